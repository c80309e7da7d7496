"""`blockplane.Agent` in one process and between two."""

from __future__ import annotations

import array
import asyncio
import json
import pathlib
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import blockplane
from blockplane import Layout

SOON = 10.0


def meet() -> tuple[blockplane.Agent, blockplane.Agent, blockplane.Peer]:
    a, b = blockplane.Agent("a"), blockplane.Agent("b")
    return a, b, a.connect(b.metadata())


def test_bytes_and_a_notification_arrive_in_that_order() -> None:
    a, b, peer = meet()
    with a, b:
        assert (peer.name, peer.connected, peer.lane) == ("b", True, "loopback")
        here, there = np.arange(64, dtype=np.uint8), bytearray(64)
        source, target = a.register(here), b.register(there)
        a.write(source, peer, target.describe(), notify=b"there").wait(SOON)
        assert b.receive(timeout=SOON) == ("a", b"there")
        assert there == here.tobytes()
        part = a.write(source, peer, target.describe(), source=slice(60, 64), target=slice(0, 4))
        part.wait(SOON)
        assert part.done and part.nbytes == 4 and (part.seconds or 0) > 0
        assert there[:5] == bytes([60, 61, 62, 63, 4])
        back = a.allocate(64)
        a.read(back, peer, target.describe()).wait(SOON)
        assert back.read(0, 64) == bytes(there)
        with pytest.raises(blockplane.TransferTimeoutError):
            b.receive(timeout=0.01)


def test_blocks_of_different_layouts() -> None:
    a, b, peer = meet()
    with a, b:
        # Two layers of 8 bytes: apart here, together there.
        apart = Layout(blocks=5, run_bytes=8, block_stride=8, layers=2, layer_stride=40)
        together = Layout(blocks=3, run_bytes=8, layers=2)
        assert together.block_stride == 16 and together.block_bytes == 16
        source, target = a.allocate(80), b.allocate(48)
        for layer in (0, 1):
            source.write(40 * layer + 8 * 4, bytes([layer + 1]) * 8)
        moved = a.write(
            source,
            peer,
            target.describe(),
            source=apart.blocks_at([4]),
            target=together.blocks_at([1]),
        )
        moved.wait(SOON)
        assert target.read(0, 48) == bytes(16) + b"\1" * 8 + b"\2" * 8 + bytes(16)


def test_windows_decide_what_peers_may_do() -> None:
    a, b, peer = meet()
    with a, b:
        source, target = a.allocate(32), b.allocate(32, windowed=True)
        blocks = Layout(blocks=4, run_bytes=8)
        with pytest.raises(blockplane.BlockplaneError):
            a.write(source, peer, target.describe()).wait(SOON)
        with b.open_window(target, blocks.blocks_at([2]), write=True) as window:
            seen = window.describe()
            assert seen.window == window.id
            one = {"source": blocks.blocks_at([0]), "target": blocks.blocks_at([2])}
            source.write(0, b"12345678")
            a.write(source, peer, seen, **one).wait(SOON)
            with pytest.raises(blockplane.BlockplaneError):
                other = {"source": blocks.blocks_at([0]), "target": blocks.blocks_at([1])}
                a.write(source, peer, seen, **other).wait(SOON)
        assert target.read(16, 8) == b"12345678"
        with pytest.raises(blockplane.BlockplaneError):
            a.write(source, peer, seen, **one).wait(SOON)
        with pytest.raises(blockplane.InvalidError, match="neither reads nor writes"):
            b.open_window(target)


def test_files(tmp_path: pathlib.Path) -> None:
    with blockplane.Agent("a") as a:
        region = a.allocate(3 * 4096)
        region.write(0, b"x" * 4096)
        file = a.open_file(tmp_path / "blocks", size=3 * 4096)
        with pytest.raises(blockplane.StorageError, match="No such file"):
            a.open_file(tmp_path / "other")
        blocks = Layout(blocks=3, run_bytes=4096)
        first, last = blocks.blocks_at([0]), blocks.blocks_at([2])
        a.save(region, file, source=first, target=last, durable=True).wait(SOON)
        a.load(region, file, source=last, target=blocks.blocks_at([1])).wait(SOON)
        assert region.read(4096, 4096) == b"x" * 4096
        assert (tmp_path / "blocks").read_bytes()[8192:12288] == b"x" * 4096


