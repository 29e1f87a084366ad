"""The tool of a forced call, where several are offered: the model chooses it, and only among them.

The names' token ids are a tree. Where its branches part, the model is asked for one token with
all others out of reach. Everything up to there is the engine's cached prefix, so this costs one
token for each parting.
"""

from dataclasses import replace

from eaglerun.messages import Failed, Request, SamplingParams, Tokens
from eaglerun.server.client import EngineClient
from eaglerun.server.failures import RETRY_AFTER, ApiError
from eaglerun.server.fields import MAX_BIAS
from eaglerun.server.prepared import Prompt


async def with_chosen_tool(client: EngineClient, prompt: Prompt, request: Request) -> Prompt:
    """The prompt with the opening tag of one of its tools, chosen by the request's sampling.

    Penalties and biases of the request do not bear on the choice; all of its answers share it.
    """
    tails = dict(prompt.tails)
    chosen: tuple[int, ...] = ()
    while len(tails) > 1:
        depth = len(chosen)
        branches = {ids[depth] for ids in tails.values() if depth < len(ids)}
        if len(branches) > 1:
            asked = Request(
                f"{request.request_id}-tool-{depth}",
                prompt.token_ids + chosen,
                _one_of(branches, request.sampling),
                request.priority,
                request.cache_salt,
            )
            token = await _first_token(client, asked)
        else:
            [token] = branches
        tails = {text: ids for text, ids in tails.items() if ids[depth : depth + 1] == (token,)}
        chosen += (token,)
    if not tails:
        raise ApiError(
            500, "tool_choice: the model chose none of the tools", "tool_choice", "no_tool_chosen"
        )
    return prompt.with_tail(*next(iter(tails.items())))


def _one_of(token_ids: set[int], sampling: SamplingParams) -> SamplingParams:
    return replace(
        sampling,
        n=1,
        max_tokens=1,
        min_tokens=0,
        logit_bias=dict.fromkeys(sorted(token_ids), float(MAX_BIAS)),
        repetition_penalty=1.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        stop=(),
        stop_token_ids=(),
        logprobs=None,
        prompt_logprobs=None,
        num_draft_tokens=0,
    )


async def _first_token(client: EngineClient, request: Request) -> int:
    events = await client.submit(request)
    try:
        async for event in events:
            if isinstance(event, Tokens):
                return event.token_ids[0]
            if isinstance(event, Failed):
                raise ApiError(503, event.message, headers=RETRY_AFTER)
    finally:
        await events.aclose()
    raise ApiError(503, "the engine said nothing", headers=RETRY_AFTER)
