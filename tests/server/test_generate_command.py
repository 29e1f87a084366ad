"""eaglerun generate and chat with the demo pair in this process, and what they refuse."""

import io
import sys
from pathlib import Path

import pytest

from eaglerun.llm import LLM
from eaglerun.loader import DEMO
from eaglerun.messages import SamplingParams
from eaglerun.server import cli, prompt_commands

GREEDY = SamplingParams(temperature=0.0, max_tokens=8)
SHORT = ["--max-tokens", "8"]


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("EAGLERUN_DEVICE", "cpu")
    monkeypatch.setenv("EAGLERUN_LOG_STATS_EVERY", "0")


@pytest.fixture(scope="module")
def llm():
    return LLM("demo", device="cpu", log_stats_every=0)


@pytest.fixture(scope="module")
def untemplated(tmp_path_factory) -> Path:
    """The demo's target as a model that is not for chat."""
    path = tmp_path_factory.mktemp("untemplated")
    for file in (DEMO / "target").iterdir():
        if file.name not in ("chat_template.jinja", "tokenizer_config.json"):
            (path / file.name).symlink_to(file)
    return path


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = cli.main(argv)
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def said(llm: LLM, prompt: str, **more: object) -> str:
    messages = [{"role": "user", "content": prompt}]
    values = {"thinking_mode": "disabled"}
    return llm.chat(messages, GREEDY, chat_template_kwargs=values, **more)[0].text


def test_prompts_go_through_the_chat_template(llm: LLM, capsys: pytest.CaptureFixture[str]):
    argv = ["--prompt", "Hello!", "--prompt", "Who are you?", "--thinking", "disabled"]
    code, out, err = run(capsys, "generate", "demo", *SHORT, *argv)
    expected = [said(llm, "Hello!"), said(llm, "Who are you?")]
    assert (code, out) == (0, "".join(f"{text}\n" for text in expected))
    lines = err.splitlines()
    assert len(lines) == 2 and all("8 tokens (cut at --max-tokens 8)" in line for line in lines)
    assert "acceptance length " in lines[0] and "% of drafts accepted" in lines[0]


def test_thinking_is_not_among_the_answers(llm: LLM, capsys: pytest.CaptureFixture[str]):
    argv = ["--prompt", "Hello!", "--thinking", "enabled", "--num-draft-tokens", "0"]
    code, out, err = run(capsys, "generate", "demo", *SHORT, *argv)
    thinking, note = err.splitlines()
    assert (code, out) == (0, "\n")
    assert thinking and note == "eaglerun: 8 tokens (cut at --max-tokens 8)"


def test_raw_and_a_system_prompt(llm: LLM, capsys: pytest.CaptureFixture[str]):
    text = llm.generate(["Once upon"], GREEDY)[0].text
    assert run(capsys, "generate", "demo", *SHORT, "--raw", "--prompt", "Once upon")[1] == (
        f"{text}\n"
    )
    system = {"role": "system", "content": "Be brief."}
    turns = [system, {"role": "user", "content": "Hello!"}]
    values = {"thinking_mode": "disabled"}
    text = llm.chat(turns, GREEDY, chat_template_kwargs=values)[0].text
    argv = ["--system", "Be brief.", "--thinking", "disabled", "--prompt", "Hello!"]
    assert run(capsys, "generate", "demo", *SHORT, *argv)[1] == f"{text}\n"


def test_a_model_without_a_template(
    llm: LLM, untemplated: Path, capsys: pytest.CaptureFixture[str]
):
    code, out, err = run(capsys, "generate", str(untemplated), *SHORT, "--prompt", "Once upon")
    assert (code, out) == (0, llm.generate(["Once upon"], GREEDY)[0].text + "\n")
    assert err.startswith("eaglerun: the model has no chat template; prompts go as they are\n")
    code, out, err = run(capsys, "chat", str(untemplated))
    assert (code, out) == (2, "") and err.startswith(f"eaglerun: {untemplated} has no chat templ")


def test_lines_of_standard_input(
    llm: LLM, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello!\nWho are you?\n"))
    code, out, _ = run(capsys, "generate", "demo", *SHORT, "--thinking", "disabled")
    assert (code, out.count("\n")) == (0, 2) and out.startswith(said(llm, "Hello!"))
    lines = "Hello!\n/drafts 0\nWho are you?\n/quit\nnever\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    code, out, err = run(capsys, "chat", "demo", *SHORT, "--thinking", "disabled")
    assert code == 0 and out.startswith(said(llm, "Hello!") + "\n") and out.count("\n") == 2
    first, drafts, second = err.splitlines()
    assert first.startswith("8 tokens in ") and "acceptance length " in first
    assert drafts == "at most 0 drafts a step"
    assert "8 tokens in 8 steps" in second and "without drafts, cut at --max-tokens 8" in second


@pytest.mark.parametrize(
    ("argv", "stdin", "code", "words"),
    [
        ([], "", 2, "no prompt: give --prompt TEXT, or lines on standard input"),
        ([], "Hello\n \n", 2, "standard input, line 2 is empty"),
        (["--prompt", ""], "", 2, "--prompt 1 is empty"),
        (["--prompt", "x", "--prompt", "caf\udce9"], "", 2, "--prompt 2 is not UTF-8 text"),
        (["--raw", "--system", "x", "--prompt", "x"], "", 2, "--system goes through the chat"),
        (["--raw", "--thinking", "enabled", "--prompt", "x"], "", 2, "--thinking goes through"),
        (["--promt", "x"], "", 2, "unknown flag --promt; did you mean '--prompt'?"),
        (["--prompt", "x", "--max-tokens", "0"], "", 1, "max_tokens: 0 must be in [1, "),
        (["--prompt", "x", "--max-tokens", "x"], "", 2, "argument --max-tokens: invalid int"),
        (["--prompt", "word " * 3000], "", 1, "tokens leave no room for an answer"),
    ],
)
def test_what_cannot_be_asked(argv, stdin, code, words, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    found, out, err = run(capsys, "generate", "demo", *argv)
    assert (found, out) == (code, "") and words in err.splitlines()[-1]


def test_bytes_that_are_no_text(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), "utf-8"))
    assert run(capsys, "generate", "demo") == (
        2,
        "",
        "eaglerun: standard input, line 1 is not UTF-8 text\n",
    )


def test_a_terminal_of_few_characters(monkeypatch: pytest.MonkeyPatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii"))
    monkeypatch.setattr(prompt_commands, "generate", lambda config, flags: print("café") or 0)
    assert cli.main(["generate"]) == 0
    sys.stdout.flush()
    assert written.getvalue() == b"caf?\n"


def test_ctrl_c_ends_in_a_word(capsys, monkeypatch):
    def interrupted(config: object, flags: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(prompt_commands, "generate", interrupted)
    assert run(capsys, "generate", "demo") == (130, "", "eaglerun: interrupted\n")
