"""Without network and with an empty cache: one message at once, and nothing left behind."""

from pathlib import Path

import pytest

from tests.programs.conftest import REPOSITORY, finish, start_program

SPACE = str(REPOSITORY / "search_spaces" / "lr.yaml")


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ("run_search.py", "--space", SPACE),
        ("run_search.py", "--space", SPACE, "--dry-run"),
        ("run_single.py", "--preset", "nanovlm-222m"),
    ],
    ids=lambda command: " ".join(command[:1] + command[3:]),
)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((), "vlm.vit_model_type='google/siglip-base-patch16-224': there is no folder"),
        (
            ("vlm.vlm_load_backbone_weights=false",),
            "vlm.lm_tokenizer='HuggingFaceTB/cosmo2-tokenizer': there is no folder",
        ),
        (
            (
                "vlm.vlm_load_backbone_weights=false",
                "vlm.lm_tokenizer=builtin:digits",
                "train_dataset_name=[tqa, vsr]",
            ),
            "train_dataset_path='HuggingFaceM4/the_cauldron': there is no folder",
        ),
    ],
    ids=["backbones", "tokenizer", "data"],
)
def test_one_message_says_what_is_missing_and_what_works(
    command: tuple[str, ...], settings: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    process = start_program(
        *command,
        *settings,
        cwd=tmp_path,
        HF_HOME=str(tmp_path / "cache"),
        HF_ENDPOINT="http://127.0.0.1:9",  # refuses at once
        HF_HUB_OFFLINE="0",
    )
    finished = finish(process, tmp_path / "results")
    assert finished.code == 2, finished.output
    # One line: a request that is repeated, for 23 s, would say so before. No time is held here,
    # since the first import of torch and Ray takes longer than all else on a cold disk.
    [said] = finished.output.splitlines()
    assert said.startswith(f"error: {message}")
    for part in ("Connection refused", "HF_HOME", "HF_HUB_OFFLINE=1", "search_spaces/digits.yaml"):
        assert part in said
    assert not (tmp_path / "results").exists()
