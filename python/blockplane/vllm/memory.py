"""Where vLLM's blocks lie: from its tensors to regions and strides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


class Segment(NamedTuple):
    """The same part of every block, in one region."""

    region: int
    offset: int
    block_stride: int
    layers: int
    layer_stride: int
    run_bytes: int


@dataclass(frozen=True)
class KvMemory:
    """The memory of all blocks."""

    regions: list[tuple[int, int, int | None]]
    """Address, bytes and CUDA device of each allocation."""
    segments: list[Segment]
    """Parts of a block, in the order in which a stored block has them."""
    blocks: int
    """Blocks of vLLM."""

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return sum(part.layers * part.run_bytes for part in self.segments)


def describe(caches: Mapping[str, Any], blocks: int) -> KvMemory:
    """The memory of vLLM's KV caches: a tensor for each layer, one dimension of which are blocks.

    Raises:
        ValueError: a layer's cache is arranged in a way that is not known; says which and how.
    """
    regions: list[tuple[int, int, int | None]] = []
    places: dict[int, int] = {}
    parts: list[Segment] = []
    seen: set[int] = set()
    for layer, cache in caches.items():
        if not hasattr(cache, "untyped_storage"):
            raise ValueError(f"layer {layer} has a cache of several tensors: not supported")
        if cache.data_ptr() in seen:
            # It shares the cache of another layer.
            continue
        seen.add(cache.data_ptr())
        storage = cache.untyped_storage()
        base = storage.data_ptr()
        if base not in places:
            places[base] = len(regions)
            device = cache.device.index or 0 if cache.device.type == "cuda" else None
            if cache.device.type not in ("cpu", "cuda"):
                raise ValueError(f"layer {layer} is on {cache.device}; cpu and cuda are supported")
            regions.append((base, storage.nbytes(), device))
        item = cache.element_size()
        strides = [stride * item for stride in cache.stride()]
        parts.extend(
            part._replace(region=places[base], offset=part.offset + cache.data_ptr() - base)
            for part in parts_of(layer, list(cache.shape), strides, item, blocks)
        )
    if not parts:
        raise ValueError("vLLM has no KV cache")
    return KvMemory(regions, merge(parts), blocks)


def parts_of(
    layer: str, shape: Sequence[int], strides: Sequence[int], item: int, blocks: int
) -> list[Segment]:
    """How one layer's part of a block lies; strides in bytes, offsets from the tensor."""
    at = next((at for at, size in enumerate(shape[:2]) if size % blocks == 0 and size), None)
    if at is None:
        raise ValueError(
            f"layer {layer} has a cache of shape {list(shape)}, "
            f"without a dimension of {blocks} blocks"
        )
    inside = [(strides[i], size) for i, size in enumerate(shape) if i != at and size > 1]
    # vLLM's attention may cut a block into smaller ones.
    smaller = shape[at] // blocks
    if smaller > 1:
        inside.append((strides[at], smaller))
    inside.sort()
    run = item
    while inside and inside[0][0] == run:
        run *= inside.pop(0)[1]
    if len(inside) > 1:
        raise ValueError(
            f"layer {layer} has a cache of shape {list(shape)} and strides {list(strides)}: "
            "a block is in more than two pieces of pieces"
        )
    stride, count = inside[0] if inside else (run, 1)
    return [Segment(0, 0, strides[at] * smaller, count, stride, run)]


def merge(parts: list[Segment]) -> list[Segment]:
    """Neighbouring parts at equal distances are one: a transfer less for each."""
    merged: list[Segment] = []
    for part in parts:
        last = merged[-1] if merged else None
        if last is not None and part.layers == 1 and alike(last, part):
            step = part.offset - last.offset - (last.layers - 1) * last.layer_stride
            if last.layers == 1 and step >= last.run_bytes:
                merged[-1] = last._replace(layers=2, layer_stride=step)
                continue
            if last.layers > 1 and step == last.layer_stride:
                merged[-1] = last._replace(layers=last.layers + 1)
                continue
        merged.append(part)
    return merged


def alike(one: Segment, other: Segment) -> bool:
    """Whether two parts differ only in where they begin."""
    return (one.region, one.block_stride, one.run_bytes) == (
        other.region,
        other.block_stride,
        other.run_bytes,
    )
