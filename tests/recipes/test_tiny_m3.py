"""The corpus of tiny-m3 (answers, splits, format), its two trainers, and the shipped pair."""

import ast
import contextlib
import io
import json
import operator
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "tiny-m3"
DEMO = ROOT / "configs" / "demo"
sys.path.insert(0, str(RECIPE))

import check_target  # noqa: E402
import make_eval_sets  # noqa: E402
import train_draft  # noqa: E402
import train_target  # noqa: E402
from tiny_m3 import (  # noqa: E402
    arithmetic,
    chat_format,
    checkpoints,
    code_tasks,
    composed,
    corpus,
    evalsets,
    muon,
    raw,
    structured,
    tasks,
    templates,
    wording,
)
from tiny_m3.scoring import Speaker, acceptance, flexible_match, strict_match  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
             ast.FloorDiv: operator.floordiv, ast.Div: operator.truediv}  # fmt: skip
CHAIN = re.compile(r"\d+(?: [-+x/] \d+)*(?: = \d+(?: [-+x/] \d+)*)+")
EVERY_CHAT = {**tasks.SHORT, **{f"long {k}": v for k, v in tasks.LONG.items()}}
del EVERY_CHAT["raw"]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def value_of(expression: str, names: dict[str, int]) -> float:
    """Evaluates + - * / // over numbers and names."""

    def visit(node: ast.AST) -> float:
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](visit(node.left), visit(node.right))
        return names[node.id] if isinstance(node, ast.Name) else node.value

    return visit(ast.parse(expression, mode="eval").body)


def assert_chains_hold(text: str) -> int:
    """Every a = b = c in the text has equal sides; returns how many chains there are."""
    chains = CHAIN.findall(text)
    for chain in chains:
        sides = [value_of(side.replace("x", "*"), {}) for side in chain.split(" = ")]
        assert len(set(sides)) == 1, chain
    return len(chains)


def test_there_are_templates_enough_and_the_held_out_ones_differ():
    names = [t.name for t in templates.TRAINED + templates.HELD_OUT]
    assert len(templates.TRAINED) >= 80 and len(templates.HELD_OUT) >= 10
    assert len(set(names)) == len(names)
    assert all(1 <= len(t.steps) <= 3 for t in templates.TRAINED + templates.HELD_OUT)


@pytest.mark.parametrize("template", templates.TRAINED + templates.HELD_OUT, ids=lambda t: t.name)
def test_answers_recomputed(template):
    rng = random.Random(template.name)
    for _ in range(20):
        problem = arithmetic.generate(template, rng)
        assert problem.answer == value_of(template.answer, dict(problem.values))
        assert assert_chains_hold("\n".join(problem.steps)) == len(problem.steps)
        assert "{" not in problem.question + problem.final + "".join(problem.steps)


def test_chains_of_composed_problems_and_sums_hold():
    rng = random.Random(1)
    for _ in range(300):
        problem = composed.generate(rng)
        assert assert_chains_hold("\n".join(problem.steps)) == len(problem.steps) <= 5
        assert str(problem.answer) in problem.final
        assert not set("{}[]<>|") & set(problem.question + problem.final + "".join(problem.steps))
        assert_chains_hold(tasks.sum_chat(rng)["messages"][1]["reasoning_content"])


@pytest.mark.parametrize("x,op,y,chain", [
    (46, "+", 38, "46 + 38 = 46 + 30 + 8 = 76 + 8 = 84"),
    (23, "*", 6, "23 x 6 = 20 x 6 + 3 x 6 = 120 + 18 = 138"),
    (138, "/", 6, "138 / 6 = 120 / 6 + 18 / 6 = 20 + 3 = 23"),
    (70, "*", 8, "70 x 8 = 560"), (84, "/", 7, "84 / 7 = 12"), (9, "-", 4, "9 - 4 = 5"),
])  # fmt: skip
def test_work_takes_numbers_apart(x, op, y, chain):
    assert arithmetic.work(x, op, y)[0] == chain


@pytest.mark.parametrize("x,op,y", [(3, "-", 3), (7, "/", 2), (99, "*", 99), (5, "/", 0)])
def test_work_refuses_what_is_not_a_small_whole_number(x, op, y):
    with pytest.raises(ValueError):
        arithmetic.work(x, op, y)


def test_held_out_problems_are_never_trained_on():
    rng = random.Random(2)
    held_out = {p.question for p in evalsets.held_out_seeds(300)}
    assert all(arithmetic.is_for_eval(q) for q in held_out)
    trained = [tasks.word_chat(rng)["messages"][0]["content"] for _ in range(2000)]
    assert not any(q in text for text in trained for q in held_out)


