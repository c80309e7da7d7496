"""vLLM's KV cache on blockplane.

`--kv-transfer-config '{"kv_connector": "BlockplaneConnector", "kv_connector_module_path":
"blockplane.vllm", "kv_role": "kv_both", "kv_connector_extra_config": {"mode": "kvbm"}}'`
"""

from __future__ import annotations

from typing import Any

__all__ = ["BlockplaneConnector"]


def __getattr__(name: str) -> Any:
    """The connector needs vLLM, which the modules below it do not."""
    if name == "BlockplaneConnector":
        from .connector import BlockplaneConnector

        return BlockplaneConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
