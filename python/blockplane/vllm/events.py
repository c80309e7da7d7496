"""KV events of the tiers under vLLM's hashes, so that whoever reads vLLM's events knows them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Known:
    """A block that vLLM computed, as its events tell of it."""

    block_hash: Any
    parent: Any | None
    tokens: tuple[int, ...]
    lora_name: str | None


@dataclass(frozen=True)
class TierEvent:
    """Blocks came into a tier (`stored`), or left it."""

    stored: bool
    tier: str
    blocks: tuple[Known, ...]


class Announcer:
    """Remembers what our names mean, for at most `blocks_max` blocks; the oldest are forgotten.

    Blocks of earlier runs are not told of: their tokens are not known any more.
    """

    def __init__(self, blocks_max: int, convert: Callable[[Any], Any]) -> None:
        self._known: OrderedDict[int, Known] = OrderedDict()
        self._blocks_max = blocks_max
        self._convert = convert
        self._waiting: list[TierEvent] = []

    def learn(
        self,
        names: Sequence[int],
        hashes: Sequence[Any],
        tokens: Sequence[Sequence[int]],
        parent: Any | None,
        lora_name: str | None,
    ) -> None:
        """Consecutive blocks of one sequence, with vLLM's hashes."""
        before = None if parent is None else self._convert(parent)
        for name, block_hash, own in zip(names, hashes, tokens, strict=False):
            told = self._convert(block_hash)
            self._known[name] = Known(told, before, tuple(own), lora_name)
            self._known.move_to_end(name)
            before = told
        while len(self._known) > self._blocks_max:
            self._known.popitem(last=False)

    def add(self, events: Sequence[tuple[str, str | None, list[int]]]) -> None:
        """What the tiers say, under our names."""
        for kind, tier, names in events:
            if kind not in ("stored", "removed") or tier not in ("host", "disk"):
                continue
            known = [self._known[name] for name in names if name in self._known]
            if kind == "removed":
                if known:
                    self._waiting.append(TierEvent(False, tier, tuple(known)))
                continue
            for run in chains(known):
                self._waiting.append(TierEvent(True, tier, tuple(run)))

    def take(self) -> list[TierEvent]:
        """Since the last call."""
        waiting, self._waiting = self._waiting, []
        return waiting


def chains(blocks: list[Known]) -> Iterator[list[Known]]:
    """Cut where a block does not follow the one before it."""
    run: list[Known] = []
    for block in blocks:
        if run and block.parent != run[-1].block_hash:
            yield run
            run = []
        run.append(block)
    if run:
        yield run