def test_many_transfers_are_awaited_without_polling() -> None:
    async def run() -> None:
        a, b, peer = meet()
        with a, b:
            source, target = a.allocate(1 << 20), b.allocate(1 << 20)
            source.write(0, b"z" * 1024)
            remote = target.describe()

            async def one(at: int) -> None:
                part = slice(at * 1024, (at + 1) * 1024)
                await a.write(source, peer, remote, source=slice(0, 1024), target=part)

            await asyncio.gather(*(one(at) for at in range(500)))
            assert target.read(0, 500 * 1024) == b"z" * 1024 * 500
            # One that has ended already.
            transfer = a.write(source, peer, remote)
            transfer.wait(SOON)
            await transfer
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.sleep(60), 0.01)

    asyncio.run(run())
    # Another loop, and one in another thread.
    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    asyncio.run(run())
    thread.join(SOON)
    assert not thread.is_alive()


def test_whoever_waits_lets_others_run() -> None:
    with blockplane.Agent("a") as a:
        ran = threading.Event()
        threading.Timer(0.05, ran.set).start()
        began = time.monotonic()
        with pytest.raises(blockplane.TransferTimeoutError):
            a.receive(timeout=0.5)
        assert ran.is_set() and time.monotonic() - began < 5


def test_what_does_not_fit_is_named() -> None:
    a, b, peer = meet()
    with a, b:
        source, target = a.allocate(16), b.allocate(8)
        with pytest.raises(blockplane.InvalidError):
            a.write(source, peer, target.describe())
        with pytest.raises(ValueError, match="a range is accepted"):
            a.write(source, peer, target.describe(), source=slice(4, 4))
        with pytest.raises(blockplane.MetadataError):
            a.connect(b"not metadata")
        with pytest.raises(blockplane.InvalidError, match="contiguous"):
            a.register(np.zeros((4, 4))[:, 1])
        with pytest.raises(blockplane.InvalidError, match="read-only"):
            a.register(b"constant")
        with pytest.raises(blockplane.InvalidError, match="ADDRESS:PORT"):
            blockplane.Agent("c", listen="nowhere")
        with pytest.raises(blockplane.InvalidError):
            Layout(blocks=0, run_bytes=8)
    with pytest.raises(blockplane.InvalidError, match="closed"):
        a.metadata()


def test_a_region_keeps_its_memory_until_it_is_closed() -> None:
    with blockplane.Agent("a") as a:
        memory = array.array("B", b"12345678")
        references = sys.getrefcount(memory)
        region = a.register(memory)
        assert sys.getrefcount(memory) > references
        region.close()
        assert sys.getrefcount(memory) == references
        region.close()
        with pytest.raises(blockplane.InvalidError, match="closed"):
            region.read(0, 1)


PEER = """
import json, sys
import blockplane

with blockplane.Agent("child") as child:
    region = child.allocate(4096)
    known = {"metadata": child.metadata().hex(), "id": region.id, "nbytes": region.nbytes}
    print(json.dumps(known), flush=True)
    sender, note = child.receive(timeout=20)
    print(json.dumps([sender, note.decode(), region.read(0, 4).decode()]), flush=True)
    sys.stdin.readline()
"""


def test_two_processes_and_a_peer_that_is_killed() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", PEER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    try:
        known = json.loads(child.stdout.readline())
        with blockplane.Agent("parent") as parent:
            peer = parent.connect(bytes.fromhex(known["metadata"]))
            assert peer.lane == "shm"
            remote = blockplane.RemoteRegion(known["id"], known["nbytes"])
            source = parent.register(bytearray(b"from" + bytes(4092)))
            parent.write(source, peer, remote, notify=b"done").wait(SOON)
            assert json.loads(child.stdout.readline()) == ["parent", "done", "from"]
            child.kill()
            child.wait(SOON)
            end = time.monotonic() + SOON
            while peer.connected and time.monotonic() < end:
                time.sleep(0.01)
            with pytest.raises(blockplane.PeerLostError) as lost:
                parent.write(source, peer, remote).wait(SOON)
            assert isinstance(lost.value, ConnectionError)
    finally:
        child.kill()
        child.wait(SOON)


def test_cancelling_ends_a_transfer() -> None:
    a, b, peer = meet()
    with a, b:
        size = 256 << 20
        source, target = a.allocate(size), b.allocate(size)
        transfer = a.write(source, peer, target.describe())
        transfer.cancel()
        with pytest.raises(blockplane.CancelledError):
            transfer.wait(SOON)
        assert transfer.done
