"""Scores of the accuracy evaluation, and what it refuses."""

import json
from pathlib import Path

import pytest

from eaglerun.bench.evaluate import (
    Answer,
    Problem,
    Report,
    evaluate,
    flexible_extract,
    load_problems,
    score,
    strict_match,
    write_json,
)
from eaglerun.errors import ConfigError
from eaglerun.messages import SpeculationStats

NUMBER = Problem("p", "seeds", "?", "18", True)
PHRASE = Problem("n", "needles", "?", "blue door", False)


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("<mm:think>9 * 2 = 18</mm:think>So.\n#### 18", True, True),
        ("<mm:think>#### 18</mm:think>I do not know", False, True),
        ("#### 18 apples, not 20", True, False),
        ("#### 1,018", False, False),
        ("#### 18.", True, True),
        ("the answer is 18", False, True),
        ("", False, False),
        ("#### -18", False, False),
    ],
)
def test_word_problem_scores(text: str, strict: bool, flexible: bool):
    assert strict_match(text, NUMBER) is strict
    assert flexible_extract(text, NUMBER) is flexible


def test_phrases_must_be_said():
    assert strict_match("<mm:think>x</mm:think>behind the blue door.", PHRASE)
    assert not strict_match("<mm:think>blue door</mm:think>the red one", PHRASE)


def test_a_score_sums_the_counts_of_all_answers():
    stats = SpeculationStats(
        steps=2, drafted=6, accepted=4, judged_at=(2, 2, 2), accepted_at=(2, 1, 1)
    )
    answers = [Answer("#### 18", (1,), stats), Answer("no", (2,), SpeculationStats())]
    row = score("EAGLE3", [NUMBER, NUMBER], answers)
    assert (row.n, row.strict_match, row.flexible_extract) == (2, 0.5, 0.5)
    assert row.acceptance_rate == pytest.approx(4 / 6)
    assert row.tokens_per_forward == 3.0 and row.per_position == (1.0, 0.5, 0.5)


def test_two_modes_are_compared_answer_by_answer(tmp_path: Path):
    def same(problems: object) -> list[Answer]:
        return [Answer("#### 1", (1,), SpeculationStats())] * 3

    def other(problems: object) -> list[Answer]:
        return [*same(problems)[:2], Answer("#### 2", (2,), SpeculationStats())]

    report = evaluate({"plain": same, "EAGLE3": other}, ["seeds"], 3)
    assert report.identical == {"seeds": (2, 3)}
    assert "seeds: 2 of 3 answers are the same in both modes" in report.to_text()
    write_json(report, tmp_path / "r.json")
    body = json.loads((tmp_path / "r.json").read_text())
    assert body["identical_answers"]["seeds"] == {"same": 2, "of": 3}
    assert {"n", "flexible_extract", "strict_match", "acceptance_rate", "tokens_per_forward",
            "per_position"} <= body["scores"][0].keys()  # fmt: skip
    assert isinstance(report, Report)


def test_problem_sets_are_there():
    assert len(load_problems("seeds", None)) >= 500
    assert all(p.exact and p.answer.lstrip("-").isdigit() for p in load_problems("templates", 50))
    needle = load_problems("needles", 1)[0]
    assert not needle.exact and len(needle.content) > 2000
    with pytest.raises(ConfigError, match="task = 'x': allowed seeds, templates, needles"):
        load_problems("x", 1)
