"""Statistics in vLLM's terms: for its log line and its metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

METRICS = {
    "load_blocks": "Blocks loaded from the KV tiers",
    "host_blocks": "Blocks loaded that were in host memory (G2)",
    "disk_blocks": "Blocks loaded that were on disk (G3)",
    "remote_blocks": "Blocks loaded that were in an object store (G4)",
    "load_bytes": "Bytes loaded from the KV tiers",
    "load_seconds": "Time that requests waited for their blocks",
    "loads": "Requests for which blocks were loaded",
    "loads_failed": "Of these, requests for which not all blocks were loaded",
    "saved_blocks": "Blocks copied below vLLM's own cache",
    "present_blocks": "Blocks that did not have to be copied, because they were there",
    "dropped_blocks": "Blocks that were not copied: no room, no time, or a failure",
    "lookups": "Requests that were looked up in the KV tiers",
    "lookup_failures": "Lookups that were not answered",
    "found_blocks": "Blocks that lookups found",
    "load_requests": "Requests for which a load was begun",
    "save_blocks": "Blocks whose copy was begun",
    "skipped_requests": "Requests whose blocks cannot be named by their tokens",
}


@dataclass
class BlockplaneStats(KVConnectorStats):
    """Counts of one interval, by the names of `METRICS`."""

    @staticmethod
    def names() -> frozenset[str]:
        """All that may be counted."""
        return frozenset(METRICS)

    def reset(self) -> None:
        """Nothing has happened."""
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Adds what another worker, or a later interval, counted."""
        for name, value in other.data.items():
            self.data[name] = self.data.get(name, 0) + value
        return self

    def reduce(self) -> dict[str, Any]:
        """For the log."""
        return {name: round(value, 6) for name, value in self.data.items() if value}

    def is_empty(self) -> bool:
        """Whether nothing has happened."""
        return not any(self.data.values())


class BlockplanePromMetrics(KVConnectorPromMetrics):
    """`vllm:blockplane_<name>_total` for each name of `METRICS`."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {
            name: self._counter_cls(
                name=f"vllm:blockplane_{name}", documentation=text, labelnames=labelnames
            )
            for name, text in METRICS.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Adds one interval."""
        labels = self.per_engine_labelvalues[engine_idx]
        for name, value in transfer_stats_data.items():
            if value and name in self._counters:
                self._counters[name].labels(*labels).inc(value)
