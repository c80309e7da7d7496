"""BlockplaneConnector: vLLM's connector interface over `SchedulerSide` and `WorkerSide`."""

from __future__ import annotations

import atexit
import copy
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import vllm
from vllm.config.kv_transfer import KVTransferConfig
from vllm.distributed import kv_events
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
)

from blockplane._core import Lookups, TierWorker

from . import events, memory, model
from .messages import Report, Step
from .scheduler import SchedulerSide, Tracked
from .settings import ConnectorSettings, kvbm_variables, socket_path, version_warning
from .stats import BlockplanePromMetrics, BlockplaneStats
from .worker import WorkerSide

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput

logger = logging.getLogger("vllm.blockplane")

NAME = "BlockplaneConnector"
MODULE = "blockplane.vllm"
DISK_MEDIUM = getattr(kv_events, "MEDIUM_STORAGE", None) or getattr(kv_events, "MEDIUM_FS", "FS")
MEDIA = {"host": kv_events.MEDIUM_CPU, "disk": DISK_MEDIUM}

if NAME not in KVConnectorFactory._registry:
    # MultiConnector finds the statistics of its parts by their names.
    KVConnectorFactory.register_connector(NAME, MODULE, NAME)


class StepMetadata(KVConnectorMetadata):
    """A step for the workers."""

    def __init__(self, step: Step) -> None:
        self.step = step


class ReportMetadata(KVConnectorWorkerMetadata):
    """A report for the scheduler."""

    def __init__(self, report: Report) -> None:
        self.report = report

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """With what another worker says."""
        assert isinstance(other, ReportMetadata)
        self.report.add(other.report)
        return self


