"""NIXL's agent for people: names of backends and kinds of memory instead of handles and numbers."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _bindings
from .logging import get_logger

if TYPE_CHECKING:
    import torch

logger = get_logger(__name__)

DEFAULT_COMM_PORT = _bindings.DEFAULT_COMM_PORT

# Handles of backends are only passed on.
nixl_backend_handle = int

_INIT_AGENT = "NIXL_INIT_AGENT"
_OPS = {"READ": _bindings.NIXL_READ, "WRITE": _bindings.NIXL_WRITE}
_MEMORY = {
    "DRAM": _bindings.DRAM_SEG,
    "VRAM": _bindings.VRAM_SEG,
    "FILE": _bindings.FILE_SEG,
    "BLOCK": _bindings.BLK_SEG,
    "OBJ": _bindings.OBJ_SEG,
    "cpu": _bindings.DRAM_SEG,
    "cuda": _bindings.VRAM_SEG,
}
_STATES = {_bindings.NIXL_SUCCESS: "DONE", _bindings.NIXL_IN_PROG: "PROC"}


class _Handle:
    """A handle that is given back when it is released, or forgotten."""

    __slots__ = ("_agent", "_handle", "_released")

    def __init__(self, agent: Any, value: int) -> None:
        self._agent = agent
        self._handle = int(value)
        self._released = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}(0x{self._handle:x}, released={self._released})"

    def _give_back(self) -> None:
        raise NotImplementedError

    def release(self) -> None:
        """Gives the handle back; a second time does nothing.

        Raises:
            nixlNotAllowedError: bytes of a transfer still move after it was called off. The handle
                stays; release it again.
        """
        if not self._released:
            self._give_back()
            self._released = True

    def __del__(self) -> None:
        try:
            self.release()
        except Exception as error:  # noqa: BLE001 - there is nobody to raise to
            logger.error("%r could not be released: %s", self, error)


class nixl_prepped_dlist_handle(_Handle):
    """A prepared descriptor list."""

    __slots__ = ()

    def _give_back(self) -> None:
        self._agent.releasedDlistH(self._handle)


class nixl_xfer_handle(_Handle):
    """A transfer. Releasing one in flight calls it off: no byte of it moves afterwards."""

    __slots__ = ()

    def _give_back(self) -> None:
        self._agent.releaseXferReq(self._handle)


class nixl_thread_sync_t(Enum):
    """How calls of several threads are kept apart.

    Agents of this package may be used from any thread in every mode.
    """

    NIXL_THREAD_SYNC_NONE = _bindings.NIXL_THREAD_SYNC_NONE
    NIXL_THREAD_SYNC_STRICT = _bindings.NIXL_THREAD_SYNC_STRICT
    NIXL_THREAD_SYNC_RW = _bindings.NIXL_THREAD_SYNC_RW
    NIXL_THREAD_SYNC_DEFAULT = _bindings.NIXL_THREAD_SYNC_DEFAULT


class nixl_agent_config:
    """Configuration of an agent.

    Args:
        enable_prog_thread: accepted; transfers make progress without calls in either case.
        enable_listen_thread: whether the agent listens for metadata of others.
        listen_port: where; 0 lets the kernel choose (see ``nixl_agent.get_listen_port``).
        capture_telemetry: whether ``get_xfer_telemetry`` works.
        num_threads: accepted; the agent has threads of its own, which sleep when idle.
        backends: names of backends that are created at once.
        sync_mode: accepted; every mode is safe.
    """

    def __init__(
        self,
        enable_prog_thread: bool = True,
        enable_listen_thread: bool = False,
        listen_port: int = DEFAULT_COMM_PORT,
        capture_telemetry: bool = False,
        num_threads: int = 0,
        backends: Sequence[str] = ("UCX",),
        sync_mode: nixl_thread_sync_t | None = None,
    ) -> None:
        if sync_mode is not None and not isinstance(sync_mode, nixl_thread_sync_t):
            given = type(sync_mode).__name__
            raise TypeError(f"sync_mode must be a nixl_thread_sync_t (got {given!r})")
        self.backends = list(backends)
        self.enable_pthread = enable_prog_thread
        self.enable_listen = enable_listen_thread
        self.port = listen_port
        self.capture_telemetry = capture_telemetry
        self.num_threads = num_threads
        self.sync_mode = sync_mode


class nixl_agent:
    """An agent: registers memory, knows other agents, moves bytes between their memory and its own.

    Args:
        agent_name: name under which others know it; up to 255 bytes.
        nixl_conf: configuration; the default has the backend UCX.
        instantiate_all: whether all backends are created; not together with a configuration.
    """

    def __init__(
        self,
        agent_name: str,
        nixl_conf: nixl_agent_config | None = None,
        instantiate_all: bool = False,
    ) -> None:
        if nixl_conf is not None and instantiate_all:
            logger.warning("instantiate_all is ignored: a configuration is given")
            instantiate_all = False
        conf = nixl_conf or nixl_agent_config()
        sync_mode = conf.sync_mode or (
            nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT
            if conf.enable_listen
            else nixl_thread_sync_t.NIXL_THREAD_SYNC_NONE
        )
        config = _bindings.nixlAgentConfig()
        config.useProgThread = conf.enable_pthread
        config.useListenThread = conf.enable_listen
        config.listenPort = conf.port
        config.syncMode = sync_mode.value
        config.captureTelemetry = bool(conf.capture_telemetry)
        self.agent = _bindings.nixlAgent(agent_name, config)
        self.name = agent_name
        self.notifs: dict[str, list[bytes]] = {}
        self.backends: dict[str, nixl_backend_handle] = {}
        self.backend_mems: dict[str, list[str]] = {}
        self.backend_options: dict[str, dict[str, str]] = {}
        self.plugin_list: list[str] = self.agent.getAvailPlugins()
        self.nixl_mems = dict(_MEMORY)
        self.nixl_ops = dict(_OPS)
        for backend in self.plugin_list if instantiate_all else conf.backends:
            if backend in self.plugin_list:
                self.create_backend(backend)
            else:
                logger.warning("there is no plugin %s; its backend is not created", backend)
        logger.info("agent %s is there, with %s", agent_name, ", ".join(self.backends) or "none")

    # Plugins and backends.

    def get_plugin_list(self) -> list[str]:
        """Names of backends that can be created."""
        return self.plugin_list

    def get_plugin_mem_types(self, backend: str) -> list[str]:
        """Kinds of memory of a plugin; none for an unknown one."""
        return self._plugin(backend)[1]

    def get_plugin_params(self, backend: str) -> dict[str, str]:
        """Parameters of a plugin and their defaults; none for an unknown one."""
        return self._plugin(backend)[0]

    def _plugin(self, name: str) -> tuple[dict[str, str], list[str]]:
        if name in self.plugin_list:
            return self.agent.getPluginParams(name)
        logger.warning("there is no plugin %s", name)
        return {}, []

    def get_backend_mem_types(self, backend: str) -> list[str]:
        """Kinds of memory of a backend that was created; none for others."""
        if backend not in self.backends:
            logger.warning("backend %s was not created", backend)
        return self.backend_mems.get(backend, [])

    def get_backend_params(self, backend: str) -> dict[str, str]:
        """Parameters of a backend that was created; none for others."""
        if backend not in self.backends:
            logger.warning("backend %s was not created", backend)
        return self.backend_options.get(backend, {})

    def create_backend(self, backend: str, initParams: dict[str, str] | None = None) -> None:
        """Creates a backend. Parameters of NIXL's plugins are accepted and have no effect.

        Raises:
            nixlNotFoundError: there is no such plugin.
            nixlInvalidParamError: it was created before.
        """
        handle = self.agent.createBackend(backend, initParams or {})
        self.backends[backend] = handle
        self.backend_options[backend], self.backend_mems[backend] = self.agent.getBackendParams(
            handle
        )

    def _handles(self, backends: Sequence[str]) -> list[nixl_backend_handle]:
        return [self.backends[name] for name in backends]

    # Memory.

    def register_memory(
        self, reg_list: Any, mem_type: str | None = None, backends: Sequence[str] = ()
    ) -> _bindings.nixlRegDList:
        """Registers memory, all of it or nothing; see ``get_reg_descs`` for the forms.

        The memory has to stay until it is deregistered. Other agents find it with the next exchange
        of metadata. The first memory of a GPU compiles the kernels that move its bytes.
        """
        descs = self.get_reg_descs(reg_list, mem_type)
        self.agent.registerMem(descs, self._handles(backends))
        return descs

    def deregister_memory(
        self, dereg_list: _bindings.nixlRegDList, backends: Sequence[str] = ()
    ) -> None:
        """Ends registrations. Requests that use the memory are called off; the memory may go then.

        Raises:
            nixlNotFoundError: a descriptor was not registered like that.
            nixlBackendError: somebody still uses the memory after some seconds.
        """
        self.agent.deregisterMem(dereg_list, self._handles(backends))

    def query_memory(
        self, reg_list: Any, backend: str, mem_type: str | None = None
    ) -> list[dict[str, str] | None]:
        """Size, mode and mtime of files; None for those that are not there.

        A descriptor of a file has its path at the end, or its descriptor as device.
        """
        descs = self.get_reg_descs(reg_list, mem_type)
        if backend not in self.backends:
            raise ValueError(f"backend {backend!r} was not created; there are {[*self.backends]}")
        return self.agent.queryMem(descs, self.backends[backend])

    # Descriptors.

    def get_xfer_descs(
        self, descs: Any, mem_type: str | None = None
    ) -> _bindings.nixlXferDList | None:
        """Descriptors of a transfer.

        Args:
            descs: a list of (address, length, device), an array of shape (N, 3), a contiguous tensor,
                a list of them on one device, or a ``nixlXferDList``, which is passed on.
            mem_type: DRAM, VRAM, FILE, ...; needed for tuples and arrays.

        Returns:
            The list, or None (and an error in the log) for anything else.
        """
        if isinstance(descs, _bindings.nixlRegDList):
            return _refused("a list for registration is not one for transfers")
        if isinstance(descs, _bindings.nixlXferDList):
            return descs
        return self._descs(_bindings.nixlXferDList, descs, mem_type, 3)

    def get_reg_descs(
        self, descs: Any, mem_type: str | None = None, is_sorted: bool = False
    ) -> _bindings.nixlRegDList | None:
        """Descriptors of memory to register.

        Args:
            descs: a list of (address, length, device, information), or one of the other forms that
                ``get_xfer_descs`` takes.
            mem_type: as there.
            is_sorted: accepted; order does not matter.

        Returns:
            As there.
        """
        if isinstance(descs, _bindings.nixlXferDList):
            return _refused("a list for transfers is not one for registration")
        if isinstance(descs, _bindings.nixlRegDList):
            return descs
        return self._descs(_bindings.nixlRegDList, descs, mem_type, 4)

    def get_remote_descs(
        self, descs: Any, mem_type: str | None = None
    ) -> _bindings.nixlRemoteDList | None:
        """Descriptors of several agents: a list of (address, length, device, agent)."""
        if isinstance(descs, _bindings.nixlRemoteDList):
            return descs
        if not isinstance(descs[0], tuple):
            return None
        return self._of_tuples(_bindings.nixlRemoteDList, descs, mem_type, 4)

    def _descs(self, kind: type, descs: Any, mem_type: str | None, width: int) -> Any:
        if isinstance(descs, np.ndarray):
            if mem_type is None:
                return _refused("a mem_type is needed for arrays")
            if descs.ndim != 2 or descs.shape[1] != 3:
                return _refused(f"an array of shape {descs.shape}; accepted: (N, 3)")
            return kind(self.nixl_mems[mem_type], descs)
        if _is_tensor(descs):
            return self._of_tensors(kind, [descs])
        if isinstance(descs[0], tuple):
            return self._of_tuples(kind, descs, mem_type, width)
        if _is_tensor(descs[0]):
            return self._of_tensors(kind, descs)
        return None

    def _of_tuples(self, kind: type, descs: Any, mem_type: str | None, width: int) -> Any:
        if mem_type is None:
            return _refused("a mem_type is needed for tuples")
        if len(descs[0]) != width:
            return _refused(f"tuples of {len(descs[0])}; accepted: {width}")
        return kind(self.nixl_mems[mem_type], descs if isinstance(descs, list) else list(descs))

    def _of_tensors(self, kind: type, tensors: Sequence[torch.Tensor]) -> Any:
        device = tensors[0].device
        rows = np.empty((len(tensors), 3), dtype=np.uint64)
        for row, tensor in zip(rows, tensors, strict=True):
            if tensor.device != device:
                return _refused(f"tensors on {device} and {tensor.device}; accepted: one device")
            if not tensor.is_contiguous():
                return _refused("a tensor that is not contiguous")
            size = tensor.numel() * tensor.element_size()
            row[:] = (tensor.data_ptr(), size, max(tensor.get_device(), 0))
        on_host = tensors[0].get_device() == -1
        return kind(_MEMORY["DRAM" if on_host else "VRAM"], rows)

    def get_serialized_descs(self, descs: Any) -> bytes:
        """A descriptor list as bytes, for another agent."""
        return pickle.dumps(descs)

    def deserialize_descs(self, serialized_descs: bytes) -> Any:
        """The descriptor list of such bytes, which have to come from somebody trusted (pickle)."""
        return pickle.loads(serialized_descs)

    # Transfers.

    def make_connection(self, remote_agent: str, backends: Sequence[str] = ()) -> None:
        """Connects to another agent now instead of at the first transfer."""
        self.agent.makeConnection(remote_agent, self._handles(backends))

    def prep_xfer_dlist(
        self,
        agent_name: str,
        xfer_list: Any,
        mem_type: str | None = None,
        backends: Sequence[str] = (),
    ) -> nixl_prepped_dlist_handle:
        """Prepares descriptors, of which transfers then name some by their indices.

        Args:
            agent_name: ``"NIXL_INIT_AGENT"`` or ``""`` for the local side, the name of another agent
                for its side, this agent's own name for the other side of a transfer within it.
            xfer_list: as for ``get_xfer_descs``; or an array of shape (N, 5), whose rows (address,
                length, device, stride, count) stand for ``count`` descriptors each.
            mem_type: as there.
            backends: names of backends; all that were created if there are none.

        Raises:
            nixlNotFoundError: the agent, or memory of the list, is not known.
        """
        name = "" if agent_name == _INIT_AGENT else agent_name
        handles = self._handles(backends)
        strided = (
            isinstance(xfer_list, np.ndarray) and xfer_list.ndim == 2 and xfer_list.shape[1] == 5
        )
        if strided:
            if mem_type is None:
                raise ValueError("a mem_type is needed for strided descriptors")
            memory = self.nixl_mems[mem_type]
            handle = self.agent.prepXferDlist(name, memory, xfer_list, handles)
        else:
            descs = self.get_xfer_descs(xfer_list, mem_type)
            handle = self.agent.prepXferDlist(name, descs, handles)
        return nixl_prepped_dlist_handle(self.agent, handle)

    def make_prepped_xfer(
        self,
        operation: str,
        local_xfer_side: nixl_prepped_dlist_handle,
        local_indices: Sequence[int] | np.ndarray,
        remote_xfer_side: nixl_prepped_dlist_handle,
        remote_indices: Sequence[int] | np.ndarray,
        notif_msg: bytes | str = b"",
        backends: Sequence[str] = (),
        skip_desc_merge: bool = False,
    ) -> nixl_xfer_handle:
        """Makes a transfer of descriptors of two prepared lists.

        Args:
            operation: ``"READ"`` or ``"WRITE"``, seen from this agent.
            local_xfer_side: the local list.
            local_indices: which of its descriptors; the i-th pairs with the i-th of the other side
                and is as long. Arrays of 32-bit or 64-bit numbers are read in place.
            remote_xfer_side: the list of the other side.
            remote_indices: which of its descriptors.
            notif_msg: what the other agent is told after the last byte; nothing if it is empty.
            backends: as for ``prep_xfer_dlist``.
            skip_desc_merge: accepted; neighbours are merged at no cost.
        """
        handle = self.agent.makeXferReq(
            self.nixl_ops[operation],
            local_xfer_side._handle,
            local_indices,
            remote_xfer_side._handle,
            remote_indices,
            notif_msg,
            self._handles(backends),
            skip_desc_merge,
        )
        return nixl_xfer_handle(self.agent, handle)

    def initialize_xfer(
        self,
        operation: str,
        local_descs: _bindings.nixlXferDList,
        remote_descs: _bindings.nixlXferDList,
        remote_agent: str,
        notif_msg: bytes | str = b"",
        backends: Sequence[str] = (),
    ) -> nixl_xfer_handle:
        """Makes a transfer of two whole lists, for which nothing was prepared."""
        handle = self.agent.createXferReq(
            self.nixl_ops[operation],
            local_descs,
            remote_descs,
            remote_agent,
            notif_msg,
            self._handles(backends),
        )
        return nixl_xfer_handle(self.agent, handle)

    def transfer(self, handle: nixl_xfer_handle, notif_msg: bytes | str = b"") -> str:
        """Starts a transfer, again if it was done before.

        Args:
            handle: the transfer.
            notif_msg: takes the place of the message that it has, if it is not empty.

        Returns:
            ``"DONE"`` if that was all (small ones are copied at once), else ``"PROC"``.

        Raises:
            nixlRepostActiveError: it is in flight.
            nixlRemoteDisconnectError: the other agent is lost.
        """
        return _STATES.get(self.agent.postXferReq(handle._handle, notif_msg), "ERR")

    def check_xfer_state(self, handle: nixl_xfer_handle) -> str:
        """``"DONE"`` or ``"PROC"``. Waits for nothing.

        Raises:
            nixlRemoteDisconnectError: the other agent is lost.
            nixlBackendError: it failed in another way, or took longer than its deadline.
            nixlNotPostedError: it was not started.
        """
        return _STATES.get(self.agent.getXferStatus(handle._handle), "ERR")

    def get_xfer_telemetry(self, handle: nixl_xfer_handle) -> _bindings.nixlXferTelemetry:
        """Times (us), bytes and descriptors of a transfer, if the agent keeps them."""
        return self.agent.getXferTelemetry(handle._handle)

    def estimate_xfer_cost(self, req_handle: nixl_xfer_handle) -> tuple[int, int, str]:
        """Expected time and its margin of error in us, and how they were found."""
        duration, margin, method = self.agent.estimateXferCost(req_handle._handle)
        known = method == _bindings.NIXL_COST_ANALYTICAL_BACKEND
        return duration, margin, "ANALYTICAL_BACKEND" if known else "UNKNOWN"

    def query_xfer_backend(self, handle: nixl_xfer_handle) -> str:
        """Name of the backend of a transfer."""
        found = self.agent.queryXferBackend(handle._handle)
        return next(name for name, backend in self.backends.items() if backend == found)

    def release_xfer_handle(self, handle: nixl_xfer_handle) -> None:
        """Gives a transfer up; see ``nixl_xfer_handle.release``."""
        handle.release()

    def release_dlist_handle(self, handle: nixl_prepped_dlist_handle) -> None:
        """Gives a prepared list up. Transfers that were made of it stay."""
        handle.release()

    def prep_mem_view(self, dlist: Any, *, backends: Sequence[str] | None = None) -> int:
        """Not supported: transfers that a kernel of a GPU starts by itself.

        Raises:
            nixlNotSupportedError: always.
        """
        return self.agent.prepMemView(dlist, self._handles(backends or ()))

    def release_mem_view(self, mvh: int) -> None:
        """Not supported; see ``prep_mem_view``."""
        self.agent.releaseMemView(mvh)

    # Notifications.

    def get_new_notifs(self, backends: Sequence[str] = ()) -> dict[str, list[bytes]]:
        """Messages that have come since the last look, by the agent that sent them."""
        return self.agent.getNotifs({}, self._handles(backends))

    def update_notifs(self, backends: Sequence[str] = ()) -> dict[str, list[bytes]]:
        """All messages that were not taken by ``check_remote_xfer_done``."""
        self.notifs = self.agent.getNotifs(self.notifs, self._handles(backends))
        return self.notifs

    def check_remote_xfer_done(
        self,
        remote_agent_name: str | bytes,
        lookup_tag: bytes,
        backends: Sequence[str] = (),
        tag_is_prefix: bool = True,
    ) -> bool:
        """Whether a message of another agent has come; takes the first that fits.

        Args:
            remote_agent_name: who sent it.
            lookup_tag: how it begins; an empty one fits every message.
            backends: as for ``prep_xfer_dlist``.
            tag_is_prefix: if not, the tag may be anywhere in it.
        """
        messages = self.update_notifs(backends).get(remote_agent_name, [])
        for at, message in enumerate(messages):
            if message.startswith(lookup_tag) if tag_is_prefix else lookup_tag in message:
                del messages[at]
                return True
        return False

    def send_notif(
        self, remote_agent_name: str | bytes, notif_msg: bytes | str, backend: str | None = None
    ) -> None:
        """Sends a message that belongs to no transfer. Messages to one agent keep their order."""
        handles = [] if backend is None else [self.backends[backend]]
        self.agent.genNotif(remote_agent_name, notif_msg, handles)

    # Metadata.

    def get_agent_metadata(self) -> bytes:
        """What others need to reach this agent and all its registered memory."""
        return self.agent.getLocalMD()

    def get_partial_agent_metadata(
        self,
        descs: _bindings.nixlRegDList,
        inc_conn_info: bool = False,
        backends: Sequence[str] = (),
    ) -> bytes:
        """The same for some registered memory only, with or without how to connect."""
        return self.agent.getLocalPartialMD(descs, inc_conn_info, self._handles(backends))

    def add_remote_agent(self, metadata: bytes) -> bytes:
        """Takes metadata of another agent, also newer one of a known agent. Does not connect.

        Returns:
            Its name.

        Raises:
            nixlMismatchError: this is not metadata of this package.
        """
        return self.agent.loadRemoteMD(metadata)

    def remove_remote_agent(self, agent: str | bytes) -> None:
        """Forgets another agent and ends the connection to it; transfers in flight are called off."""
        self.agent.invalidateRemoteMD(_text(agent))

    def check_remote_metadata(
        self, agent: str, descs: _bindings.nixlXferDList | None = None
    ) -> bool:
        """Whether an agent is known, and the memory of these descriptors with it."""
        listed = _bindings.nixlXferDList(_bindings.DRAM_SEG) if descs is None else descs
        return self.agent.checkRemoteMD(agent, listed) == _bindings.NIXL_SUCCESS

    def get_listen_port(self) -> int:
        """Port at which this agent listens for metadata of others."""
        return self.agent.getListenPort()

    def send_local_metadata(self, ip_addr: str = "", port: int = DEFAULT_COMM_PORT) -> None:
        """Gives all metadata to the agent that listens at an address.

        Raises:
            nixlNotSupportedError: no address; etcd and TCP stores are not supported.
        """
        self.agent.sendLocalMD(ip_addr, port)

    def send_partial_agent_metadata(
        self,
        descs: _bindings.nixlRegDList,
        inc_conn_info: bool = False,
        backends: Sequence[str] = (),
        ip_addr: str = "",
        port: int = DEFAULT_COMM_PORT,
        label: str = "",
    ) -> None:
        """Gives partial metadata to the agent that listens at an address."""
        handles = self._handles(backends)
        self.agent.sendLocalPartialMD(descs, inc_conn_info, handles, ip_addr, port, label)

    def fetch_remote_metadata(
        self,
        remote_agent: str,
        ip_addr: str = "",
        port: int = DEFAULT_COMM_PORT,
        label: str = "",
    ) -> None:
        """Gets metadata of the agent that listens at an address, and adds it."""
        self.agent.fetchRemoteMD(remote_agent, ip_addr, port, label)

    def invalidate_local_metadata(self, ip_addr: str = "", port: int = DEFAULT_COMM_PORT) -> None:
        """Has the agent that listens at an address forget this one."""
        self.agent.invalidateLocalMD(ip_addr, port)


def _is_tensor(value: object) -> bool:
    # torch is only looked for where somebody has imported it: there are no tensors before.
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _refused(why: str) -> None:
    logger.error("descriptors: %s", why)


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name
