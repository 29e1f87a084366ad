"""Bytes of strangers into everything that reads them: no crash, no error but the promised ones.

python recipes/fuzz_server.py [--minutes 1] [--target NAME] [--seed 0]
python recipes/fuzz_server.py --atheris [flags of libFuzzer] [CORPUS]

Without atheris (not a dependency) seeds are mutated at random; with it coverage leads. A crash ends
the run and its input is written to crash-NAME.
"""

import argparse
import asyncio
import importlib
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

# The modules that coverage watches, with all that they import.
WATCHED = (
    "eaglerun.server.http_limits",
    "eaglerun.server.link",
    "eaglerun.server.prepare_process",
    "eaglerun.models.loading",
    "eaglerun.checkpoint.draft",
)

if "--atheris" in sys.argv:
    import atheris

    # The imports below find what is imported here.
    with atheris.instrument_imports(include=["eaglerun", "uvicorn"]):
        for name in WATCHED:
            importlib.import_module(name)

import torch  # noqa: E402
import uvicorn  # noqa: E402
from served import write_checkpoint  # noqa: E402
from uvicorn.server import ServerState  # noqa: E402

from eaglerun.checkpoint.draft import DraftSpec  # noqa: E402
from eaglerun.checkpoint.fields import read_checkpoint_config  # noqa: E402
from eaglerun.checkpoint.names import TensorNames  # noqa: E402
from eaglerun.checkpoint.target import TargetSpec  # noqa: E402
from eaglerun.checkpoint.weights import draft_weights  # noqa: E402
from eaglerun.errors import CheckpointError, ConfigError  # noqa: E402
from eaglerun.loader import DEMO  # noqa: E402
from eaglerun.models.loading import _checkpoint_files, _plan  # noqa: E402
from eaglerun.server import wire  # noqa: E402
from eaglerun.server.bodies import count_nodes, is_nested  # noqa: E402
from eaglerun.server.failures import MAX_MESSAGE  # noqa: E402
from eaglerun.server.hosts import AllowedHosts, host_of  # noqa: E402
from eaglerun.server.http_limits import (  # noqa: E402
    Connections,
    HttpCounts,
    HttpLimits,
    LimitedProtocol,
)
from eaglerun.server.link import UNDECODABLE, BadFrame, Frames, frame  # noqa: E402
from eaglerun.server.parsers.output import OutputParser  # noqa: E402
from eaglerun.server.parsers.reasoning import Start  # noqa: E402
from eaglerun.server.prepare_jobs import Answered, Body, Load, Refusal  # noqa: E402
from eaglerun.server.prepare_process import MODELS, Preparer  # noqa: E402
from eaglerun.server.settings import Limits, Settings  # noqa: E402

DIRECTORY = Path(tempfile.mkdtemp(prefix="eaglerun-fuzz-"))
PATHS = list(MODELS)
SMALL = Limits(max_values=5_000, max_containers=1_000, max_prompt_chars=20_000)
TOOLS = {"f": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "array"}}}}
CONFIGS = {name: read_checkpoint_config(DEMO / name) for name in ("target", "draft")}
TARGET = TargetSpec.from_config(CONFIGS["target"])
DRAFT = DraftSpec.from_config(CONFIGS["draft"], TARGET)


class Target:
    """Called with bytes; raises what is a fault."""

    seeds: list[bytes]

    def __call__(self, data: bytes) -> None: ...

    def close(self) -> None: ...


class Bodies(Target):
    """A request's body, from bytes to token ids. The first byte chooses the route."""

    def __init__(self) -> None:
        settings = Settings(("m",), 1, "0", limits=SMALL)
        self._preparer = Preparer.load(
            Load(str(write_checkpoint(DIRECTORY)), None, settings, 512, 3)
        )

    seeds = [
        b"\0" + json.dumps(body).encode()
        for body in (
            {"messages": [{"role": "user", "content": "hi"}], "temperature": 0.5, "n": 2},
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [
                            {
                                "id": "x",
                                "type": "function",
                                "function": {"name": "f", "arguments": "{}"},
                            }
                        ],
                    },
                    {
                        "role": "tool",
                        "tool_call_id": "x",
                        "content": [{"type": "text", "text": "y"}],
                    },
                ],
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
                "tool_choice": {"type": "function", "function": {"name": "f"}},
            },
        )
    ] + [
        b"\1" + b'{"prompt": ["a", "b"], "echo": true, "logit_bias": {"5": 1}, "stop": ["x"]}',
        b"\1" + b'{"prompt": [[1, 2], [3]], "logprobs": 2, "stop_token_ids": [1], "seed": 7}',
        b"\2" + b'{"input": [{"role": "user", "content": "x"}], "metadata": {"a": "b"}}',
        b"\2" + b'{"input": "x", "instructions": "y", "reasoning": {"effort": "none"}}',
        b"\3" + b'{"prompt": "x", "return_token_strs": true}',
        b"\4" + b'{"tokens": [1, 2, 3], "skip_special_tokens": true}',
    ]

    def __call__(self, data: bytes) -> None:
        path = PATHS[data[0] % len(PATHS)] if data else PATHS[0]
        result = self._preparer.do(Body(path, data[1:]))
        assert isinstance(result, Answered | Refusal)
        if isinstance(result, Refusal):
            assert 400 <= result.status < 500 and len(result.message) <= MAX_MESSAGE


