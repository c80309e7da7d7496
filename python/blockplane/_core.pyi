"""Types of the compiled half."""

import os
from collections.abc import Sequence
from typing import Any

__version__: str

class Names:
    """The names of the full blocks of a growing sequence of tokens."""

    def __init__(
        self,
        block_tokens: int,
        *,
        cache_salt: str | None = None,
        lora_name: str | None = None,
        generation: int = 0,
    ) -> None: ...
    def extend(self, tokens: list[int]) -> None: ...
    @property
    def tokens(self) -> int: ...
    def slice(self, start: int, stop: int) -> list[int]: ...
    def __len__(self) -> int: ...
    def hashes(self, start: int, stop: int) -> list[int]: ...
    def pack(self, start: int, stop: int) -> bytes: ...

class Lookups:
    """Asks the tiers of one worker, through its socket."""

    def __init__(self, path: str | os.PathLike[str]) -> None: ...
    def lookup(
        self,
        names: Names,
        start: int,
        stop: int,
        *,
        replaces: int = 0,
        first: bool = False,
        timeout: float = 1.0,
    ) -> tuple[int, int, int, int]: ...

class TierWorker:
    """The tiers below the KV memory of one worker of an engine."""

    @staticmethod
    def open(
        settings: list[tuple[str, str]],
        *,
        name: str,
        keep: object,
        regions: Sequence[tuple[int, int, int | None]],
        segments: Sequence[tuple[int, int, int, int, int, int]],
        blocks: int,
        block_tokens: int,
        model: int,
        rank: int = 0,
        ranks: int = 1,
        events_max: int = 65536,
        hold_time: float = 30.0,
        load_time: float = 30.0,
    ) -> TierWorker | None: ...
    def serve(self, path: str | os.PathLike[str]) -> None: ...
    def load(self, key: int, hold: int, names: bytes, targets: list[int]) -> None: ...
    def save(
        self, key: int, names: bytes, blocks: list[int], priority: int | None = None
    ) -> None: ...
    def release(self, hold: int) -> None: ...
    def poll(self, timeout: float = 0.0) -> list[tuple[Any, ...]]: ...
    def events(self) -> list[tuple[str, str | None, list[int]]]: ...
    def stats(self) -> dict[str, int]: ...
    def flush(self, timeout: float) -> bool: ...
    def close(self, timeout: float) -> bool: ...
