"""The HTTP process from its start to its end: bind, load, serve, drain.

The port is open before the engine is ready; until then every route but /health answers 503.
"""

import asyncio
import contextlib
import dataclasses
import gc
import ipaddress
import logging
import signal
import socket
import ssl
import sys
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import uvicorn
import uvloop
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from eaglerun import __version__
from eaglerun.chat_template import RESERVED
from eaglerun.config import Config, OutputConfig, ServerConfig
from eaglerun.errors import ConfigError
from eaglerun.server import wire
from eaglerun.server.app import create_app, loading_stage
from eaglerun.server.chat import Chat, load_sampling, load_vocabulary
from eaglerun.server.hosts import AllowedHosts, allowed_hosts, is_loopback, trusted_proxies
from eaglerun.server.http_limits import (
    Connections,
    HttpCounts,
    HttpLimits,
    LimitedProtocol,
    allow_files,
)
from eaglerun.server.logs import configure_logging, never_waiting
from eaglerun.server.metrics import Exposition, RequestMetrics, metrics_route
from eaglerun.server.monitor import Monitor
from eaglerun.server.page import OPEN_PATHS, page_routes
from eaglerun.server.prepare import Preparation, PreparedChat, Source
from eaglerun.server.prepare_jobs import Load
from eaglerun.server.prepare_process import for_workers
from eaglerun.server.process_client import ProcessClient
from eaglerun.server.settings import Limits, RateLimit, Settings
from eaglerun.server.stream import BODY_SEND

log = logging.getLogger(__name__)

ENGINE = (sys.executable, "-m", "eaglerun.server.engine_main")
# How long connections may take to receive their last bytes.
FLUSH_S = 5.0
TLS_HANDSHAKE_S = 10.0
OK, DIED = 0, 1


def serve(config: Config, engine: Sequence[str] = ENGINE) -> int:
    """Serve until SIGTERM or SIGINT, or until the engine dies; the exit code.

    ``engine`` is the command of the engine's process. Raises ConfigError and CheckpointError for
    what cannot be served, EngineError if the engine dies while it loads.
    """
    configure_logging(config.server.log_level)
    if config.server.log_stats_interval:
        config = _without_second_log(config)
    check_files(config.server)
    check_template_kwargs(config.server)
    hosts_of(config.server)
    proxies_of(config.server)
    # Before there is an event loop or a thread, which a fork would leave half copied, and before
    # there is a file that it should not hold.
    source = Source.fork()
    try:
        listener = bind(config.server)
        log.info("eaglerun %s with\n%s", __version__, config.to_toml())
        loop = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        with never_waiting(), loop as runner:
            return runner.run(_run(config, engine, listener, source))
    finally:
        source.end()


def _without_second_log(config: Config) -> Config:
    """Acceptance is logged by time, with the throughput, and so not also by count."""
    default = OutputConfig().log_stats_every
    if config.output.log_stats_every != default:
        return config
    return dataclasses.replace(config, output=dataclasses.replace(config.output, log_stats_every=0))


def check_files(server: ServerConfig) -> None:
    """ConfigError for a chat template that is not there and certificates that do not work."""
    if server.chat_template is not None and not Path(server.chat_template).is_file():
        raise ConfigError(f"chat_template = {server.chat_template}: there is no such file")
    if server.ssl_keyfile is not None and server.ssl_certfile is None:
        raise ConfigError(f"ssl_keyfile = {server.ssl_keyfile}: ssl_certfile is missing")
    if server.ssl_certfile is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(server.ssl_certfile, server.ssl_keyfile)
        except OSError as error:
            raise ConfigError(f"ssl_certfile = {server.ssl_certfile}: {error}") from None


def check_template_kwargs(server: ServerConfig) -> None:
    """ConfigError for names that a request could not set, or must not."""
    for name in _words(server.chat_template_kwargs):
        if not name.isidentifier() or name in RESERVED:
            raise ConfigError(
                f"chat_template_kwargs = {name}: expected names of the template's own variables, "
                f"which these are not: {', '.join(sorted(RESERVED))}"
            )


