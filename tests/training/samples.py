"""Random samples of different lengths for the training loop."""

import torch
from torch.nn import functional as F

from nanovlm.data.samples import ImageSlots, PreparedSamples

NUM_SAMPLES = 12


def random_samples() -> PreparedSamples:
    """Twelve samples of 4 to 15 tokens, two to an image, with answers of 1 to 3 tokens."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.arange(4, 4 + NUM_SAMPLES)
    return PreparedSamples(
        images=torch.randint(256, (6, 3, 8, 8), generator=generator, dtype=torch.uint8),
        slots=ImageSlots.one_each(torch.arange(NUM_SAMPLES) // 2),
        tokens=torch.randint(32, (int(lengths.sum()),), generator=generator),
        offsets=F.pad(lengths.cumsum(0), (1, 0)),
        prompt_lengths=lengths - 2 - torch.arange(NUM_SAMPLES) % 3,
    )
