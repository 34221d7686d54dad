"""Telling people how far a queue is."""

import logging
from typing import Any

__all__ = ["say"]

_logger = logging.getLogger("voxloom.queue")
_handler = logging.StreamHandler()
"""Shows what is logged where nobody has set up logging."""


def say(text: str, *values: Any) -> None:
    """Log a line, and show it if no logging is set up."""
    _logger.removeHandler(_handler)
    if not _logger.hasHandlers():
        _logger.addHandler(_handler)
    if _logger.getEffectiveLevel() > logging.INFO:
        _logger.setLevel(logging.INFO)
    _logger.info(text, *values)
