"""The oldest versions that pyproject.toml allows are those that the tests run with."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

REPOSITORY = Path(__file__).parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REQUIREMENTS = [
    Requirement(line)
    for lines in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for line in lines
]


def pins(file: str) -> dict[str, Version]:
    """Return the versions that a requirements file pins, by the names as they are written."""
    text = (REPOSITORY / file).read_text(encoding="utf-8")
    return {name: Version(v) for name, v in re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE)}


NEWEST, OLDEST = pins("requirements.lock"), pins("requirements.oldest")
TESTED = {canonicalize_name(name): version for name, version in (NEWEST | OLDEST).items()}
"""Of each package the oldest version that the tests run with."""


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_each_lower_bound_is_a_version_that_is_tested(requirement: Requirement) -> None:
    """To as many places as the bound has."""
    (bound,) = (s.version for s in requirement.specifier if s.operator == ">=")
    tested = TESTED[canonicalize_name(requirement.name)]
    places = len(Version(bound).release)
    assert tested.release[:places] == Version(bound).release


@pytest.mark.parametrize("name", OLDEST)
def test_an_oldest_version_is_older_than_the_newest(name: str) -> None:
    """Under the very name that the lock has, which `make rehearse` takes out of it."""
    assert OLDEST[name] < NEWEST[name]
