"""Log lines in the form that vLLM's users know; what they say is their writer's affair."""

import logging
import os
import sys

_FORMAT = "%(levelname)s %(asctime)s [%(filename)s:%(lineno)d] %(message)s"
_DATES = "%m-%d %H:%M:%S"


def configure_logging(level: str, process: str = "") -> None:
    """All loggers to standard error. ``process`` names this one in front of each line."""
    prefix = f"({process} pid={os.getpid()}) " if process else ""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(prefix + _FORMAT, _DATES))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in ("eaglerun", "uvicorn"):
        logging.getLogger(name).setLevel(level.upper())
