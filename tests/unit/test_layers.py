"""Imports go down the layers and never round in a circle. In-function imports count too."""

import ast
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DIRS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
# Lowest first. A module may import its own layer and those above it in this list.
LAYERS = [
    "kernels.reference kernels.rows",
    "kernels",
    "errors progress",
    "config configs messages stats checkpoint",
    "chat_template conversation",
    "plan",
    "models",
    "staging sampling head speculative",
    "run",
    "loader ranks engine start llm threads",
    "bench server",
    "__main__",
]


def _layer(module: str) -> int:
    """The layer of the longest listed name that ``module`` is, or lies under."""
    found = [
        (len(name), i)
        for i, names in enumerate(LAYERS)
        for name in names.split()
        if f"{module}.".startswith(f"eaglerun.{name}.")
    ]
    assert found, f"{module} is in no layer"
    return max(found)[1]


def _modules() -> dict[str, Path]:
    found = {}
    for package, folder in DIRS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


def _imports(path: Path, known: set[str]) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names & known - {"eaglerun"}


MODULES = _modules()
GRAPH = {name: _imports(path, MODULES.keys()) for name, path in MODULES.items()}


def test_imports_go_down():
    assert not GRAPH["eaglerun"], "eaglerun/__init__.py imports nothing"
    inner = {m: ns for m, ns in GRAPH.items() if m != "eaglerun"}
    up = [f"{m} imports {n}" for m, ns in inner.items() for n in ns if _layer(n) > _layer(m)]
    assert not up, "\n".join(up)


def test_the_policy_is_plain_python():
    """Layers 2 to 5 never import torch: no direct import, and none below them but those layers."""
    for name, path in MODULES.items():
        if name != "eaglerun" and 2 <= _layer(name) <= 5:
            tree = ast.walk(ast.parse(path.read_text()))
            roots = {a.name for n in tree if isinstance(n, ast.Import) for a in n.names}
            tree = ast.walk(ast.parse(path.read_text()))
            roots |= {n.module or "" for n in tree if isinstance(n, ast.ImportFrom)}
            banned = {r for r in roots if r.split(".")[0] in ("torch", "triton", "transformers")}
            assert not banned, f"{name} imports {banned}"
            lower = {n for n in _imports(path, MODULES.keys()) if _layer(n) < 2}
            assert not lower, f"{name} imports {lower}, which may import torch"


def test_the_engine_holds_no_tensor():
    """Neither the engine nor what it asks of a rank imports torch, directly or through others."""
    reached, found = {"eaglerun.engine"}, ["eaglerun.engine"]
    while found:
        found = [n for name in found for n in GRAPH[name] if n not in reached]
        reached |= set(found)
    assert "eaglerun.ranks.rank" in reached and "eaglerun.plan.scheduler" in reached
    for name in reached:
        nodes = list(ast.walk(ast.parse(MODULES[name].read_text())))
        roots = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
        roots |= {n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)}
        assert "torch" not in {r.split(".")[0] for r in roots}, f"{name} imports torch"


def test_no_cycles():
    done, path = set(), []

    def visit(name: str) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            path.append(name)
            for other in GRAPH.get(name, ()):
                visit(other)
            done.add(path.pop())

    for name in GRAPH:
        visit(name)
