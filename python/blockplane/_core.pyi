"""Types of the compiled half."""

import os
from collections.abc import Sequence
from typing import Any

__version__: str

# NIXL's bindings; the package `nixl` gives them their names.
nixl: Any

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

class CoreFault(Exception):
    """Kind, message and whether to try again."""

_Layout = tuple[int, int, int, int, int, int]

class AgentCore:
    """An agent; see `blockplane.Agent`."""

    def __init__(self, name: str, listen: str | None = None) -> None: ...
    @property
    def name(self) -> str: ...
    @property
    def fd(self) -> int: ...
    def ended(self) -> list[int]: ...
    def metadata(self) -> bytes: ...
    def register(
        self, address: int, bytes: int, device: int | None, keep: object, windowed: bool = False
    ) -> RegionCore: ...
    def allocate(self, bytes: int, label: str, windowed: bool = False) -> RegionCore: ...
    def open_file(self, path: str | os.PathLike[str], size: int | None = None) -> FileCore: ...
    def connect(self, metadata: bytes, timeout: float) -> PeerCore: ...
    def post(
        self,
        write: bool,
        local: RegionCore,
        layout: _Layout,
        ids: list[int],
        layers: tuple[int, int],
        peer: PeerCore,
        region: int,
        remote_layout: _Layout,
        remote_ids: list[int],
        remote_layers: tuple[int, int],
        window: int | None,
        notify: bytes | None,
        timeout: float,
    ) -> TransferCore: ...
    def post_file(
        self,
        write: bool,
        local: RegionCore,
        layout: _Layout,
        ids: list[int],
        layers: tuple[int, int],
        file: FileCore,
        file_layout: _Layout,
        file_ids: list[int],
        file_layers: tuple[int, int],
        durable: bool,
        timeout: float,
    ) -> TransferCore: ...
    def notify(self, peer: PeerCore, payload: bytes, timeout: float) -> TransferCore: ...
    def receive(self, timeout: float) -> tuple[str, bytes] | None: ...
    def open_window(
        self, region: RegionCore, layout: _Layout, ids: list[int] | None, read: bool, write: bool
    ) -> WindowCore: ...

class RegionCore:
    """Registered memory."""

    @property
    def id(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def address(self) -> int: ...
    def close(self, timeout: float) -> None: ...
    def read_at(self, at: int, bytes: int) -> bytes: ...
    def write_at(self, at: int, data: bytes) -> None: ...

class PeerCore:
    """Another agent."""

    @property
    def name(self) -> str: ...
    @property
    def connected(self) -> bool: ...
    @property
    def lane(self) -> str: ...
    def disconnect(self) -> None: ...

class WindowCore:
    """What peers may do with blocks."""

    @property
    def id(self) -> int: ...
    def close(self, timeout: float) -> None: ...

class FileCore:
    """A file."""

    def close(self) -> None: ...

class TransferCore:
    """Bytes on their way."""

    @property
    def token(self) -> int: ...
    @property
    def done(self) -> bool: ...
    @property
    def telemetry(self) -> tuple[int, float] | None: ...
    def wait(self, timeout: float) -> bool: ...
    def cancel(self) -> None: ...
    def detach(self) -> None: ...
