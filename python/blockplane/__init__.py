"""blockplane moves blocks of KV cache between GPUs, host memory, disks and machines."""

from ._core import __version__
from .agent import Agent, File, Peer, Window
from .errors import (
    AgentError,
    BlockplaneError,
    BusyError,
    CancelledError,
    ConnectError,
    DeviceError,
    InvalidError,
    MetadataError,
    PeerLostError,
    RefusedError,
    StorageError,
    TransferError,
    TransferTimeoutError,
    WindowClosedError,
)
from .memory import Blocks, Layout, Region, RemoteRegion
from .transfer import Transfer

__all__ = [
    "Agent",
    "AgentError",
    "Blocks",
    "BlockplaneError",
    "BusyError",
    "CancelledError",
    "ConnectError",
    "DeviceError",
    "File",
    "InvalidError",
    "Layout",
    "MetadataError",
    "Peer",
    "PeerLostError",
    "RefusedError",
    "Region",
    "RemoteRegion",
    "StorageError",
    "Transfer",
    "TransferError",
    "TransferTimeoutError",
    "Window",
    "WindowClosedError",
    "__version__",
]
