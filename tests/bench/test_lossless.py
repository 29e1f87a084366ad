"""The lossless check: every difference of a sound engine is explained, and no fault's is."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lossless_check import FLAGS, check, pair
from torch import Tensor

from eaglerun import start
from eaglerun.bench import lossless
from eaglerun.bench.divergence import Replay, Selections, step_of
from eaglerun.bench.lossless import Judged, first_difference, read_prompts, right_rate, script_of
from eaglerun.config import resolve
from eaglerun.engine import Engine
from eaglerun.llm import LLM
from eaglerun.loader import Models
from eaglerun.messages import Event, Request, SamplingParams
from eaglerun.models.layers import Linear
from eaglerun.plan.step import Admission, DecodeRow, PrefillChunk, StepPlan, StepResult
from eaglerun.ranks.local import runner_of
from eaglerun.server import cli
from eaglerun.start import start_engine


def test_float32_is_equal_token_for_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    code, rows = check(
        monkeypatch, tmp_path, torch.float32, "--num-drafts=0,1,3,7", "--acceptance=0.7"
    )
    assert code == 0
    assert [r["num_draft_tokens"] for r in rows] == [0, 1, 3, 7]
    for r in rows:
        assert (r["identical"], r["tokens"], r["divergences"]) == (8, 160, [])
        if r["num_draft_tokens"]:
            assert 0.55 < r["acceptance"] < 0.85
    assert rows[0]["acceptance"] is None and rows[0]["tokens_per_step"] == 1.0
    assert rows[1]["tokens_per_step"] < rows[2]["tokens_per_step"] < rows[3]["tokens_per_step"]


def test_prompts_of_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps([[5, 6, 7], [8] * 30, [9]]))
    flags = ("--num-drafts=2", f"--prompts={file}", "--num-prompts=2", "--output-len=6")
    code, [row] = check(monkeypatch, tmp_path, torch.float32, *flags)
    assert (code, row["sequences"]) == (0, 2)
    for text in ("[[1.5]]", "{}", "[[]]", "[1]"):
        file.write_text(text)
        assert cli.main(["lossless", *FLAGS, *flags]) == 2


def test_the_demos_prompts_are_saved(tmp_path: Path):
    file = tmp_path / "prompts.json"
    flags = ["--device=cpu", "--num-prompts=842", f"--save-prompts={file}"]
    assert cli.main(["lossless", *flags]) == 0
    prompts = read_prompts(file, 842)
    # All tasks in one thinking mode, then the first problems once more in the next.
    assert len(set(prompts)) > 800 and max(map(len, prompts)) > 1024


def test_a_models_own_drafts_are_compared_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    code, rows = check(monkeypatch, tmp_path, torch.float32, "--num-drafts=2")
    assert code == 0 and rows[0]["identical"] == 8 and 0 < rows[0]["acceptance"] < 1


class Rounding(Engine):
    """With a draft, every product of the target is off by a quarter of a bf16 step, as if its
    sums were in another order; a small model on a CPU sums any number of rows alike."""

    def step(self) -> list[Event]:
        if not self.num_draft_tokens:
            return super().step()
        hooks = [
            module.register_forward_hook(
                lambda _, args, y: (y * (1 + 2**-10 * torch.randn(y.shape))).to(y.dtype)
            )
            for module in runner_of(self).target.modules()
            if isinstance(module, Linear)
        ]
        events = super().step()
        for hook in hooks:
            hook.remove()
        return events


def test_bfloat16_parts_at_near_ties(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(start, "Engine", Rounding)
    torch.manual_seed(0)
    flags = ("--num-prompts=24", "--max-num-seqs=24", "--num-drafts=7", "--acceptance=0.7")
    code, [row] = check(monkeypatch, tmp_path, torch.bfloat16, *flags)
    assert code == 0
    assert row["by_kind"]["tokens"] > 0 and row["by_kind"]["experts"] > 0
    assert row["identical"] == 24 - len(row["divergences"])
    assert row["tokens"] < 24 * 20
    assert row["per_1000"] == pytest.approx(1000 * len(row["divergences"]) / row["tokens"])
    for d in row["divergences"]:
        found = d["explanation"]
        assert d["plain"] != d["draft"] and max(found["below"]) <= 2
        if found["kind"] == "experts":
            assert found["experts"] > 0
            assert max(found["short"]) <= 2 or any(found["undone"])


class Corrupted(Engine):
    """With a draft, one layer's values of the first key of every block are lost."""

    def step(self) -> list[Event]:
        if self.num_draft_tokens:
            runner_of(self).target_kv.layers[2].v[:, 0] = 0
        return super().step()


