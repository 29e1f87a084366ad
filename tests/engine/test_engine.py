"""What a user of the engine relies on, one behaviour a test, on a tiny random pair in float64."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from engine.schedules import EOS, VOCAB, ScriptedDraftLength, Wish, letters, pair, play
from pairs import CPU, target_spec, without_draft

from eaglerun import loader
from eaglerun.config import resolve
from eaglerun.engine import Engine
from eaglerun.errors import ConfigError, RequestError
from eaglerun.kernels import launch
from eaglerun.kernels.rows import Rows
from eaglerun.llm import LLM
from eaglerun.messages import Failed, Finished, FinishReason, Request, SamplingParams
from eaglerun.ranks.local import runner_of
from eaglerun.run import decode
from eaglerun.run.pending import Clock
from eaglerun.speculative.eagle3 import Eagle3
from eaglerun.start import start_engine

GREEDY = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
PROMPT = tuple(range(3, 25))


def make(
    k: int = 3,
    ks: tuple[int, ...] = (),
    draft: bool = True,
    served: bool = False,
    **settings: object,
) -> Engine:
    models = pair(0, 4, torch.float64)
    config = {
        "draft": "tiny" if draft else None,
        "num_draft_tokens": k,
        "max_model_len": 96,
        "num_kv_blocks": 100,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 128,
        "log_stats_every": 0,
        **settings,
    }
    policy = ScriptedDraftLength(ks) if ks else None
    return start_engine(
        resolve(config, environ={}),
        models if draft else without_draft(models),
        policy,
        served=served,
    )


def answer(engine: Engine, params: SamplingParams, prompt: tuple[int, ...] = PROMPT):
    return LLM.from_engine(engine).generate([list(prompt)], params, progress=False)[0]


PLAIN = answer(make(draft=False), GREEDY).token_ids
# The token that appears for the first time latest in the plain answer.
LATE = max(set(PLAIN), key=PLAIN.index)


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("at", range(12))
def test_a_stop_at_any_offset_of_an_accepted_run_ends_there(at: int, lag: int):
    """Stop token, EOS, stop string and max_tokens: same end as the plain engine, nothing after."""
    first = PLAIN.index(PLAIN[at])
    engine = make(lag=lag)
    out = answer(engine, replace(GREEDY, stop_token_ids=(PLAIN[at],)))
    assert out.token_ids == PLAIN[: first + 1]
    assert (out.finish_reason, out.outputs[0].stop_reason) == (FinishReason.STOP, PLAIN[at])
    assert engine.stats.emitted_tokens == first + 1

    letter = letters().id_to_token(PLAIN[at])
    out = answer(make(lag=lag), replace(GREEDY, stop=(letter,)))
    assert out.token_ids == PLAIN[: first + 1]
    assert out.text == letters().decode(PLAIN[:first])
    assert out.outputs[0].stop_reason == letter

    out = answer(make(lag=lag), replace(GREEDY, max_tokens=at + 1))
    assert (out.token_ids, out.finish_reason) == (PLAIN[: at + 1], FinishReason.LENGTH)

    bias = {PLAIN[at]: -100.0, EOS: 100.0}
    plain = answer(make(draft=False), replace(GREEDY, ignore_eos=False, logit_bias=bias))
    out = answer(make(lag=lag), replace(GREEDY, ignore_eos=False, logit_bias=bias, min_tokens=at))
    assert EOS not in out.token_ids[:at]
    assert out.token_ids[at] == EOS and len(out.token_ids) == at + 1
    assert plain.token_ids == (EOS,)


def test_tokens_past_the_end_are_trimmed_and_counted_as_such():
    engine = make(k=8)
    answer(engine, replace(GREEDY, stop_token_ids=(LATE,)))
    stats = engine.stats
    assert stats.acceptance.accepted > 0
    emitted = stats.prefill_samples + stats.decode_rows + stats.acceptance.accepted
    assert stats.emitted_tokens == emitted - stats.trimmed_tokens


def test_lag_discards_the_step_of_an_ended_sequence():
    engine = make(lag=1)
    answer(engine, replace(GREEDY, stop_token_ids=(LATE,)))
    assert engine.stats.steps_discarded == 1
    engine.scheduler.check_integrity()
    assert engine.pool.num_held == 0


def poison(engine: Engine) -> None:
    """NaN into every cell that no committed position of a live or published block owns."""
    runner, size = runner_of(engine), engine.pool.block_size
    keep = torch.zeros(engine.pool.num_blocks, size, dtype=torch.bool)
    keep_draft = keep.clone()
    for seq in engine.scheduler.sequences():
        ends = ((keep, seq.num_computed), (keep_draft, max(seq.num_computed, 0)))
        if seq.num_computed == len(seq.token_ids) - 1:
            # The draft's row of the newest token is there already.
            ends = ((keep, seq.num_computed), (keep_draft, len(seq.token_ids)))
        for mask, end in ends:
            for position in range(min(end, len(seq.block_ids) * size)):
                mask[seq.block_ids[position // size], position % size] = True
        if seq.block_ids:
            keep_draft[seq.block_ids[0], 0] = False
    published = list(engine.pool.published())
    keep[published] = True
    keep_draft[published] = True
    with torch.inference_mode():
        for region in runner.target_kv.regions():
            region.tensor[~keep] = torch.nan
        drafter = runner.drafter
        assert isinstance(drafter, Eagle3)
        for region in drafter.kv.regions():
            region.tensor[~keep_draft] = torch.nan
        drafter.block_carry[~keep.all(dim=1)] = torch.nan
        assert runner.aux is not None
        runner.aux.fill_(torch.nan)


@pytest.mark.parametrize("ks", [(0,), (3,), (8, 0, 1)])
def test_poisoned_memory_changes_nothing(ks: tuple[int, ...]):
    prompts = (PROMPT, PROMPT[:9] + (30, 31), tuple(range(5, 38)), PROMPT[:17])
    wishes = tuple(
        Wish(p, replace(GREEDY, seed=i, temperature=float(i % 2)), 3 * i, 0, None, (9,) * (i == 2))
        for i, p in enumerate(prompts)
    )
    settings = {"ks": ks, "k": 8, "max_chunk_tokens": 5, "decode_batch_sizes": (2, 8)}
    clean = play(make(**settings), wishes)
    engine = make(**settings)
    poison(engine)
    poisoned = play(engine, wishes, watch=poison)
    assert [a.tokens for a in poisoned] == [a.tokens for a in clean]
    assert engine.stats.cached_tokens > 0 and engine.stats.preemptions == 1


def test_padding_rows_change_no_bit_and_no_count_of_experts(monkeypatch: pytest.MonkeyPatch):
    """The same steps with padding rows fed token 0, its embedding plain and then all NaN."""

    def run(engine: Engine) -> tuple[list[torch.Tensor], list[int]]:
        hidden: list[torch.Tensor] = []
        experts: list[int] = []
        forward = type(runner_of(engine).target).forward

        def keep(self, ids, rows: Rows, *rest):
            out = forward(self, ids, rows, *rest)
            hidden.append(out[rows.positions >= 0].clone())
            if rest[-1] is not None:
                experts.append(int(rest[-1]))
            return out

        monkeypatch.setattr(type(runner_of(engine).target), "forward", keep)
        params = replace(GREEDY, logit_bias={0: -100.0})
        prompts = [list(PROMPT), list(PROMPT[3:9]), list(PROMPT[5:])]
        LLM.from_engine(engine).generate(prompts, params, progress=False)
        monkeypatch.undo()
        return hidden, experts

    settings = {"decode_batch_sizes": (8,), "ks": (0, 3, 1)}
    plain_hidden, plain_experts = run(make(**settings))
    engine = make(**settings)
    weight = runner_of(engine).target.embed_tokens.weight
    kept = weight[0].clone()
    try:
        with torch.inference_mode():
            weight[0] = torch.nan
        hidden, experts = run(engine)
    finally:
        with torch.inference_mode():
            weight[0] = kept
    assert experts == plain_experts and max(experts) > 0
    assert all(torch.equal(a, b) for a, b in zip(hidden, plain_hidden, strict=True))


def test_n_answers_share_the_prompt_and_count_up_the_seed():
    params = SamplingParams(temperature=1.0, seed=11, n=3, max_tokens=12, ignore_eos=True)
    engine = make()
    events = []
    engine.submit(Request("r", PROMPT, params))
    while engine.has_work:
        events += engine.step()
    ends = {e.index: e for e in events if isinstance(e, Finished)}
    assert [ends[i].seed for i in range(3)] == [11, 12, 13]
    shared = (len(PROMPT) - 1) // 4 * 4
    assert [ends[i].num_cached_tokens for i in range(3)] == [0, shared, shared]
    out = answer(make(), params)
    for i in range(3):
        alone = answer(make(draft=False), replace(params, n=1, seed=11 + i))
        assert out.outputs[i].token_ids == alone.token_ids


def test_prefix_blocks_are_found_only_once_their_writer_has_committed():
    engine = make(max_chunk_tokens=8, lag=1)
    engine.submit(Request("writer", PROMPT, GREEDY))
    engine.submit(Request("same-step", PROMPT, GREEDY))
    events = engine.step()
    engine.submit(Request("in-flight", PROMPT, GREEDY))
    while engine.num_running < 3:
        events += engine.step()
    while engine.has_work:
        events += engine.step()
    engine.submit(Request("after", PROMPT, GREEDY))
    while engine.has_work:
        events += engine.step()
    cached = {e.request_id: e.num_cached_tokens for e in events if isinstance(e, Finished)}
    assert cached == {"writer": 0, "same-step": 0, "in-flight": 0, "after": 20}


def test_salted_prompts_do_not_share():
    engine = make()
    for salt in ("", "a", "a"):
        engine.submit(Request(f"r{engine.stats.steps}", PROMPT, GREEDY, cache_salt=salt))
        while engine.has_work:
            engine.step()
    assert engine.stats.cached_tokens == 20


@pytest.mark.parametrize("lag", [0, 1])
def test_abort_ends_once_wherever_the_request_is(lag: int):
    engine = make(lag=lag, max_num_seqs=2)
    for i in range(4):
        engine.submit(Request(str(i), PROMPT[i:], GREEDY))
    events = []
    for _ in range(4):
        events += engine.step()
    assert engine.abort("3") and engine.abort("0") and not engine.abort("nobody")
    while engine.has_work:
        events += engine.step()
    ends = [e for e in events if isinstance(e, Finished)]
    assert sorted(e.request_id for e in ends) == ["0", "1", "2", "3"]
    reasons = {e.request_id: e.reason for e in ends}
    assert reasons["0"] == reasons["3"] == FinishReason.ABORT
    assert reasons["1"] == reasons["2"] == FinishReason.LENGTH
    waiting = next(e for e in ends if e.request_id == "3")
    assert waiting.num_output_tokens == 0
    assert engine.pool.num_held == 0


def test_close_fails_what_is_open():
    engine = make()
    engine.submit(Request("a", PROMPT, GREEDY))
    engine.step()
    engine.submit(Request("b", PROMPT, GREEDY))
    assert engine.close("gone") == [Failed("a", "gone"), Failed("b", "gone")]
    assert not engine.has_work and engine.step() == []
    assert engine.pool.num_held == 0
    engine.scheduler.check_integrity()
    assert answer(engine, GREEDY).token_ids == PLAIN


def test_an_interrupted_call_leaves_a_usable_llm():
    engine = make()
    llm = LLM.from_engine(engine)

    def interrupt(plan: object, result: object) -> None:
        raise KeyboardInterrupt

    engine.observer = interrupt
    with pytest.raises(KeyboardInterrupt):
        llm.generate([list(PROMPT)], GREEDY, progress=False)
    engine.observer = None
    assert llm.generate([list(PROMPT)], GREEDY, progress=False)[0].token_ids == PLAIN


def test_an_aborted_id_is_free_once_its_end_was_handed_out():
    engine = make(lag=1)
    engine.submit(Request("r", PROMPT, GREEDY))
    engine.step()
    engine.abort("r")
    with pytest.raises(RequestError, match="'r' is already running"):
        engine.submit(Request("r", PROMPT, GREEDY))
    events = []
    while not any(isinstance(e, Finished) for e in events):
        events += engine.step()
    engine.submit(Request("r", PROMPT, GREEDY))
    while engine.has_work:
        events += engine.step()
    assert [e.reason for e in events if isinstance(e, Finished)] == ["abort", "length"]


def test_a_tiny_temperature_is_greedy():
    cold = replace(GREEDY, temperature=1e-38, seed=1)
    assert answer(make(), cold).token_ids == PLAIN


def test_processed_logprobs_of_a_greedy_request_do_not_depend_on_its_batch():
    greedy = replace(GREEDY, top_k=2, max_tokens=4, logprobs=4)
    sampled = replace(greedy, temperature=1.0, seed=2)
    llm = LLM.from_engine(make(logprobs_mode="processed"))
    prompts = [list(PROMPT), list(PROMPT)]
    alone = llm.generate(prompts[:1], greedy, progress=False)[0].logprobs
    beside = llm.generate(prompts, [greedy, sampled], progress=False)[0].logprobs
    assert alone is not None and beside is not None
    for a, b in zip(alone, beside, strict=True):
        assert [p for _, p in a.top] == pytest.approx([p for _, p in b.top])


@pytest.mark.parametrize(
    ("prompts", "params", "words"),
    [
        ("text", None, "prompts: is one string"),
        ([1, 2], None, r"prompts\[0\]: 1 is no text and no list"),
        ([[1], ["a"]], None, r"prompts\[1\]: token ids must be integers"),
        ([[1.5]], None, r"prompts\[0\]: token ids must be integers"),
        ([[1]], {"temperature": 0}, "expected SamplingParams, or a list"),
        ([[1]], [GREEDY, GREEDY], "2 sampling params for 1 prompts"),
    ],
)
def test_generate_refuses_what_it_cannot_mean(prompts: object, params: object, words: str):
    with pytest.raises((RequestError, ConfigError), match=words):
        LLM.from_engine(make()).generate(prompts, params, progress=False)


def test_priority_then_arrival():
    engine = make(max_num_seqs=1)
    for name, priority in (("low", 5), ("first", 0), ("second", 0)):
        engine.submit(Request(name, PROMPT, replace(GREEDY, max_tokens=2), priority))
    order = []
    while engine.has_work:
        order += [e.request_id for e in engine.step() if isinstance(e, Finished)]
    assert order == ["first", "second", "low"]


def test_hidden_states_are_the_taps_of_every_position():
    engine = make(return_aux_hidden_states=True)
    out = answer(engine, GREEDY)
    tokens = (*PROMPT, *out.token_ids)[:-1]
    again = answer(make(return_aux_hidden_states=True), replace(GREEDY, max_tokens=1), tokens)
    assert out.aux_hidden_states is not None and again.aux_hidden_states is not None
    assert out.aux_hidden_states.shape == (3, len(tokens), 32)
    torch.testing.assert_close(out.aux_hidden_states, again.aux_hidden_states)


@pytest.mark.parametrize("lag", [0, 1])
def test_hidden_states_wait_for_their_positions_with_the_result(
    lag: int, monkeypatch: pytest.MonkeyPatch
):
    """The copies arrive when the device has reached the end of a step, and not before."""
    settings = {"return_aux_hidden_states": True, "lag": lag}
    expected = answer(make(**settings), GREEDY).aux_hidden_states
    late: list[tuple[torch.Tensor, torch.Tensor]] = []

    def leave(tensor: torch.Tensor) -> torch.Tensor:
        late.append((torch.full_like(tensor, 10**6), tensor.clone()))
        return late[-1][0]

    @torch.inference_mode()
    def wait(clock: Clock, timeout_s: float) -> bool:
        for copy, original in late:
            copy.copy_(original)
        return True

    monkeypatch.setattr(decode, "to_host", leave)
    monkeypatch.setattr(Clock, "wait", wait)
    got = answer(make(**settings), GREEDY).aux_hidden_states
    assert late and expected is not None and got is not None
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_processed_logprobs_follow_the_filters():
    params = SamplingParams(temperature=0.7, top_k=2, seed=3, max_tokens=8, logprobs=4)
    raw = answer(make(), params)
    processed = answer(make(logprobs_mode="processed"), params)
    assert raw.token_ids == processed.token_ids
    assert raw.logprobs is not None and processed.logprobs is not None
    for a, b in zip(raw.logprobs, processed.logprobs, strict=True):
        two = [p for _, p in a.top[:2]]
        want = torch.log_softmax(torch.tensor(two, dtype=torch.float64) / 0.7, 0)
        assert [p for _, p in b.top[:2]] == pytest.approx(want.tolist())
        assert all(p == -torch.inf for _, p in b.top[2:])
        assert b.rank == [t for t, _ in b.top].index(b.token_id)


def test_per_request_draft_length():
    engine = make(k=3)
    wishes = tuple(
        Wish(PROMPT, replace(GREEDY, num_draft_tokens=k), 0, 0, None, ()) for k in (0, 1)
    )
    none, one = play(engine, wishes)
    assert none.finished is not None and one.finished is not None
    assert none.finished.speculation.steps == 0
    assert one.finished.speculation.drafted == one.finished.speculation.steps > 0
    assert none.tokens == one.tokens == list(PLAIN)


def test_no_draft_allocates_nothing_of_it():
    engine = make(k=0)
    runner = runner_of(engine)
    assert runner.drafter is None and runner.aux is None
    assert all(region.name.startswith("target.") for region in runner.kv_regions())
    assert answer(engine, GREEDY).token_ids == PLAIN


@pytest.mark.parametrize(
    ("prompt", "params", "words"),
    [
        ((), GREEDY, "prompt: is empty"),
        ((VOCAB,), GREEDY, rf"prompt: token id {VOCAB} is not in \[0, {VOCAB}\)"),
        ((-1,), GREEDY, "prompt: token id -1"),
        (PROMPT * 5, GREEDY, "prompt: 110 tokens leave no room for an answer: .* 96"),
        (PROMPT, replace(GREEDY, stop_token_ids=(99,)), r"stop_token_ids: 99 is not in \[0, 40\)"),
        (PROMPT, replace(GREEDY, stop_token_ids=tuple(range(40)) * 2), "80 given, allowed 64"),
        (PROMPT, replace(GREEDY, logit_bias={40: 1.0}), r"logit_bias: 40 is not in \[0, 40\)"),
        ((1.5,), GREEDY, "prompt: holds something that is not a token id"),
    ],
)
def test_refused_requests(prompt: tuple[int, ...], params: SamplingParams, words: str):
    engine = make()
    with pytest.raises(RequestError, match=words):
        engine.submit(Request("r", prompt, params))
    assert not engine.has_work


def test_a_request_id_runs_once():
    engine = make()
    engine.submit(Request("r", PROMPT, GREEDY))
    with pytest.raises(RequestError, match="request_id: 'r' is already running"):
        engine.submit(Request("r", PROMPT, GREEDY))


def test_lengths_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="max_model_len = 300: the checkpoint allows at most 256"):
        make(max_model_len=300)
    with pytest.raises(ConfigError, match="max_model_len = 96: the KV memory holds 40 tokens"):
        make(num_kv_blocks=10)


def test_a_batch_invariant_engine_is_refused_where_it_was_not_shown(
    monkeypatch: pytest.MonkeyPatch,
):
    with pytest.raises(ConfigError) as refused:
        make(batch_invariant=True)
    assert str(refused.value) == (
        "batch_invariant = True: float64 on cpu; allowed bfloat16 on a Hopper GPU"
    )
    with pytest.raises(ConfigError, match="verification = 'rejection'.* allowed invariant"):
        make(batch_invariant=True, verification="rejection")
    monkeypatch.setattr(loader, "can_be_invariant", lambda device, dtype: True)
    with pytest.raises(ConfigError, match="sparse_block_size 4; allowed 64, 128, 256"):
        make(batch_invariant=True)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"sparse_block_size": 192}, "sparse_block_size 192; allowed 64, 128, 256"),
        ({"sparse_topk_blocks": 65}, "selected keys 8320; allowed at most 8192"),
        ({"num_attention_heads": 260}, "query heads of a KV head 65; allowed at most 64"),
        ({}, None),
    ],
)
def test_what_dense_and_selected_attention_agree_for(
    change: dict[str, int], words: str | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(loader, "can_be_invariant", lambda device, dtype: True)
    m3 = {"sparse_block_size": 128, "sparse_topk_blocks": 16, "num_attention_heads": 64}
    spec = replace(target_spec(), num_key_value_heads=4, **(m3 | change))
    config = resolve({"batch_invariant": True}, environ={})
    if words is None:
        loader.check_invariant(config, spec, CPU, torch.bfloat16)
        return
    with pytest.raises(ConfigError) as refused:
        loader.check_invariant(config, spec, CPU, torch.bfloat16)
    assert str(refused.value) == f"batch_invariant = True: {words}"


def test_the_target_alone_is_batch_invariant(monkeypatch: pytest.MonkeyPatch):
    """A draft's bits decide no token; what they cost is spared."""
    monkeypatch.setattr("eaglerun.ranks.local.check_invariant", lambda *_: None)
    inside: list[bool] = []

    @contextlib.contextmanager
    def recording(on: bool) -> Iterator[None]:
        inside.append(on)
        yield
        inside.pop()

    monkeypatch.setattr("eaglerun.run.decode.invariant", recording)
    monkeypatch.setattr("eaglerun.run.prefill.invariant", recording)
    engine = make(batch_invariant=True)
    seen: dict[str, set[bool]] = {"target": set(), "draft": set()}
    runner = runner_of(engine)
    assert isinstance(runner.drafter, Eagle3)
    for name, model in (("target", runner.target), ("draft", runner.drafter.model)):
        for module in model.modules():
            module.register_forward_pre_hook(lambda *_, name=name: seen[name].add(inside == [True]))
    assert answer(engine, GREEDY).token_ids == PLAIN
    assert seen == {"target": {True}, "draft": {False}}


def test_a_gpu_without_kernels_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launch, "arch_of", lambda device: "sm_80")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    loader.check_device(CPU)
    with pytest.raises(ConfigError) as refused:
        loader.check_device(torch.device("cuda"))
    assert str(refused.value) == (
        "device = 'cuda': no kernels for NVIDIA A100; allowed sm_90, gfx942, gfx950, cpu"
    )
