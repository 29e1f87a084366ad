"""The lock holds every package that the suite installs, and nothing that ties it to one machine."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LINES = (ROOT / "requirements.lock").read_text().splitlines()
LOCKED = [Requirement(line) for line in LINES if not line.startswith("#")]
# Each machine has its own builds of these; the Makefile holds their versions.
APART = {"torch", "triton"}


def test_every_direct_dependency_is_locked_within_its_range():
    project = PROJECT["project"]
    wanted = [*project["dependencies"], *PROJECT["build-system"]["requires"]]
    for extra in project["optional-dependencies"].values():
        wanted += extra
    for requirement in map(Requirement, wanted):
        if requirement.name in APART:
            continue
        found = [r for r in LOCKED if r.name == canonicalize_name(requirement.name)]
        assert found, f"{requirement.name} is not locked: make lock"
        for locked in found:
            (pin,) = locked.specifier
            assert requirement.specifier.contains(pin.version), f"{requirement} against {locked}"


def test_every_line_names_one_version_and_no_place():
    for line, requirement in zip(LINES[1:], LOCKED, strict=True):
        assert [s.operator for s in requirement.specifier] == ["=="], line
        assert requirement.url is None and not requirement.extras, line
        assert not re.search(r"[/@]|--|:\s*/", line), line


def test_torch_and_what_only_it_brings_stay_out():
    names = {r.name for r in LOCKED}
    assert not names & APART
    assert not [name for name in names if name.startswith(("nvidia-", "cuda-"))]


def test_one_file_serves_three_versions_of_python():
    for python in ("3.11", "3.12", "3.13"):
        here = {"python_version": python, "python_full_version": f"{python}.1"}
        names = [r.name for r in LOCKED if r.marker is None or r.marker.evaluate(here)]
        assert len(names) == len(set(names)), f"a package twice for Python {python}"
        assert {"numpy", "transformers", "pytest", "mypy"} <= set(names)
