"""NIXL's bindings: the raw agent with integer handles, lists, constants and exceptions."""

from __future__ import annotations

import atexit
import weakref
from typing import Any

from blockplane import _core

from . import _environment

_nixl = _core.nixl

DEFAULT_COMM_PORT = _nixl.DEFAULT_COMM_PORT
NIXL_INIT_AGENT = _nixl.NIXL_INIT_AGENT
HAVE_UCX_GPU_DEVICE_API = _nixl.HAVE_UCX_GPU_DEVICE_API

nixl_mem_t = _nixl.nixl_mem_t
DRAM_SEG = _nixl.DRAM_SEG
VRAM_SEG = _nixl.VRAM_SEG
BLK_SEG = _nixl.BLK_SEG
OBJ_SEG = _nixl.OBJ_SEG
FILE_SEG = _nixl.FILE_SEG

nixl_xfer_op_t = _nixl.nixl_xfer_op_t
NIXL_READ = _nixl.NIXL_READ
NIXL_WRITE = _nixl.NIXL_WRITE

nixl_cost_t = _nixl.nixl_cost_t
NIXL_COST_ANALYTICAL_BACKEND = _nixl.NIXL_COST_ANALYTICAL_BACKEND

nixl_thread_sync_t = _nixl.nixl_thread_sync_t
NIXL_THREAD_SYNC_NONE = _nixl.NIXL_THREAD_SYNC_NONE
NIXL_THREAD_SYNC_STRICT = _nixl.NIXL_THREAD_SYNC_STRICT
NIXL_THREAD_SYNC_RW = _nixl.NIXL_THREAD_SYNC_RW
NIXL_THREAD_SYNC_DEFAULT = _nixl.NIXL_THREAD_SYNC_DEFAULT

nixl_status_t = _nixl.nixl_status_t
NIXL_IN_PROG = _nixl.NIXL_IN_PROG
NIXL_SUCCESS = _nixl.NIXL_SUCCESS
NIXL_ERR_NOT_POSTED = _nixl.NIXL_ERR_NOT_POSTED
NIXL_ERR_INVALID_PARAM = _nixl.NIXL_ERR_INVALID_PARAM
NIXL_ERR_BACKEND = _nixl.NIXL_ERR_BACKEND
NIXL_ERR_NOT_FOUND = _nixl.NIXL_ERR_NOT_FOUND
NIXL_ERR_MISMATCH = _nixl.NIXL_ERR_MISMATCH
NIXL_ERR_NOT_ALLOWED = _nixl.NIXL_ERR_NOT_ALLOWED
NIXL_ERR_REPOST_ACTIVE = _nixl.NIXL_ERR_REPOST_ACTIVE
NIXL_ERR_UNKNOWN = _nixl.NIXL_ERR_UNKNOWN
NIXL_ERR_NOT_SUPPORTED = _nixl.NIXL_ERR_NOT_SUPPORTED
NIXL_ERR_REMOTE_DISCONNECT = _nixl.NIXL_ERR_REMOTE_DISCONNECT
NIXL_ERR_CANCELED = _nixl.NIXL_ERR_CANCELED
NIXL_ERR_NO_TELEMETRY = _nixl.NIXL_ERR_NO_TELEMETRY

nixlNotPostedError = _nixl.nixlNotPostedError
nixlInvalidParamError = _nixl.nixlInvalidParamError
nixlBackendError = _nixl.nixlBackendError
nixlNotFoundError = _nixl.nixlNotFoundError
nixlMismatchError = _nixl.nixlMismatchError
nixlNotAllowedError = _nixl.nixlNotAllowedError
nixlRepostActiveError = _nixl.nixlRepostActiveError
nixlUnknownError = _nixl.nixlUnknownError
nixlNotSupportedError = _nixl.nixlNotSupportedError
nixlRemoteDisconnectError = _nixl.nixlRemoteDisconnectError
nixlCancelledError = _nixl.nixlCancelledError
nixlNoTelemetryError = _nixl.nixlNoTelemetryError

nixlAgentConfig = _nixl.nixlAgentConfig
nixlXferTelemetry = _nixl.nixlXferTelemetry
nixlXferDList = _nixl.nixlXferDList
nixlRegDList = _nixl.nixlRegDList
nixlRemoteDList = _nixl.nixlRemoteDList


_agents: weakref.WeakSet[nixlAgent] = weakref.WeakSet()


class nixlAgent(_nixl.nixlAgent):
    """The raw agent, with what the environment says."""

    def __new__(cls, name: str, config: Any) -> nixlAgent:
        """Starts an agent: its threads sleep until there is work."""
        if not isinstance(name, str):
            raise TypeError(f"the name of an agent is text, not {type(name).__name__}")
        captured = _environment.telemetry(config.captureTelemetry)
        if captured != config.captureTelemetry:
            config = _with_telemetry(config, captured)
        agent = super().__new__(cls, name, config, **_environment.agent_options())
        _agents.add(agent)
        return agent


@atexit.register
def _call_off() -> None:
    # What is alive at the end goes in any order: memory may go before the agent that copies it.
    for agent in list(_agents):
        agent.callOffAll()


def _with_telemetry(config: Any, captured: bool) -> Any:
    other = nixlAgentConfig(
        config.useProgThread, config.useListenThread, config.listenPort, config.syncMode
    )
    other.captureTelemetry = captured
    return other
