"""Bars on standard error for what takes long: loading, compiling, capturing, answering.

Every maker of bars takes ``shown``: True draws always, False never, and None where standard error
is a terminal.
"""

from collections.abc import Callable
from typing import Any

from tqdm import tqdm

_TOKENS = (
    "{desc}: {percentage:3.0f}%|{bar}| {n_fmt} of at most {total_fmt} tokens "
    "[{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"
)
_COUNTED = "{desc}: {n_fmt}{unit} [{elapsed}]{postfix}"


def byte_bar(shown: bool | None, what: str, num_bytes: int) -> Any:
    """A tqdm bar over so many bytes."""
    return tqdm(
        desc=what,
        total=num_bytes,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        disable=_disabled(shown),
    )


def counter(shown: bool | None, what: str, unit: str, begin: int = 0, leave: bool = True) -> Any:
    """A tqdm line that counts what has no known end."""
    return tqdm(
        desc=what,
        initial=begin,
        unit=f" {unit}",
        bar_format=_COUNTED,
        leave=leave,
        disable=_disabled(shown),
    )


def steps_bar(shown: bool | None, what: str, unit: str, total: int | None = None) -> Any:
    """A tqdm bar over ``total`` things; its total may be set later."""
    return tqdm(desc=what, total=total, unit=f" {unit}", disable=_disabled(shown))


def tick(bar: Any, name: str) -> None:
    """One thing more, by name."""
    bar.set_postfix_str(name, refresh=False)
    bar.update()


class TokenBar:
    """The tokens of several answers as they come: their rate, answers done, and acceptance.

    ``acceptance`` tells the verify steps and the accepted drafts so far; it is asked only when the
    bar is drawn. The end of the bar is the most tokens that may come; an answer that ends early
    takes what it did not use from there, so that the bar ends full.
    """

    def __init__(
        self,
        shown: bool | None,
        most_tokens: int,
        num_answers: int,
        acceptance: Callable[[], tuple[int, int]],
    ) -> None:
        self._bar = tqdm(
            desc=f"answered 0/{num_answers}",
            total=most_tokens,
            unit=" tokens",
            bar_format=_TOKENS,
            disable=_disabled(shown),
        )
        self._num_answers = num_answers
        self._num_done = 0
        self._acceptance = acceptance
        self._steps, self._accepted = acceptance()

    def __enter__(self) -> "TokenBar":
        return self

    def __exit__(self, *error: object) -> None:
        if not self._bar.disable:
            self._tell_acceptance()
            self._bar.refresh()
        self._bar.close()

    def add(self, num_tokens: int) -> None:
        if not self._bar.disable and self._bar.update(num_tokens):
            self._tell_acceptance()

    def end(self, num_unused: int) -> None:
        """Count an answer that ended with so many tokens less than it might have had."""
        if self._bar.disable:
            return
        self._num_done += 1
        self._bar.total -= num_unused
        self._bar.set_description_str(
            f"answered {self._num_done}/{self._num_answers}", refresh=False
        )

    def _tell_acceptance(self) -> None:
        steps, accepted = self._acceptance()
        steps, accepted = steps - self._steps, accepted - self._accepted
        if steps:
            text = f"acceptance length {1 + accepted / steps:.2f}"
            self._bar.set_postfix_str(text, refresh=False)


def _disabled(shown: bool | None) -> bool | None:
    """The same wish in tqdm's terms."""
    return None if shown is None else not shown
