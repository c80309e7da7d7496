"""The worker's side: has blocks copied and says what ended. Knows nothing of vLLM's types."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from .messages import Load, Report, Save, Step

logger = logging.getLogger(__name__)

IDLE_WAIT_S = 0.002


class TiersLike(Protocol):
    """What is used of `blockplane._core.TierWorker`."""

    def load(self, key: int, hold: int, names: bytes, targets: list[int]) -> None:
        """Begins a load."""

    def save(self, key: int, names: bytes, blocks: list[int], priority: int | None = None) -> None:
        """Begins a save."""

    def release(self, hold: int) -> None:
        """Lets go of what was found."""

    def poll(self, timeout: float = 0.0) -> list[tuple[Any, ...]]:
        """What ended."""

    def events(self) -> list[tuple[str, str | None, list[int]]]:
        """What came and went."""


@dataclass
class Moved:
    """Of this interval."""

    load_blocks: int = 0
    host_blocks: int = 0
    disk_blocks: int = 0
    remote_blocks: int = 0
    load_bytes: int = 0
    load_seconds: float = 0.0
    loads: int = 0
    loads_failed: int = 0
    saved_blocks: int = 0
    present_blocks: int = 0
    dropped_blocks: int = 0


class WorkerSide:
    """Carries out steps. `fence` makes a check whether what was computed so far is in memory."""

    def __init__(
        self,
        tiers: TiersLike,
        rank: int,
        *,
        fence: Callable[[], Callable[[], bool]] | None = None,
        events: bool = True,
    ) -> None:
        self.moved = Moved()
        self._tiers = tiers
        self._rank = rank
        self._fence = fence
        self._events = events and rank == 0
        self._loads: dict[int, Load] = {}
        self._saves = 0
        self._fenced: list[tuple[Callable[[], bool], list[Save]]] = []
        self._failed: set[int] = set()
        self._arrived: set[str] = set()
        self._report = Report()

    def load(self, step: Step) -> None:
        """Begins the loads of a step."""
        for holds in step.releases:
            if holds[self._rank]:
                self._tiers.release(holds[self._rank])
        for load in step.loads:
            self._loads[load.key] = load
            self._tiers.load(load.key, load.holds[self._rank], load.names, load.targets)

    def save(self, step: Step) -> None:
        """Begins the saves of a step, whose blocks have been computed, or will be by the fence."""
        if not step.saves:
            return
        if self._fence is None:
            self._begin(step.saves)
        else:
            self._fenced.append((self._fence(), step.saves))

    def finished(self, idle: bool) -> set[str]:
        """Requests whose blocks are loaded, or not: see `failed_blocks`."""
        while self._fenced and self._fenced[0][0]():
            self._begin(self._fenced.pop(0)[1])
        waits = bool(self._loads or self._saves or self._fenced)
        for ended in self._tiers.poll(IDLE_WAIT_S if idle and waits else 0.0):
            if ended[0] == "load":
                self._load_ended(*ended[1:])
            else:
                self._save_ended(*ended[1:])
        arrived, self._arrived = self._arrived, set()
        return arrived

    def failed_blocks(self) -> set[int]:
        """vLLM's blocks that were to be loaded and were not, since the last call."""
        failed, self._failed = self._failed, set()
        return failed

    def report(self) -> Report:
        """What the scheduler's side is told."""
        report, self._report = self._report, Report()
        if self._events:
            report.events = self._tiers.events()
        return report

    def _begin(self, saves: list[Save]) -> None:
        for save in saves:
            self._saves += 1
            self._tiers.save(save.key, save.names, save.blocks)

    def _load_ended(
        self,
        key: int,
        loaded: int,
        not_loaded: list[int],
        host: int,
        disk: int,
        remote: int,
        copied: int,
        seconds: float,
        reason: str | None,
    ) -> None:
        load = self._loads.pop(key)
        moved = self.moved
        moved.loads += 1
        moved.load_blocks += loaded
        moved.host_blocks += host
        moved.disk_blocks += disk
        moved.remote_blocks += remote
        moved.load_bytes += copied
        moved.load_seconds += seconds
        if not_loaded:
            moved.loads_failed += 1
            self._failed.update(not_loaded)
            logger.warning(
                "KV tiers: %d of %d blocks of request %s are computed instead of loaded (%s)",
                len(not_loaded),
                len(load.targets),
                load.request_id,
                reason or "they are gone",
            )
        self._arrived.add(load.request_id)
        self._report.loaded[key] = loaded
        self._report.load_workers[key] = 1

    def _save_ended(self, key: int, copied: int, present: int, dropped: int) -> None:
        self._saves -= 1
        self.moved.saved_blocks += copied
        self.moved.present_blocks += present
        self.moved.dropped_blocks += dropped
        self._report.saved[key] = 1
