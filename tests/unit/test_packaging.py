"""The wheel ships exactly the packages that exist, and nothing outside one import root."""

import tomllib
from pathlib import Path

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
