"""Who a request is from, as the guard found it, for what differs between clients."""

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Client:
    """``salt`` separates this client's prefix cache from others'; "" shares it."""

    salt: str = ""
    may_prioritise: bool = True


EVERYONE = Client()
CLIENT: ContextVar[Client] = ContextVar("client", default=EVERYONE)
