"""The routes. create_app() builds everything from what it is given; nothing here is global."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRouter
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from eaglerun.server import answers
from eaglerun.server.auth import Guard
from eaglerun.server.bodies import json_route
from eaglerun.server.chat import Chat
from eaglerun.server.client import EngineClient, EngineStatus
from eaglerun.server.failures import ApiError, install_handlers
from eaglerun.server.generate import (
    Backend,
    chat_completion,
    completion,
    detokenize,
    response,
    tokenize,
)
from eaglerun.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from eaglerun.server.responses_protocol import ResponsesRequest
from eaglerun.server.settings import Settings
from eaglerun.server.usage import debug_speculation

Responses = dict[int | str, dict[str, Any]]

ERRORS: Responses = {
    "4XX": {"model": answers.ErrorBody, "description": "Refused"},
    "5XX": {"model": answers.ErrorBody, "description": "Failed, or too busy"},
}


def create_app(
    client: EngineClient,
    settings: Settings,
    chat: Chat,
    extra_routes: Sequence[BaseRoute] = (),
) -> FastAPI:
    """The server as an ASGI application.

    ``extra_routes`` (metrics, the page) come after ours and under the same guard. ``chat`` is
    closed when the application shuts down; ``client`` is its owner's to start and to end.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        chat.close()

    backend = Backend(client, settings, chat)
    generation = _generation(backend)
    # Refused at the door, a request to a full server costs least.
    paths = frozenset(route.path for route in generation.routes if isinstance(route, Route))
    middleware = [Middleware(Guard, settings, check_room=client.check_room, queued_paths=paths)]
    if settings.cors_origins:
        # Outside the guard: a browser asks for permission without the key.
        middleware.insert(
            0,
            Middleware(
                CORSMiddleware,
                allow_origins=settings.cors_origins,
                allow_methods=("GET", "HEAD", "POST"),
                # Clients send headers of their own kinds, such as x-stainless-os. No cookie gives
                # access here, so none of them needs to be kept out.
                allow_headers=("*",),
                expose_headers=("x-request-id", "retry-after"),
            ),
        )
    app = FastAPI(
        title="eaglerun",
        version=settings.version,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        middleware=middleware,
        # A redirect would repeat whatever host the client named.
        redirect_slashes=False,
    )
    install_handlers(app)
    for router in (generation, _text(backend), _models(backend), _health(backend)):
        app.include_router(router)
    app.router.routes.extend(extra_routes)
    return app


def _router(backend: Backend) -> APIRouter:
    return APIRouter(route_class=json_route(backend.chat), responses=ERRORS)


def _answer(model: type) -> Responses:
    """A 200 that is one object, or server-sent events where the request says stream."""
    text = {"type": "string"}
    event = {"type": "object", "properties": {"event": text, "data": text}, "required": ["data"]}
    stream = {"text/event-stream": {"schema": event}}
    return {200: {"model": model, "description": "The answer", "content": stream}}


def _generation(backend: Backend) -> APIRouter:
    router = _router(backend)

    @router.post("/v1/chat/completions", responses=_answer(answers.ChatCompletion))
    async def create_chat_completion(body: ChatCompletionRequest) -> Response:
        return await chat_completion(backend, body)

    @router.post("/v1/completions", responses=_answer(answers.Completion))
    async def create_completion(body: CompletionRequest) -> Response:
        return await completion(backend, body)

    @router.post("/v1/responses", responses=_answer(answers.ResponseObject))
    async def create_response(body: ResponsesRequest) -> Response:
        return await response(backend, body)

    return router


def _text(backend: Backend) -> APIRouter:
    router = _router(backend)

    @router.post("/tokenize", response_model_exclude_none=True)
    async def create_tokens(body: TokenizeRequest) -> answers.Tokenized:
        return await tokenize(backend, body)

    @router.post("/detokenize")
    async def create_text(body: DetokenizeRequest) -> answers.Detokenized:
        return await detokenize(backend, body)

    return router


def _models(backend: Backend) -> APIRouter:
    router = _router(backend)
    settings = backend.settings

    def card(name: str) -> answers.ModelCard:
        length = backend.client.status().max_model_len
        return answers.ModelCard(id=name, created=settings.created, max_model_len=length)

    @router.get("/v1/models")
    @router.get("/v1/models/", include_in_schema=False)
    async def list_models() -> answers.ModelList:
        return answers.ModelList(data=[card(name) for name in settings.model_names])

    @router.get("/v1/models/{model:path}")
    async def retrieve_model(model: str) -> answers.ModelCard:
        backend.check_model(model)
        return card(model)

    return router


def loading_stage(line: str) -> str:
    """A line of the start-up progress as anybody may read it: it can name paths."""
    words = {"Loading": "reading weights", "KV": "KV memory is there", "Warming": "warming up"}
    return words.get(line.partition(" ")[0], "starting")


def _readiness(status: EngineStatus) -> tuple[answers.EngineState, str | None]:
    """A word for the engine's state, and why it is not ready."""
    if not status.alive:
        return "dead", "the engine's process has ended"
    if status.hung:
        return "hung", f"requests are open and no step came for {status.last_step_age_s:.1f} s"
    if status.draining:
        return "draining", "the server is shutting down"
    if not status.ready:
        return "loading", f"the model is loading: {loading_stage(status.stage)}"
    if status.broken:
        return "broken", "the model's numbers are not finite (NaN or Inf), answer after answer"
    return "ready", None


def _health(backend: Backend) -> APIRouter:
    router = _router(backend)
    client = backend.client

    @router.get("/health", response_class=Response)
    async def health() -> Response:
        """200 while the engine's process lives."""
        if not client.status().alive:
            raise ApiError(503, "the engine is dead")
        return Response()

    @router.get("/health/ready", responses={503: {"model": answers.Readiness}})
    async def ready(response: Response) -> answers.Readiness:
        """200 while requests would be answered: steps advance, or there is nothing to do."""
        status = client.status()
        state, reason = _readiness(status)
        if state != "ready":
            response.status_code = 503
        return answers.Readiness(
            status=state,
            reason=reason,
            num_running=status.num_running,
            num_waiting=status.num_waiting,
        )

    @router.get("/version")
    async def version() -> answers.Version:
        return answers.Version(version=backend.settings.version)

    @router.get("/config", response_class=PlainTextResponse)
    async def config() -> PlainTextResponse:
        """The effective configuration, as the TOML file that would make it."""
        return PlainTextResponse(client.status().config_toml)

    @router.get("/debug/speculation")
    async def speculation() -> answers.SpeculationTotals:
        enabled = client.status().num_draft_tokens > 0
        return answers.SpeculationTotals(**debug_speculation(client.speculation(), enabled))

    return router
