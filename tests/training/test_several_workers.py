"""A trial shared by two or three worker processes (gloo) gives the numbers of one worker.

The processes start once; everything that they can show is computed in that one go.
"""

from typing import Any

import pytest
import torch

from nanovlm.parallel import all_reduce_sum_, broadcast_object, gather_objects, rank, world_size
from nanovlm.training.gradient_sum import GradientSum
from tests.training.worker_processes import run_processes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]  # three processes

Numbers = dict[int, list[dict[str, Any]]]
"""What the workers of a group computed, by its size."""

CURVES = ["whole", "micro_batches", "vision_encoder_frozen", "backbones_frozen"]


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Numbers:
    folder = tmp_path_factory.mktemp("several_workers")
    numbers = run_processes(folder)
    saved = {path.name for path in folder.glob("saved_by_*")}
    assert saved == {"saved_by_0_of_1", "saved_by_0_of_2"}
    return numbers


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("size", [2, 3])
def test_several_workers_give_the_loss_curve_of_one(numbers: Numbers, size: int, name: str) -> None:
    (alone,) = numbers[1]
    first, *others = (n[name] for n in numbers[size])
    assert others == [first] * (size - 1)
    assert first == pytest.approx(alone[name], abs=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_trials_before_leave_nothing_behind(numbers: Numbers, size: int) -> None:
    for worker in numbers[size]:
        assert worker["whole_again"] == worker["whole"]


def test_a_trial_of_two_workers_gives_the_numbers_of_one(numbers: Numbers) -> None:
    first, second, alone = (n["trial"] for n in numbers[2] + numbers[1])
    assert first == second
    assert len(first) == len(alone) == 2
    for shared_report, report in zip(first, alone, strict=True):
        assert shared_report == pytest.approx(report, abs=1e-4)


def test_a_trial_of_two_workers_goes_on_from_its_state(numbers: Numbers) -> None:
    for shared in numbers[2]:
        assert len(shared["resumed"]) == 2
        assert shared["resumed"] == shared["undisturbed"], "each rank has its own dropout"


def test_the_speed_is_that_of_all_workers(numbers: Numbers) -> None:
    first, second, alone = (n["speed"] for n in numbers[2] + numbers[1])
    assert first == second
    assert first.samples_per_second == alone.samples_per_second == 7 / 4  # of the global batch
    assert first.answer_tokens_per_second == alone.answer_tokens_per_second == 14 / 4
    assert first.model_tflops_per_second == alone.model_tflops_per_second
    assert first.model_flops_utilization == first.model_tflops_per_second / 2
    assert (first.data_wait_fraction, alone.data_wait_fraction) == (0.5, 0.25)  # of the slower one


def test_all_workers_end_together(numbers: Numbers) -> None:
    workers = numbers[1] + numbers[2]
    assert [n["interrupted"] for n in workers] == ["interrupted at step 3"] * 3
    assert all("/no/such/folder" in n["set_up"] for n in workers)
    assert [n["not_finite"] for n in workers] == ["loss is nan at step 2"] * 3


@pytest.mark.parametrize(
    ("name", "size", "limit"),
    [
        ("one in its last pass", 2, 2),
        ("one in its first pass", 2, 2),
        ("all", 2, 2),
        ("another one again", 1, 1),
    ],
)
def test_without_memory_all_workers_repeat_the_step_or_none(
    numbers: Numbers, name: str, size: int, limit: int
) -> None:
    """To the bit as if they had been configured with the smaller size, with dropout."""
    scarce = [n["scarce_memory"][name] for n in numbers[3]]
    for found, worker in zip(scarce, numbers[3], strict=True):
        expected = worker["scarce_memory"][f"enough, size {size}"]
        assert found["losses"] == expected["losses"] == scarce[0]["losses"]
        assert found["weights"] == expected["weights"] == scarce[0]["weights"]
        assert found["limit"] == limit
        assert found["sent"] == scarce[0]["sent"], "the same messages in the same order"
        num_attempts = 3 + {2: 1, 1: 2}[limit]
        assert len(found["sent"]) * 3 == len(expected["sent"]) * num_attempts


def test_memory_runs_out_amid_the_messages(numbers: Numbers) -> None:
    """Or the test above would show little."""
    cases = [n["scarce_memory"] for n in numbers[3]]
    num_messages = len(cases[0]["enough, size 2"]["sent"]) // 3
    assert num_messages > 5
    assert 2 < cases[1]["one in its last pass"]["sent_before"] < num_messages - 2
    assert [c["one in its last pass"]["sent_before"] for c in cases[::2]] == [None, None]
    assert cases[2]["one in its first pass"]["sent_before"] == 0
    assert [c["all"]["sent_before"] > 0 for c in cases] == [True, True, False]


def test_what_does_not_fit_ends_the_trial_of_all_workers(numbers: Numbers) -> None:
    for worker in numbers[3]:
        found, again = (worker["scarce_memory"][n] for n in ("no smaller", "enough, size 2, again"))
        assert found["error"] == "out of memory at step 2: see the workers' logs"
        assert again == worker["scarce_memory"]["enough, size 2"]


def test_an_interruption_goes_before_a_repeated_step(numbers: Numbers) -> None:
    for worker in numbers[3]:
        found = worker["scarce_memory"]["interrupted"]
        assert (found["error"], found["limit"]) == ("interrupted at step 1", 4)


@pytest.mark.parametrize(
    "name", ["gradient_sums", pytest.param("gradient_sums_on_gpu", marks=pytest.mark.gpu)]
)
def test_gradients_are_summed_in_place(numbers: Numbers, name: str) -> None:
    for worker in numbers[3]:
        sums = worker[name]
        torch.testing.assert_close(sums["found"], sums["expected"], atol=1e-6, rtol=1e-6)
        assert [bool(gradient.any()) for gradient in sums["found"]] == [True] * 6 + [False] * 2
        assert sums["buckets"] == 4
        assert sums["bytes"] == sums["bytes_of_parameters"], "no second copy"


def test_each_worker_needs_a_sample(numbers: Numbers) -> None:
    for shared in numbers[2]:
        assert "batch_size=1 cannot be shared by 2 workers" in shared["one_sample"]


def test_messages_between_workers(numbers: Numbers) -> None:
    for shared in numbers[2]:
        assert shared["sums"] == [3.0, [[10.0, 10.0], [10.0, 10.0]]]
        assert shared["gathered"] == [("rank", 0), ("rank", 1)]
        assert shared["broadcast"] == {"from": 0}


def test_one_worker_needs_no_process_group() -> None:
    assert (rank(), world_size()) == (0, 1)
    tensor = torch.tensor(2.0)
    all_reduce_sum_([tensor])
    assert tensor.item() == 2
    assert gather_objects("x") == ["x"]
    assert broadcast_object("x") == "x"
    weight = torch.nn.Parameter(tensor)
    gradients = GradientSum([weight])
    gradients.clear()
    assert weight.grad is None
    with gradients.sending():
        (3 * weight).backward()
        assert not weight._post_accumulate_grad_hooks
    gradients.finish()
    assert weight.grad == 3
