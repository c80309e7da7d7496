"""A transfer: waited for, awaited, or called off."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Generator
from typing import Any

from ._core import AgentCore, TransferCore
from .errors import TransferTimeoutError, translated


class Ends:
    """Tells event loops of transfers that ended: by a descriptor, without a thread and polling."""

    def __init__(self, core: AgentCore) -> None:
        self._core = core
        self._lock = threading.Lock()
        self._waiting: dict[int, tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = {}
        self._watched: dict[asyncio.AbstractEventLoop, int] = {}

    def drain(self) -> None:
        """Takes what ended; who awaits it is told."""
        with self._lock:
            for token in self._core.ended():
                waiter = self._waiting.pop(token, None)
                if waiter is not None:
                    loop, future = waiter
                    if not loop.is_closed():
                        loop.call_soon_threadsafe(resolve, future)

    async def wait(self, transfer: TransferCore) -> None:
        """Until it has ended."""
        loop = asyncio.get_running_loop()
        with self._lock:
            if transfer.done:
                return
            future: asyncio.Future[None] = loop.create_future()
            self._waiting[transfer.token] = (loop, future)
            watched = self._watched.get(loop, 0)
            self._watched[loop] = watched + 1
            if watched == 0:
                loop.add_reader(self._core.fd, self.drain)
        try:
            await future
        finally:
            with self._lock:
                self._waiting.pop(transfer.token, None)
                self._watched[loop] -= 1
                if self._watched[loop] == 0:
                    del self._watched[loop]
                    loop.remove_reader(self._core.fd)


def resolve(future: asyncio.Future[None]) -> None:
    """Unless whoever waited has gone."""
    if not future.done():
        future.set_result(None)


class Transfer:
    """Bytes on their way. Dropping it calls it off; `detach` lets it go on alone."""

    def __init__(self, core: TransferCore, ends: Ends) -> None:
        self._core = core
        self._ends = ends

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._core.done

    @property
    def seconds(self) -> float | None:
        """Time from post to end, once it has ended."""
        telemetry = self._core.telemetry
        return None if telemetry is None else telemetry[1]

    @property
    def nbytes(self) -> int | None:
        """Bytes that it moved, once it has ended."""
        telemetry = self._core.telemetry
        return None if telemetry is None else telemetry[0]

    @translated
    def wait(self, timeout: float = 30.0) -> None:
        """Waits for all its bytes to be in place. Other threads of Python run meanwhile.

        Raises:
            TransferTimeoutError: it is still in flight after `timeout` seconds, and goes on.
            TransferError: it failed.
        """
        if not self._core.wait(timeout):
            raise TransferTimeoutError(f"still in flight after {timeout} s", retryable=True)

    def cancel(self) -> None:
        """Asks for its end. `wait` or `await` say when that is: with `CancelledError`."""
        self._core.cancel()

    def detach(self) -> None:
        """Lets it go on without this object."""
        self._core.detach()

    @translated
    def _outcome(self) -> None:
        self._core.wait(0.0)

    async def _awaited(self) -> None:
        await self._ends.wait(self._core)
        self._outcome()

    def __await__(self) -> Generator[Any, None, None]:
        return self._awaited().__await__()

    def __enter__(self) -> Transfer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        else:
            self.cancel()
