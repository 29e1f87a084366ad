"""The wheel ships exactly the packages that exist, and nothing outside one import root."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOL = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def _packages_on_disk() -> set[str]:
    found = set()
    for name, folder in TOOL["package-dir"].items():
        for init in (ROOT / folder).rglob("__init__.py"):
            tail = init.parent.relative_to(ROOT / folder).parts
            found.add(".".join((name, *tail)))
    return found


def test_every_package_is_listed():
    assert set(TOOL["packages"]) == _packages_on_disk()


def test_no_python_hides_in_an_unlisted_folder():
    for folder in TOOL["package-dir"].values():
        for py in (ROOT / folder).rglob("*.py"):
            assert (py.parent / "__init__.py").exists(), f"{py} is in no package"


def test_one_import_root():
    assert {p.split(".")[0] for p in TOOL["packages"]} == {"eaglerun"}


@pytest.mark.parametrize("statement", ["import eaglerun.server", "from eaglerun import configs"])
def test_a_clones_bare_folder_says_what_it_lacks(statement: str, tmp_path: Path):
    """A plain install does not help in the clone's root: the folder there is found first."""
    clone, installed = tmp_path / "clone", tmp_path / "installed"
    shutil.copytree(ROOT / "eaglerun", clone / "eaglerun")
    for name, folder in TOOL["package-dir"].items():
        shutil.copytree(ROOT / folder, installed / name.replace(".", "/"), dirs_exist_ok=True)

    def run(folder: Path) -> subprocess.CompletedProcess[str]:
        # -S: without this environment's own, editable eaglerun.
        return subprocess.run(
            [sys.executable, "-S", "-c", statement],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(installed)},
            capture_output=True,
            text=True,
        )

    assert run(tmp_path).returncode == 0
    told = run(clone).stderr.splitlines()[-1]
    assert told.startswith(f"ImportError: eaglerun was imported from the folder {clone}/eaglerun")
    assert f"pip install -e {clone}" in told
