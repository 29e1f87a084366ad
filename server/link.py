"""The HTTP process's end of the two sockets between the processes.

They are files with mode 0600 in a directory that only this user can enter.
"""

import shutil
import tempfile
from pathlib import Path

import zmq

from eaglerun.errors import ConfigError
from eaglerun.server import wire

# What the kernel takes as the path of a Unix socket.
MAX_PATH = 107


class EngineLink:
    """Sends commands and receives reports, both without ever waiting."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="eaglerun-"))
        self._context = zmq.Context()
        self._commands = self._context.socket(zmq.PUSH)
        self._events = self._context.socket(zmq.PULL)
        # Commands are few, bounded by the queue's limits; events wait at the engine's side.
        self._commands.sndhwm = 0
        self._events.rcvhwm = 16
        try:
            self.commands_address = self._bind(self._commands, "commands")
            self.events_address = self._bind(self._events, "events")
        except ConfigError:
            self.close()
            raise

    def _bind(self, socket: "zmq.Socket[bytes]", name: str) -> str:
        path = self.directory / name
        if len(str(path)) > MAX_PATH:
            raise ConfigError(f"{path} is too long for a socket: set TMPDIR to a shorter path")
        socket.bind(f"ipc://{path}")
        path.chmod(0o600)
        return f"ipc://{path}"

    @property
    def fileno(self) -> int:
        """Readable when reports may have come; they must then be received until there are none,
        because it tells of each only once."""
        return int(self._events.fd)

    def send(self, command: wire.Command) -> bool:
        """Whether there is an engine to take it."""
        try:
            self._commands.send(wire.encode(command), zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def receive(self) -> wire.Report | None:
        """The next report that is there."""
        try:
            return wire.decode_report(self._events.recv(zmq.NOBLOCK))
        except zmq.Again:
            return None

    def close(self) -> None:
        self._commands.close(0)
        self._events.close(0)
        self._context.term()
        shutil.rmtree(self.directory)
