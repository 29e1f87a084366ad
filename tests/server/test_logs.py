"""A log that nobody reads."""

import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from served import LIMIT_S, SCRIPT, Http, drive, write_checkpoint

from eaglerun.server.logs import MAX_LINES, configure_logging, never_waiting


def test_a_full_pipe_stops_nothing(tmp_path: Path):
    engine = f"scripted_engine.py --checkpoint {write_checkpoint(tmp_path)}"
    command = [sys.executable, str(SCRIPT), engine, "serve", "--http-port", "0", "--log-requests"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "Ready: " in line:
                break
        url = line.partition(" at ")[2].split()[0]

        async def load(http: Http) -> None:
            reader, writer = await http.send("/health")
            await reader.readuntil(b"\r\n\r\n")
            for _ in range(40):
                # 2,000 lines are more than a pipe holds.
                writer.write(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n" * 5)
                for _ in range(5):
                    assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
            long = "/" + "x" * 4000
            for _ in range(40):
                assert (await http.ask(long)).status == 404

        try:
            drive(url, load)
            process.terminate()
            # Nobody reads on; the last lines are not waited for long.
            process.wait(LIMIT_S)
        finally:
            process.kill()


def test_what_is_dropped_is_counted(monkeypatch: pytest.MonkeyPatch):
    kept = list(logging.getLogger().handlers)
    read, write = os.pipe()
    try:
        with os.fdopen(write, "w") as stalled:
            monkeypatch.setattr(sys, "stderr", stalled)
            configure_logging("info")
            with never_waiting():
                for i in range(3 * MAX_LINES):
                    logging.getLogger("eaglerun").info("line %d %s", i, "x" * 50)
                found: list[str] = []

                def drain() -> None:
                    with os.fdopen(read) as lines:
                        found.extend(lines)

                reader = threading.Thread(target=drain)
                reader.start()
        reader.join(LIMIT_S)
        [said] = [line for line in found if "were dropped" in line]
        dropped = int(said.split("] ")[1].split()[0])
        assert sum("line " in line for line in found) + dropped == 3 * MAX_LINES
        assert "line 0 x" in found[0]
    finally:
        logging.getLogger().handlers[:] = kept