class Careless(Engine):
    """With a draft, one layer's router forgets its bias."""

    def step(self) -> list[Event]:
        gate = runner_of(self).target.layers[2].mlp.gate
        kept = gate.e_score_correction_bias
        if self.num_draft_tokens:
            gate.e_score_correction_bias = torch.nn.Parameter(0 * kept, requires_grad=False)
        events = super().step()
        gate.e_score_correction_bias = kept
        return events


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", [Corrupted, Careless])
def test_a_fault_is_not_explained_away(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: type[Engine], dtype: torch.dtype
):
    monkeypatch.setattr(start, "Engine", fault)
    code, [row] = check(monkeypatch, tmp_path, dtype, "--num-drafts=2", "--acceptance=0.7")
    assert code == 1
    assert row["by_kind"]["unexplained"] > 1


def test_an_early_end_is_no_rounding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    class Hasty(Engine):
        def submit(self, request: Request) -> None:
            if self.num_draft_tokens and request.request_id.endswith("-3"):
                request = replace(request, sampling=replace(request.sampling, max_tokens=5))
            super().submit(request)

    monkeypatch.setattr(start, "Engine", Hasty)
    code, [row] = check(monkeypatch, tmp_path, torch.float32, "--num-drafts=1")
    assert code == 1
    assert [(d["sequence"], d["at"], d["draft"]) for d in row["divergences"]] == [(3, 5, -1)]
    assert row["by_kind"]["unexplained"] == 1


def differing_runs(
    models: Models, prompt: list[int], turned: Tensor
) -> tuple[tuple[int, int], tuple[Selections, Selections]]:
    """The token after ``prompt`` and all selections, without and with ``turned`` added to the bias
    of the router of layer 2. A lone sequence, so that nothing else differs."""
    bias = models.target.layers[2].mlp.gate.e_score_correction_bias
    config = resolve({"device": "cpu", "num_kv_blocks": 16, "max_model_len": 64}, environ={})
    tokens, selections = [], []
    for share in (0.0, 1.0):
        engine = start_engine(config, Models("tiny", models.target, None, (0,)))
        recorded = Selections(runner_of(engine), 1, 32)
        kept = bias.clone()
        bias.add_(share * turned)
        params = SamplingParams(temperature=0.0, max_tokens=1, seed=0, ignore_eos=True)
        out = LLM.from_engine(engine).generate([prompt], params, progress=False)
        bias.copy_(kept)
        recorded.stop()
        tokens.append(out[0].token_ids[0])
        selections.append(recorded)
    return (tokens[0], tokens[1]), (selections[0], selections[1])


@torch.inference_mode()
def test_a_replay_knows_both_sides_of_a_turned_selection():
    models = pair(torch.float32)
    bias = models.target.layers[2].mlp.gate.e_score_correction_bias
    replay = Replay(models.target, 32, (torch.float32, torch.float32))
    kinds = []
    for token in range(40):
        tokens, recorded = differing_runs(models, [token], bias.roll(1) - bias)
        if tokens[0] != tokens[1]:
            found = replay.explain([token], tokens, (recorded[0].of(0, 1), recorded[1].of(0, 1)))
            # Each token is the best of its own path; the turn itself is no near tie.
            assert found.below == (0.0, 0.0) and found.short[0] == 0.0 and found.experts > 0
            kinds.append((found.kind, found.short[1] > 2))
    assert kinds and all((kind == "unexplained") == far for kind, far in kinds)
    assert ("unexplained", True) in kinds


@torch.inference_mode()
def test_a_selection_too_far_to_be_a_tie_is_undone_and_has_to_be_of_no_effect():
    models = pair(torch.float32)
    gate = models.target.layers[2].mlp.gate
    bias = gate.e_score_correction_bias
    replay = Replay(models.target, 32, (torch.float32, torch.float32))
    scores: list[Tensor] = []
    hook = gate.register_forward_hook(
        lambda _, args, output: scores.append((args[0][-1] @ gate.weight.T).sigmoid())
    )
    explained = 0
    for token in range(20):
        prompt = [1, token]
        scores.clear()
        differing_runs(models, prompt, torch.zeros_like(bias))
        # The best expert that is not chosen comes within a hair of the last that is.
        choice = (scores[0] + bias).sort(descending=True)
        near = torch.zeros_like(bias)
        next_one = choice.indices[gate.topk]
        near[next_one] = choice.values[gate.topk - 1] - choice.values[gate.topk] - 5e-6
        bias.add_(near)
        turn = torch.zeros_like(bias)
        turn[next_one] = 1e-5
        tokens, recorded = differing_runs(models, prompt, turn)
        if tokens[0] != tokens[1]:
            plain, other = recorded[0].of(0, 2), recorded[1].of(0, 2)
            found = replay.explain(prompt, tokens, (plain, other))
            assert found.kind == "experts" and max(found.short) <= 2 and found.undone == (0, 0)
            # Another expert for the first token in the last layer: nothing comes of it.
            last = max(other.experts)
            first_token = other.experts[last][0]
            first_token[0] = next(e for e in range(8) if e not in first_token.tolist())
            found = replay.explain(prompt, tokens, (plain, other))
            assert found.kind == "experts" and found.short[1] > 2 and found.undone == (0, 1)
            # The turn is what leads to the other token: with it so far as to be undone as well,
            # nothing explains that token.
            bias[next_one] -= 0.01
            assert replay.explain(prompt, tokens, (plain, other)).kind == "unexplained"
            bias[next_one] += 0.01
            explained += 1
        bias.sub_(near)
    hook.remove()
    assert explained > 0