def words_of(text: str) -> list[str]:
    """Lower-case words; numbers and number slots are #, word slots are @."""
    text = re.sub(r"\{(\w+)\}", lambda m: " # " if len(m[1]) == 1 else " @ ", text.lower())
    return re.findall(r"[a-z']+|#|@", re.sub(r"\d+", "#", text))


def held_out_wording() -> list[tuple[str, re.Pattern[str]]]:
    """(template, pattern): the statements of the held-out questions, every run of ten words in
    them, and the questions as a whole; a word slot matches one or two words. Which question follows
    ("How many ... are left?") is common to many texts and counts only with all before it."""
    out = []
    for template in templates.HELD_OUT:
        statements = re.split(r"(?<=[.?]) ", template.question)[:-1]
        runs = [words_of(template.question)]
        for words in map(words_of, statements):
            runs += [words[i : i + 10] for i in range(max(len(words) - 9, 1))]
        for run in runs:
            parts = (r"\w+(?: \w+)?" if w == "@" else re.escape(w) for w in run)
            out.append((template.name, re.compile(rf"(?<!\S){' '.join(parts)}(?!\S)")))
    return out


def test_no_text_of_a_held_out_template_is_trained_on():
    rng = random.Random(7)
    texts = [tasks.draw(tasks.SHORT, rng).text() for _ in range(600)]
    texts += [composed.generate(rng).question for _ in range(2500)]
    texts += [arithmetic.generate(t, rng).question for t in templates.TRAINED]
    everything = "\n".join(" ".join(words_of(t)) for t in texts)
    found = {(name, m[0]) for name, p in held_out_wording() if (m := p.search(everything))}
    assert not found
    # The check itself finds a held-out text among the others.
    theirs = "\n".join(" ".join(words_of(p.question)) for p in evalsets.held_out_templates(24))
    assert all(p.search(theirs) for _, p in held_out_wording())


def test_visitors_questions_are_not_trained_on():
    rng = random.Random(8)
    visitors = {" ".join(words_of(v.question)) for v in evalsets.visitors()}
    assert len(visitors) == 60
    trained = {" ".join(words_of(composed.generate(rng).question)) for _ in range(4000)}
    assert not visitors & trained


@pytest.mark.parametrize("verb,person,past,form", [
    ("give", "3", False, "gives"), ("give", "I", False, "give"), ("give", "3", True, "gave"),
    ("be", "I", False, "am"), ("be", "they", True, "were"), ("carry", "3", False, "carries"),
    ("stay", "3", False, "stays"), ("pick up", "3", True, "picked up"),
    ("drop", "3", True, "dropped"), ("have", "3", False, "has"),
    ("wash", "3", False, "washes"), ("try", "3", True, "tried"),
])  # fmt: skip
def test_verbs_follow_their_subject(verb, person, past, form):
    assert wording.conjugate(verb, person, past) == form


def test_pronouns_stand_only_for_who_is_clear():
    for seed in range(200):
        rng = random.Random(seed)
        text = wording.Text(rng, {"x": "apples"})
        if any(a.first != a.later or a.person == "I" for a in text.actors.values()):
            continue
        s, o = text.actors["S"], text.actors["O"]
        text.past = False
        first = text.fill("{S} <give> {n} {x} to {Om}.", {"n": 30})
        assert first == f"{s.first} gives 30 apples to {o.first}."
        second = text.fill("{O} <have> {n}.", {"n": 40})
        if s.forms[0] == o.forms[0]:
            assert second == f"{o.first} has 40."
        else:
            assert second in (f"{o.first} has 40.", f"{o.forms[0]} has 40.")


def test_texts_without_a_chat_are_all_answer(tokenizer):
    rng = random.Random(9)
    turn, eos = (chat_format.id_of(tokenizer, t) for t in (chat_format.TURN, chat_format.EOS))
    role = np.array([0], np.uint16)
    for _ in range(50):
        sample = tasks.choose_mode(raw.raw_chat(rng), "raw", "adaptive", rng)
        (prompt,) = sample.prompts()
        assert prompt and sample.text().startswith(prompt) and sample.text().endswith("[e~[")
        ids = np.array(tokenizer.encode(sample.text(), add_special_tokens=False).ids, np.uint16)
        assert corpus.answer_mask(ids, turn, eos, role, role).all()


