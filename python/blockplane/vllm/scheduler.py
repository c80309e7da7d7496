"""The scheduler's side: what is below G1, what is loaded, what is saved.

It knows nothing of vLLM's types. Invariants:

* A block of vLLM that is being saved is held in vLLM's pool, by its count, until every worker
  has said that it is not read any more. So it does not matter whether its request has finished, was
  aborted or was preempted.
* Of a prompt at least one token is left to compute, and only whole blocks are loaded.
* A request loads at most twice: what failed is computed.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from blockplane._core import Names

from .messages import Load, Report, Save, Step

logger = logging.getLogger(__name__)

LOADS_PER_REQUEST = 2


class RequestLike(Protocol):
    """What is used of vLLM's `Request`."""

    request_id: str
    num_tokens: int
    num_computed_tokens: int
    all_token_ids: Sequence[int]
    cache_salt: str | None
    block_hashes: Sequence[Any]


class PoolLike(Protocol):
    """What is used of vLLM's `BlockPool`."""

    blocks: Sequence[Any]

    def touch(self, blocks: Sequence[Any]) -> None:
        """Counts one more holder of each."""

    def free_blocks(self, ordered_blocks: Iterable[Any]) -> None:
        """Counts one holder less."""


class LookupsLike(Protocol):
    """The tiers of one worker."""

    def lookup(
        self,
        names: Names,
        start: int,
        stop: int,
        *,
        replaces: int = 0,
        first: bool = False,
        timeout: float = 1.0,
    ) -> tuple[int, int, int, int]:
        """What is held, and how many blocks are in host memory, on disk, further away."""


@dataclass
class Found:
    """The answer of all workers."""

    start: int
    stop: int
    holds: list[int]
    blocks: int
    tiers: tuple[int, int, int]
    at: float


@dataclass
class Tracked:
    """One request of vLLM."""

    request: RequestLike
    names: Names
    generation: int
    lora_name: str | None = None
    block_ids: list[int] = field(default_factory=list)
    saved: int = 0
    found: Found | None = None
    loading: int | None = None
    load_start: int = 0
    loads: int = 0
    asked: bool = False


@dataclass
class Counters:
    """Of this interval."""

    lookups: int = 0
    lookup_failures: int = 0
    found_blocks: int = 0
    load_requests: int = 0
    save_blocks: int = 0
    skipped_requests: int = 0