class BlockplaneConnector(KVConnectorBase_V1):
    """KV of vLLM in host memory, on disk and in object stores, in blockplane's tiers.

    `kv_connector_extra_config` is of `ConnectorSettings`, the tiers are set by `DYN_KVBM_*`. Mode
    `nixl` is vLLM's NixlConnector, mode `kvbm+nixl` its MultiConnector of that and this.
    """

    def __new__(
        cls, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> Any:
        """An object of the class that the mode asks for."""
        settings = settings_of(vllm_config)
        if not settings.uses_nixl:
            return super().__new__(cls)
        config = copy.copy(vllm_config)
        config.kv_transfer_config = with_nixl(vllm_config.kv_transfer_config, settings)
        return KVConnectorFactory.get_connector_class(config.kv_transfer_config)(
            config, role, kv_cache_config
        )

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        warning = version_warning(vllm.__version__)
        if warning:
            logger.warning(warning)
        self._settings = settings_of(vllm_config)
        self._kv_cache_config = kv_cache_config
        groups = len(kv_cache_config.kv_cache_groups)
        if groups > 1:
            raise ValueError(
                f"the model has {groups} groups of KV caches; {NAME} supports one. Start vLLM with "
                "--disable-hybrid-kv-cache-manager"
            )
        parallel = vllm_config.parallel_config
        if getattr(parallel, "decode_context_parallel_size", 1) > 1:
            raise ValueError(f"{NAME} does not support --decode-context-parallel-size")
        self._workers = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
        self._engine_id = str(self._kv_transfer_config.engine_id)
        self._tiers: TierWorker | None = None
        self._worker: WorkerSide | None = None
        self._scheduler: SchedulerSide | None = None
        self._announcer: events.Announcer | None = None
        if role == KVConnectorRole.SCHEDULER:
            self._start_scheduler(vllm_config)

    def _start_scheduler(self, config: VllmConfig) -> None:
        if self._kv_transfer_config.kv_load_failure_policy != "recompute":
            # A block that is lost below vLLM's cache is a miss, and never an error.
            logger.info("kv_load_failure_policy is 'recompute' with %s", NAME)
            self._kv_transfer_config.kv_load_failure_policy = "recompute"
        settings = self._settings
        scheduler = SchedulerSide(
            config.cache_config.block_size,
            [Lookups(str(socket_path(self._engine_id, rank))) for rank in range(self._workers)],
            clock=time.monotonic,
            lookup_timeout=settings.lookup_timeout_s,
            hold_time=settings.hold_s,
        )
        told = config.kv_events_config
        if told is not None and told.enable_kv_cache_events:
            from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

            self._announcer = events.Announcer(settings.events_max, maybe_convert_block_hash)
            scheduler.on_save = self._learn
        self._scheduler = scheduler

    def _learn(self, tracked: Tracked, start: int, stop: int) -> None:
        hashes = tracked.request.block_hashes
        if self._announcer is None or len(hashes) < stop:
            return
        size = self._scheduler_side.block_tokens
        tokens = [tracked.names.slice(at * size, (at + 1) * size) for at in range(start, stop)]
        parent = hashes[start - 1] if start else None
        names = tracked.names.hashes(start, stop)
        self._announcer.learn(names, hashes[start:stop], tokens, parent, tracked.lora_name)

    @property
    def _scheduler_side(self) -> SchedulerSide:
        assert self._scheduler is not None, "called in the scheduler"
        return self._scheduler

    @property
    def _worker_side(self) -> WorkerSide:
        assert self._worker is not None, "called in a worker, after register_kv_caches"
        return self._worker

    @property
    def requires_kv_delivery(self) -> bool:
        """A block that is not saved is a miss later."""
        return False

    # --- worker ---

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Opens the tiers below vLLM's memory."""
        config = self._vllm_config
        parallel = config.parallel_config
        rank = parallel.rank % self._workers
        places = memory.describe(kv_caches, self._kv_cache_config.num_blocks)
        path = socket_path(self._engine_id, rank)
        path.unlink(missing_ok=True)
        tiers = TierWorker.open(
            kvbm_variables(),
            name=f"vllm-{self._engine_id[:13]}-{rank}",
            keep=list(kv_caches.values()),
            regions=places.regions,
            segments=places.segments,
            blocks=places.blocks,
            block_tokens=config.cache_config.block_size,
            model=model.fingerprint(config, kv_caches, places),
            rank=rank,
            ranks=self._workers,
            events_max=self._settings.events_max,
            hold_time=self._settings.hold_s,
            load_time=self._settings.load_timeout_s,
        )
        if tiers is None:
            raise ValueError(
                f"{NAME} in mode {self._settings.mode} has no tier: set DYN_KVBM_CPU_CACHE_GB, "
                "DYN_KVBM_DISK_CACHE_GB or DYN_KVBM_OBJECT_ENABLED"
            )
        tiers.serve(str(path))
        fence = cuda_fence if any(device is not None for *_, device in places.regions) else None
        told = config.kv_events_config
        self._worker = WorkerSide(
            tiers,
            rank,
            fence=fence,
            events=told is not None and told.enable_kv_cache_events,
        )
        self._tiers = tiers
        # Not every executor of vLLM calls `shutdown`.
        atexit.register(self.shutdown)
        logger.info(
            "KV tiers below %d blocks of %d bytes, in %d regions and %d pieces",
            places.blocks,
            places.block_bytes,
            len(places.regions),
            len(places.segments),
        )

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Begins the loads of this step."""
        self._worker_side.load(self._step)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is loaded during a step into what the step reads."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Blocks are saved whole, after the step."""

    def wait_for_save(self) -> None:
        """Begins the saves of this step. Their blocks are held by the scheduler."""
        self._worker_side.save(self._step)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Requests whose loads are over."""
        idle = self.has_connector_metadata() and self._step.idle
        return None, self._worker_side.finished(idle) or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks that must be computed."""
        return self._worker_side.failed_blocks()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """What the scheduler is told."""
        report = self._worker_side.report()
        return None if report.is_empty() else ReportMetadata(report)

    @property
    def _step(self) -> Step:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, StepMetadata)
        return metadata.step

    # --- scheduler ---

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        """vLLM's pool, in which blocks are held that are being saved."""
        self._scheduler_side.bind_pool(gpu_block_pool)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Tokens that the tiers have beyond vLLM's own cache; loaded asynchronously."""
        tokens = self._scheduler_side.matched_tokens(request, num_computed_tokens)
        return tokens, tokens > 0

    def get_external_cache_hit_sources(
        self, request: Any, num_external_tokens: int
    ) -> dict[Any, int]:
        """Of these tokens, how many come from where (vLLM 0.32)."""
        from vllm.v1.metrics.cache_hit_source import CacheHitSource

        host, disk, remote = self._scheduler_side.sources(request, num_external_tokens)
        split = {
            CacheHitSource.HOST: host,
            CacheHitSource.DISK: disk,
            CacheHitSource.EXTERNAL_UNSPECIFIED: remote,
        }
        return {source: tokens for source, tokens in split.items() if tokens}

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Takes the blocks that are to be loaded into."""
        self._scheduler_side.allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """What the workers do with this step."""
        output = scheduler_output
        new_blocks = [(new.req_id, new.block_ids[0], True) for new in output.scheduled_new_reqs]
        cached = output.scheduled_cached_reqs
        for request_id, ids in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if ids is not None:
                new_blocks.append((request_id, ids[0], request_id in cached.resumed_req_ids))
        return StepMetadata(self._scheduler_side.step(output.num_scheduled_tokens, new_blocks))

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Takes what the workers say."""
        metadata = connector_output.kv_connector_worker_meta
        if isinstance(metadata, ReportMetadata):
            self._scheduler_side.reported(metadata.report)
            if self._announcer is not None:
                self._announcer.add(metadata.report.events)

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Saves what is left. Blocks being saved are held one by one, so vLLM frees the request."""
        self._scheduler_side.finished(request)
        return False, None

    def has_pending_push_work(self) -> bool:
        """Whether blocks are held for saves that have not ended."""
        return self._scheduler_side.busy()

    def take_events(self) -> Iterable[kv_events.KVCacheEvent]:
        """What came into host memory and the disk, and left them, under vLLM's hashes."""
        if self._announcer is None:
            return []
        return [self._event(event) for event in self._announcer.take()]

    def _event(self, event: events.TierEvent) -> kv_events.KVCacheEvent:
        hashes = [block.block_hash for block in event.blocks]
        medium = MEDIA[event.tier]
        if not event.stored:
            return kv_events.BlockRemoved(block_hashes=hashes, medium=medium, group_idx=0)
        first = event.blocks[0]
        return kv_events.BlockStored(
            block_hashes=hashes,
            parent_block_hash=first.parent,
            token_ids=[token for block in event.blocks for token in block.tokens],
            block_size=self._scheduler_side.block_tokens,
            lora_id=None,
            medium=medium,
            lora_name=first.lora_name,
            group_idx=0,
        )

    def reset_cache(self) -> bool | None:
        """Nothing that was stored before is found any more, also not by later runs."""
        if self._scheduler is not None:
            self._scheduler.reset()
        return True

    # --- both ---

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """Counts since the last call."""
        side = self._worker or self._scheduler
        if isinstance(side, WorkerSide):
            counts = asdict(side.moved)
            side.moved = type(side.moved)()
        elif side is not None:
            counts = asdict(side.counters)
            side.counters = type(side.counters)()
        else:
            return None
        stats = BlockplaneStats(data={name: value for name, value in counts.items() if value})
        return None if stats.is_empty() else stats

    def shutdown(self) -> None:
        """Writes what was offloaded, and ends the use of vLLM's memory."""
        tiers, self._tiers = self._tiers, None
        if tiers is not None and not tiers.close(self._settings.shutdown_s):
            logger.warning(
                "KV tiers: not everything was written within %g s", self._settings.shutdown_s
            )

    # --- of the class ---

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        """That of NixlConnector where it takes part."""
        settings = settings_of(vllm_config)
        if not settings.uses_nixl:
            return None
        nixl = KVConnectorFactory.get_connector_class_by_name("NixlConnector")
        return nixl.get_required_kvcache_layout(vllm_config)

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Any:
        """Statistics of the mode that they are of."""
        other = stats_class(data)
        if other is not None:
            return other.build_kv_connector_stats(data)
        return BlockplaneStats(data=data) if data is not None else BlockplaneStats()

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> Any:
        """Metrics of the mode."""
        settings = settings_of(vllm_config)
        if not settings.uses_nixl:
            return BlockplanePromMetrics(
                vllm_config, metric_types, labelnames, per_engine_labelvalues
            )
        config = copy.copy(vllm_config)
        config.kv_transfer_config = with_nixl(vllm_config.kv_transfer_config, settings)
        return KVConnectorFactory.get_connector_class(config.kv_transfer_config).build_prom_metrics(
            config, metric_types, labelnames, per_engine_labelvalues
        )


