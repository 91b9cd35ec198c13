"""What the programs share: exit codes, arguments, how they report errors and how to resume."""

import argparse
import contextlib
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from nanovlm import process
from nanovlm.config.database_url import hide_passwords, hide_words
from nanovlm.config.sources import Layer, LayersBelow, given_values
from nanovlm.config.start_keys import known_eos_layers, needs_files
from nanovlm.errors import RunFailed, UserError
from nanovlm.files import find_full_disk, shown, user_path
from nanovlm.results.folder import has_begun
from nanovlm.results.remote import is_uri, local_copy
from nanovlm.watch.terminal.console import PLAIN

if TYPE_CHECKING:
    from nanovlm.cluster.recorder import RunOutcome
    from nanovlm.watch.observer import Observer

FOLDER_KEYS = (
    *("train_dataset_path", "test_dataset_path", "vlm.vlm_checkpoint_path"),
    *("vlm.vit_model_type", "vlm.lm_model_type", "vlm.lm_tokenizer"),
)
"""Keys of a configuration that may name folders."""

DONE = 0
FAILED = 1
WRONG_INPUT = 2
INTERRUPTED = process.EXIT_CODE


def run_program(main: Callable[[], int]) -> None:
    """Run `main` and exit with its code; a user's error is printed without a traceback.

    If the output is closed before the end, `main` goes on, and its code counts.
    """
    with process.enduring_streams():
        sys.exit(_run(main))


def show_outcome(console: Console, folder: Path, run: Callable[[], "RunOutcome"]) -> int:
    """Run a search or a single run; print its notes and how to resume it; return the exit code."""
    process.name_results(shown(folder))

    def show_failure(error: Exception) -> None:
        failed_in = error.folder if isinstance(error, RunFailed) else None
        console.print(f"\n{how_to_go_on(failed_in or folder)}", **PLAIN)

    try:
        with process.on_abandon(show_failure):
            outcome = run()
    except RunFailed as failed:
        show_failure(failed)
        raise
    for note in outcome.notes:
        console.print(f"note: {note}", style="yellow", **PLAIN)
    if outcome.is_interrupted:
        console.print(f"\ninterrupted; {how_to_go_on(outcome.folder)}", **PLAIN)
    if outcome.is_interrupted or process.was_interrupted():
        return INTERRUPTED
    return FAILED if outcome.has_failed else DONE


def _run(main: Callable[[], int]) -> int:
    try:
        with process.on_abandon(_show_error):
            return main()
    except UserError as error:
        sys.stdout.flush()
        sys.stderr.writelines(f"error: {hide_passwords(message)}\n" for message in error.messages)
        return WRONG_INPUT
    except RunFailed as error:
        _show_error(error)
        return INTERRUPTED if process.was_interrupted() else FAILED
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        return INTERRUPTED
    except Exception as error:
        if not process.was_interrupted():
            if full_disk := find_full_disk(error):
                sys.stderr.write(f"error: the disk is full: {full_disk}\n")
                return FAILED
            raise
        what = f"{type(error).__name__}: {error}"
        sys.stderr.write(f"\ninterrupted; and while it ended: {what}\n")
        return INTERRUPTED


def _show_error(error: Exception) -> None:
    sys.stdout.flush()
    sys.stderr.write(f"error: {hide_passwords(str(error))}\n")


def make_parser(description: str | None, examples: str) -> argparse.ArgumentParser:
    """Return a parser with the arguments that both programs take."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="overrides of the configuration, read as YAML: lr_mp=1e-3 vlm.lm_dropout=0.1",
    )
    parser.add_argument("--name", help="name of the results folder; must not exist yet")
    parser.add_argument(
        "--results",
        type=results_place,
        default=Path("results"),
        help="where results folders are made: a folder, or s3://BUCKET/PATH, gs://BUCKET/PATH",
    )
    parser.add_argument(
        "--address",
        help="Ray cluster to join (auto: this machine's); default: RAY_ADDRESS, else an own one",
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue the interrupted run in the folder"
    )
    parser.add_argument(
        "--resume-if-exists",
        action="store_true",
        help="continue the run in the folder, or begin it if there is none: for jobs that restart",
    )
    parser.add_argument(
        "--submit",
        metavar="http://HEAD:8265",
        help="run as a job of the Ray cluster with this dashboard, and follow its log",
    )
    parser.add_argument(
        "--quiet", action="store_true", help="print plain lines, also on a terminal"
    )
    return parser


def results_place(text: str) -> Path | str:
    """Return a path, or the URI of a folder in a bucket."""
    return text if is_uri(text) else user_path(text)


def copied_file(text: str) -> Path:
    """Return the path of a file, or of a copy of what is at a URI."""
    return local_copy("--config", text)


@contextlib.contextmanager
def local_results(
    arguments: argparse.Namespace, default_name: str
) -> Iterator[Sequence["Observer"]]:
    """Let `arguments.results` be a local folder meanwhile; yield what copies it to the bucket.

    Args:
        default_name: of the results folder, if none was given.
    """
    from nanovlm.watch.bucket import results_in

    is_resumed = arguments.resume or arguments.resume_if_exists
    name = arguments.name or default_name
    with results_in(arguments.results, name, is_resumed) as (arguments.results, observers):
        yield observers


def settle_resume(arguments: argparse.Namespace, default_name: str) -> None:
    """Turn --resume-if-exists into --resume, or into a start in the folder of that very name."""
    if arguments.resume_if_exists and not arguments.resume:
        arguments.name = arguments.name or default_name
        arguments.resume = has_begun(arguments.results / arguments.name)


def start_layers(layers: Sequence[Layer]) -> Sequence[Layer]:
    """Return the numbers of the model to start from, see `nanovlm.training.start`."""
    given = given_values(layers)
    if not needs_files(given):
        return known_eos_layers(given)
    # Imported late: most mistakes in a configuration are reported without waiting for torch.
    from nanovlm.training import start

    return start.start_layers(layers)


def layers_below(arguments: argparse.Namespace) -> LayersBelow:
    """Return what looks at the model to start from. A job's may lie on the cluster alone."""
    return _start_layers_if_here if arguments.submit else start_layers


def _start_layers_if_here(layers: Sequence[Layer]) -> Sequence[Layer]:
    given = given_values(layers)
    paths = [Path(str(given[key])) for key in FOLDER_KEYS if key in given]
    is_elsewhere = any(path.is_absolute() and not path.exists() for path in paths)
    return [] if is_elsewhere else start_layers(layers)


def at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def command(words: Sequence[str]) -> str:
    """Return the command by which this program was called, with other arguments."""
    num_given = len(sys.argv) - 1
    called = sys.orig_argv[: len(sys.orig_argv) - num_given]
    return shlex.join([*called, *words])


def how_to_go_on(folder: Path) -> str:
    """Return the command that resumes the run, or starts it again if there is nothing to resume."""
    words, what = hide_words(sys.argv[1:]), "begin again"
    if folder.exists():
        words, what = resume_words(words, folder), "go on"
    return f"to {what}:\n{command(words)}"


def resume_words(words: Sequence[str], folder: Path) -> list[str]:
    """Return the arguments that resume the run which `words` have started in `folder`.

    Passwords of databases are replaced by an environment variable.
    """
    kept = [w for w in hide_words(words) if w not in ("--resume", "--resume-if-exists")]
    if not any(word == "--name" or word.startswith("--name=") for word in kept):
        # One that begins with a dash would be taken for an option.
        named = [f"--name={folder.name}"] if folder.name.startswith("-") else None
        kept += named or ["--name", folder.name]
    return [*kept, "--resume"]
