"""The log of the drop-in: loggers below ``nixl``, on standard output like NIXL's own."""

from __future__ import annotations

import logging
import sys

from . import _environment

_LEVELS = {
    "TRACE": logging.DEBUG,
    "DEBUG": logging.DEBUG,
    "INFO": logging.INFO,
    "WARN": logging.WARNING,
    "WARNING": logging.WARNING,
    "ERROR": logging.ERROR,
    "FATAL": logging.CRITICAL,
}
_FORMAT = "%(asctime)s NIXL %(levelname)-7s %(filename)s:%(lineno)d %(message)s"


def setup_logging() -> None:
    """Gives the logger ``nixl`` a handler and the level of ``NIXL_LOG_LEVEL``, once."""
    logger = logging.getLogger("nixl")
    if logger.handlers:
        return
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter(_FORMAT, "%Y-%m-%d %H:%M:%S"))
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.INFO)
    wanted = _environment.log_level()
    if wanted is None:
        return
    level = _LEVELS.get(wanted.upper())
    if level is None:
        logger.warning("NIXL_LOG_LEVEL is %r; accepted: %s", wanted, ", ".join(_LEVELS))
    else:
        logger.setLevel(level)


def get_logger(name: str) -> logging.Logger:
    """The logger for a module: ``_api`` logs as ``nixl.api``."""
    setup_logging()
    return logging.getLogger(f"nixl.{name.rsplit('.', 1)[-1].lstrip('_')}")
