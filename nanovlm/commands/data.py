"""Prepared data on this machine: what there is, and how to get its disk space back."""

import argparse
from datetime import datetime

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nanovlm import cli
from nanovlm.data.cache import (
    ABOUT_FILE,
    PreparedFolder,
    delete,
    prepared_folders,
    prepared_root,
    size_on_disk,
)
from nanovlm.errors import UserError, did_you_mean
from nanovlm.watch.terminal.console import PLAIN, make_console

EXAMPLES = """examples:
  python -m nanovlm data list
  python -m nanovlm data delete 034c798abee2aade
  python -m nanovlm data delete --unfinished

It lies in HF_HOME/assets/nanovlm/prepared; HF_ASSETS_CACHE puts it elsewhere. What is deleted is
prepared again when it is needed.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="action", required=True)
    commands.add_parser("list", help="show all prepared data")
    remove = commands.add_parser("delete", help="remove prepared data")
    remove.add_argument("keys", nargs="*", metavar="KEY", help="first column of the list")
    remove.add_argument("--unfinished", action="store_true", help="what was never completed")
    remove.add_argument("--all", action="store_true", help="everything")


def run(arguments: argparse.Namespace) -> int:
    console = make_console()
    if arguments.action == "list":
        show(console, prepared_folders())
        return cli.DONE
    for folder in chosen(arguments, prepared_folders()):
        size = size_on_disk(folder.path)
        delete(folder)
        console.print(f"deleted {folder.path.name}: {gigabytes(size)} GB", **PLAIN)
    return cli.DONE


def show(console: Console, folders: list[PreparedFolder]) -> None:
    """Print a line for each, and where they are."""
    table = Table(header_style="bold", box=None, pad_edge=False)
    for name in ("key", "GB", "images", "samples", "state", "made", "what", "from"):
        table.add_column(name, justify="right" if name in ("GB", "images", "samples") else "left")
    for folder in folders:
        manifest = folder.manifest() if folder.is_complete else {}
        made = datetime.fromtimestamp((folder.path / ABOUT_FILE).stat().st_mtime)
        cutoff = folder.about.get("data_cutoff_idx")
        table.add_row(
            folder.path.name,
            gigabytes(size_on_disk(folder.path)),
            str(manifest.get("images", "")),
            str(manifest.get("samples", "")),
            "complete" if folder.is_complete else "unfinished",
            f"{made:%Y-%m-%d %H:%M}",
            folder.about["what"],
            escape(folder.about["path"]) + (f", {cutoff} rows" if cutoff else ""),
        )
    if folders:
        console.print(table)
    console.print(f"{len(folders)} in {prepared_root()}", **PLAIN)


def chosen(arguments: argparse.Namespace, folders: list[PreparedFolder]) -> list[PreparedFolder]:
    """Return what the command line names. Raises UserError if that is nothing, or not there."""
    if not (arguments.keys or arguments.unfinished or arguments.all):
        raise UserError("delete: give keys of `list`, --unfinished or --all")
    by_key = {folder.path.name: folder for folder in folders}
    unknown = [key for key in arguments.keys if key not in by_key]
    if unknown:
        raise UserError(
            *(f"delete: there is no {key!r}.{did_you_mean(key, by_key)}" for key in unknown)
        )
    return [
        folder
        for key, folder in by_key.items()
        if arguments.all
        or key in arguments.keys
        or (arguments.unfinished and not folder.is_complete)
    ]


def gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3f}"
