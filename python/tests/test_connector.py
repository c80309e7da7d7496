"""The connector's own logic without vLLM: a pool of blocks, and tiers that remember contents."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest

from blockplane._core import Names
from blockplane.vllm import memory
from blockplane.vllm.events import Announcer
from blockplane.vllm.messages import Report
from blockplane.vllm.scheduler import LOADS_PER_REQUEST, SchedulerSide
from blockplane.vllm.settings import ConnectorSettings, version_warning
from blockplane.vllm.worker import WorkerSide

TOKENS = 4


@dataclass
class Block:
    block_id: int
    ref_cnt: int = 0
    is_null: bool = False
    contents: Any = None


class Pool:
    """vLLM's: a block whose count is 0 is given to the next one who asks."""

    def __init__(self, blocks: int) -> None:
        self.blocks = [Block(at, is_null=at == 0, ref_cnt=int(at == 0)) for at in range(blocks)]

    def allocate(self, count: int) -> list[int] | None:
        free = [block for block in self.blocks if block.ref_cnt == 0]
        if len(free) < count:
            return None
        for block in free[:count]:
            block.ref_cnt, block.contents = 1, None
        return [block.block_id for block in free[:count]]

    def touch(self, blocks: Any) -> None:
        for block in blocks:
            block.ref_cnt += 1

    def free_blocks(self, ordered_blocks: Any) -> None:
        for block in ordered_blocks:
            block.ref_cnt -= 1
            assert block.ref_cnt >= 0


@dataclass
class Request:
    request_id: str
    all_token_ids: list[int]
    num_computed_tokens: int = 0
    cache_salt: str | None = None
    block_hashes: list[Any] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)


def unpack(packed: bytes) -> list[int]:
    words = [int.from_bytes(packed[at : at + 8], "little") for at in range(9, len(packed), 8)]
    return words[1::2]


class Tiers:
    """Both sides of one worker's tiers: what was saved, under its name."""

    def __init__(self, pool: Pool, rng: random.Random) -> None:
        self.pool = pool
        self.rng = rng
        self.stored: dict[int, Any] = {}
        self.holds: dict[int, Any] = {}
        self.running: list[tuple[Any, ...]] = []
        self.last = 0
        self.silent = False

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
        if self.silent:
            raise ConnectionError("silent")
        self.holds.pop(replaces, None)
        wanted = names.hashes(start, stop)
        missing = [at for at, name in enumerate(wanted) if name not in self.stored]
        count = missing[0] if missing else len(wanted)
        if count == 0:
            return 0, 0, 0, 0
        self.last += 1
        self.holds[self.last] = wanted
        return self.last, count, 0, 0

    def release(self, hold: int) -> None:
        self.holds.pop(hold, None)

    def load(self, key: int, hold: int, names: bytes, targets: list[int]) -> None:
        del self.holds[hold]
        self.running.append(("load", key, unpack(names), targets))

    def save(self, key: int, names: bytes, blocks: list[int], priority: int | None = None) -> None:
        self.running.append(("save", key, unpack(names), blocks))

    def poll(self, timeout: float = 0.0) -> list[tuple[Any, ...]]:
        ended: list[tuple[Any, ...]] = []
        for move in list(self.running):
            if self.rng.random() < 0.5:
                continue
            self.running.remove(move)
            kind, key, names, ids = move
            if kind == "save":
                for name, at in zip(names, ids, strict=True):
                    contents = self.pool.blocks[at].contents
                    assert contents == name, "a block was reused while it was saved"
                    self.stored[name] = contents
                ended.append(("save", key, len(ids), 0, 0))
                continue
            good = len(ids) if self.rng.random() < 0.7 else self.rng.randrange(len(ids))
            for name, at in zip(names[:good], ids, strict=False):
                self.pool.blocks[at].contents = self.stored[name]
            reason = None if good == len(ids) else "invalid"
            ended.append(("load", key, good, ids[good:], good, 0, 0, good, 0.0, reason))
        return ended

    def events(self) -> list[tuple[str, str | None, list[int]]]:
        return []