class Nesting(Target):
    """What is counted before parsing agrees with what was parsed."""

    seeds = [b'[[1, {"a": [2]}], "[[", "\\"[", {}]', b'{"a": {"b": {"c": {}}}}']

    def __call__(self, data: bytes) -> None:
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            is_nested(data, 8)
            return
        depth, values, containers = _measure(value)
        assert is_nested(data, 8) == (depth > 8)
        most = count_nodes(data)
        assert most[0] >= values - 1 and most[1] >= containers


def _measure(value: object) -> tuple[int, int, int]:
    """Depth, values and containers."""
    if not isinstance(value, list | dict):
        return 0, 1, 0
    inner = [_measure(v) for v in (value.values() if isinstance(value, dict) else value)]
    depths, values, containers = zip(*inner, strict=True) if inner else ((0,), (0,), (0,))
    # Repeated keys of an object are one; each is counted where it stands.
    return max(depths) + 1, sum(values) + (not inner), sum(containers) + 1


class Heads(Target):
    """Bytes of a connection, in pieces; the first two choose where it is cut."""

    seeds = [
        b"\x10\x05GET /health HTTP/1.1\r\nhost: a\r\n\r\n",
        b"\x20\x07POST /a HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n\r\nhello"
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x20\x07POST /a HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"
        b"5;x=y\r\nhello\r\n0\r\nx: y\r\n\r\n",
        b"\x03\x40GET http://a:80/%41?b HTTP/1.0\r\nconnection: keep-alive\r\nupgrade: h2c\r\n\r\n",
        b"\x03\x40OPTIONS * HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\n\r\n",
        b"\x03\x40CONNECT a:80 HTTP/1.1\r\nhost: a\r\n\r\n",
    ]

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._config = uvicorn.Config(_answer, interface="asgi3", http="httptools", log_config=None)
        self._config.load()

    def __call__(self, data: bytes) -> None:
        self._loop.run_until_complete(self._run(data))

    def close(self) -> None:
        self._loop.close()

    async def _run(self, data: bytes) -> None:
        limits = HttpLimits(max_header_bytes=512, max_url_bytes=128, max_headers=8)
        counts, state = HttpCounts(), ServerState()
        one = LimitedProtocol(self._config, state, {}, Connections(limits, counts, lambda _: False))
        transport = Transport(one)
        one.connection_made(transport)
        size = data[0] * 4 + data[1] + 1 if len(data) > 1 else 1
        for begin in range(2, len(data), size):
            if transport.closed:
                break
            one.data_received(data[begin : begin + size])
            assert one._head_bytes <= limits.max_header_bytes
            await asyncio.sleep(0)
        transport.abort()
        for task in list(state.tasks):
            await task
        assert counts.connections_open == 0
        assert all(100 <= status < 600 for status in counts.responses)


async def _answer(scope: Any, receive: Any, send: Any) -> None:
    while (message := await receive())["type"] == "http.request" and message["more_body"]:
        pass
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body"})


