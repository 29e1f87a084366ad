"""Rows of a measurement: shown as they come, kept as JSON and as a Markdown table."""

import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

R = TypeVar("R")
# Columns of a table: title -> cell of a row, given all rows so far too.
Columns = dict[str, Callable[[R, Sequence[R]], str]]

BEGUN = time.perf_counter()


def say(text: str) -> None:
    """A line on standard error, with the seconds since the process began to measure."""
    print(f"[{time.perf_counter() - BEGUN:6.1f} s] {text}", file=sys.stderr, flush=True)


class Table(Generic[R]):
    """Rows under named columns; each row is shown and written at once, so that a kill loses none.

    columns    title -> cell of a row and of all rows so far
    directory  where NAME.json and NAME.md go; None: nowhere
    settings   the effective settings, as TOML
    about      the machine(); None: this process's
    """

    def __init__(
        self,
        name: str,
        columns: Columns[R],
        directory: Path | None,
        settings: str,
        about: dict[str, Any] | None = None,
    ) -> None:
        self.name = name
        self.rows: list[R] = []
        self._columns = columns
        self._directory = directory
        self._settings = settings
        self._about = about

    def add(self, row: R) -> None:
        self.rows.append(row)
        cells = zip(self._columns, self._cells(row), strict=True)
        say(f"{self.name}: " + ", ".join(f"{title} {cell}" for title, cell in cells))
        if self._directory is None:
            return
        body = {
            "machine": machine() if self._about is None else self._about,
            "settings": self._settings,
            "rows": list(map(_plain, self.rows)),
        }
        self._directory.mkdir(parents=True, exist_ok=True)
        (self._directory / f"{self.name}.json").write_text(json.dumps(body, indent=1) + "\n")
        (self._directory / f"{self.name}.md").write_text(self.to_text() + "\n")

    def to_text(self) -> str:
        """Markdown; columns of numbers lean right."""
        cells = [self._cells(row) for row in self.rows]
        leans = [
            "--:" if all(_is_number(row[i]) for row in cells) else "---"
            for i in range(len(self._columns))
        ]
        lines = [self._columns.keys(), leans, *cells]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def _cells(self, row: R) -> list[str]:
        return [cell(row, self.rows) for cell in self._columns.values()]


def _plain(row: Any) -> dict[str, Any]:
    return asdict(row)


def _is_number(cell: str) -> bool:
    return cell[:1].isdigit() or cell.startswith("-")


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def percent(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f}%"


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    gpu = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "gpu_memory_gib": round(torch.cuda.mem_get_info()[1] / 2**30, 1) if gpu else None,
        "cpu_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }
