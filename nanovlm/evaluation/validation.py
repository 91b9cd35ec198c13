"""The loss on samples that no step trains on: the steadiest signal of a trial."""

import numpy as np
import torch

from nanovlm.data.samples import PreparedSamples
from nanovlm.models.vision_language_model import VisionLanguageModel
from nanovlm.parallel import all_reduce_sum_, rank, world_size
from nanovlm.training.forward import answer_loss_sum, evaluating
from nanovlm.training.loader import Loader


def validation_loss(
    model: VisionLanguageModel,
    samples: PreparedSamples,
    device: torch.device,
    batch_size: int = 64,
) -> float:
    """Return the mean cross-entropy of an answer token over all samples of all workers."""
    indices = np.arange(len(samples))
    loader = Loader(samples, model.config, device)
    total = torch.zeros((), device=device)
    with evaluating(model):
        for start in range(rank() * batch_size, len(samples), world_size() * batch_size):
            inputs = loader.take(indices[start : start + batch_size])
            total += answer_loss_sum(model, inputs)
    all_reduce_sum_([total])
    return total.item() / int(samples.num_answer_tokens.sum())
