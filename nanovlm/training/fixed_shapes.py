"""Few shapes of a batch, known before the first one comes: compiled code is made for each."""

import math
from typing import NamedTuple, Self

from nanovlm.data.tensors import PreparedSamples

DEVIATIONS = 4
"""How far from its mean the number of tokens of a random batch may lie in the usual shape: one
batch in 30,000 lies beyond, if many samples make it nearly normal."""
MULTIPLE = 16
"""To which lengths are rounded up, since matrix units of GPUs like it."""


class FixedShapes(NamedTuple):
    """The shapes of batches of one set of samples: two at most for each number of samples.

    They depend on the data alone, so what is compiled in one trial serves those with other seeds.
    """

    mean: float
    """Text tokens of a sample."""
    deviation: float
    longest: int

    @classmethod
    def of(cls, samples: PreparedSamples) -> Self:
        """Return the shapes for batches of `samples`."""
        lengths = (samples.offsets.diff() - 1).double()  # the EOS is not read
        return cls(lengths.mean().item(), lengths.std(correction=0).item(), int(lengths.max()))

    def num_text(self, num_samples: int, num_real: int) -> int:
        """Return how many text tokens a row gets.

        Args:
            num_real: of its samples; less than the result.
        """
        spread = DEVIATIONS * self.deviation * math.sqrt(num_samples)
        most = num_samples * self.longest
        usual = min(math.ceil(num_samples * self.mean + spread), most)
        return _round_up((usual if num_real <= usual else most) + 1)

    def line(self, num_image_tokens: int) -> int:
        """Return how many places a line of the padded view gets."""
        return _round_up(num_image_tokens + self.longest)


def _round_up(length: int) -> int:
    return -(-length // MULTIPLE) * MULTIPLE
