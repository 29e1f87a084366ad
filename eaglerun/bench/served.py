"""A server of its own for a measurement: eaglerun serve, as users start it, on a free port."""

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn, TextIO

from tokenizers import Tokenizer, models

from eaglerun.bench.table import say
from eaglerun.config import ENV_PREFIX, Config, options
from eaglerun.loader import read_checkpoints
from eaglerun.server.http_partner import ServerError

SERVE = (sys.executable, "-m", "eaglerun", "serve")
NUM_LAST_LINES = 15
POLL_S = 0.1
# How long a server that was told to end may take, and one that seems to have died.
STOP_S, DEATH_S = 30.0, 5.0


class Server:
    """The process. ``ready_s``: from its start until it said Ready."""

    def __init__(self, process: "subprocess.Popen[str]", begun: float, log: TextIO) -> None:
        self.url = ""
        self.ready_s = 0.0
        self._process = process
        self._begun = begun
        self._log = log
        self._last: deque[str] = deque(maxlen=NUM_LAST_LINES)
        self._told = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        """Take what it logs, so that it never waits for that."""
        assert self._process.stderr is not None
        with self._process.stderr as lines:
            for line in lines:
                self._log.write(line)
                self._log.flush()
                self._last.append(line)
                if not self.url and (found := re.search(r"Ready: .* at (https?://\S+)", line)):
                    self.ready_s = time.perf_counter() - self._begun
                    self.url = found[1]
                    self._told.set()
        self._told.set()

    def wait_until_ready(self, timeout_s: float) -> None:
        """ServerError with its last lines where it ends, or takes longer."""
        deadline = self._begun + timeout_s
        # Its log may stay open longer than it lives, in the hands of a process that it started.
        while not self._told.wait(POLL_S) and self._process.poll() is None:
            if time.perf_counter() > deadline:
                break
        if self.url:
            return
        if self._told.is_set() or self._process.poll() is not None:
            raise ServerError(f"the server did not start{self.last_words()}")
        raise ServerError(
            f"the server was not ready after --start-timeout {timeout_s:g} s{self._lines()}"
        )

    def last_words(self) -> str:
        """How it ended and its last lines; "" where it still runs."""
        try:
            code = self._process.wait(DEATH_S)
        except subprocess.TimeoutExpired:
            return ""
        self._reader.join(DEATH_S)
        return f"; it ended with code {code}{self._lines()}"

    def _lines(self) -> str:
        return ". Its last lines:\n" + "".join(self._last).rstrip() if self._last else ""

    def stop(self) -> None:
        """Its engine's process ends with it."""
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(DEATH_S)


@contextmanager
def served(config: Config, timeout_s: float, log: Path | None) -> Iterator[Server]:
    """A fresh server with settings of local_only(), from its Ready on. ``log``: a file for all that
    it logs.

    Raises  ServerError where it does not become ready, and ConfigError as it would.
    """
    with tempfile.TemporaryDirectory() as folder, _ending_on_sigterm():
        file = Path(folder) / "settings.toml"
        file.write_text(_with_tokenizer(config, Path(folder)).to_toml())
        known = {ENV_PREFIX + option.name.upper() for option in options()}
        # Every variable is in the settings already, and may have been overruled by a flag.
        environ = {name: text for name, text in os.environ.items() if name not in known}
        with open(os.devnull if log is None else log, "w") as written:
            begun = time.perf_counter()
            process = subprocess.Popen(
                [*SERVE, "--config", str(file)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                env=environ,
            )
            server = Server(process, begun, written)
            try:
                server.wait_until_ready(timeout_s)
                yield server
            finally:
                server.stop()


def local_only(config: Config) -> Config:
    """The settings for a server that this machine alone can reach, on a free port, and without
    what a client would have to know or wait for: keys, TLS, names, a rate limit."""
    server = dataclasses.replace(
        config.server,
        host="127.0.0.1",
        http_port=0,
        api_key=None,
        allowed_hosts=None,
        ssl_certfile=None,
        ssl_keyfile=None,
        rate_limit=None,
        # The line that says Ready is of this level.
        log_level="info",
    )
    return dataclasses.replace(config, server=server)


def _with_tokenizer(config: Config, folder: Path) -> Config:
    """Random weights are often without a tokenizer, which a server needs: give them one with a
    word for each id, in a copy of the target's settings under ``folder``."""
    if config.model.load_format != "dummy":
        return config
    found = read_checkpoints(config)
    if (found.target_path / "tokenizer.json").is_file():
        return config
    say(f"{found.name} has no tokenizer.json: one with a word for each id is made for the server")
    target = folder / "target"
    target.mkdir()
    for file in found.target_path.glob("*.json"):
        shutil.copy(file, target)
    words = {f"w{i}": i for i in range(found.target.vocab_size)}
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(target / "tokenizer.json"))
    model = dataclasses.replace(config.model, model=str(target), served_model_name=found.name)
    return dataclasses.replace(config, model=model)


@contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """A bench that is told to end ends its server too."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        sys.exit(128 + number)

    before: Callable[[int, FrameType | None], object] | int | None
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
