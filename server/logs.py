"""Log lines in the form that vLLM's users know; what they say is their writer's affair."""

import contextlib
import logging
import logging.handlers
import os
import queue
import sys
import threading
from collections.abc import Generator
from typing import Any

_FORMAT = "%(levelname)s %(asctime)s [%(filename)s:%(lineno)d] %(message)s"
_DATES = "%m-%d %H:%M:%S"
# Lines that wait while whoever reads the log does not; more are dropped.
MAX_LINES = 4096
# How long the last lines may take.
LAST_LINES_S = 1.0

log = logging.getLogger(__name__)


def configure_logging(level: str, process: str = "") -> None:
    """All loggers to standard error. ``process`` names this one in front of each line."""
    prefix = f"({process} pid={os.getpid()}) " if process else ""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(prefix + _FORMAT, _DATES))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in ("eaglerun", "uvicorn"):
        logging.getLogger(name).setLevel(level.upper())


@contextlib.contextmanager
def never_waiting() -> Generator[None]:
    """Log lines are written by a thread while entered, so that a log that nobody reads (a full
    pipe) holds up nobody. What there is no room for is dropped and counted."""
    root = logging.getLogger()
    handlers = list(root.handlers)
    [handler] = handlers
    assert isinstance(handler, logging.StreamHandler)
    lines = _Lines(handler)
    root.handlers[:] = [lines]
    writer = threading.Thread(target=lines.write_all, name="eaglerun-log", daemon=True)
    writer.start()
    try:
        yield
    finally:
        root.handlers[:] = handlers
        lines.end()
        writer.join(LAST_LINES_S)


class _Lines(logging.handlers.QueueHandler):
    """A bounded queue of lines, and the thread that writes them."""

    queue: "queue.Queue[logging.LogRecord | None]"

    def __init__(self, handler: "logging.StreamHandler[Any]") -> None:
        super().__init__(queue.Queue(MAX_LINES))
        self._format_line = handler.format
        self._file = handler.stream.fileno()
        self._num_dropped = 0

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            self._num_dropped += 1

    def end(self) -> None:
        with contextlib.suppress(queue.Full):
            self.queue.put_nowait(None)

    def write_all(self) -> None:
        with contextlib.suppress(OSError):
            self._write_until_the_end()

    def _write_until_the_end(self) -> None:
        while (record := self.queue.get()) is not None:
            self._write(record)
            if self._num_dropped:
                dropped, self._num_dropped = self._num_dropped, 0
                text = "%d log lines were dropped: whoever reads the log is too slow"
                self._write(
                    log.makeRecord(log.name, logging.WARNING, __file__, 0, text, (dropped,), None)
                )

    def _write(self, record: logging.LogRecord) -> None:
        # Straight into the file: a stream's or a handler's lock, held by a write that does not end,
        # would hold up the process's end.
        line = self._format_line(record).encode(errors="replace") + b"\n"
        while line:
            line = line[os.write(self._file, line) :]
