"""The loss on samples that no step trains on: the steadiest signal of a trial."""

import torch

from nanovlm.data.batches import collate, count_answer_tokens, image_buffer
from nanovlm.data.prepared import PreparedSamples
from nanovlm.models.vision_language_model import VisionLanguageModel
from nanovlm.parallel import all_reduce_sum_, rank, world_size
from nanovlm.training.forward import answer_loss_sum, evaluating


def validation_loss(
    model: VisionLanguageModel, samples: PreparedSamples, batch_size: int, device: torch.device
) -> float:
    """Return the mean cross-entropy of an answer token over all samples of all workers."""
    by_length = samples.offsets.diff().argsort(stable=True).numpy()  # little padding in a batch
    starts = range(rank() * batch_size, len(samples), world_size() * batch_size)
    images = image_buffer(samples, min(batch_size, len(samples)))
    total = torch.zeros((), device=device)
    with evaluating(model):
        for start in starts:
            batch = collate(samples, by_length[start : start + batch_size], buffer=images)
            total += answer_loss_sum(model, batch, device)
    all_reduce_sum_([total])
    return total.item() / count_answer_tokens(samples, by_length)
