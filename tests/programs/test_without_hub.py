"""Without network and with an empty cache: one message at once, and nothing left behind."""

from pathlib import Path

import pytest
from huggingface_hub import constants

from nanovlm import downloads
from tests.programs.conftest import REPOSITORY, finish, start_program
from tests.programs.test_bad_input import code_and_message

SPACE = str(REPOSITORY / "search_spaces" / "lr.yaml")
REFUSES_AT_ONCE = "http://127.0.0.1:9"

NO_BACKBONES = "vlm.vlm_load_backbone_weights=false"
MISSING = {
    "backbones": ((), "vlm.vit_model_type='google/siglip-base-patch16-224': there is no folder"),
    "tokenizer": (
        (NO_BACKBONES,),
        "vlm.lm_tokenizer='HuggingFaceTB/cosmo2-tokenizer': there is no folder",
    ),
    "data": (
        (NO_BACKBONES, "vlm.lm_tokenizer=builtin:digits", "train_dataset_name=[tqa, vsr]"),
        "train_dataset_path='HuggingFaceM4/the_cauldron': there is no folder",
    ),
}
"""What is looked for first that is not there: with which settings, and what is said."""


def assert_says_what_works(said: str, message: str) -> None:
    assert said.startswith(f"error: {message}")
    for part in ("Connection refused", "HF_HOME", "HF_HUB_OFFLINE=1", "search_spaces/digits.yaml"):
        assert part in said


@pytest.fixture
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process ask a hub that refuses, with an empty cache."""
    monkeypatch.setattr(constants, "ENDPOINT", REFUSES_AT_ONCE)
    template = REFUSES_AT_ONCE + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    downloads.forget_downloads()


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("run_search.py", ["--space", SPACE]),
        ("run_search.py", ["--space", SPACE, "--dry-run"]),
        ("run_single.py", ["--preset", "nanovlm-222m"]),
    ],
    ids=["search", "dry run", "single"],
)
@pytest.mark.parametrize("missing", MISSING)
def test_one_message_says_what_is_missing_and_what_works(
    program: str,
    arguments: list[str],
    missing: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings, message = MISSING[missing]
    code, said = code_and_message(program, [*arguments, *settings], tmp_path, monkeypatch, capsys)
    assert code == 2
    assert_says_what_works(said, message)
    assert not (tmp_path / "results").exists()


@pytest.mark.slow
def test_nothing_is_said_before_and_nothing_is_tried_again(tmp_path: Path) -> None:
    settings, message = MISSING["data"]
    process = start_program(
        *("run_search.py", "--space", SPACE, *settings),
        cwd=tmp_path,
        HF_HOME=str(tmp_path / "cache"),
        HF_ENDPOINT=REFUSES_AT_ONCE,
        HF_HUB_OFFLINE="0",
    )
    finished = finish(process, tmp_path / "results")
    assert finished.code == 2, finished.output
    # One line: a request that is repeated, for 23 s, would say so before. No time is held here,
    # since the first import of torch and Ray takes longer than all else on a cold disk.
    [said] = finished.output.splitlines()
    assert_says_what_works(said, message)
