"""eaglerun chat: the loop, its tints and commands, servers of ours and others, a real terminal."""

import http.server
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from served import LIMIT_S, get, serving, write_checkpoint

from eaglerun.errors import ConfigError, EaglerunError, EngineError, RankFailed
from eaglerun.messages import Finished, SpeculationStats, Tokens
from eaglerun.server import cli
from eaglerun.server.conversation_loop import Talk
from eaglerun.server.http_partner import OverHttp, ServerError
from eaglerun.server.local_partner import _shielded
from eaglerun.server.partners import Ending, Piece, Wish
from eaglerun.server.terminal import Screen, Tints, printable

WISH = Wish(temperature=0.0, top_p=1.0, max_tokens=100)
STATS = SpeculationStats(steps=2, drafted=4, accepted=2)
PIECES = (
    Piece(reasoning="hm", tokens=(("<mm:think>", False), ("hm", True))),
    Piece(content="Fine", tokens=(("</mm:think>", False), ("Fine", False))),
    Piece(content=", thanks.", tokens=((", thanks", True), (".", False))),
    Ending("stop", 6, STATS),
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Scripted:
    """A partner that answers every question with the same pieces, errors among them."""

    name = "scripted"
    most_drafts: int | None = 3

    def __init__(self, *pieces: Piece | Ending | BaseException) -> None:
        self.pieces = pieces
        self.asked: list[tuple[list[dict[str, Any]], Wish]] = []
        self.num_closed = 0

    def answer(self, messages, wish):
        self.asked.append((list(messages), wish))
        try:
            for piece in self.pieces:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            self.num_closed += 1


def reader(lines: list[str | BaseException]) -> Callable[[str], str]:
    left = iter(lines)

    def read(prompt: str) -> str:
        line = next(left, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    return read


def talk(partner: Scripted, *lines: str | BaseException, system: str | None = None, **environ: str):
    """Return what a terminal shows of a conversation, and the Talk."""
    terminal = Terminal()
    screen = Screen(terminal, terminal, environ)
    made = Talk(partner, screen, reader(list(lines)), WISH, system)
    made.run()
    return terminal.getvalue(), made


def test_an_answer_is_tinted_and_counted():
    text, made = talk(Scripted(*PIECES), "How are you?\n")
    shown, _, last = text.partition("thanks")
    assert shown.endswith("\x1b[2;32mhm\x1b[0m\x1b[2m\n\x1b[0mFine\x1b[32m, ")
    assert last.startswith("\x1b[0m.\n\x1b[2m6 tokens in 3 steps, ")
    assert "tokens/s, acceptance length 2.00, 50.0% of drafts accepted\x1b[0m" in last
    assert not made.failed


@pytest.mark.parametrize("environ", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_no_colours_where_they_are_not_wanted(environ):
    text, _ = talk(Scripted(*PIECES), "How are you?", **environ)
    assert text.startswith("hm\nFine, thanks.\n6 tokens in 3 steps") and "\x1b" not in text


def test_a_file_gets_the_answers_alone():
    out, notes = io.StringIO(), Terminal()
    Talk(Scripted(*PIECES), Screen(out, notes, {}), reader(["a", "b"]), WISH, None).run()
    assert out.getvalue() == "Fine, thanks.\nFine, thanks.\n"
    assert notes.getvalue().count("\x1b[2;32mhm") == 2


def test_a_device_that_hangs_ends_the_conversation():
    partner = Scripted(PIECES[1], RankFailed("step 5 is not done"))
    out, notes = io.StringIO(), io.StringIO()
    made = Talk(partner, Screen(out, notes, {}), reader(["a", "b"]), WISH, None)
    with pytest.raises(RankFailed, match="step 5 is not done"):
        made.run()
    assert len(partner.asked) == partner.num_closed == 1
    assert (out.getvalue(), notes.getvalue()) == ("Fine\n", "")


def test_the_conversation_goes_on_until_it_is_reset():
    partner = Scripted(*PIECES)
    talk(partner, "a", "", "b", "/reset", "c", "/system Be kind.", "//d", system="Be brief.")
    turns = [[(m["role"], m["content"]) for m in messages] for messages, _ in partner.asked]
    first = [("system", "Be brief."), ("user", "a")]
    assert turns == [
        first,
        [*first, ("assistant", "Fine, thanks."), ("user", "b")],
        [("system", "Be brief."), ("user", "c")],
        [("system", "Be kind."), ("user", "/d")],
    ]


def test_commands():
    partner = Scripted(*PIECES)
    lines = ["/drafts", "/drafts 1", "/drafts", "/thinking disabled", "a", "/drafts 0", "b"]
    wrong = ["/drafts 4", "/drafts x", "/thinking hard", "/rest", "/help", "/quit", "never"]
    text, _ = talk(partner, *lines, *wrong, TERM="dumb")
    wishes = [(wish.num_draft_tokens, wish.thinking) for _, wish in partner.asked]
    assert wishes == [(1, "disabled"), (0, "disabled")]
    for words in (
        "at most 3 drafts a step\nat most 1 drafts a step\n",
        "/drafts 4: allowed are 0, 1, 2, 3\n/drafts x: allowed are 0, 1, 2, 3\n",
        "/thinking hard: allowed are enabled, disabled, adaptive",
        "unknown command /rest; did you mean '/reset'?",
        "/quit      leave; so do /exit",
    ):
        assert words in text
    partner.most_drafts = None
    text, _ = talk(partner, "/drafts 1", TERM="dumb")
    assert text == "this server takes no number of drafts\n"


def test_a_stopped_answer_is_forgotten():
    partner = Scripted(*PIECES[:2], KeyboardInterrupt())
    text, made = talk(partner, "a", "b", TERM="dumb")
    assert text == 2 * "hm\nFine\nstopped; the question and what there was are forgotten\n"
    assert [len(messages) for messages, _ in partner.asked] == [1, 1]
    assert partner.num_closed == 2


def test_ctrl_c_twice_leaves():
    stopped = Scripted(KeyboardInterrupt())
    talk(stopped, "a", KeyboardInterrupt(), "b")
    assert len(stopped.asked) == 1
    partner = Scripted(*PIECES)
    lines = [KeyboardInterrupt(), "a", KeyboardInterrupt(), KeyboardInterrupt(), "b"]
    text, _ = talk(partner, *lines, TERM="dumb")
    assert len(partner.asked) == 1
    assert text.count("Ctrl-C again, /quit or Ctrl-D leaves") == 2


def test_an_error_leaves_the_conversation_as_it_was():
    partner = Scripted(EngineError("it broke"))
    text, made = talk(partner, "a", "caf\udce9", TERM="dumb")
    assert text.startswith("eaglerun: it broke\neaglerun: message: is no text in this terminal")
    assert made.failed and len(partner.asked) == 1


def test_an_end_by_length_is_told():
    ending = Ending("length", 100, None)
    text, _ = talk(Scripted(Piece(content="x"), ending), "a", TERM="dumb")
    assert text.startswith("x\n100 tokens, ") and text.endswith("cut at --max-tokens 100\n")
    text, _ = talk(Scripted(Piece(content="x"), Ending("length", 9, None)), "a", TERM="dumb")
    assert text.endswith("cut at the model's length\n")


def split(text: str, *tokens: tuple[str, bool]) -> list[tuple[str, bool]]:
    tints = Tints()
    tints.add(tokens)
    return list(tints.split(text))


def test_tints_follow_the_text():
    assert split("ab", ("a", True), ("b", False)) == [("a", True), ("b", False)]
    # A marker, or what else the parsers took away, is passed over.
    assert split("b", ("</mm:think>", True), ("xx", True), ("b", False)) == [("b", False)]
    # A character of several tokens is where its last part is.
    parts = [("\ufffd", False), ("\ufffd", True), ("b", False)]
    assert split("éb", *parts) == [("é", True), ("b", False)]
    # Unknown characters are as the one before.
    assert split("a?b", ("a", True), ("b", False)) == [("a?", True), ("b", False)]
    assert split("x") == [("x", False)]


def test_an_answer_cannot_drive_the_terminal():
    assert printable("a\x1b[2J\tb\nc\x07\x9b") == "a\ufffd[2J\tb\nc\ufffd\ufffd"
    assert printable("né 😀") == "né 😀"


def test_ctrl_c_waits_for_the_end_of_a_step():
    steps = []

    def events() -> Iterator[Tokens | Finished]:
        try:
            for number in range(9):
                if number == 1:
                    signal.raise_signal(signal.SIGINT)
                steps.append(number)
                yield Tokens("r", 0, (number,), "x")
        finally:
            steps.append("closed")

    with pytest.raises(KeyboardInterrupt):
        list(_shielded(events()))
    assert steps == [0, 1, "closed"]

    def stuck() -> Iterator[Tokens | Finished]:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the second comes through at once")
        yield

    with pytest.raises(KeyboardInterrupt):
        list(_shielded(stuck()))


# Servers.


class Other(http.server.BaseHTTPRequestHandler):
    """An OpenAI server that knows nothing of drafts. ``replies`` by path: status and body."""

    replies: dict[str, tuple[int, str]] = {}
    bodies: list[dict[str, Any]] = []

    def do_GET(self) -> None:
        self.reply()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.bodies.append(json.loads(body))
        self.reply()

    def reply(self) -> None:
        status, body = self.replies[self.path]
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def other_server(**replies: tuple[int, str]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    handler = type("Handler", (Other,), {"bodies": [], "replies": {}})
    handler.replies = {
        "/v1/models": replies.get("models", (200, '{"data": [{"id": "m"}]}')),
        "/v1/chat/completions": replies.get("chat", (200, "")),
    }
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", handler.bodies
        server.shutdown()
        thread.join()


def events(*chunks: Any, done: bool = True) -> tuple[int, str]:
    data = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
    return 200, "".join(data) + ("data: [DONE]\n\n" if done else "")


def chunk(text: str, reason: str | None = None, key: str = "content") -> dict[str, Any]:
    return {"choices": [{"delta": {key: text}, "finish_reason": reason}]}


def test_a_server_of_others_answers_without_tints():
    usage = {"choices": [], "usage": {"completion_tokens": 7}}
    reply = events(chunk("hm", key="reasoning"), chunk("Hi"), chunk("!", "stop"), usage)
    with other_server(chat=reply) as (url, bodies):
        partner = OverHttp(f"{url}/v1/", None, "key")
        assert (partner.name, partner.most_drafts, partner.is_ours) == ("m", None, False)
        text, _ = talk(partner, "Hello", TERM="dumb")
    assert text.startswith("hm\nHi!\n7 tokens, ") and text.endswith(" tokens/s\n")
    [body] = bodies
    assert "speculation" not in body and body["messages"][0]["content"] == "Hello"


@pytest.mark.parametrize(
    ("chat", "words"),
    [
        ((400, '{"error": {"message": "too long"}}'), "answers 400: too long"),
        ((404, "nothing"), "answers 404: Not Found"),
        (events(chunk("Hi"), {"error": {"message": "died"}}), "the answer broke off: died"),
        (events(chunk("Hi"), done=False), "closed the connection inside the answer"),
        ((200, "data: {\n\n"), "sent an event that is no JSON object"),
    ],
)
def test_an_answer_that_fails_is_one_line(chat, words):
    with other_server(chat=chat) as (url, _):
        text, made = talk(OverHttp(url, None, None), "Hello", TERM="dumb")
    last = text.splitlines()[-1]
    assert made.failed and last.startswith("eaglerun: ") and words in last


@pytest.mark.parametrize(
    ("models", "name", "words"),
    [
        ((200, "<html>"), None, "is no OpenAI server: /v1/models is no JSON"),
        ((200, '{"data": []}'), None, "is no OpenAI server: /v1/models lists no model"),
        ((404, ""), None, "answers 404: Not Found"),
        ((503, '{"error": {"message": "the model is loading"}}'), None, "503: the model is load"),
        ((401, '{"error": {"message": "no key"}}'), None, "wants another API key: --api-key KEY"),
        ((200, '{"data": [{"id": "m"}]}'), "n", "MODEL n: .* serves m"),
    ],
)
def test_a_server_that_will_not_do(models, name, words):
    with other_server(models=models) as (url, _), pytest.raises(EaglerunError, match=words):
        OverHttp(url, name, None)


def test_a_server_that_is_not_there():
    with other_server() as (url, _):
        pass
    with pytest.raises(ServerError, match=f"no answer from {url}: Connection refused"):
        OverHttp(url, None, None)
    for wrong in ("localhost:8000", "ftp://x", "http://", "http://x:y", "http://x/?a=b"):
        with pytest.raises(ConfigError, match="expected an address like http://127.0.0.1:8000"):
            OverHttp(wrong, None, None)


def test_the_command_says_what_is_wrong(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    with other_server() as (url, _):
        pass
    for argv, code, words in (
        (["--url", url], 1, f"eaglerun: no answer from {url}: Connection refused"),
        (["--url", "x"], 2, "eaglerun: --url x: expected an address"),
        (["--url", url, "--max-num-seqs", "3"], 2, "--max-num-seqs is the server's to set"),
        (["--url", url, "--config", "m3-8l-h200"], 2, "--config is the server's to set"),
        (["--temperature", "-1"], 1, "eaglerun: temperature: -1.0 is not in [0, 100]"),
        (["--thinking", "hard"], 2, "argument --thinking: invalid choice: 'hard'"),
        (["--ur", url], 2, "unknown flag --ur; did you mean '--url'?"),
    ):
        assert cli.main(["chat", *argv]) == code
        assert words in capsys.readouterr().err.splitlines()[-1]


# A real terminal. The first that a session opens is its own, so that Ctrl-C reaches it. A suite in
# the background has Ctrl-C ignored, which its children would inherit.
BECOME = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
terminal = os.open(sys.argv[1], os.O_RDWR)
for number in range(3):
    os.dup2(terminal, number)
os.execv(sys.executable, [sys.executable, "-m", "eaglerun", *sys.argv[2:]])
"""


@contextmanager
def terminal(*argv: str, **environ: str) -> Iterator[tuple[Callable[[str], str], int]]:
    """eaglerun on a terminal of its own: a function that waits for text, and where to type."""
    master, slave = pty.openpty()
    env = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {"TERM": "xterm"} | environ
    process = subprocess.Popen(
        [sys.executable, "-c", BECOME, os.ttyname(slave), *argv], env=env, start_new_session=True
    )
    seen = ""

    def until(words: str) -> str:
        nonlocal seen
        end_s = time.monotonic() + LIMIT_S
        while words not in seen:
            left_s = end_s - time.monotonic()
            ready = left_s > 0 and select.select([master], [], [], left_s)[0]
            assert ready, f"no {words!r} in {seen[-2000:]!r}"
            try:
                data = os.read(master, 1 << 16)
            except OSError:
                data = b""
            assert data, f"no {words!r} in {seen!r}"
            seen += data.decode()
        found, _, seen = seen.partition(words)
        return found

    try:
        yield until, master
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        os.close(slave)
        os.close(master)


def test_a_conversation_on_a_terminal(tmp_path: Path):
    """Tints, a number of drafts, Ctrl-C in an answer and twice at the prompt."""
    checkpoint = write_checkpoint(tmp_path)
    with serving(checkpoint, engine="--pause-ms 5") as (_, url):
        with terminal("chat", "--url", url, "--max-tokens", "40") as (until, typed):
            assert "scripted; up to 3 drafts a step; " in until("/help lists commands")
            until("green text was guessed by the draft")
            until("> ")
            os.write(typed, b"Hello\n")
            text = until("40 tokens in 20 steps, ")
            # A step gave two tokens, and the first was drafted.
            assert text.count("\x1b[32m") == 20
            assert "acceptance length 2.00, 34.5% of drafts accepted" in until("> ")
            os.write(typed, b"/drafts 0\n")
            until("at most 0 drafts a step")
            until("> ")
            os.write(typed, b"Again\n")
            assert "\x1b[32m" not in until("40 tokens in 40 steps, ")
            assert "without drafts" in until("> ")
            # Ctrl-D
            os.write(typed, b"\x04")
        endless = ("chat", "--url", url, "--max-tokens", "99999")
        with terminal(*endless, NO_COLOR="1") as (until, typed):
            until("> ")
            os.write(typed, b"Never ending\n")
            until("abc")
            os.write(typed, b"\x03")
            until("stopped; the question and what there was are forgotten")
            until("> ")
            # Python notices a Ctrl-C right before it waits for keys at the next key only.
            os.write(typed, b"\x03\n")
        # The server is told: nobody answers a client that has left.
        while b'"num_running":0' not in get(url, "/health/ready")[1]:
            continue


def test_lines_of_a_pipe_are_questions(tmp_path: Path):
    checkpoint = write_checkpoint(tmp_path)
    with serving(checkpoint) as (_, url):
        done = subprocess.run(
            [sys.executable, "-m", "eaglerun", "chat", "--url", url, "--max-tokens", "5"],
            input=b"Hello\ncaf\xe9\n",
            capture_output=True,
            env=os.environ | {"PYTHONIOENCODING": "ascii"},
            timeout=30,
        )
    assert done.returncode == 1
    assert len(done.stdout) == 6 and done.stdout.endswith(b"\n")
    assert b"message: is no text in this terminal's encoding" in done.stderr