class Transport(asyncio.Transport):
    """Takes what is written; closing is at once."""

    def __init__(self, protocol: LimitedProtocol) -> None:
        super().__init__({"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)})
        self._protocol = protocol
        self.closed = False

    def write(self, data: Any) -> None:
        pass

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._protocol.connection_lost(None)

    abort = close


class Link(Target):
    """What one process sends the other."""

    seeds = [
        frame(wire.encode(wire.Abort("r"))),
        frame(wire.encode(wire.Step(accepted=("a",), totals=wire.Totals(steps=3)))),
        frame(wire.encode(wire.Ready("m", 5, 3, None))) + frame(b"\x80"),
    ]

    def __call__(self, data: bytes) -> None:
        for decode in (wire.decode_command, wire.decode_report):
            frames = Frames()
            frames.add(data)
            try:
                while (content := frames.take()) is not None:
                    decode(content)
            except (BadFrame, *UNDECODABLE):
                pass


class Output(Target):
    """A model's text, in pieces."""

    seeds = [
        b'\5<mm:think>a</mm:think>b]<]minimax[>[<tool_call>]<]minimax[>[<invoke name="f">'
        b"]<]minimax[>[<a>1]<]minimax[>[</a>]<]minimax[>[</invoke>]<]minimax[>[</tool_call>",
        b'\1]<]minimax[>[<tool_call>]<]minimax[>[<invoke name="f">]<]minimax[>[<b>[1, 2',
    ]

    def __call__(self, data: bytes) -> None:
        size = data[0] % 32 + 1 if data else 1
        text = data[1:].decode(errors="replace")
        for start in Start:
            parser = OutputParser(start=start, tools=TOOLS)
            for begin in range(0, len(text), size):
                parser.feed(text[begin : begin + size])
            parser.finish()


class Configs(Target):
    """config.json of either model; the first byte chooses."""

    seeds = [
        b"\0" + json.dumps(CONFIGS["target"]).encode(),
        b"\1" + json.dumps(CONFIGS["draft"]).encode(),
    ]

    def __call__(self, data: bytes) -> None:
        directory = DIRECTORY / "config"
        directory.mkdir(exist_ok=True)
        (directory / "config.json").write_bytes(data[1:])
        try:
            config = read_checkpoint_config(directory)
            if data[:1] == b"\1":
                DraftSpec.from_config(config, TARGET)
            else:
                TargetSpec.from_config(config)
        except (ConfigError, CheckpointError) as error:
            assert len(str(error)) < 4000


class Safetensors(Target):
    """Headers of a weights file, and the index beside it where the first byte says so."""

    seeds = [
        b"\0" + len(head).to_bytes(8, "little") + head
        for head in (
            b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}',
            b'{"__metadata__": {"format": "pt"}, "fc.weight": {"dtype": "BF16", "shape": [1, 2], '
            b'"data_offsets": [0, 4]}}    ',
        )
    ] + [
        b'\1{"metadata": {}, "weight_map": {"fc.weight": "a.safetensors"}}',
        # Found by atheris: a message of two lines.
        b'\1{"metadata": {}, "weight_map": {"fc.": "a.safetA\\nsors"}}',
    ]

    def __call__(self, data: bytes) -> None:
        directory = DIRECTORY / "weights"
        directory.mkdir(exist_ok=True)
        index = directory / "model.safetensors.index.json"
        index.unlink(missing_ok=True)
        if data[:1] == b"\1":
            index.write_bytes(data[1:])
        else:
            (directory / "a.safetensors").write_bytes(data[1:])
        try:
            if data[:1] == b"\1":
                _checkpoint_files(directory)
            else:
                _plan(directory, TensorNames(draft_weights(DRAFT)), optional=())
        except CheckpointError as error:
            assert "\n" not in str(error)


class Hosts(Target):
    seeds = [b"localhost:80", b"[::1]:8000", b"127.0.0.1", b"a.b.c"]

    def __call__(self, data: bytes) -> None:
        header = data.decode("latin1")
        local = AllowedHosts(())
        if header in local:
            host = host_of(header)
            assert host.endswith("localhost") or host.startswith("127.") or ":" in host


KINDS: dict[str, type[Target]] = {
    kind.__name__.lower(): kind
    for kind in (Bodies, Nesting, Heads, Link, Output, Configs, Safetensors, Hosts)
}


def mutated(seed: bytes, chance: random.Random) -> bytes:
    """A few of: a byte changed, a piece cut, doubled, moved, or an odd value put in."""
    data = bytearray(seed)
    odd = (b"\0", b"\xff" * 4, b"[" * 20, b'"', b"{}", b"null", b"1e999", b"-1", b"9" * 30, b"\r\n")
    for _ in range(chance.randrange(1, 6)):
        at = chance.randrange(len(data) + 1)
        end = min(len(data), at + chance.randrange(1, 20))
        match chance.randrange(5):
            case 0 if at < len(data):
                data[at] = chance.randrange(256)
            case 1:
                del data[at:end]
            case 2:
                data[at:at] = data[at:end] * chance.randrange(1, 5)
            case 3:
                data[at:at] = chance.choice(odd)
            case _:
                piece = data[at:end]
                del data[at:end]
                to = chance.randrange(len(data) + 1)
                data[to:to] = piece
    return bytes(data)


def fuzz(name: str, seconds: float, seed: int, folder: Path = Path()) -> int:
    """Run one target; the number of inputs. A crash leaves its input in crash-NAME."""
    target, chance = KINDS[name](), random.Random(f"{name} {seed}")
    count, end = 0, time.monotonic() + seconds
    data = b""
    try:
        for data in target.seeds:
            target(data)
        while time.monotonic() < end:
            data = mutated(chance.choice(target.seeds), chance)
            target(data)
            count += 1
    except BaseException:
        (folder / f"crash-{name}").write_bytes(data)
        raise
    finally:
        target.close()
    return count


def with_atheris(flags: list[str]) -> None:
    """All targets in one run; the first byte of an input chooses."""
    targets = [kind() for kind in KINDS.values()]

    def one(data: bytes) -> None:
        if data:
            targets[data[0] % len(targets)](data[1:])

    folders = [Path(flag) for flag in flags if not flag.startswith("-")]
    if folders:
        folders[0].mkdir(parents=True, exist_ok=True)
        for i, target in enumerate(targets):
            for j, seed in enumerate(target.seeds):
                (folders[0] / f"seed-{i}-{j}").write_bytes(bytes([i]) + seed)
    atheris.Setup([sys.argv[0], *flags], one)
    atheris.Fuzz()


def main() -> None:
    torch.set_num_threads(1)
    if "--atheris" in sys.argv:
        with_atheris([flag for flag in sys.argv[1:] if flag != "--atheris"])
        return
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=1.0, help="for each target")
    parser.add_argument("--target", choices=KINDS, action="append")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    for name in flags.target or KINDS:
        print(f"{name}: {fuzz(name, 60 * flags.minutes, flags.seed):,} inputs, no crash")


if __name__ == "__main__":
    main()
