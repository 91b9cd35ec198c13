"""Whatever a results folder is called, it works, and its name is shown as it is."""

import re
import shlex
from pathlib import Path

import pytest

from nanovlm import cli
from nanovlm.config.yaml_text import read_mapping
from nanovlm.errors import UserError
from nanovlm.files import identifier
from nanovlm.results.folder import choose_folder
from nanovlm.results.load import load_results
from nanovlm.results.read import BEST_CONFIG_FILE, read_records
from nanovlm.watch.report.page import write_report
from tests.results.fake_records import make_results

ODD = ("größe", "🙂 two words", 'it\'s "that"', "new\nline", "-x", "a#b?c%20d", "[b]", "x" * 255)


@pytest.mark.parametrize("name", ["digits", "lr-2", "A_b.c", "x" * 64])
def test_a_plain_name_is_its_own_identifier(name: str) -> None:
    assert identifier(name) == name


@pytest.mark.parametrize("name", [*ODD, "\udcff", "größe ", "x" * 65])
def test_an_odd_name_gets_one_that_every_system_takes(name: str) -> None:
    made = identifier(name)
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", made)
    others = [*ODD, "grosse", "gr-e", "x" * 254]
    assert made not in [identifier(other) for other in others if other != name]
    assert identifier(made) == made


@pytest.mark.parametrize("name", ODD)
def test_a_results_folder_may_be_called_what_the_file_system_takes(
    name: str, tmp_path: Path
) -> None:
    folder = choose_folder(tmp_path, name, "default")
    make_results(folder, num_trials=6)
    best = read_mapping(folder / BEST_CONFIG_FILE)["lr_mp"]
    assert best in [record.config["lr_mp"] for record in read_records(folder)]
    assert (load_results(folder).summary or {})["name"] == name
    write_report(folder)


@pytest.mark.parametrize("name", ODD)
def test_the_command_that_goes_on_finds_the_folder(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import run_single

    for words in ([f"--name={name}"], []):
        shown = shlex.join(cli.resume_words(words, Path("results") / name))
        monkeypatch.setattr("sys.argv", ["run_single.py", *shlex.split(shown)])
        arguments = run_single.parse_arguments()
        assert (arguments.name, arguments.resume) == (name, True)


def test_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--name: must be UTF-8, got b'.*a\\xff'"):
        choose_folder(tmp_path, "a\udcff", "default")
