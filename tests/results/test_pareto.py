"""Fronts, hypervolumes and the knee, against the definitions written out."""

import itertools

import numpy as np
import pytest

from nanovlm.results.pareto import (
    Box,
    Floats,
    best_first,
    contributions,
    front_ranks,
    hypervolume,
    knee,
)


def draw(seed: int, most: int = 9) -> Floats:
    """Return some rows of 1 to 3 losses, many of them equal in some or all."""
    random = np.random.default_rng(seed)
    size = int(random.integers(1, most)), 1 + seed % 3
    return random.integers(0, 4 if seed % 2 else 40, size=size).astype(float)


def dominates(one: Floats, other: Floats) -> bool:
    return bool((one <= other).all() and (one < other).any())


def ranks_by_definition(losses: Floats) -> list[int]:
    ranks, left = dict[int, int](), set(range(len(losses)))
    for rank in itertools.count():
        front = {i for i in left if not any(dominates(losses[j], losses[i]) for j in left)}
        ranks |= dict.fromkeys(front, rank)
        left -= front
        if not left:
            return [ranks[i] for i in range(len(losses))]
    raise AssertionError


def volume_by_inclusion_and_exclusion(losses: Floats, reference: Floats) -> float:
    inside = [row for row in losses if (row < reference).all()]
    return sum(
        (-1) ** (size + 1) * float(np.prod(reference - np.max(some, axis=0)))
        for size in range(1, len(inside) + 1)
        for some in itertools.combinations(inside, size)
    )


@pytest.mark.parametrize("seed", range(60))
def test_fronts(seed: int) -> None:
    losses = draw(seed, most=30)
    assert front_ranks(losses).tolist() == ranks_by_definition(losses)


@pytest.mark.parametrize("seed", range(60))
def test_hypervolume(seed: int) -> None:
    losses = draw(seed)
    reference = np.full(losses.shape[1], 3.5 if seed % 2 else 30)
    expected = volume_by_inclusion_and_exclusion(losses, reference)
    assert hypervolume(losses, reference) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("seed", range(60))
def test_contributions(seed: int) -> None:
    losses = draw(seed)
    front = losses[front_ranks(losses) == 0]
    reference = np.full(front.shape[1], 50.0)
    whole = volume_by_inclusion_and_exclusion(front, reference)
    for index, share in enumerate(contributions(front, reference)):
        same = (front == front[index]).all(axis=1)
        rest = volume_by_inclusion_and_exclusion(front[~same], reference)
        expected = 0.0 if same[:index].any() else whole - rest
        assert share == pytest.approx(expected, abs=1e-6)


def test_fronts_of_many() -> None:
    """The bisection finds what the definition says where there are many fronts, too."""
    for columns in (2, 3):
        losses = np.random.default_rng(columns).integers(0, 25, size=(150, columns)).astype(float)
        assert front_ranks(losses).tolist() == ranks_by_definition(losses)


@pytest.mark.parametrize("seed", range(20))
def test_of_one_objective_the_order_is_that_of_its_values(seed: int) -> None:
    """Of equal ones the earlier comes first."""
    losses = draw(3 * seed, most=20)
    assert losses.shape[1] == 1
    assert best_first(losses) == np.argsort(losses[:, 0], kind="stable").tolist()


def test_the_order_of_several() -> None:
    front = [[0.0, 10.0], [4.0, 4.0], [10.0, 0.0], [4.1, 3.9]]  # the last one adds next to nothing
    behind = [[5.0, 5.0], [11.0, 11.0]]
    order = best_first(np.array([*behind, *front]))
    assert order[-2:] == [0, 1], "a front comes before what it dominates"
    assert order[3] == 5, "within one what adds least to the hypervolume comes last"
    assert set(order[:3]) == {2, 3, 4}


def test_equal_rows_do_not_take_each_other_away() -> None:
    losses = np.array([[1.0, 5.0], [3.0, 3.0], [3.0, 3.0], [5.0, 1.0], [5.9, 0.9]])
    order = best_first(losses)
    assert order.index(1) < order.index(2) and order[-1] == 2 and order[0] == 1


def test_the_knee_is_furthest_below_the_line_through_the_ends() -> None:
    front = np.array([[0.0, 100.0], [1.0, 25.0], [2.0, 20.0], [6.0, 8.0], [10.0, 0.0]])
    ends = front[[0, -1]] / [10.0, 100.0]
    along = (ends[1] - ends[0]) / np.linalg.norm(ends[1] - ends[0])
    away = front / [10.0, 100.0] - ends[0]
    distances = -(along[0] * away[:, 1] - along[1] * away[:, 0])
    assert knee(front) == int(distances.argmax()) == 1


def test_what_hardly_differs_does_not_choose() -> None:
    """Stretched to the same size both objectives have a say, at their least extent only one."""
    front = np.array([[0.0, 0.010], [0.4, 0.001], [1.0, 0.000]])
    assert knee(front) == 1
    assert knee(front, [0.0, 0.2]) == 0


def test_a_box_has_no_empty_side() -> None:
    one = np.array([[1.0, 2.0]])
    assert Box.around(one).scaled(one).tolist() == [[0.0, 0.0]]
    box = Box.around(np.array([[1.0, 2.0], [1.0, 6.0]]))
    assert box.extent.tolist() == [1.0, 4.0] and 0 < box.share(one) <= 1