def settings_of(config: VllmConfig) -> ConnectorSettings:
    """The user's settings of the connector."""
    assert config.kv_transfer_config is not None
    return ConnectorSettings.read(config.kv_transfer_config.kv_connector_extra_config)


def with_nixl(given: KVTransferConfig, settings: ConnectorSettings) -> KVTransferConfig:
    """The configuration of NixlConnector, or of it and this one side by side."""
    nixl = {
        "kv_connector": "NixlConnector",
        "kv_role": given.kv_role,
        "kv_buffer_device": given.kv_buffer_device,
        "kv_connector_extra_config": settings.nixl,
    }
    if not settings.kvbm:
        policy = given.kv_load_failure_policy
        return KVTransferConfig(**nixl, engine_id=given.engine_id, kv_load_failure_policy=policy)
    own = {
        "kv_connector": NAME,
        "kv_connector_module_path": MODULE,
        "kv_role": given.kv_role,
        "kv_connector_extra_config": {
            **given.kv_connector_extra_config,
            "mode": "kvbm",
            "nixl": {},
        },
    }
    # What is below vLLM's cache may be lost; then it is computed.
    given.kv_load_failure_policy = "recompute"
    return KVTransferConfig(
        kv_connector="MultiConnector",
        kv_role=given.kv_role,
        kv_buffer_device=given.kv_buffer_device,
        engine_id=given.engine_id,
        kv_load_failure_policy="recompute",
        # The first one that has tokens loads them; all save.
        kv_connector_extra_config={"connectors": [nixl, own]},
    )


def stats_class(data: dict[str, Any] | None) -> Any:
    """Whose statistics these are; `None` for our own."""
    if not data:
        return None
    if {NAME, "NixlConnector"} & set(data):
        return KVConnectorFactory.get_connector_class_by_name("MultiConnector")
    if set(data) <= set(BlockplaneStats.names()):
        return None
    return KVConnectorFactory.get_connector_class_by_name("NixlConnector")


def cuda_fence() -> Callable[[], bool]:
    """Says whether the device has done what was asked of it until now."""
    import torch

    event = torch.cuda.Event()
    event.record()
    return event.query