class Engine:
    """As much of vLLM's scheduler and runner as calls the connector, in its order."""

    def __init__(self, seed: int, workers: int = 1) -> None:
        self.rng = random.Random(seed)
        self.pool = Pool(40)
        self.tiers = [Tiers(self.pool, self.rng) for _ in range(workers)]
        self.now = 0.0
        self.side = SchedulerSide(TOKENS, self.tiers, clock=lambda: self.now)
        self.side.bind_pool(self.pool)
        self.workers = [WorkerSide(tier, rank) for rank, tier in enumerate(self.tiers)]
        self.waiting: list[Request] = []
        self.loading: dict[str, tuple[Request, int]] = {}
        self.running: list[Request] = []
        self.aborted: set[str] = set()
        self.arrivals: dict[str, int] = {}
        self.failed: set[int] = set()
        self.loaded_tokens = 0

    @staticmethod
    def name(request: Request, block: int) -> int:
        names = Names(TOKENS, cache_salt=request.cache_salt)
        names.extend(request.all_token_ids[: (block + 1) * TOKENS])
        return names.hashes(block, block + 1)[0]

    def admit(self) -> list[tuple[str, list[int], bool]]:
        new = []
        for request in list(self.waiting):
            external = 0
            if request.num_computed_tokens == 0:
                external = self.side.matched_tokens(request, 0)
                assert external % TOKENS == 0 and external < request.num_tokens
            ids = self.pool.allocate(-(-request.num_tokens // TOKENS) - len(request.blocks))
            if ids is None:
                continue
            request.blocks += ids
            self.side.allocated(request, request.blocks, external)
            self.waiting.remove(request)
            if external:
                request.num_computed_tokens = external
                self.loading[request.request_id] = (request, external)
                self.loaded_tokens += external
            else:
                self.running.append(request)
                new.append((request.request_id, list(request.blocks), True))
        return new

    def step(self) -> None:
        self.now += 0.1
        new = self.admit()
        scheduled = {}
        for request in list(self.running):
            left = request.num_tokens - request.num_computed_tokens
            missing = -(-request.num_tokens // TOKENS) - len(request.blocks)
            if missing > 0:
                ids = self.pool.allocate(missing)
                if ids is None:
                    self.preempt(request)
                    continue
                request.blocks += ids
                new.append((request.request_id, ids, False))
            scheduled[request.request_id] = min(left, self.rng.choice([3, 8, 30]))
        step = self.side.step(scheduled, new)
        for request in self.running:
            self.compute(request, scheduled[request.request_id])
        report = Report()
        for worker in self.workers:
            worker.load(step)
            worker.save(step)
            for arrived in worker.finished(step.idle):
                self.arrivals[arrived] = self.arrivals.get(arrived, 0) + 1
            self.failed |= worker.failed_blocks()
            report.add(worker.report())
        self.side.reported(report)
        for request_id, workers in list(self.arrivals.items()):
            if workers == len(self.workers):
                del self.arrivals[request_id]
                self.arrived(request_id)
        for request in list(self.running):
            self.grow(request)

    def compute(self, request: Request, tokens: int) -> None:
        """What attention reads must be there: everything before."""
        for at in range(request.num_computed_tokens // TOKENS):
            assert self.pool.blocks[request.blocks[at]].contents == self.name(request, at)
        request.num_computed_tokens += tokens
        for at in range(request.num_computed_tokens // TOKENS):
            self.pool.blocks[request.blocks[at]].contents = self.name(request, at)

    def arrived(self, request_id: str) -> None:
        request, external = self.loading.pop(request_id)
        failed = self.failed & set(request.blocks)
        self.failed -= failed
        if request_id in self.aborted:
            self.free(request)
            return
        good = external // TOKENS
        bad = [at for at in range(good) if request.blocks[at] in failed]
        good = min([good, *bad])
        request.num_computed_tokens = good * TOKENS
        if good == 0:
            self.free(request)
        self.waiting.insert(0, request)

    def grow(self, request: Request) -> None:
        if request.num_computed_tokens < request.num_tokens:
            return
        chance = self.rng.random()
        if chance < 0.15 or request.num_tokens > 40:
            self.running.remove(request)
            self.side.finished(request)
            self.free(request)
        elif chance < 0.25:
            self.preempt(request)
        else:
            request.all_token_ids.append(self.rng.randrange(2))

    def preempt(self, request: Request) -> None:
        self.running.remove(request)
        self.free(request)
        request.num_computed_tokens = 0
        self.waiting.append(request)

    def abort(self, request_id: str) -> None:
        if request_id in self.loading and request_id not in self.aborted:
            self.aborted.add(request_id)
            self.side.finished(self.loading[request_id][0])
        for queue in (self.running, self.waiting):
            for request in [known for known in queue if known.request_id == request_id]:
                queue.remove(request)
                self.side.finished(request)
                self.free(request)

    def free(self, request: Request) -> None:
        self.pool.free_blocks([self.pool.blocks[at] for at in reversed(request.blocks)])
        request.blocks = []

    def drain(self) -> None:
        for _ in range(500):
            for request in [*self.running, *self.waiting]:
                self.abort(request.request_id)
            for request_id in list(self.loading):
                self.abort(request_id)
            self.step()
            if not (self.loading or self.side.busy()):
                break
        assert not self.side.busy() and not self.loading
        assert [block.block_id for block in self.pool.blocks if block.ref_cnt] == [0]
        assert all(not tier.running for tier in self.tiers)
        assert all(not tier.holds for tier in self.tiers), "something is held for nobody"


@pytest.mark.parametrize("workers", [1, 2])
def test_any_order_of_requests_keeps_every_block_until_it_is_saved(workers: int) -> None:
    loaded = 0
    for seed in range(150):
        engine = Engine(seed, workers)
        for at in range(40):
            if engine.rng.random() < 0.5:
                tokens = [engine.rng.randrange(2) for _ in range(engine.rng.randrange(1, 30))]
                engine.waiting.append(Request(f"r{at}", tokens))
            if engine.rng.random() < 0.1 and at:
                engine.abort(f"r{engine.rng.randrange(at)}")
            if engine.rng.random() < 0.02:
                engine.tiers[0].silent = not engine.tiers[0].silent
            engine.step()
        loaded += engine.loaded_tokens
        engine.drain()
    assert loaded > 1000, "hardly anything was loaded"


def side_with(blocks: int) -> tuple[SchedulerSide, Tiers, list[int]]:
    pool = Pool(30)
    tiers = Tiers(pool, random.Random(1))
    side = SchedulerSide(TOKENS, [tiers], clock=lambda: 0.0)
    side.bind_pool(pool)
    tokens = list(range(blocks * TOKENS))
    names = Names(TOKENS)
    names.extend(tokens)
    for name in names.hashes(0, blocks):
        tiers.stored[name] = name
    return side, tiers, tokens


def test_a_prompt_is_never_loaded_whole() -> None:
    side, _, tokens = side_with(5)
    assert side.matched_tokens(Request("a", tokens), 0) == 4 * TOKENS
    assert side.matched_tokens(Request("b", [*tokens, 1]), 0) == 5 * TOKENS
    assert side.matched_tokens(Request("c", [*tokens, 1]), 2 * TOKENS) == 3 * TOKENS
    assert side.matched_tokens(Request("d", tokens), 4 * TOKENS) == 0
    assert side.matched_tokens(Request("e", [*tokens, 1]), 3) == 0


def test_other_salts_and_other_generations_find_nothing() -> None:
    side, tiers, tokens = side_with(5)
    assert side.matched_tokens(Request("a", tokens, cache_salt="mine"), 0) == 0
    request = Request("b", tokens)
    assert side.matched_tokens(request, 0) > 0
    side.reset()
    assert side.matched_tokens(request, 0) == 0
    assert side.matched_tokens(Request("c", tokens), 0) == 0
    assert tiers.holds, "of the request that began before"
    side.finished(request)
    assert side.busy() and side.step({}, []).releases
    assert not side.busy()


def test_requests_that_are_more_than_tokens_are_left_alone() -> None:
    side, _, tokens = side_with(5)
    request = Request("a", tokens)
    request.mm_features = ["an image"]  # type: ignore[attr-defined]
    assert side.matched_tokens(request, 0) == 0
    assert side.counters.skipped_requests == 1


def test_a_request_does_not_fail_to_load_for_ever() -> None:
    side, _, tokens = side_with(5)
    request = Request("a", tokens)
    for _ in range(LOADS_PER_REQUEST):
        assert side.matched_tokens(request, 0) > 0
        side.allocated(request, list(range(1, 6)), 4 * TOKENS)
        (load,) = side.step({}, []).loads
        side.reported(Report(loaded={load.key: 0}, load_workers={load.key: 1}))
    assert side.matched_tokens(request, 0) == 0


def test_null_blocks_are_not_saved() -> None:
    side, _, _ = side_with(0)
    request = Request("a", list(range(21)))
    assert side.matched_tokens(request, 0) == 0
    step = side.step({"a": 21}, [("a", [3, 0, 5, 6, 7, 8], True)])
    assert [save.blocks for save in step.saves] == [[3], [5, 6, 7]]


class Tensor:
    """What is used of torch's."""

    def __init__(self, base: int, offset: int, shape: list[int], strides: list[int]) -> None:
        self.base, self.offset, self.shape, self._strides = base, offset, shape, strides
        self.device = type("Device", (), {"type": "cpu", "index": None})

    def untyped_storage(self) -> Any:
        base = self.base
        return type("S", (), {"data_ptr": lambda _: base, "nbytes": lambda _: 1 << 20})()

    def data_ptr(self) -> int:
        return self.base + self.offset

    def element_size(self) -> int:
        return 2

    def stride(self) -> list[int]:
        return self._strides


def test_layers_of_one_allocation_are_one_piece() -> None:
    page = 2 * 32 * 64
    caches = {
        f"layer.{at}": Tensor(4096, at * 9 * page * 2, [9, 2, 32, 64], [page, 2048, 64, 1])
        for at in range(3)
    }
    places = memory.describe(caches, 9)
    assert places.regions == [(4096, 1 << 20, None)]
    assert places.segments == [memory.Segment(0, 0, page * 2, 3, 9 * page * 2, page * 2)]
    assert places.block_bytes == 3 * page * 2


def test_keys_and_values_apart_are_two_runs_and_allocations_are_regions() -> None:
    page = 16 * 4 * 8
    strides = [7 * page, page, 32, 8, 1]
    caches = {f"layer.{at}": Tensor(1 << 20 << at, 0, [2, 7, 16, 4, 8], strides) for at in (0, 1)}
    places = memory.describe(caches, 7)
    assert [region[0] for region in places.regions] == [1 << 20, 1 << 21]
    run = memory.Segment(0, 0, page * 2, 2, 7 * page * 2, page * 2)
    assert places.segments == [run, run._replace(region=1)]


def test_caches_that_are_not_understood_are_named() -> None:
    with pytest.raises(ValueError, match=r"layer x .*without a dimension of 7 blocks"):
        memory.describe({"x": Tensor(0, 0, [3, 5], [5, 1])}, 7)
    with pytest.raises(ValueError, match="layer y has a cache of several tensors"):
        memory.describe({"y": [1, 2]}, 7)
    with pytest.raises(ValueError, match="more than two pieces"):
        memory.describe({"z": Tensor(0, 0, [7, 2, 2, 4], [64, 32, 16, 1])}, 7)


def test_events_have_the_hashes_of_the_engine() -> None:
    announcer = Announcer(3, lambda block_hash: block_hash * 10)
    announcer.learn([1, 2], [11, 12], [[5], [6]], None, None)
    announcer.learn([3], [13], [[7]], 99, "lora")
    announcer.add([("stored", "host", [1, 2, 3, 4]), ("removed", "disk", [2, 77])])
    one, two, gone = announcer.take()
    assert [block.block_hash for block in one.blocks] == [110, 120]
    assert one.blocks[0].parent is None
    assert (two.blocks[0].parent, two.blocks[0].lora_name) == (990, "lora")
    assert (gone.stored, gone.tier, gone.blocks[0].tokens) == (False, "disk", (6,))
    announcer.learn([5], [15], [[8]], None, None)
    announcer.add([("removed", "host", [1])])
    assert announcer.take() == [], "the oldest is forgotten"


def test_settings_are_strict() -> None:
    assert ConnectorSettings.read(None).mode == "kvbm"
    assert ConnectorSettings.read({"mode": "kvbm+nixl"}).uses_nixl
    for wrong, says in [
        ({"mdoe": "kvbm"}, "mdoe is not known; accepted are mode"),
        ({"mode": "other"}, "accepted are kvbm, nixl"),
        ({"load_timeout_s": -1}, "load_timeout_s is -1"),
        ({"hold_s": "long"}, "hold_s is 'long'"),
        ({"nixl": 3}, "nixl must be an object"),
    ]:
        with pytest.raises(ValueError, match=says):
            ConnectorSettings.read(wrong)


def test_other_versions_are_warned_of() -> None:
    assert version_warning("0.32.0+cpu") is None
    assert version_warning("0.26.0") is None
    assert "0.33.1" in (version_warning("0.33.1") or "")
    assert version_warning("0.3.2") is not None
