"""Which contents: one number for everything that decides what the bytes of a block mean."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")
SAMPLE_BYTES = 1 << 16


def fingerprint(config: Any, caches: Mapping[str, Any], memory: Any) -> int:
    """A number that differs where model, weights, arithmetic or layout do. 64 bits.

    `config` is vLLM's; of `caches` layers, types and shapes count, not how many blocks there are.
    """
    model = config.model_config
    cache = config.cache_config
    parallel = config.parallel_config
    hf_config = model.hf_config
    layers = [
        (name, str(tensor.dtype), [size for size in tensor.shape if size % memory.blocks])
        for name, tensor in caches.items()
    ]
    facts = {
        "model": weights(Path(model.model)) or [model.model, model.revision],
        "commit": getattr(hf_config, "_commit_hash", None),
        "config": hashlib.sha256(text(hf_config.to_dict()).encode()).hexdigest(),
        "dtype": str(model.dtype),
        "quantization": str(model.quantization),
        "load_format": str(config.load_config.load_format),
        "kv_dtype": str(cache.cache_dtype),
        "block_tokens": cache.block_size,
        "layers": layers,
        "runs": [(part.layers, part.run_bytes) for part in memory.segments],
        "pipeline": [parallel.pipeline_parallel_size, parallel.rank],
    }
    return int.from_bytes(hashlib.sha256(text(facts).encode()).digest()[:8], "little")


def weights(folder: Path) -> list[tuple[str, int, str]] | None:
    """Name, size and a digest of the ends of each file of weights; `None` if this is no folder."""
    if not folder.is_dir():
        return None
    files = sorted(path for path in folder.iterdir() if path.suffix in WEIGHTS)
    return [(path.name, path.stat().st_size, ends(path)) for path in files]


def ends(path: Path) -> str:
    """A digest of the first and the last bytes of a file; safetensors begin with a header."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(SAMPLE_BYTES))
        file.seek(max(0, path.stat().st_size - SAMPLE_BYTES))
        digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def text(value: Any) -> str:
    """The same text for the same facts, in every process."""
    return json.dumps(value, sort_keys=True, default=str)
