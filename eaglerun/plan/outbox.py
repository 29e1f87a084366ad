"""Outbox: events on their way out, and which requests still wait for an end."""

from collections import Counter

from eaglerun.messages import Event, Finished


class Outbox:
    """Keeps events in the order in which they became final.

    A request is open from when its answers are added until the last of their ends is taken out.
    """

    def __init__(self) -> None:
        self._events: list[Event] = []
        # Answers of each request whose end has not been taken out yet.
        self._open: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._events)

    def expect(self, request_id: str) -> None:
        """One more answer of the request is to end."""
        self._open[request_id] += 1

    def is_open(self, request_id: str) -> bool:
        """True while an end of the request is still to be taken out."""
        return self._open[request_id] > 0

    def add(self, event: Event) -> None:
        self._events.append(event)

    def take(self) -> list[Event]:
        events, self._events = self._events, []
        for event in events:
            if isinstance(event, Finished):
                self._open[event.request_id] -= 1
                if not self._open[event.request_id]:
                    del self._open[event.request_id]
        return events

    def clear(self) -> None:
        """Forget who is open; whoever was has been told that it failed."""
        self._open.clear()
