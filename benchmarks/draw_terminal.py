"""A picture of the terminal while a search runs, as SVG.

    python benchmarks/draw_terminal.py docs/images/terminal.svg

Runs the demo's search in a terminal of tmux, takes what it shows when so many trials have ended,
and lets the search run to its end, so that it can be looked at afterwards.
"""

import argparse
import io
import shlex
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs without being installed

from rich.console import Console
from rich.text import Text

REPOSITORY = Path(__file__).parents[1]
WIDTH, HEIGHT = 112, 34
COMMAND = "python run_search.py --space search_spaces/digits.yaml"
SESSION = "nanovlm-picture"
POLL_SECONDS = 2.0


def main() -> None:
    arguments = parse_arguments()
    program = shlex.join([sys.executable, *shlex.split(COMMAND)[1:]])
    options = f"--results {shlex.quote(str(arguments.results))} --name digits"
    size = ["-x", str(WIDTH), "-y", str(HEIGHT)]
    tmux("new-session", "-d", "-s", SESSION, *size, "-c", str(REPOSITORY), f"{program} {options}")
    trials = arguments.results / "digits" / "trials.jsonl"
    while is_there() and num_lines(trials) < arguments.after:
        time.sleep(POLL_SECONDS)
    picture = draw(tmux("capture-pane", "-p", "-e", "-t", SESSION))
    arguments.picture.write_text(picture, encoding="utf-8")
    print(f"{arguments.picture}; the search goes on in {arguments.results}", flush=True)
    while is_there():
        time.sleep(POLL_SECONDS)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("picture", type=Path, help="the file to write")
    parser.add_argument("--after", type=int, default=8, help="ended trials when it is taken")
    parser.add_argument(
        "--results", type=Path, default=Path("results"), help="digits/ in it must not exist yet"
    )
    return parser.parse_args()


def draw(shown: str) -> str:
    """Return the picture of what a terminal shows.

    Args:
        shown: its lines, with escape sequences for the colours.
    """
    console = Console(record=True, width=WIDTH, file=io.StringIO())
    console.print(Text.from_ansi(f"$ {COMMAND}\n{shown.rstrip()}"), no_wrap=True, crop=True)
    return console.export_svg(title="run_search.py")


def num_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines()) if path.exists() else 0


def is_there() -> bool:
    """Return whether the program still runs."""
    found = subprocess.run(["tmux", "has-session", "-t", SESSION], capture_output=True)
    return found.returncode == 0


def tmux(*words: str) -> str:
    return subprocess.run(["tmux", *words], check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
