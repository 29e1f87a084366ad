"""The errors a user can meet. Each message names the field, the value and what is allowed."""


class EaglerunError(Exception):
    """Root of the errors below; nothing raises it itself."""


class ConfigError(EaglerunError):
    """A setting, or a combination of model and setting, that cannot be served."""


class CheckpointError(EaglerunError):
    """A checkpoint that does not hold what its config.json promises, or holds more."""


class RequestError(EaglerunError):
    """A request that is refused before it runs.

    ``field`` is the name of the offending request field, for the client's error body.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


class CapacityError(EaglerunError):
    """The machine cannot hold what was asked: memory at start, or the queue under load."""


class EngineError(EaglerunError):
    """The engine broke its own rules or died; every request in it has failed."""


class RankFailed(EngineError):
    """A rank died, or did not do a step in time."""
