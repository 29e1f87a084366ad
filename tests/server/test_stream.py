"""Every answer ends once, in every case: failures, clients that go away, several requests."""

import asyncio

import pytest
from fake_engine import FakeEngine, FakeEvents, Reply, Script, call, make_app, post

from eaglerun.errors import CapacityError, EngineError
from eaglerun.messages import Event, Request

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


def test_a_failure_before_the_first_token_has_its_own_status():
    app = make_app(FakeEngine(Script(fail=0)))
    for stream in (False, True):
        reply = post(app, "/v1/chat/completions", CHAT | {"stream": stream})
        assert reply.status == 503 and reply.error["message"] == "the engine died"
        assert reply.headers["retry-after"] == "1"


def test_a_failure_in_a_stream_is_its_last_event():
    app = make_app(FakeEngine(Script(fail=2)))
    reply = post(app, "/v1/chat/completions", CHAT | {"stream": True})
    assert reply.status == 200
    *_, last = reply.events()
    assert last["error"]["message"] == "the engine died"
    assert last["error"]["request_id"] == reply.headers["x-request-id"]
    assert b"[DONE]" not in reply.body


def test_a_failure_of_a_whole_answer_is_no_half_answer():
    app = make_app(FakeEngine(Script(fail=2)))
    reply = post(app, "/v1/chat/completions", CHAT)
    assert reply.status == 503 and reply.error["type"] == "server_error"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (CapacityError("waited too long"), "waited too long"),
        (EngineError("0x7f"), "the engine is not running"),
    ],
)
@pytest.mark.parametrize("prompt", ["a", ["a", "b"]])
def test_an_error_while_iterating(error, message, prompt):
    class Breaking(FakeEngine):
        async def submit(self, request: Request):
            events = await super().submit(request)
            inner = events.__anext__
            count = 0

            async def anext() -> Event:
                nonlocal count
                count += 1
                if count > 1:
                    raise error
                return await inner()

            class Events:
                take_ready = events.take_ready
                aclose = events.aclose
                __anext__ = staticmethod(anext)

                def __aiter__(self):
                    return self

            return Events()

    for stream, status in ((False, 503), (True, 200)):
        body = {"prompt": prompt, "stream": stream}
        reply = post(make_app(Breaking()), "/v1/completions", body)
        assert reply.status == status
        last = reply.events()[-1] if stream else reply.json()
        assert last["error"]["message"] == message


@pytest.mark.parametrize("prompt", ["a", ["a", "b"]])
def test_events_that_end_too_early(prompt):
    class Short(FakeEngine):
        async def submit(self, request: Request):
            events = await super().submit(request)
            events._events.pop()
            return events

    reply = post(make_app(Short()), "/v1/completions", {"prompt": prompt, "stream": True})
    assert reply.events()[-1]["error"]["message"] == "the engine is not running"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("num_events", [0, 2])
@pytest.mark.parametrize("path", ["chat/completions", "completions", "responses"])
def test_a_client_that_goes_away_aborts(stream, num_events, path):
    """Queued (no event yet) or running."""

    async def run() -> None:
        gate, gone = asyncio.Semaphore(0), asyncio.Event()
        engine = FakeEngine(Script(gate=gate))
        body = {"chat/completions": CHAT, "completions": {"prompt": ["a", "b"]}}
        fields = body.get(path, {"input": "hi"}) | {"stream": stream}
        task = asyncio.create_task(call(make_app(engine), "POST", f"/v1/{path}", fields, gone=gone))
        while len(engine.requests) < (2 if path == "completions" else 1):
            await asyncio.sleep(0)
        for _ in range(num_events):
            gate.release()
        while num_events and gate._value:
            await asyncio.sleep(0)
        assert not engine.aborted
        gone.set()
        reply = await asyncio.wait_for(task, 10)
        assert sorted(engine.aborted) == sorted(request.request_id for request in engine.requests)
        assert b"[DONE]" not in reply.body
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(run())


def test_a_client_that_stays_aborts_nothing():
    async def run() -> None:
        engine = FakeEngine()
        app = make_app(engine)
        for stream in (False, True):
            reply = await call(app, "POST", "/v1/chat/completions", CHAT | {"stream": stream})
            assert reply.status == 200
        assert engine.aborted == []
        await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(run())


def test_a_server_that_stops_cancels_through():
    """A cancellation that is not the client's goes on."""

    async def run() -> None:
        engine = FakeEngine(Script(gate=asyncio.Semaphore(0)))
        task = asyncio.create_task(call(make_app(engine), "POST", "/v1/chat/completions", CHAT))
        while not engine.requests:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(engine.aborted) == 1

    asyncio.run(run())


def test_the_second_prompt_refused_takes_the_first_back():
    class Full(FakeEngine):
        async def submit(self, request: Request):
            if self.requests:
                raise CapacityError("the queue is full")
            return await super().submit(request)

    engine = Full()
    reply = post(make_app(engine), "/v1/completions", {"prompt": ["a", "b"]})
    assert reply.status == 503
    assert engine.aborted == [engine.requests[0].request_id]


def test_many_streams_at_once_stay_apart():
    async def run() -> None:
        engine = FakeEngine(Script(lambda request, i: f"seed {request.sampling.seed}"))
        app = make_app(engine)
        replies = await asyncio.gather(
            *(
                call(app, "POST", "/v1/chat/completions", CHAT | {"seed": i, "stream": True})
                for i in range(50)
            )
        )
        for i, reply in enumerate(replies):
            deltas = [e["choices"][0]["delta"] for e in reply.events()[:-1]]
            assert "".join(delta.get("content", "") for delta in deltas) == f"seed {i}"

    asyncio.run(run())


@pytest.mark.parametrize("prompt", ["a", ["a", "b"]])
def test_an_unknown_failure_says_nothing_of_itself(prompt):
    class BrokenEvents(FakeEvents):
        async def __anext__(self):
            raise KeyError("/srv/secret")

    class Broken(FakeEngine):
        async def submit(self, request: Request):
            return BrokenEvents(self, request)

    reply = Reply(0, {}, [])
    with pytest.raises(KeyError):
        post(make_app(Broken()), "/v1/completions", {"prompt": prompt}, reply=reply)
    assert reply.status == 500
    assert reply.error["message"].startswith("the server failed to answer")
    assert b"secret" not in reply.body