@pytest.mark.parametrize("task", EVERY_CHAT)
def test_generation_prompts_render_as_in_training(task):
    rng = random.Random(task)
    for mode in tasks.MODES:
        sample = tasks.choose_mode(EVERY_CHAT[task][0](rng), task, mode, rng)
        text = sample.text()
        for prompt in sample.prompts():
            assert text.startswith(prompt)
            ends = {"enabled": "<mm:think>", "disabled": "</mm:think>", "adaptive": "]~b]ai\n"}
            assert prompt.endswith(ends[mode])


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(DEMO / "target" / "tokenizer.json"))


def test_template_renders_as_transformers_renders_it(tokenizer):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(DEMO / "target")
    assert (DEMO / "target" / "chat_template.jinja").read_text() == (
        chat_format.TEMPLATE_FILE.read_text()
    )
    rng = random.Random(3)
    for task in EVERY_CHAT:
        sample = tasks.choose_mode(EVERY_CHAT[task][0](rng), task, rng.choice(tasks.MODES), rng)
        ids = theirs.apply_chat_template(
            sample.messages, tools=sample.tools, thinking_mode=sample.mode, return_dict=False
        )
        assert ids == tokenizer.encode(sample.text(), add_special_tokens=False).ids


def test_vocabulary(tokenizer):
    assert tokenizer.get_vocab_size() == 4096
    for token in chat_format.ADDED:
        assert tokenizer.token_to_id(token) == chat_format.added_id(token, 4096)
    assert tokenizer.encode("12345 and 67", add_special_tokens=False).tokens == [
        "1", "2", "3", "4", "5", "Ġand", "Ġ", "6", "7",
    ]  # fmt: skip
    ids = tokenizer.encode("]~b]ai\n<mm:think>a</mm:think>b]<]minimax[>[[e~[").ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == (
        "ai\n<mm:think>a</mm:think>b]<]minimax[>["
    )


def test_tool_calls_round_trip(tokenizer):
    rng = random.Random(4)
    mark = re.escape(chat_format.MARK)
    calls = 0
    for _ in range(60):
        chat = structured.tool_chat(rng)
        wanted = [m["tool_calls"][0]["function"] for m in chat["messages"] if "tool_calls" in m]
        calls += len(wanted)
        text = tasks.choose_mode(chat, "tools", "adaptive", rng).text()
        text = tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=True)
        blocks = re.findall(f"{mark}<tool_call>\n(.*?)\n{mark}</tool_call>", text, re.S)
        for block, function in zip(blocks, wanted, strict=True):
            match = re.fullmatch(f'{mark}<invoke name="(.*?)">(.*){mark}</invoke>', block)
            tool = next(t for t in chat["tools"] if t["function"]["name"] == match[1])
            types = tool["function"]["parameters"]["properties"]
            arguments = {
                k: json.loads(v) if types[k]["type"] == "integer" else v
                for k, v in re.findall(f"{mark}<(\\w+)>(.*?){mark}</\\1>", match[2])
            }
            assert (match[1], arguments) == (function["name"], function["arguments"])
    assert calls > 40


def test_nested_arguments_follow_the_syntax():
    call = {"name": "f", "arguments": {"a": [1, {"b": None}], "c": {"d": "x y"}, "e": True}}
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "Sure.", "tool_calls": [{"function": call}]},
    ]
    text = chat_format.render(messages).replace(chat_format.MARK, "#")
    assert text.endswith(
        '</mm:think>Sure.#<tool_call>\n#<invoke name="f">#<a>#<item>1#</item>#<item>#<b>null#</b>'
        "#</item>#</a>#<c>#<d>x y#</d>#</c>#<e>true#</e>#</invoke>\n#</tool_call>[e~[\n"
    )


@pytest.mark.parametrize("task", code_tasks.TASKS, ids=lambda t: t.name)
def test_python_functions_do_what_was_asked(task):
    rng = random.Random(task.name)
    for _ in range(5):
        _, body, slots = code_tasks.write_function(task, rng)
        scope: dict[str, object] = {}
        with contextlib.redirect_stdout(io.StringIO()):
            exec(body, scope)
            got = eval(f"{slots['f']}({task.check[0].format(**slots)})", scope)
        assert got == eval(task.check[1].format(**slots))


