"""A terminal conversation with a server, through OpenAI's chat API."""

import contextlib
import http.client
import json
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import SplitResult, urlsplit

from eaglerun.errors import ConfigError, EaglerunError
from eaglerun.messages import SpeculationStats
from eaglerun.server.partners import Answer, Ending, Messages, Piece, Wish

# Seconds for a connection, and for the answers that a server has ready.
PATIENCE_S = 10.0
# Asks the live page for its numbers without the history of samples.
_STATUS = "/page/data?after=999999999"
OURS = "eaglerun"


class ServerError(EaglerunError):
    """A server that cannot be reached, or that refuses or breaks off an answer."""


class OverHttp:
    """A server's chat API. What only an eaglerun server tells is missing with others."""

    def __init__(self, url: str, model: str | None, api_key: str | None) -> None:
        self.url = parsed_url(url)
        self._base = self.url.path.rstrip("/").removesuffix("/v1")
        self._where = f"{self.url.scheme}://{self.url.netloc}{self._base}"
        self._headers = {"content-type": "application/json"}
        if api_key is not None:
            self._headers["authorization"] = f"Bearer {api_key.partition(',')[0]}"
        cards = self._models()
        known = [str(card["id"]) for card in cards]
        self.name = known[0] if model is None else model
        if self.name not in known:
            raise ConfigError(f"MODEL {self.name}: {self._where} serves {', '.join(known)}")
        self.is_ours = any(card.get("owned_by") == OURS for card in cards)
        self.most_drafts = self._most_drafts() if self.is_ours else None

    def answer(self, messages: Messages, wish: Wish) -> Answer:
        reason = num_tokens = speculation = None
        for chunk in self._events("/v1/chat/completions", self._body(messages, wish)):
            if "error" in chunk:
                raise ServerError(f"the answer broke off: {words_of(chunk)}")
            if chunk.get("usage"):
                num_tokens = chunk["usage"].get("completion_tokens")
            if chunk.get("metrics"):
                speculation = _stats(chunk["metrics"])
            for choice in chunk.get("choices") or ():
                reason = choice.get("finish_reason") or reason
                yield _piece_of(choice)
        if reason is None:
            raise ServerError(f"{self._where} closed the connection inside the answer")
        yield Ending(reason, num_tokens, speculation)

    def _body(self, messages: Messages, wish: Wish) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.name,
            "messages": list(messages),
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": wish.temperature,
            "top_p": wish.top_p,
            "max_tokens": wish.max_tokens,
        }
        if wish.stop:
            body["stop"] = list(wish.stop)
        if wish.thinking is not None:
            body["chat_template_kwargs"] = {"thinking_mode": wish.thinking}
        if self.is_ours:
            drafts = {"num_draft_tokens": wish.num_draft_tokens}
            body["speculation"] = drafts | {"tokens": True, "report": True}
        return body

    def _models(self) -> list[dict[str, Any]]:
        found = self._json("/v1/models")
        cards = found.get("data") if isinstance(found, dict) else None
        if not cards or not all(isinstance(card, dict) and card.get("id") for card in cards):
            raise ServerError(f"{self._where} is no OpenAI server: /v1/models lists no model")
        return list(cards)

    def _most_drafts(self) -> int | None:
        try:
            return int(self._json(_STATUS)["status"]["num_draft_tokens"])
        except (ServerError, KeyError, TypeError, ValueError):
            # A server without the page still answers.
            return None

    def _json(self, path: str) -> Any:
        with self._response("GET", path, None) as response:
            try:
                return json.loads(response.read())
            except ValueError:
                raise ServerError(f"{self._where} is no OpenAI server: {path} is no JSON") from None

    def _events(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Server-sent events, as parsed JSON, until [DONE] or the end."""
        with self._response("POST", path, json.dumps(body).encode()) as response:
            while line := response.readline():
                data = line.removeprefix(b"data:").strip()
                if data == b"[DONE]":
                    return
                if data and line.startswith(b"data:"):
                    yield self._event(data)

    def _event(self, data: bytes) -> dict[str, Any]:
        try:
            event = json.loads(data)
        except ValueError:
            event = None
        if not isinstance(event, dict):
            raise ServerError(f"{self._where} sent an event that is no JSON object")
        return event

    @contextlib.contextmanager
    def _response(
        self, method: str, path: str, body: bytes | None
    ) -> Iterator[http.client.HTTPResponse]:
        """A 200, on a connection that is closed at the end; ServerError for all else."""
        kind = http.client.HTTPSConnection if self.url.scheme == "https" else _Plain
        connection = kind(self.url.hostname or "", self.url.port, timeout=PATIENCE_S)
        try:
            connection.connect()
            if body is not None:
                # An answer may wait for its turn as long as the server lets it.
                connection.sock.settimeout(None)
            connection.request(method, self._base + path, body, self._headers)
            response = connection.getresponse()
            if response.status != 200:
                raise self._refusal(response)
            yield response
        except (OSError, http.client.HTTPException) as error:
            words = error.strerror if isinstance(error, OSError) else None
            raise ServerError(
                f"no answer from {self._where}: {words or error or type(error).__name__}"
            ) from error
        finally:
            connection.close()

    def _refusal(self, response: http.client.HTTPResponse) -> EaglerunError:
        try:
            words = words_of(json.loads(response.read()))
        except ValueError:
            words = response.reason
        if response.status == 401:
            return ConfigError(f"{self._where} wants another API key: --api-key KEY ({words})")
        return ServerError(f"{self._where} answers {response.status}: {words}")


_Plain = http.client.HTTPConnection


def parsed_url(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        # Raises for a port that is no number.
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        fits = False
    if not fits or parts.query or parts.fragment:
        raise ConfigError(f"--url {url}: expected an address like http://127.0.0.1:8000")
    return parts


def words_of(body: Any) -> str:
    """Return the message of an error body, in OpenAI's form or another."""
    error = body.get("error", body) if isinstance(body, dict) else body
    message = error.get("message") if isinstance(error, dict) else None
    return str(message or error)


def _piece_of(choice: Mapping[str, Any]) -> Piece:
    delta = choice.get("delta") or {}
    reasoning = delta.get("reasoning_content") or delta.get("reasoning") or ""
    tokens = tuple((token["text"], token["drafted"]) for token in choice.get("tokens") or ())
    return Piece(reasoning, delta.get("content") or "", tokens)


def _stats(metrics: Mapping[str, Any]) -> SpeculationStats:
    report = metrics["speculative_decoding"]
    return SpeculationStats(
        steps=report["num_spec_steps"],
        drafted=report["num_draft_tokens"],
        accepted=report["num_accepted_draft_tokens"],
    )