class SchedulerSide:
    """Decides; is told of vLLM's requests in the order of its calls."""

    def __init__(
        self,
        block_tokens: int,
        lookups: Sequence[LookupsLike],
        *,
        clock: Callable[[], float],
        lookup_timeout: float = 1.0,
        hold_time: float = 30.0,
    ) -> None:
        self.block_tokens = block_tokens
        self.counters = Counters()
        self.on_save: Callable[[Tracked, int, int], None] | None = None
        self._lookups = list(lookups)
        self._clock = clock
        self._timeout = lookup_timeout
        self._hold_time = hold_time
        self._pool: PoolLike | None = None
        self._requests: dict[str, Tracked] = {}
        self._loads: list[Load] = []
        self._saves: list[Save] = []
        self._releases: list[list[int]] = []
        self._saving: dict[int, tuple[list[Any], int]] = {}
        self._loading: dict[int, str] = {}
        self._load_workers: dict[int, int] = {}
        self._last_tiers: dict[str, tuple[int, int, int]] = {}
        self._last_key = 0
        self._generation = 0
        self._silent_until = 0.0

    def bind_pool(self, pool: PoolLike) -> None:
        """vLLM's pool of blocks."""
        self._pool = pool

    # --- before a request runs ---

    def matched_tokens(self, request: RequestLike, computed: int) -> int:
        """Tokens beyond `computed` that can be loaded: whole blocks, and not the last token."""
        tracked = self._track(request)
        if tracked is None or tracked.loading is not None or computed % self.block_tokens:
            return 0
        if tracked.loads >= LOADS_PER_REQUEST or tracked.generation != self._generation:
            return 0
        if getattr(request, "skip_reading_prefix_cache", False):
            return 0
        self._extend(tracked)
        start = computed // self.block_tokens
        stop = (request.num_tokens - 1) // self.block_tokens
        if stop <= start:
            self._forget_found(tracked)
            return 0
        now = self._clock()
        found = tracked.found
        fresh = found is not None and now - found.at < self._hold_time / 2
        if found is None or not fresh or (found.start, found.stop) != (start, stop):
            found = self._look(tracked, start, stop, now)
        return found.blocks * self.block_tokens if found else 0

    def allocated(self, request: RequestLike, block_ids: Sequence[int], external: int) -> None:
        """vLLM has these blocks for the request; `external` tokens of it are to be loaded."""
        tracked = self._requests.get(request.request_id)
        if tracked is None:
            return
        tracked.block_ids = list(block_ids)
        found = tracked.found
        count = external // self.block_tokens
        if count == 0 or found is None:
            self._forget_found(tracked)
            return
        tracked.found = None
        start, stop = found.start, found.start + count
        key = self._key()
        self._loads.append(
            Load(
                key,
                request.request_id,
                found.holds,
                tracked.names.pack(start, stop),
                tracked.block_ids[start:stop],
            )
        )
        tracked.loading = key
        tracked.load_start = start
        tracked.loads += 1
        tracked.saved = max(tracked.saved, stop)
        self._loading[key] = request.request_id
        self.counters.load_requests += 1

    def sources(self, request: RequestLike, tokens: int) -> tuple[int, int, int]:
        """Of these tokens, how many come from host memory, from disk, and from further away."""
        tracked = self._requests.get(request.request_id)
        tiers = self._last_tiers.get(request.request_id, (0, 0, 0)) if tracked else (0, 0, 0)
        left = tokens
        split = []
        for blocks in tiers:
            part = min(left, blocks * self.block_tokens)
            split.append(part)
            left -= part
        return split[0], split[1], split[2] + left

    # --- in every step ---

    def step(
        self,
        scheduled: dict[str, int],
        new_blocks: Iterable[tuple[str, Sequence[int], bool]],
    ) -> Step:
        """What the workers are to do with this step.

        `scheduled` says how many tokens of each request are computed in it, `new_blocks` which
        blocks requests have: more of them, or (`True`) these and no others.
        """
        for request_id, ids, anew in new_blocks:
            tracked = self._requests.get(request_id)
            if tracked is not None:
                if anew:
                    tracked.block_ids = list(ids)
                else:
                    tracked.block_ids.extend(ids)
        for request_id, tokens in scheduled.items():
            tracked = self._requests.get(request_id)
            if tracked is not None and tracked.loading is None:
                self._save(tracked, tracked.request.num_computed_tokens + tokens)
        step = Step(self._loads, self._saves, self._releases, idle=not scheduled)
        self._loads, self._saves, self._releases = [], [], []
        return step

    def reported(self, report: Report) -> None:
        """What the workers say."""
        for key, workers in report.saved.items():
            blocks, left = self._saving.get(key, ([], 0))
            if left > workers:
                self._saving[key] = (blocks, left - workers)
            elif self._saving.pop(key, None) is not None and self._pool is not None:
                self._pool.free_blocks(reversed(blocks))
        for key, loaded in report.loaded.items():
            request_id = self._loading.get(key)
            tracked = self._requests.get(request_id) if request_id else None
            if tracked is not None and tracked.loading == key:
                # What is computed instead is saved.
                tracked.saved = min(tracked.saved, tracked.load_start + loaded)
            ended = self._load_workers.get(key, 0) + report.load_workers.get(key, 1)
            if ended < len(self._lookups):
                self._load_workers[key] = ended
                continue
            self._load_workers.pop(key, None)
            self._loading.pop(key, None)
            if tracked is not None and tracked.loading == key:
                tracked.loading = None

    def finished(self, request: RequestLike) -> None:
        """The request has ended, in any way. vLLM frees its blocks; those being saved are held."""
        tracked = self._requests.get(request.request_id)
        if tracked is None:
            return
        if tracked.loading is None:
            self._save(tracked, request.num_computed_tokens)
        self._forget_found(tracked)
        del self._requests[request.request_id]
        self._last_tiers.pop(request.request_id, None)

    def busy(self) -> bool:
        """Whether vLLM must go on stepping although no request runs."""
        return bool(self._saving or self._releases)

    def reset(self) -> None:
        """Nothing stored is found any more; what runs now is neither saved nor loaded."""
        self._generation = secrets.randbits(63) | 1

    # --- inside ---

    def _track(self, request: RequestLike) -> Tracked | None:
        tracked = self._requests.get(request.request_id)
        if tracked is not None:
            tracked.request = request
            return tracked
        if (
            getattr(request, "mm_features", None)
            or getattr(request, "prompt_embeds", None) is not None
        ):
            # Their blocks are not named by their tokens alone.
            self.counters.skipped_requests += 1
            return None
        lora = getattr(request, "lora_request", None)
        lora_name = lora.lora_name if lora is not None else None
        names = Names(
            self.block_tokens,
            cache_salt=request.cache_salt,
            lora_name=lora_name,
            generation=self._generation,
        )
        tracked = Tracked(request, names, self._generation, lora_name)
        self._requests[request.request_id] = tracked
        return tracked

    @staticmethod
    def _extend(tracked: Tracked) -> None:
        have = tracked.names.tokens
        if have < tracked.request.num_tokens:
            tracked.names.extend(list(tracked.request.all_token_ids[have:]))

    def _look(self, tracked: Tracked, start: int, stop: int, now: float) -> Found | None:
        before = tracked.found.holds if tracked.found else [0] * len(self._lookups)
        tracked.found = None
        if now < self._silent_until:
            return None
        holds: list[int] = []
        tiers: list[tuple[int, int, int]] = []
        self.counters.lookups += 1
        try:
            for lookups, replaces in zip(self._lookups, before, strict=True):
                hold, *found = lookups.lookup(
                    tracked.names,
                    start,
                    stop,
                    replaces=replaces,
                    first=not tracked.asked,
                    timeout=self._timeout,
                )
                holds.append(hold)
                tiers.append((found[0], found[1], found[2]))
        except ConnectionError as error:
            self.counters.lookup_failures += 1
            self._silent_until = now + 1.0
            logger.warning("KV tiers: %s; nothing is loaded for a second", error)
            tiers = []
        tracked.asked = True
        blocks = min((sum(tier) for tier in tiers), default=0)
        if blocks == 0:
            self._release(holds)
            return None
        shortest = min(tiers, key=sum)
        self.counters.found_blocks += blocks
        tracked.found = Found(start, stop, holds, blocks, shortest, now)
        self._last_tiers[tracked.request.request_id] = shortest
        return tracked.found

    def _release(self, holds: list[int]) -> None:
        if any(holds):
            self._releases.append(holds + [0] * (len(self._lookups) - len(holds)))

    def _forget_found(self, tracked: Tracked) -> None:
        if tracked.found is not None:
            self._release(tracked.found.holds)
            tracked.found = None

    def _save(self, tracked: Tracked, computed: int) -> None:
        """Saves blocks that are full of known tokens, computed when the step is over."""
        if self._pool is None or tracked.generation != self._generation:
            return
        full = min(computed, tracked.request.num_tokens) // self.block_tokens
        full = min(full, len(tracked.block_ids))
        if full <= tracked.saved:
            return
        self._extend(tracked)
        start = tracked.saved
        tracked.saved = full
        run: list[int] = []
        for at in range(start, full + 1):
            block_id = tracked.block_ids[at] if at < full else None
            if block_id is None or self._pool.blocks[block_id].is_null:
                self._save_run(tracked, at - len(run), run)
                run = []
            else:
                run.append(block_id)

    def _save_run(self, tracked: Tracked, start: int, run: list[int]) -> None:
        if not run or self._pool is None:
            return
        blocks = [self._pool.blocks[block_id] for block_id in run]
        self._pool.touch(blocks)
        key = self._key()
        self._saving[key] = (blocks, len(self._lookups))
        self._saves.append(Save(key, tracked.names.pack(start, start + len(run)), run))
        self.counters.save_blocks += len(run)
        if self.on_save is not None:
            self.on_save(tracked, start, start + len(run))

    def _key(self) -> int:
        self._last_key += 1
        return self._last_key
