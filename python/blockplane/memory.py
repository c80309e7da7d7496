"""Memory that can be registered, and how blocks lie in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ._core import RegionCore
from .errors import InvalidError, translated


@dataclass(frozen=True)
class Layout:
    """Where blocks lie in a region: `offset + block * block_stride + layer * layer_stride`.

    All in bytes; `run_bytes` of them follow each other there.
    """

    blocks: int
    run_bytes: int
    block_stride: int = 0
    layers: int = 1
    layer_stride: int = 0
    offset: int = 0

    def __post_init__(self) -> None:
        if min(self.blocks, self.run_bytes, self.layers) < 1 or self.offset < 0:
            raise InvalidError(f"{self}: blocks, run_bytes and layers are at least 1")
        if self.block_stride == 0:
            object.__setattr__(self, "block_stride", self.run_bytes * self.layers)
        if self.layer_stride == 0:
            object.__setattr__(self, "layer_stride", self.run_bytes)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, all layers."""
        return self.run_bytes * self.layers

    def core(self) -> tuple[int, int, int, int, int, int]:
        """As the compiled half takes it."""
        return (
            self.offset,
            self.blocks,
            self.block_stride,
            self.layers,
            self.layer_stride,
            self.run_bytes,
        )

    def blocks_at(self, ids: Sequence[int], layers: range | None = None) -> Blocks:
        """Some of the blocks, and of their layers."""
        return Blocks(self, tuple(ids), layers if layers is not None else range(self.layers))


@dataclass(frozen=True)
class Blocks:
    """Blocks of a layout, by their ids, and which of their layers."""

    layout: Layout
    ids: tuple[int, ...]
    layers: range

    @property
    def nbytes(self) -> int:
        """How many bytes they are."""
        return len(self.ids) * len(self.layers) * self.layout.run_bytes

    def core(self) -> tuple[tuple[int, int, int, int, int, int], list[int], tuple[int, int]]:
        """As the compiled half takes it."""
        return self.layout.core(), list(self.ids), (self.layers.start, self.layers.stop)


Part = Blocks | slice | None
"""Blocks of a layout, bytes `slice(start, stop)`, or all of a region."""


def part_of(part: Part, size: int) -> Blocks:
    """A part of a region as blocks: bytes are one block."""
    if isinstance(part, Blocks):
        return part
    start, stop, step = (part or slice(None)).indices(size)
    if step != 1 or stop <= start:
        raise InvalidError(f"bytes {start} to {stop} by {step} of {size}: a range is accepted")
    return Layout(blocks=1, run_bytes=stop - start, offset=start).blocks_at([0])


@dataclass(frozen=True)
class RemoteRegion:
    """A region of another agent: its number there, its size, and perhaps a window over it."""

    id: int
    nbytes: int
    window: int | None = None

    def through(self, window: int) -> RemoteRegion:
        """The same, reached through a window that its owner has opened."""
        return replace(self, window=window)


class Region:
    """Registered memory. Ends with `close` or `with`; what it was made of stays until then."""

    def __init__(self, core: RegionCore) -> None:
        self._core = core

    @property
    def id(self) -> int:
        """Its number at this agent."""
        return self._core.id

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self._core.nbytes

    def describe(self) -> RemoteRegion:
        """What a peer must know to name it; a plain value to send to it."""
        return RemoteRegion(self.id, self.nbytes)

    @translated
    def read(self, at: int, count: int) -> bytes:
        """A copy of some of its bytes (host memory only)."""
        return self._core.read_at(at, count)

    @translated
    def write(self, at: int, data: bytes) -> None:
        """Puts bytes into it (host memory only)."""
        self._core.write_at(at, data)

    @translated
    def close(self, timeout: float = 5.0) -> None:
        """Ends the registration and waits until nobody uses the memory.

        Raises:
            BusyError: somebody still does after `timeout` seconds. The memory is never freed then.
        """
        self._core.close(timeout)

    def __enter__(self) -> Region:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def locate(memory: Any) -> tuple[int, int, int | None]:
    """Address, bytes and CUDA device of a tensor, an array, or anything with a writable buffer."""
    if hasattr(memory, "data_ptr"):
        if not memory.is_contiguous():
            raise InvalidError("a tensor that is not contiguous; register its storage")
        device = memory.device
        if device.type not in ("cpu", "cuda"):
            raise InvalidError(f"a tensor on {device}; cpu and cuda are accepted")
        size = memory.numel() * memory.element_size()
        return memory.data_ptr(), size, (device.index or 0) if device.type == "cuda" else None
    interface = getattr(memory, "__array_interface__", None)
    if interface is not None:
        if interface.get("strides") is not None:
            raise InvalidError("an array that is not contiguous; register the one it is of")
        address, read_only = interface["data"]
        if read_only:
            raise InvalidError("an array that is read-only")
        return address, memory.nbytes, None
    import ctypes

    view = memoryview(memory)
    if view.readonly or not view.c_contiguous:
        raise InvalidError("a buffer that is read-only or not contiguous")
    return ctypes.addressof(ctypes.c_char.from_buffer(view)), view.nbytes, None
