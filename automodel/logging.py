"""Loggers of the training half, and messages that are said once however many layers or steps cause them."""

from __future__ import annotations

import logging
from functools import lru_cache


def get_logger(name: str) -> logging.Logger:
    """The logger of one module; all of them are children of `automodel`."""
    return logging.getLogger(name)


@lru_cache(maxsize=1024)
def log_once(logger: logging.Logger, level: int, message: str) -> None:
    """Log `message` the first time that this logger is given it."""
    logger.log(level, message)
