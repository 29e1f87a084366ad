"""Who a request says it asks, and whose word is taken on who asks.

A page on any web site may let its own name point at 127.0.0.1; its script then reaches a local
server that has no key, and the browser sends that name as Host. So such a server answers to
loopback names only. A client's address is that of its connection; a proxy's word on it counts only
where the operator named that proxy.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

from eaglerun.errors import ConfigError

_PORT = re.compile(r":\d{0,5}$")
_NAME = re.compile(r"(?:\*\.)?[a-z0-9_-]+(?:\.[a-z0-9_-]+)*")


def host_of(header: str) -> str:
    """The name or address in a Host header, without its port; "" for none."""
    host = _PORT.sub("", header.strip().lower())
    if host.startswith("[") and host.endswith("]"):
        return host[1:-1]
    return host.removesuffix(".")


def is_loopback(host: str) -> bool:
    """Whether a name or address means this machine alone."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class AllowedHosts:
    """The hosts that a server answers to: ``names``, and loopback's. None for ``names``: any."""

    names: tuple[str, ...] | None

    def __contains__(self, header: str) -> bool:
        if self.names is None:
            return True
        host = host_of(header)
        ends = tuple(name[1:] for name in self.names if name.startswith("*."))
        return host in self.names or is_loopback(host) or host.endswith(ends)


def allowed_hosts(given: tuple[str, ...], loopback_only: bool, has_keys: bool) -> AllowedHosts:
    """What a server answers to. Nothing given: loopback names where it is local and has no keys,
    else any name, for then a key or the operator's word stands before it."""
    for name in given:
        if name != "*" and not _NAME.fullmatch(name.lower()) and not _is_address(name):
            raise ConfigError(
                f"allowed_hosts = {name}: expected names such as api.example or *.example, "
                "addresses, or *; without scheme and port"
            )
    if "*" in given or (not given and (has_keys or not loopback_only)):
        return AllowedHosts(None)
    return AllowedHosts(tuple(name.lower() for name in given))


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def trusted_proxies(given: tuple[str, ...]) -> Callable[[str], bool]:
    """Whether an address is one of the proxies that were named; ConfigError for what is none."""
    networks: list[IPv4Network | IPv6Network] = []
    for text in given:
        try:
            networks += [] if text == "*" else [ip_network(text)]
        except ValueError:
            raise ConfigError(
                f"forwarded_allow_ips = {text}: expected addresses, networks such as 10.0.0.0/8, "
                "or *"
            ) from None

    def trusts(address: str) -> bool:
        if "*" in given:
            return True
        try:
            ip = ip_address(address.partition("%")[0])
        except ValueError:
            return False
        return any(ip in network for network in networks)

    return trusts
