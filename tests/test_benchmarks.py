"""The benchmarks' other side: a model from transformers that has to compute what ours does."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import psutil
import pytest
import torch

from benchmarks import many_slots, many_trials, mmstar, train_step, trial_start
from benchmarks.agreement import NUM_STEPS, check_agreement
from benchmarks.padded import NO_LABEL, padded_batch, peer_loss
from benchmarks.peer import Peer, plain_name, renamed
from benchmarks.questions import make_benchmark, make_tokenizer
from benchmarks.reference_answers import reference_answers
from benchmarks.setups import TEXT_LENGTHS, Texts, make_texts, question_lengths
from nanovlm.config.schema import TrainConfig
from nanovlm.evaluation.mmstar import evaluate_mmstar
from nanovlm.models.vision_language_model import VisionLanguageModel
from nanovlm.training.forward import image_input
from tests.tiny import vlm_config

REPOSITORY = Path(__file__).parents[1]
CPU = torch.device("cpu")
VLM = vlm_config(lm_n_blocks=2, vit_n_blocks=2)
HEAVY = ("ray", "datasets", "pyarrow", "optuna", "rich", "pandas", "sklearn", "wandb", "plotly")


def model_and_peer() -> tuple[VisionLanguageModel, Peer]:
    model, peer = VisionLanguageModel(VLM, seed=1), Peer(VLM)
    peer.copy_weights(model)
    return model, peer


def test_loss_and_gradients_equal_transformers() -> None:
    model, peer = model_and_peer()
    texts = make_texts(VLM, num_samples=40, num_images=7).fitting(VLM.lm_max_length)
    batch = padded_batch(texts, range(len(texts)), 90, "right")
    images = image_input(batch.images, VLM)
    _, loss = model(batch.input_ids, images, batch.attention_mask, batch.targets)
    assert loss is not None
    loss.backward()
    expected = peer_loss(peer, batch)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    gradients = dict(
        renamed((n, p.grad) for n, p in model.named_parameters() if p.grad is not None)
    )
    for name, parameter in peer.named_parameters():
        assert parameter.grad is not None
        gradient = gradients.pop(plain_name(name)).view_as(parameter)
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-7, rtol=1e-4)
    assert not gradients


def test_losses_of_the_training_loop_equal_a_plain_loop() -> None:
    config = TrainConfig(batch_size=6, micro_batch_size=4, compile=False, vlm=VLM)
    texts = make_texts(VLM, num_samples=40, num_images=7).fitting(VLM.lm_max_length)
    losses = check_agreement(config, texts, CPU)
    assert len(set(losses.ours)) == NUM_STEPS
    assert max(losses.differences()) < 1e-5


def test_texts_are_padded_as_by_v01() -> None:
    """On the left; what is too long is cut to its end, and nothing of it is learnt."""
    tokens = [torch.tensor([5, 6, 7, 0]), torch.tensor([1, 2, 3, 4, 8, 9, 0])]
    images = torch.arange(2, dtype=torch.uint8)[:, None, None, None].expand(2, 3, 4, 4)
    batch = padded_batch(Texts(tokens, [2, 3], images), [0, 1], 6, "left")
    x = NO_LABEL
    assert batch.input_ids.tolist() == [[0, 0, 5, 6, 7, 0], [2, 3, 4, 8, 9, 0]]
    assert batch.attention_mask.tolist() == [[0, 0, 1, 1, 1, 1], [1] * 6]
    assert batch.targets.tolist() == [[x, x, x, 7, 0, x], [x] * 6]
    assert batch.images[:, 0, 0, 0].tolist() == [0, 1]
    assert batch.num_useful == 1


def test_answers_equal_those_of_five_passes_over_padded_questions() -> None:
    model, peer = model_and_peer()
    tokenizer, benchmark = make_tokenizer(VLM), make_benchmark(VLM, 40)
    result = evaluate_mmstar(model, benchmark, tokenizer, 8, CPU)
    expected = reference_answers(peer, benchmark, tokenizer, CPU)
    assert result.outputs == tuple(answer.output for answer in expected)
    assert result.letters == tuple(answer.letter for answer in expected)
    nlls = [answer.letter_nll for answer in expected]
    assert result.letter_nlls == pytest.approx(nlls, abs=1e-5)
    assert len(set(result.outputs)) > 10  # they do differ


def test_lengths_are_those_that_are_stated() -> None:
    lengths = [prompt + answer for prompt, answer in TEXT_LENGTHS]
    assert sum(length > 79 for length in lengths) / len(lengths) == 0.4
    questions = question_lengths(1500)
    assert round(sum(questions) / 1500) == 58 and max(questions) == 439


@pytest.mark.parametrize("program", [train_step, mmstar, trial_start])
def test_help(
    program: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", "--help"])
    with pytest.raises(SystemExit, match="0"):
        program.main()
    assert "--config" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(REPOSITORY.glob("benchmarks/*.py")), ids=lambda p: p.stem)
def test_a_program_finds_what_it_shares_with_others(path: Path) -> None:
    """Python looks beside a program that is named by its path, not in the folder above."""
    code = path.read_text(encoding="utf-8")
    if "__name__ ==" in code and "\nfrom benchmarks." in code:
        assert "sys.path.insert" in code.partition("\nfrom benchmarks.")[0]


@pytest.mark.slow
def test_a_machine_with_torch_and_transformers_is_enough() -> None:
    code = f"import sys; sys.modules |= dict.fromkeys({HEAVY!r}); import benchmarks.train_step"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


def test_many_trials_are_all_recorded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["many_trials.py", "--trials", "12", "--slots", "3"])
    many_trials.main()
    output = capsys.readouterr().out
    assert output.startswith("12 trials, ")
    assert "suggest" in output and "RSS after 12 trials" in output


@pytest.mark.ray
@pytest.mark.timeout(120)
@pytest.mark.usefixtures("ray_cluster")
def test_groups_that_train_nothing_make_a_whole_search(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--trials", "30", "--slots", "16", "--every", "10", "--load", "60"]
    monkeypatch.setattr(sys, "argv", ["many_slots.py", *options])
    many_slots.main()  # which asserts that each trial is recorded once
    output = capsys.readouterr().out
    assert "all of them:" in output and "broker" in output and "trials.jsonl" in output
    assert "  pages      1 processes" in output, "which writes the page of so many slots"
    commands = [" ".join(process.cmdline()) for process in psutil.Process().children()]
    assert not [command for command in commands if "page_process" in command], "it has ended"