def test_json_answers_have_the_types_of_their_schema():
    rng = random.Random(5)
    for _ in range(100):
        ask, reply = structured.json_chat(rng)["messages"]
        schema = json.loads(ask["content"].split("\n")[1])
        record = json.loads(reply["content"])
        types = {k: v["type"] if isinstance(v, dict) else v
                 for k, v in schema.get("properties", schema).items()}  # fmt: skip
        assert {k: structured.json_type(v) for k, v in record.items()} == types


def test_rows_hold_the_chats_and_mark_the_answers(tokenizer):
    file = str(DEMO / "target" / "tokenizer.json")
    short, long, num_bytes = corpus.make_shard(corpus.Shard(file, "test", 0, 4000, 3000))
    assert num_bytes > 15_000
    for rows, length in zip((short, long), corpus.ROW_LENS, strict=True):
        assert rows.ids.shape[1] == length and rows.answer.any()
        starts = (rows.positions[:, 1:] == 1).nonzero()[1]
        assert (starts % corpus.BLOCK == 0).all()
    row = short.ids[0]
    answer = row[short.answer[0] > 0]
    text = tokenizer.decode(answer.tolist(), skip_special_tokens=False)
    assert text.endswith("[e~[") and "]~b]user" not in text
    again, _, _ = corpus.make_shard(corpus.Shard(file, "test", 0, 4000, 3000))
    assert (again.ids == short.ids).all()


def test_rounds_of_the_corpus_differ_and_repeat():
    file = DEMO / "target" / "tokenizer.json"
    rounds = []
    for _ in range(2):
        with corpus.Supply(file, "test", 2000, 2000, 1, 2, corpus.ROW_LENS) as supply:
            assert not supply.is_ready()
            rounds.append([supply.take()[0].ids for _ in range(2)])
            assert supply.num_rounds == 2 and supply.num_tokens > 4000
    assert all(np.array_equal(a, b) for a, b in zip(*rounds, strict=True))
    assert not np.array_equal(rounds[0][0][0], rounds[0][1][0])


def test_muon_steps_are_orthogonal_and_as_long_as_adamws():
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.zeros(s)) for s in ((64, 32), (32, 32), (4, 48, 32))]
    optimizer = muon.Muon(params, lr=1e-2)
    for p in params:
        p.grad = torch.randn(p.shape) * 100
    optimizer.step()
    for p in params:
        singular = torch.linalg.svdvals(p.detach()) / (1e-2 * 0.2 * max(p.shape[-2:]) ** 0.5)
        assert 0.5 < singular.min() and singular.max() < 1.3
        assert abs(float(p.detach().pow(2).mean().sqrt()) / 2e-3 - 0.9) < 0.2


def test_scores_read_answers_as_gsm8k_does():
    assert strict_match("<mm:think>#### 3</mm:think>so\n#### 1,204[e~[", 1204)
    assert not strict_match("It is 12.", 12) and flexible_match("It is 12.", 12)
    assert not strict_match("#### 7\n#### 8", 8) and flexible_match("#### 7\n#### 8", 8)


def test_both_trainers_smoke(tmp_path, capsys):
    target, draft = tmp_path / "target", tmp_path / "draft"
    train_target.main(["--out", str(target), "--smoke"])
    train_draft.main(
        ["--target", str(target), "--out", str(draft), "--smoke", "--taps", "0", "1", "2"]
    )
    capsys.readouterr()
    assert len(json.loads((target / "curve.json").read_text())) >= 1
    assert checkpoints.load_draft(draft).config.taps == (0, 1, 2)
    assert json.loads((draft / "config.json").read_text())["vocab_size"] == 1024
    assert "word_problems_adaptive" in json.loads((draft / "acceptance.json").read_text())


def test_shipped_target_is_transformers_minimax_m3():
    difference, scale = check_target.largest_difference(DEMO / "target", 150, 0)
    assert difference < 1e-4 * scale


def test_shipped_pair_answers_and_is_accepted(tokenizer):
    model = checkpoints.load_target(DEMO / "target").eval()
    draft = checkpoints.load_draft(DEMO / "draft").eval()
    problems = evalsets.held_out_seeds(500)[100:104]
    speaker = Speaker(model, tokenizer, 4)
    scores, _, sequences = speaker.word_problems(problems, "adaptive", 300)
    assert scores["strict_match"] == 1.0
    assert acceptance(model, draft, sequences, 3, 4).rate > 0.9


def test_shipped_pair_is_small_and_the_sets_are_the_generator_s():
    files = [f for f in DEMO.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 24 * 2**20
    for name in make_eval_sets.SETS:
        assert (DEMO / "eval" / name).read_text() == make_eval_sets.lines(name)
