"""What can go wrong, by class. All are `BlockplaneError`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from ._core import CoreFault

P = ParamSpec("P")
R = TypeVar("R")


class BlockplaneError(Exception):
    """Something failed. `retryable` says whether doing it again may succeed."""

    def __init__(self, message: str, retryable: bool = False) -> None:
        super().__init__(message)
        self.retryable = retryable


class InvalidError(BlockplaneError, ValueError):
    """Arguments that do not fit: the message says which, and what is accepted."""


class AgentError(BlockplaneError):
    """The agent cannot be started, or has stopped."""


class MetadataError(BlockplaneError, ValueError):
    """Bytes that are not the metadata of an agent."""


class ConnectError(BlockplaneError, ConnectionError):
    """The peer is not reached."""


class PeerLostError(BlockplaneError, ConnectionError):
    """The peer ended, or is silent. Connect again."""


class TransferError(BlockplaneError):
    """A transfer failed. None of its bytes moves any more."""


class TransferTimeoutError(TransferError, TimeoutError):
    """Not done in time."""


class CancelledError(TransferError):
    """It was called off."""


class RefusedError(TransferError):
    """The peer does not let it: no such region, no window, or no room for a notification."""


class WindowClosedError(TransferError):
    """The peer closed the window while bytes were moving."""


class StorageError(TransferError, OSError):
    """A file failed."""


class DeviceError(TransferError):
    """A GPU failed."""


class BusyError(BlockplaneError):
    """Something still uses the memory or the window."""


KINDS: dict[str, type[BlockplaneError]] = {
    "invalid": InvalidError,
    "agent": AgentError,
    "metadata": MetadataError,
    "connect": ConnectError,
    "peer_lost": PeerLostError,
    "transfer": TransferError,
    "timeout": TransferTimeoutError,
    "cancelled": CancelledError,
    "refused": RefusedError,
    "window_closed": WindowClosedError,
    "storage": StorageError,
    "device": DeviceError,
    "busy": BusyError,
}


def translated(function: Callable[P, R]) -> Callable[P, R]:
    """Raises the class of a fault of the compiled half."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except CoreFault as fault:
            kind, message, retryable = fault.args
            raise KINDS[kind](message, retryable) from None

    return call
