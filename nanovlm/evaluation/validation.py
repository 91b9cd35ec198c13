"""The loss on samples that no step trains on: the steadiest signal of a trial."""

import numpy as np
import torch

from nanovlm.data.samples import PreparedSamples
from nanovlm.models.vision_language_model import VisionLanguageModel
from nanovlm.parallel import all_reduce_sum_, rank, world_size
from nanovlm.training.forward import answer_loss_sum, evaluating
from nanovlm.training.loader import Loader
from nanovlm.training.passes import evaluation_batches


def validation_loss(
    model: VisionLanguageModel,
    samples: PreparedSamples,
    device: torch.device,
    batch_size: int = 64,
) -> float:
    """Return the mean cross-entropy of an answer token over all samples of all workers.

    Args:
        batch_size: of samples that are alike; those of tiled images go by their costs.
    """
    config = model.config
    if config.traits.is_tiled:
        lengths, num_images = samples.text_lengths, samples.slots.counts
        batches = evaluation_batches(lengths, num_images, config, device)
    else:
        starts = range(batch_size, len(samples), batch_size)
        batches = np.split(np.arange(len(samples)), starts)
    loader = Loader(samples, config, device)
    total = torch.zeros((), device=device)
    with evaluating(model):
        for indices in batches[rank() :: world_size()]:
            total += answer_loss_sum(model, loader.take(indices))
    all_reduce_sum_([total])
    return total.item() / int(samples.num_answer_tokens.sum())
