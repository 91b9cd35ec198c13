"""Weights of sub-sets: how often an epoch has each sample, and in which order."""

from collections import Counter
from collections.abc import Callable
from itertools import chain

import numpy as np
import pytest
from tokenizers import Tokenizer

from nanovlm.config.schema import TrainConfig
from nanovlm.data.prepared import prepare_training
from nanovlm.data.samples import Mixture, samples_in_order
from nanovlm.errors import UserError
from nanovlm.training.loop import num_steps
from tests.data.conftest import change

MIXTURE = Mixture((np.array([0, 3, 4]), np.array([1, 2, 5, 6])), (2.0, 0.5))
COLOURS = ("red", "green", "blue")


def epochs_of(mixture: Mixture | None, number: int, seed: int = 0) -> list[list[int]]:
    size = 7 if mixture is None else mixture.epoch_size
    ends = range(0, number * size, size)
    return [samples_in_order(7, seed, end, end + size, mixture).tolist() for end in ends]


def test_an_epoch_has_each_sample_as_often_as_its_weight() -> None:
    """Of what is left of a whole number another part in each epoch, and in the long run all."""
    assert MIXTURE.epoch_size == 2 * 3 + 2
    epochs = epochs_of(MIXTURE, 200)
    halves = Counter[int]()
    for epoch in epochs:
        counts = Counter(epoch)
        assert all(counts[sample] == 2 for sample in (0, 3, 4))
        half = [sample for sample in (1, 2, 5, 6) if counts[sample]]
        assert len(half) == 2 == sum(counts[sample] for sample in half)
        halves.update(half)
    assert all(70 < halves[sample] < 130 for sample in (1, 2, 5, 6))
    assert len({tuple(epoch) for epoch in epochs}) > 190


def test_the_order_depends_on_nothing_else() -> None:
    whole = [*chain(*epochs_of(MIXTURE, 3))]
    for size in (1, 5, 24):
        parts = [
            samples_in_order(7, 0, start, min(start + size, 24), MIXTURE)
            for start in range(0, 24, size)
        ]
        assert np.concatenate(parts).tolist() == whole
    assert [*chain(*epochs_of(MIXTURE, 3, seed=1))] != whole


def test_weights_of_1_change_nothing() -> None:
    same = Mixture(MIXTURE.members, (1.0, 1.0))
    assert epochs_of(same, 3) == epochs_of(None, 3)


@pytest.fixture
def config(folder_of: Callable[..., TrainConfig]) -> TrainConfig:
    """Return three sub-sets of four rows each, told apart by their images' colours."""
    subsets = {name: [(name, [("this?", str(n))]) for n in range(4)] for name in COLOURS}
    return change(folder_of(**subsets), val_ratio=0.25, batch_size=2, epochs=3)


def test_each_sample_is_known_by_its_sub_set(config: TrainConfig, tokenizer: Tokenizer) -> None:
    """Among the shuffled rows, without those of the validation, and with a cut-off."""
    for cutoff in (None, 10):
        weighted = change(config, train_dataset_weights=(1.0, 3.0, 0.25), data_cutoff_idx=cutoff)
        samples, val = prepare_training(weighted, tokenizer)
        assert val.mixture is None and samples.mixture is not None
        assert sum(map(len, samples.mixture.members)) == len(samples)
        for channel, members in enumerate(samples.mixture.members):
            pixels = samples.images[samples.slots.index[members], :, 0, 0]
            assert (pixels.argmax(dim=1) == channel).all()
            assert len(members) > 0
        sizes = list(map(len, samples.mixture.members))
        expected = sizes[0] + 3 * sizes[1] + round(0.25 * sizes[2])
        assert samples.epoch_size == expected
        assert num_steps(weighted, samples.epoch_size) == 3 * expected // 2
        unweighted, _ = prepare_training(change(config, data_cutoff_idx=cutoff), tokenizer)
        assert unweighted.mixture is None
        assert unweighted.tokens.tolist() == samples.tokens.tolist()


def test_a_weight_for_each_name(config: TrainConfig) -> None:
    with pytest.raises(ValueError, match=r"a weight for each of the 3 names .* got 2"):
        change(config, train_dataset_weights=(1.0, 2.0))


def test_too_little_is_left_for_a_batch(config: TrainConfig, tokenizer: Tokenizer) -> None:
    few = change(config, train_dataset_weights=(0.2, 0.2, 0.2), batch_size=5)
    with pytest.raises(UserError, match="batch_size must be at most the number of training"):
        prepare_training(few, tokenizer)