def bind(server: ServerConfig) -> socket.socket:
    """The listening socket. ConfigError if it is taken, or open to others without a key."""
    try:
        [(family, _, _, _, address), *_] = socket.getaddrinfo(
            server.host, server.http_port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        host = str(address[0])
        if not ipaddress.ip_address(host.partition("%")[0]).is_loopback:
            _check_key(server)
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        words = error.strerror or str(error)
        raise ConfigError(f"cannot listen on {server.host}:{server.http_port}: {words}") from None


def _check_key(server: ServerConfig) -> None:
    if not keys_of(server) and not server.allow_no_api_key:
        raise ConfigError(
            f"host = {server.host}: others could reach this server, and it has no api_key; give "
            "it one (EAGLERUN_API_KEY), or --allow-no-api-key"
        )


def keys_of(server: ServerConfig) -> tuple[str, ...]:
    return _words(server.api_key)


def hosts_of(server: ServerConfig) -> AllowedHosts:
    return allowed_hosts(
        _words(server.allowed_hosts),
        loopback_only=_is_local(server),
        has_keys=bool(keys_of(server)),
    )


def _is_local(server: ServerConfig) -> bool:
    """Whether the address to listen on is this machine's alone; bind() says what is none."""
    try:
        found = socket.getaddrinfo(server.host, None, type=socket.SOCK_STREAM)
    except OSError:
        return is_loopback(server.host)
    return is_loopback(str(found[0][4][0]).partition("%")[0])


def proxies_of(server: ServerConfig) -> Callable[[str], bool]:
    return trusted_proxies(_words(server.forwarded_allow_ips))


def http_limits(server: ServerConfig) -> HttpLimits:
    """Raises the process's limit of open files where that is needed and allowed."""
    most = allow_files(server.max_connections)
    return HttpLimits(
        header_seconds=server.header_timeout,
        write_seconds=server.write_timeout,
        max_connections=most,
        max_per_address=server.max_connections_per_address or max(1, most // 2),
    )


def _words(text: str | None) -> tuple[str, ...]:
    return tuple(word.strip() for word in (text or "").split(",") if word.strip())


def settings_of(config: Config, ready: wire.Ready, checkpoint: Path) -> Settings:
    """What the routes are told."""
    server = config.server
    rate = server.rate_limit
    return Settings(
        model_names=(ready.model_name,),
        created=int(time.time()),
        version=__version__,
        api_keys=keys_of(server),
        open_paths=frozenset({"/health"}) | OPEN_PATHS,
        hosts=hosts_of(server),
        priority_keys=_words(server.allow_priority),
        prefix_cache_by_key=server.prefix_cache_scope == "key",
        cors_origins=_words(server.cors_origins),
        rate_limit=None if rate is None else RateLimit(rate, server.rate_limit_burst),
        limits=Limits(
            max_body_bytes=server.max_body_bytes,
            max_prompt_chars=server.max_prompt_chars,
            max_n=server.max_n,
            max_stop=server.max_stop,
        ),
        sampling=load_sampling(checkpoint),
        template_kwargs=_words(server.chat_template_kwargs),
        log_prompts=server.log_prompts,
    )


async def _run(
    config: Config, engine: Sequence[str], listener: socket.socket, source: Source
) -> int:
    return await _HttpProcess(config, engine, listener, source).run()


class Front:
    """The application, from the moment there is one; until then, word that it is loading."""

    def __init__(self, counts: HttpCounts) -> None:
        self.app: ASGIApp = self._loading
        self.stage = ""
        self._counts = counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[BODY_SEND] = send

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._counts.responded(message["status"])
            await send(message)

        await self.app(scope, receive, counted)

    async def _loading(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/health":
            response = Response()
        else:
            error = {
                "message": f"the model is loading: {loading_stage(self.stage)}",
                "type": "server_error",
                "param": None,
                "code": "loading",
            }
            response = JSONResponse({"error": error}, 503, {"retry-after": "5"})
        await response(scope, receive, send)


class _Server(uvicorn.Server):
    """uvicorn with our connections, and with signals left to us: the first one drains, and none is
    raised again at the end."""

    def __init__(self, config: uvicorn.Config, connections: Connections) -> None:
        super().__init__(config)
        self._connections = connections

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await self.lifespan.startup()
        config = self.config

        def connection() -> LimitedProtocol:
            return LimitedProtocol(
                config, self.server_state, self.lifespan.state, self._connections
            )

        loop = asyncio.get_running_loop()
        timeout_s = None if config.ssl is None else TLS_HANDSHAKE_S
        self.servers = [
            await loop.create_server(
                connection, sock=one, ssl=config.ssl, ssl_handshake_timeout=timeout_s
            )
            for one in sockets or ()
        ]
        self.started = True

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


class _HttpProcess:
    """One run; made inside its event loop."""

    def __init__(
        self, config: Config, engine: Sequence[str], listener: socket.socket, source: Source
    ) -> None:
        self._config = config
        self._source = source
        self._listener = listener
        self._metrics = RequestMetrics()
        self._front = Front(self._metrics.http)
        self._client = ProcessClient(config, engine, self._metrics, self._on_stage)
        self._loop = asyncio.get_running_loop()
        # The first signal drains, the second does not wait any longer.
        self._stop: asyncio.Future[None] = self._loop.create_future()
        self._stop_now: asyncio.Future[None] = self._loop.create_future()
        server = config.server
        proxies = proxies_of(server)
        self._http = _Server(
            uvicorn.Config(
                self._front,
                interface="asgi3",
                http="httptools",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=server.log_requests,
                server_header=False,
                ssl_certfile=server.ssl_certfile,
                ssl_keyfile=server.ssl_keyfile,
                # Without a setting nobody is believed, whatever uvicorn's own variables say.
                proxy_headers=server.forwarded_allow_ips is not None,
                forwarded_allow_ips=list(_words(server.forwarded_allow_ips)),
            ),
            Connections(http_limits(server), self._metrics.http, proxies),
        )

    async def run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._on_signal)
        log.info("Listening on %s; the model is loading", self.url)
        http = asyncio.create_task(self._http.serve([self._listener]))
        start = asyncio.create_task(self._client.start())
        try:
            await self._first(start, self._stop, http)
            if not start.done():
                return OK
            with contextlib.closing(await self._load(start.result())):
                return await self._until_the_end(http)
        finally:
            start.cancel()
            # Fails what is open, so that every stream ends before its connection does.
            await self._client.close()
            self._http.should_exit = True
            await asyncio.wait([http], timeout=FLUSH_S)
            http.cancel()
            await asyncio.gather(http, start, return_exceptions=True)

    def _on_stage(self, stage: str) -> None:
        self._front.stage = stage
        log.info("%s", stage)

    def _on_signal(self) -> None:
        if not self._stop.done():
            self._stop.set_result(None)
        elif not self._stop_now.done():
            self._stop_now.set_result(None)

    async def _first(self, *ends: asyncio.Future[Any]) -> None:
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)

    async def _load(self, ready: wire.Ready) -> Chat:
        """Put the application in front."""
        if ready.path is None:
            raise ConfigError(f"{ready.model_name} has no directory, and so no tokenizer")
        settings = settings_of(self._config, ready, ready.path)
        await self._source.load(
            Load(
                path=str(ready.path),
                template_file=self._config.server.chat_template,
                settings=for_workers(settings),
                max_model_len=ready.max_model_len,
                num_draft_tokens=ready.num_draft_tokens,
            )
        )
        # In a thread, for /health is asked meanwhile.
        vocabulary = await asyncio.to_thread(load_vocabulary, ready.path)
        preparation = Preparation(self._source, settings.limits)
        chat = PreparedChat(vocabulary, preparation, settings.limits)
        client, name = self._client, ready.model_name

        def totals() -> wire.Totals:
            return client.totals

        monitor = Monitor(totals, self._config.server.log_stats_interval, time.monotonic)
        self._monitoring = asyncio.create_task(monitor.run())
        metrics = metrics_route(Exposition(name, self._metrics, totals))
        pages = page_routes(monitor, client.status, totals)
        self._front.app = create_app(client, settings, chat, [metrics, *pages])
        # What is here by now stays; the collector need not look at it in the midst of streams.
        gc.collect()
        gc.freeze()
        log.info("Ready: %s at %s (the API under /v1, a live page at /)", name, self.url)
        return chat

    @property
    def url(self) -> str:
        host, port = self._listener.getsockname()[:2]
        scheme = "http" if self._config.server.ssl_certfile is None else "https"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"

    async def _until_the_end(self, http: asyncio.Task[None]) -> int:
        ended, unprepared = self._client.ended, self._source.watch()
        try:
            await self._first(self._stop, ended, http, unprepared)
            if self._stop.done():
                timeout_s = self._config.server.shutdown_timeout
                log.info("Stopping: open requests have %g s to end", timeout_s)
                # No more connections from here on.
                self._http.should_exit = True
                drain = asyncio.create_task(self._client.drain(timeout_s))
                await self._first(drain, self._stop_now, ended)
                drain.cancel()
            if ended.done():
                log.error("the engine process ended, code %d; so does the server", ended.result())
                return DIED
            if unprepared.done():
                log.error("the preparation process ended; so does the server")
                return DIED
            if not self._stop.done():
                # The HTTP server ended, which it does only in error.
                http.result()
                return DIED
            return OK
        finally:
            self._monitoring.cancel()
