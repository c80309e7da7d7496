"""What the scheduler's side tells the worker's side in each step, and back."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Load:
    """Blocks to bring into G1 for one request."""

    key: int
    """Names the load."""
    request_id: str
    """Whom vLLM is told about."""
    holds: list[int]
    """What the lookup holds on each worker."""
    names: bytes
    """The blocks, of `Names.pack`."""
    targets: list[int]
    """vLLM's blocks to fill, in order."""


@dataclass
class Save:
    """Computed blocks to copy below G1. vLLM's scheduler holds them until they are."""

    key: int
    """Names the save."""
    names: bytes
    """The blocks, of `Names.pack`."""
    blocks: list[int]
    """vLLM's blocks, in order."""


@dataclass
class Step:
    """Everything for one step."""

    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
    releases: list[list[int]] = field(default_factory=list)
    """Held for lookups that nobody loads: on each worker."""
    idle: bool = False
    """Nothing is computed: whoever waits for a copy may wait."""


@dataclass
class Report:
    """What became of it, on one worker or on all that are added up."""

    saved: dict[int, int] = field(default_factory=dict)
    """Saves that ended, and on how many workers."""
    loaded: dict[int, int] = field(default_factory=dict)
    """Loads that ended, and the fewest blocks that a worker has."""
    load_workers: dict[int, int] = field(default_factory=dict)
    """On how many workers they ended."""
    events: list[tuple[str, str | None, list[int]]] = field(default_factory=list)
    """What came into the tiers of worker 0 and left them."""

    def is_empty(self) -> bool:
        """Whether it says nothing."""
        return not (self.saved or self.loaded or self.events)

    def add(self, other: Report) -> Report:
        """With what another worker says."""
        for key, workers in other.saved.items():
            self.saved[key] = self.saved.get(key, 0) + workers
        for key, blocks in other.loaded.items():
            self.loaded[key] = min(self.loaded.get(key, blocks), blocks)
        for key, workers in other.load_workers.items():
            self.load_workers[key] = self.load_workers.get(key, 0) + workers
        self.events.extend(other.events)
        return self
