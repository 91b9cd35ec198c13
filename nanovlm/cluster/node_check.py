"""What the machine of a worker must have in common with that of the search: code and data.

Each worker checks it before its group asks for a job: otherwise every trial that comes there fails,
or is compared with trials on other data. What is prepared for it is what its first trial needs.
"""

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray.util

from nanovlm.config.schema import TrainConfig
from nanovlm.errors import UserError
from nanovlm.resources import Resources

_PACKAGE = Path(__file__).parents[1]
_SETTINGS = {"training": "train_dataset_path", "benchmark": "test_dataset_path"}


@dataclass(frozen=True)
class NodeCheck:
    """What the machine of a search has."""

    config: TrainConfig
    """Of a single run, or the base of a search."""
    keys: Mapping[str, str]
    """Of training data and benchmark: hashes of all that the prepared bytes depend on."""
    code: str
    """Hash of the package's code."""

    @staticmethod
    def of(config: TrainConfig, data: Mapping[str, Any]) -> "NodeCheck":
        """Return the check by what is here.

        Args:
            data: the content of `data.json`.
        """
        # The batch size, which may be searched, is no matter of the data.
        return NodeCheck(replace(config, batch_size=1), _keys(data), code_hash())

    def verify(self, resources: Resources) -> None:
        """Raise UserError if code or data differ on this machine; prepares its data."""
        node = f"node {ray.util.get_node_ip_address()}"
        if code_hash() != self.code:
            raise UserError(
                f"{node}: the code of the package in {_PACKAGE} is not that with which the run has "
                "started; install the same on all machines, or use one folder on a shared disk"
            )
        try:
            resources.training_data(self.config)
            resources.benchmark(self.config)
        except UserError as error:
            said = "; ".join(error.messages)
            raise UserError(f"{node}: {said}; the machine of the search has this data") from None
        here = _keys(resources.describe_data(self.config))
        for part, setting in _SETTINGS.items():
            if here[part] != self.keys[part]:
                raise UserError(
                    f"{node}: {setting}={getattr(self.config, setting)!r} is other data there than "
                    f"on the machine of the search ({here[part]}, not {self.keys[part]}); copy the "
                    "files with their times (rsync -a) or use a shared disk, with the same "
                    "tokenizer and the packages of requirements.lock"
                )


def _keys(data: Mapping[str, Any]) -> dict[str, str]:
    # The name of a folder of prepared data is a hash of all that its bytes depend on.
    return {part: Path(data[part]["folder"]).name for part in _SETTINGS}


@functools.cache
def code_hash() -> str:
    """Return a hash of the package's code, as it is on the disk now."""
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(f"{path.relative_to(_PACKAGE)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]
