"""Mistakes of the user: one clear message, exit code 2, and nothing left behind."""

from pathlib import Path

import pytest
import ray

import run_search
import run_single
from nanovlm import cli
from nanovlm.cluster.ray_cluster import Cluster, connect
from nanovlm.errors import UserError
from tests.programs.conftest import run_program

SPACE = """
preset: digits
base: {data_cutoff_idx: 300, epochs: 1}
search:
  lr_mp: {log_uniform: [1.0e-4, 1.0e-1]}
  batch_size: {choice: [16, 32]}
scheduler: {rungs: 3, reduction_factor: 3}
budget: {trials: 6}
"""

LONG = 300 * "x"
TOO_LONG = "--name: must not exceed 255 bytes, got 300: "

CHECKPOINT = ["resume_from_vlm_checkpoint=true", "vlm.vlm_checkpoint_path=./nowhere"]
OTHER_ENCODER = ["vlm.vlm_load_backbone_weights=true", "vlm.vit_model_type=./nowhere"]


def code_and_message(
    program: str,
    arguments: list[str],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> tuple[int, str]:
    """Run a program's main in `folder`; return its exit code and what it said on stderr."""
    main = {"run_search.py": run_search.main, "run_single.py": run_single.main}[program]
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", [program, *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.run_program(main)
    assert isinstance(ended.value.code, int)
    return ended.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--space", "nowhere.yaml"], "nowhere.yaml: there is no such file"),
        (["--space", "list.yaml"], "list.yaml: must be a mapping"),
        (["--space", "broken.yaml"], "broken.yaml: is not YAML"),
        ([], "the following arguments are required: --space"),
        (["--space", "space.yaml", "--trails", "3"], "unrecognized arguments: --trails"),
        (["--space", "space.yaml", "--trials", "0"], "must be a whole number of at least 1"),
        (["--space", "space.yaml", "--hours", "-1"], "must be a number above 0"),
        (["--space", "space.yaml", "lr_pm=1"], "unknown key 'lr_pm'. Did you mean 'lr_mp'?"),
        (["--space", "space.yaml", "epochs=two"], "epochs: must be a valid integer, got 'two'"),
        (["--space", "space.yaml", "preset=nano"], "preset: there is no 'nano'."),
        (["--space", "space.yaml", "--name", "taken"], "results/taken holds results already"),
        (
            ["--space", "space.yaml", "--name", LONG],
            TOO_LONG,
        ),
        (
            ["--space", "space.yaml", "--name", LONG, "--resume"],
            TOO_LONG,
        ),
        (["--space", "space.yaml", "--results", LONG], "File name too long"),
        (["--space", "space.yaml", "--name", "a/b"], "--name: must be the plain name of a folder"),
        (["--space", "space.yaml", "--resume", "--name", "taken"], "holds no search to go on with"),
        (["--space", "space.yaml", "search.batch_size={choice: [16, 9000]}"], "batch_size"),
        (["--space", "space.yaml", "scheduler.rungs=9"], "scheduler.rungs: the first milestone"),
        (["--space", "space.yaml", "objective.metric=mmstar"], "no report has 'mmstar' as a score"),
        (
            ["--space", "space.yaml", "objective={metric: mmstar_letter_nll, mode: max}"],
            "objective.mode: must be 'min' for mmstar_letter_nll, got 'max'",
        ),
        (
            ["--space", "space.yaml", "objective={metric: val_loss, mode: max}"],
            "objective.mode: must be 'min'",
        ),
        (["--space", "space.yaml", "--results", "space.yaml"], "space.yaml/space cannot be made"),
        (["--space", "space.yaml", *CHECKPOINT], "checkpoint_path='./nowhere': there is no folder"),
        (["--space", "space.yaml", *OTHER_ENCODER], "vit_model_type='./nowhere': there is no"),
        (["--space", "space.yaml", "train_dataset_path=./nowhere"], "there is no folder ./nowhere"),
        (["--space", "space.yaml", "test_dataset_path=builtin:letters"], "builtin:letters"),
        (["--space", "space.yaml", "resources.workers=17"], "resources.workers: must not exceed"),
    ],
)
def test_mistakes_in_a_search(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "space.yaml").write_text(SPACE)
    (tmp_path / "list.yaml").write_text("- lr_mp")
    (tmp_path / "broken.yaml").write_text("search: [")
    (tmp_path / "results" / "taken").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    code, said = code_and_message("run_search.py", arguments, tmp_path, monkeypatch, capsys)
    assert code == 2
    assert message in said
    assert "Traceback" not in said
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "nowhere.yaml"], "nowhere.yaml: there is no such file"),
        (["--preset", "digit"], "preset: there is no 'digit'. Did you mean 'digits'?"),
        (["--preset", "digits", "--name", LONG], TOO_LONG),
        (
            ["--preset", "digits", "--name", LONG, "--resume"],
            TOO_LONG,
        ),
        (["--preset", "digits", "vlm.lm_n_heads=5"], "must divide lm_hidden_dim"),
        (["--preset", "digits", *OTHER_ENCODER], "vlm.vit_model_type='./nowhere': there is no"),
        (["--preset", "digits", "--workers", "0"], "must be a whole number of at least 1"),
        (["--preset", "digits", "batch_size=100000"], "batch_size"),
        (["--preset", "digits", "batch_size=2", "--workers", "3"], "--workers: must not exceed"),
    ],
)
def test_mistakes_in_a_single_run(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, said = code_and_message("run_single.py", arguments, tmp_path, monkeypatch, capsys)
    assert code == 2
    assert message in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ray
def test_more_gpus_than_there_are(
    ray_cluster: Cluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "space.yaml").write_text(SPACE)
    arguments = ["--space", "space.yaml", "resources.gpus_per_worker=64"]
    code, said = code_and_message("run_search.py", arguments, tmp_path, monkeypatch, capsys)
    assert code == 2
    assert "one trial needs 1 CPUs and 64 GPUs" in said
    assert "the cluster has" in said
    assert not (tmp_path / "results").exists()


@pytest.mark.ray
def test_another_cluster_than_that_of_this_process(ray_cluster: Cluster) -> None:
    with (
        pytest.raises(UserError, match=r"cannot join '127\.0\.0\.1:9' too"),
        connect("127.0.0.1:9"),
    ):
        pass
    with connect(None) as joined:
        assert (joined.dashboard_url, joined.is_own) == (ray_cluster.dashboard_url, False)
    assert ray.is_initialized()


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_an_address_without_a_cluster(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(SPACE)
    arguments = ("--space", "space.yaml", "--address", "127.0.0.1:9")
    finished = run_program("run_search.py", *arguments, cwd=tmp_path, name="demo")
    assert finished.code == 2, finished.output
    assert "--address: no Ray cluster answers at '127.0.0.1:9'" in finished.output
    assert not (tmp_path / "results").exists()
