"""What the command lines of the benchmarks have in common."""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from benchmarks.figures import Figures

if TYPE_CHECKING:
    import torch


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


def models_parser_of(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser for what runs one model after another there; see `model_runs`."""
    from benchmarks.setups import VLM_CONFIGS  # imports torch

    parser = model_parser_of(doc)
    parser.add_argument("--config", nargs="+", choices=VLM_CONFIGS, help="tiny small, or 222m")
    return parser


def model_runs(
    arguments: argparse.Namespace, *packages: ModuleType
) -> "Iterator[tuple[str, torch.device, Figures]]":
    """Say where the models run; yield the name of each, the device, and where its figures go.

    Args:
        arguments: of `models_parser_of`; `config` are names, None takes those for the device.
        packages: whose versions are said beside torch's.
    """
    import torch

    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    where = torch.cuda.get_device_name() if on_gpu else f"CPU, {arguments.threads} threads"
    versions = [f"{package.__name__} {package.__version__}" for package in (torch, *packages)]
    print(f"{where}; {', '.join(versions)}")
    figures = Figures(arguments.json, device=where, torch=torch.__version__)
    for name in arguments.config or (["222m"] if on_gpu else ["tiny", "small"]):
        yield name, device, figures.part(name)
