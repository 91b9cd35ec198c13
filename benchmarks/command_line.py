"""What the command lines of the benchmarks have in common."""

import argparse
import os
from pathlib import Path


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help is a module's docstring, as it is laid out there."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def device_parser_of(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser for what runs on a GPU where there is one."""
    import torch  # which most benchmarks do without

    parser = parser_of(doc)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=default)
    parser.add_argument("--json", type=Path, help="file for the figures")
    return parser


def model_parser_of(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser for what runs a model there, compiled where nothing else is asked for."""
    parser = device_parser_of(doc)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the CPU")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    return parser
