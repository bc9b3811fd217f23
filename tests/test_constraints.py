"""The pins of constraints.txt can be installed on every Python that the project names."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

LINES = (Path(__file__).parents[1] / "constraints.txt").read_text(encoding="utf-8").splitlines()
PINS = [Requirement(line.partition("#")[0]) for line in LINES if "==" in line.partition("#")[0]]


@pytest.mark.parametrize("python", ["3.10.0", "3.11.0", "3.12.0", "3.13.0"])
def test_what_is_pinned_for_a_python_supports_it(python):
    where = {"python_version": python.rpartition(".")[0], "python_full_version": python}
    wrong, seen = [], 0
    for pin in PINS:
        try:
            found = distribution(pin.name)
        except PackageNotFoundError:
            continue
        if found.version not in pin.specifier or (pin.marker and not pin.marker.evaluate(where)):
            continue
        seen += 1
        supported = found.metadata.get("Requires-Python")
        if supported and not Requirement(f"x{supported}").specifier.contains(python):
            wrong.append(f"{pin} supports Python {supported}")
    assert wrong == [] and seen > 50
