"""Agents: memory, peers, transfers, notifications.

>>> import blockplane
>>> with blockplane.Agent("a") as a, blockplane.Agent("b") as b:
...     here, there = bytearray(b"hello"), bytearray(5)
...     source, target = a.register(here), b.register(there)
...     peer = a.connect(b.metadata())
...     a.write(source, peer, target.describe(), notify=b"it is there").wait()
...     sender, note = b.receive(timeout=5)
...     print(sender, note, there)
a b'it is there' bytearray(b'hello')
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ._core import AgentCore, FileCore, PeerCore, RegionCore, WindowCore
from .errors import InvalidError, TransferTimeoutError, translated
from .memory import Blocks, Layout, Part, Region, RemoteRegion, locate, part_of
from .transfer import Ends, Transfer


class Peer:
    """Another agent, connected."""

    def __init__(self, core: PeerCore) -> None:
        self._core = core

    @property
    def name(self) -> str:
        """Its name."""
        return self._core.name

    @property
    def connected(self) -> bool:
        """Whether it is there: false once it was lost."""
        return self._core.connected

    @property
    def lane(self) -> str:
        """How bytes get there: `loopback`, `shm` or `tcp`."""
        return self._core.lane

    def disconnect(self) -> None:
        """Ends the connection; what is in flight fails."""
        self._core.disconnect()


class Window:
    """Lets peers access blocks of a region, until it is closed."""

    def __init__(self, core: WindowCore, region: Region) -> None:
        self._core = core
        self._region = region

    @property
    def id(self) -> int:
        """Its number, for `RemoteRegion.through`."""
        return self._core.id

    def describe(self) -> RemoteRegion:
        """The region through this window; a plain value to send to a peer."""
        return self._region.describe().through(self.id)

    @translated
    def close(self, timeout: float = 5.0) -> None:
        """Ends it. When this returns, no further byte lands or is read through it."""
        self._core.close(timeout)

    def __enter__(self) -> Window:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class File:
    """An open file, as a place for blocks."""

    def __init__(self, core: FileCore) -> None:
        self._core = core

    def close(self) -> None:
        """Closes it, after what is in flight."""
        self._core.close()

    def __enter__(self) -> File:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Agent:
    """Owns memory and moves bytes between it and that of other agents, in any process or host.

    `name` is how peers know it. `listen` (`ADDRESS:PORT`) is where peers of other hosts reach it;
    without it only those of this host do. Ends with `close` or `with`.

    All methods may be called from any thread. Whatever waits lets other threads run.
    """

    @translated
    def __init__(self, name: str, *, listen: str | None = None) -> None:
        self._core: AgentCore | None = AgentCore(name, listen)
        self._ends = Ends(self._core)
        self._regions: list[Region] = []
        self._files: list[File] = []

    @property
    def name(self) -> str:
        """Its name."""
        return self._open.name

    @property
    def _open(self) -> AgentCore:
        if self._core is None:
            raise InvalidError("the agent is closed")
        return self._core

    def metadata(self) -> bytes:
        """How it is reached and what it has registered: for `connect`, by any means."""
        return self._open.metadata()

    @translated
    def register(self, memory: Any, *, windowed: bool = False) -> Region:
        """Registers a tensor, an array or a writable buffer, which is kept until the region closes.

        Peers may read and write it at once or, if it is `windowed`, through an open window only.
        Host memory is copied by the kernel for other processes; what `allocate` gives is faster.
        """
        address, size, device = locate(memory)
        core = self._open.register(address, size, device, memory, windowed)
        return self._keep(core)

    @translated
    def allocate(self, size: int, *, label: str = "python", windowed: bool = False) -> Region:
        """Host memory that other processes of this host map. Filled with zeros."""
        return self._keep(self._open.allocate(size, label, windowed))

    @translated
    def connect(self, metadata: bytes, *, timeout: float = 5.0) -> Peer:
        """Connects to the agent whose metadata these are."""
        return Peer(self._open.connect(metadata, timeout))

    def write(
        self,
        local: Region,
        peer: Peer,
        remote: RemoteRegion,
        *,
        source: Part = None,
        target: Part = None,
        notify: bytes | None = None,
        timeout: float = 30.0,
    ) -> Transfer:
        """Writes `source` of a region into `target` of a peer's. Default: all of both.

        `notify` reaches the peer after all bytes. After `timeout` seconds the transfer fails.
        """
        return self._post(True, local, source, peer, remote, target, notify, timeout)

    def read(
        self,
        local: Region,
        peer: Peer,
        remote: RemoteRegion,
        *,
        source: Part = None,
        target: Part = None,
        notify: bytes | None = None,
        timeout: float = 30.0,
    ) -> Transfer:
        """Reads `source` of a peer's region into `target` of a region. Default: all of both."""
        return self._post(False, local, target, peer, remote, source, notify, timeout)

    @translated
    def notify(self, peer: Peer, payload: bytes, *, timeout: float = 30.0) -> Transfer:
        """Sends a notification alone."""
        core = self._open
        self._ends.drain()
        return Transfer(core.notify(peer._core, payload, timeout), self._ends)

    @translated
    def receive(self, *, timeout: float = 0.0) -> tuple[str, bytes]:
        """The next notification: who sent it, and its bytes.

        Raises:
            TransferTimeoutError: there is none within `timeout` seconds.
        """
        note = self._open.receive(timeout)
        if note is None:
            raise TransferTimeoutError(f"no notification within {timeout} s", retryable=True)
        return note

    @translated
    def open_window(
        self,
        region: Region,
        blocks: Blocks | None = None,
        *,
        read: bool = False,
        write: bool = False,
    ) -> Window:
        """Lets peers read or write all of a region, or some of its blocks (all their layers)."""
        layout = blocks.layout if blocks else Layout(blocks=1, run_bytes=region.nbytes)
        ids = list(blocks.ids) if blocks else None
        core = self._open.open_window(region._core, layout.core(), ids, read, write)
        return Window(core, region)

    @translated
    def open_file(self, path: str | os.PathLike[str], *, size: int | None = None) -> File:
        """Opens a file for reading and writing. With a `size` it is made if it is not there."""
        file = File(self._open.open_file(path, size))
        self._files.append(file)
        return file

    def save(
        self,
        local: Region,
        file: File,
        *,
        source: Blocks,
        target: Blocks,
        durable: bool = False,
        timeout: float = 30.0,
    ) -> Transfer:
        """Writes blocks to a file. If it is `durable`, it is done when they are on the disk."""
        return self._post_file(True, local, source, file, target, durable, timeout)

    def load(
        self,
        local: Region,
        file: File,
        *,
        source: Blocks,
        target: Blocks,
        timeout: float = 30.0,
    ) -> Transfer:
        """Reads blocks of a file into a region."""
        return self._post_file(False, local, target, file, source, False, timeout)

    def close(self, timeout: float = 5.0) -> None:
        """Closes all files and regions; the agent ends with its last transfer."""
        files, self._files = self._files, []
        for file in files:
            file.close()
        regions, self._regions = self._regions, []
        for region in regions:
            region.close(timeout)
        self._core = None

    def __enter__(self) -> Agent:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _keep(self, core: RegionCore) -> Region:
        region = Region(core)
        self._regions.append(region)
        return region

    @translated
    def _post(
        self,
        write: bool,
        local: Region,
        local_part: Part,
        peer: Peer,
        remote: RemoteRegion,
        remote_part: Part,
        notify: bytes | None,
        timeout: float,
    ) -> Transfer:
        core = self._open
        self._ends.drain()
        transfer = core.post(
            write,
            local._core,
            *part_of(local_part, local.nbytes).core(),
            peer._core,
            remote.id,
            *part_of(remote_part, remote.nbytes).core(),
            remote.window,
            notify,
            timeout,
        )
        return Transfer(transfer, self._ends)

    @translated
    def _post_file(
        self,
        write: bool,
        local: Region,
        local_part: Blocks,
        file: File,
        file_part: Blocks,
        durable: bool,
        timeout: float,
    ) -> Transfer:
        core = self._open
        self._ends.drain()
        transfer = core.post_file(
            write,
            local._core,
            *local_part.core(),
            file._core,
            *file_part.core(),
            durable,
            timeout,
        )
        return Transfer(transfer, self._ends)


__all__: Sequence[str] = ("Agent", "File", "Peer", "Window")