def test_a_step_is_bf16s_own_spacing():
    values = torch.tensor([1.0, 1.99, 4.5, 0.3, -5.0, 0.0])
    expected = [2**-7, 2**-7, 2**-5, 2**-9, 2**-5, 2**-8]
    assert step_of(values, torch.bfloat16).tolist() == expected
    up = torch.nextafter(torch.tensor(4.5, dtype=torch.bfloat16), torch.tensor(9.0).bfloat16())
    assert float(up) - 4.5 == 2**-5
    assert step_of(values, torch.float32).tolist() == [step / 256 for step in expected]


def test_first_differences():
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 9, 3]) == 1
    assert first_difference([1, 2, 3], [1, 2]) == first_difference([1, 2], [1, 2, 3]) == 2


@pytest.mark.parametrize("num_drafts", [1, 3, 7])
def test_scripts_are_right_as_often_as_asked(num_drafts: int):
    rate = right_rate(0.7, num_drafts)
    accepted = sum(rate**i for i in range(1, num_drafts + 1))
    assert accepted / num_drafts == pytest.approx(0.7)
    answer = list(range(5000))
    script = script_of([[1, 2]], [answer], rate, 5000, 0)(0, 6000)
    right = script[2:5002] == torch.arange(5000)
    assert float(right.float().mean()) == pytest.approx(rate, abs=0.02)
    assert script.min() >= 0 and script.max() < 5000


def test_only_steps_before_the_end_are_counted():
    judged = Judged(2)
    admissions = [
        Admission(slot, SamplingParams(), seed, (), (), 0, -1) for slot, seed in ((5, 0), (6, 1))
    ]
    chunks = tuple(PrefillChunk(slot, (1,), 0, -1, 3) for slot in (5, 6))
    rows = tuple(DecodeRow(slot, 3, 3, 9) for slot in (5, 6))
    judged(StepPlan(0, tuple(admissions), (), (), chunks, 0, 3, -1), StepResult(0, (), (), (7, 8)))
    decoded = StepPlan(1, (), (), rows, (), 3, 3, -1)
    judged(decoded, StepResult(1, ((1, 2, 3, 4), (1,)), (3, 0), ()))
    judged(decoded, StepResult(2, ((1, 2), (1, 2)), (1, 1), ()))
    # Sequence 0: steps at 1 and 5, each with 3 drafts; sequence 1: at 1 and 2.
    assert judged.totals([20, 20]) == (4, 12, 5)
    assert judged.totals([8, 5]) == (2, 6, 3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-drafts=1,x"], "--num-drafts 1,x: expected whole numbers"),
        (["--num-drafts=9"], "--num-drafts 9: allowed 0 to 8"),
        (["--input-lens=5"], "--input-lens 5: expected LOW,HIGH"),
        (["--input-lens=9,5"], "expected LOW,HIGH"),
        (["--num-prompts=0"], "--num-prompts 0: allowed 1 or more"),
        (["--acceptance=1.5"], "--acceptance 1.5: allowed 0 to 1"),
        (["--draft=none"], "draft = none: there is nothing to compare"),
        (["--prompts=demo"], "chats need a checkpoint"),
        (["--prompts=/nowhere.json"], "--prompts /nowhere.json: "),
        (["--output-len=9999"], "the longest prompt and answer are 10119 tokens"),
    ],
)
def test_refusals(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
):
    models = pair(torch.float32)
    monkeypatch.setattr(lossless, "load_models", lambda config, progress: models)
    assert cli.main(["lossless", *FLAGS, *flags]) == 2
    assert message in capsys.readouterr().err
