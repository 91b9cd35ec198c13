"""Few shapes of a batch, known before the first one comes: compiled code is made for each."""

import math
from typing import NamedTuple, Self

from torch import Tensor

from nanovlm.data.tensors import PreparedSamples

DEVIATIONS = 4
"""How far from its mean the number of tokens or labels of a random batch may lie in the usual
shape: one batch in 30,000 lies beyond, if many samples make it nearly normal."""
MULTIPLE = 16
"""To which lengths are rounded up, since matrix units of GPUs like it."""


class FixedCount(NamedTuple):
    """What each sample has some of, and how many of them a batch gets room for."""

    mean: float
    """Of a sample."""
    deviation: float
    most: int

    @classmethod
    def of(cls, counts: Tensor) -> Self:
        """Return it for samples that have so many, int64[N]."""
        deviation = counts.double().std(correction=0).item()
        return cls(counts.double().mean().item(), deviation, int(counts.max()))

    def room(self, num_samples: int, num_real: int) -> int:
        """Return the room of a batch.

        Args:
            num_real: what its samples have together; less than the result.
        """
        spread = DEVIATIONS * self.deviation * math.sqrt(num_samples)
        most = num_samples * self.most
        usual = min(math.ceil(num_samples * self.mean + spread), most)
        return _round_up((usual if num_real <= usual else most) + 1)


class FixedShapes(NamedTuple):
    """The shapes of batches of one set of samples: nearly always one for each number of samples.

    They depend on the data alone, so what is compiled in one trial serves those with other seeds.
    """

    text: FixedCount
    """Tokens of the text; the EOS is not read."""
    labels: FixedCount

    @classmethod
    def of(cls, samples: PreparedSamples) -> Self:
        """Return the shapes for batches of `samples`."""
        lengths = samples.offsets.diff()
        return cls(FixedCount.of(lengths - 1), FixedCount.of(lengths - samples.prompt_lengths))

    def line(self, num_image_tokens: int) -> int:
        """Return how many places a line of the padded view gets."""
        return _round_up(num_image_tokens + self.text.most)


def _round_up(length: int) -> int:
    return -(-length // MULTIPLE) * MULTIPLE
