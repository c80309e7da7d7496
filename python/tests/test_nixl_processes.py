"""Agents of two processes: transfers, messages, metadata, the loss of the other side."""

from __future__ import annotations

import base64
import contextlib
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import Memory, finish, until

import nixl._bindings as bindings
from nixl._api import nixl_agent

MIB = 1 << 20


@pytest.fixture
def meet(make_agent, make_peer):
    """An agent here and one in another process that know each other."""

    def make(size=MIB):
        agent = make_agent("here", enable_listen_thread=True, listen_port=0)
        memory, peer = Memory(agent, size), make_peer(size)
        assert agent.add_remote_agent(peer.metadata()) == peer.name.encode()
        return agent, memory, peer

    return make


def lists(agent, memory, peer, offsets, size):
    """Both sides prepared, with the same offsets."""
    return (
        agent.prep_xfer_dlist("NIXL_INIT_AGENT", memory.rows(offsets, size), "DRAM"),
        agent.prep_xfer_dlist(peer.name, peer.rows(offsets, size), "DRAM"),
    )


def pattern(start, count):
    """What the other process has in its memory."""
    return (np.arange(start, start + count) % 256).astype(np.uint8)


def test_reads_writes_and_messages(meet):
    """Bytes of ordinary memory, both ways, and what is told behind them."""
    agent, memory, peer = meet()
    local, remote = lists(agent, memory, peer, np.arange(128) * 8192, 8192)
    picks = np.random.default_rng(1).permutation(128)[:12].astype(np.int32)
    handle = agent.make_prepped_xfer("READ", local, picks, remote, picks, b"read:7")
    finish(agent, handle)
    for pick in picks:
        assert np.array_equal(
            memory.bytes[pick * 8192 : (pick + 1) * 8192], pattern(pick * 8192, 8192)
        )
    assert until(lambda: peer.call("notifs")) == {agent.name: ["read:7"]}
    memory.bytes[:] = 200
    finish(agent, agent.make_prepped_xfer("WRITE", local, [3], remote, [5]))
    assert set(peer.call("bytes", 5 * 8192, 8192)) == {200}
    assert peer.call("bytes", 5 * 8192 - 1, 1) == [255] and peer.call("bytes", 6 * 8192, 1) == [0]
    blob = agent.get_agent_metadata()
    assert peer.call("add", base64.b64encode(blob).decode()) == agent.name
    peer.call("send", agent.name, "hello")
    assert until(agent.get_new_notifs) == {peer.name: [b"hello"]}


def test_new_memory_comes_with_the_next_metadata(meet):
    """Full metadata replaces what was known, partial metadata adds to it."""
    agent, memory, peer = meet()
    address, size = peer.call("grow")
    descs = agent.get_xfer_descs([(address, size, 0)], "DRAM")
    old = agent.get_xfer_descs(peer.rows([0], 64), "DRAM")
    assert agent.check_remote_metadata(peer.name) and agent.check_remote_metadata(peer.name, old)
    assert not agent.check_remote_metadata(peer.name, descs)
    with pytest.raises(bindings.nixlNotFoundError):
        agent.prep_xfer_dlist(peer.name, descs)
    agent.add_remote_agent(peer.metadata())
    assert agent.check_remote_metadata(peer.name, descs)
    near = agent.get_xfer_descs(memory.rows([0], size), "DRAM")
    finish(agent, agent.initialize_xfer("READ", near, descs, peer.name))
    assert (memory.bytes[:size] == 77).all()
    peer.call("deregister")
    agent.add_remote_agent(peer.metadata())
    assert not agent.check_remote_metadata(peer.name, old)
    agent.remove_remote_agent(peer.name)
    assert not agent.check_remote_metadata(peer.name)
    with pytest.raises(bindings.nixlNotFoundError):
        agent.send_notif(peer.name, b"x")
    agent.remove_remote_agent(peer.name)


def test_partial_metadata(make_agent):
    """Some memory, with or without how to connect."""
    here, there = make_agent(), make_agent()
    one, other = Memory(there, 4096, seed=1), Memory(there, 4096, seed=2)
    here_memory = Memory(here, 4096)
    known = here.get_xfer_descs(one.rows([0], 4096), "DRAM")
    unknown = here.get_xfer_descs(other.rows([0], 4096), "DRAM")
    bare = there.get_partial_agent_metadata(other.descs)
    with pytest.raises(bindings.nixlNotFoundError, match="connect"):
        here.add_remote_agent(bare)
    here.add_remote_agent(there.get_partial_agent_metadata(one.descs, True, ["UCX"]))
    assert here.check_remote_metadata(there.name, known)
    near = here.get_xfer_descs(here_memory.rows([0], 4096), "DRAM")
    with pytest.raises(bindings.nixlNotFoundError):
        here.initialize_xfer("READ", near, unknown, there.name)
    here.add_remote_agent(bare)
    assert here.check_remote_metadata(there.name, known)
    finish(here, here.initialize_xfer("READ", near, unknown, there.name))
    assert np.array_equal(here_memory.bytes, other.bytes)
    stranger = Memory(here, 64)
    with pytest.raises(bindings.nixlNotFoundError):
        there.get_partial_agent_metadata(stranger.descs)


def test_metadata_by_address(meet):
    """Listeners give, take and forget metadata."""
    agent, _, peer = meet()
    agent.remove_remote_agent(peer.name)
    port = peer.call("port")
    agent.fetch_remote_metadata("somebody else", "127.0.0.1", port)
    assert not agent.check_remote_metadata(peer.name)
    agent.fetch_remote_metadata(peer.name, "127.0.0.1", port)
    assert agent.check_remote_metadata(peer.name)
    assert not peer.call("knows", agent.name)
    agent.send_local_metadata("127.0.0.1", port)
    assert peer.call("knows", agent.name)
    agent.invalidate_local_metadata("127.0.0.1", port)
    assert not peer.call("knows", agent.name)
    memory = Memory(agent, 4096)
    agent.send_partial_agent_metadata(memory.descs, True, ["UCX"], "127.0.0.1", port)
    assert peer.call("knows", agent.name)
    # Nobody listens there: logged, as by NIXL.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        agent.send_local_metadata("127.0.0.1", free.getsockname()[1])
    for call in (
        lambda: agent.send_local_metadata(),
        lambda: agent.fetch_remote_metadata(peer.name, label="label"),
        lambda: agent.invalidate_local_metadata(),
    ):
        with pytest.raises(bindings.nixlNotSupportedError, match="etcd"):
            call()


def test_a_listener_survives_everything(make_agent):
    """Whatever is sent to it, it answers the next call."""
    agent = make_agent("listens", enable_listen_thread=True, listen_port=0)
    caller = make_agent("calls")
    port = agent.get_listen_port()
    with pytest.raises(bindings.nixlNotAllowedError):
        caller.get_listen_port()
    random.seed(7)
    blob = caller.get_agent_metadata()
    header = b"BPNL\x01"
    for data in (
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"BPNL\x09" + struct.pack("<I", 0),
        header + struct.pack("<I", 1 << 31),
        header + struct.pack("<I", 10) + b"short",
        header + struct.pack("<I", 100) + random.randbytes(100),
        header + struct.pack("<I", len(blob) - 1) + blob[:-1],
        b"BPNL\x03" + struct.pack("<I", 4) + b"\xff\xfe\xfd\xfc",
    ):
        with socket.create_connection(("127.0.0.1", port), 5) as connection:
            connection.settimeout(5)
            # It may hang up before all is sent.
            with contextlib.suppress(OSError):
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(4096):
                    pass
        assert not agent.check_remote_metadata(caller.name)
    caller.fetch_remote_metadata(agent.name, "127.0.0.1", port)
    caller.send_local_metadata("127.0.0.1", port)
    assert agent.check_remote_metadata(caller.name)
    assert caller.check_remote_metadata(agent.name)


def test_metadata_of_liars(make_agent):
    """No bytes are a crash, and damaged metadata is never half taken."""
    agent, other = make_agent(), make_agent()
    Memory(other, 4096)
    good = other.get_agent_metadata()
    for end in range(len(good)):
        with pytest.raises(bindings.nixlMismatchError):
            agent.add_remote_agent(good[:end])
    random.seed(11)
    for _ in range(2000):
        bad = bytearray(good)
        for _ in range(random.randint(1, 4)):
            bad[random.randrange(len(bad))] ^= 1 << random.randrange(8)
        if bytes(bad) != good:
            with pytest.raises(bindings.nixlMismatchError):
                agent.add_remote_agent(bytes(bad))
    for bad in (b"", b"junk", b"nixlSerDes|Agent", random.randbytes(10_000), good + b"x"):
        with pytest.raises(bindings.nixlMismatchError):
            agent.add_remote_agent(bad)
    assert not agent.check_remote_metadata(other.name)
    with pytest.raises(bindings.nixlInvalidParamError, match="own name"):
        agent.add_remote_agent(agent.get_agent_metadata())
    assert agent.add_remote_agent(good) == other.name.encode()


def test_a_killed_peer_is_a_remote_disconnect(meet):
    """Transfers in flight, posts and messages all say so, soon; the agent goes on with others."""
    agent, memory, peer = meet(64 * MIB)
    local, remote = lists(agent, memory, peer, [0], 64 * MIB)
    idle = agent.make_prepped_xfer("READ", local, [0], remote, [0])
    finish(agent, idle)
    flying = agent.make_prepped_xfer("READ", local, [0], remote, [0])
    agent.transfer(flying)
    peer.send_signal(signal.SIGKILL)
    killed = time.monotonic()

    def ended():
        try:
            return agent.check_xfer_state(flying) == "DONE"
        except bindings.nixlRemoteDisconnectError:
            return True

    until(ended, "the end of the transfer in flight", 5)

    def refused():
        try:
            agent.transfer(idle)
        except bindings.nixlRemoteDisconnectError:
            return True
        except bindings.nixlRepostActiveError:
            return False
        return False

    until(refused, "the refusal of a post", 5)
    assert time.monotonic() - killed < 5
    with pytest.raises(bindings.nixlRemoteDisconnectError):
        agent.send_notif(peer.name, b"x")
    with pytest.raises(bindings.nixlRemoteDisconnectError):
        agent.make_prepped_xfer("READ", local, [0], remote, [0])
    agent.release_xfer_handle(flying)
    agent.release_xfer_handle(idle)
    agent.release_dlist_handle(remote)
    agent.remove_remote_agent(peer.name)


def test_a_stopped_peer_is_lost_and_comes_back(meet, monkeypatch):
    """Silence is noticed after the timeout; the same peer is found again when it goes on."""
    monkeypatch.setenv("BLOCKPLANE_PEER_LOSS_TIMEOUT_S", "0.5")
    monkeypatch.setenv("BLOCKPLANE_CONNECT_TIMEOUT_S", "0.5")
    agent, memory, peer = meet()
    local, remote = lists(agent, memory, peer, [0], 4096)
    handle = agent.make_prepped_xfer("READ", local, [0], remote, [0])
    finish(agent, handle)
    peer.send_signal(signal.SIGSTOP)

    def lost():
        try:
            agent.transfer(handle)
        except bindings.nixlRemoteDisconnectError:
            return True
        except bindings.nixlRepostActiveError:
            pass
        return False

    until(lost, "the loss of a stopped peer", 5)
    began = time.monotonic()
    for _ in range(20):
        with pytest.raises(bindings.nixlRemoteDisconnectError):
            agent.send_notif(peer.name, b"heartbeat")
    assert time.monotonic() - began < 3, "callers do not wait for a stopped peer each time"
    peer.send_signal(signal.SIGCONT)

    def back():
        try:
            return agent.make_prepped_xfer("READ", local, [0], remote, [0])
        except bindings.nixlRemoteDisconnectError:
            return None

    finish(agent, until(back, "the connection to the peer that goes on"))


def test_a_new_life_of_a_name(make_agent, make_peer):
    """Metadata of a restarted agent takes the place of the old one."""
    agent = make_agent()
    memory = Memory(agent, 4096)
    first = make_agent("twice")
    far = Memory(first, 4096, seed=1)
    agent.add_remote_agent(first.get_agent_metadata())
    old = agent.prep_xfer_dlist(first.name, far.rows([0], 64), "DRAM")
    name = first.name
    del first
    second = nixl_agent(name)
    there = Memory(second, 4096, seed=2)
    agent.add_remote_agent(second.get_agent_metadata())
    near = agent.prep_xfer_dlist("", memory.rows([0], 64), "DRAM")
    new = agent.prep_xfer_dlist(name, there.rows([0], 64), "DRAM")
    finish(agent, agent.make_prepped_xfer("READ", near, [0], new, [0]))
    assert np.array_equal(memory.bytes[:64], there.bytes[:64])
    with pytest.raises((bindings.nixlNotFoundError, bindings.nixlRemoteDisconnectError)):
        agent.make_prepped_xfer("READ", near, [0], old, [0])


def test_an_idle_agent_uses_no_processor(meet):
    """Nothing spins, connected or not."""
    agent, memory, peer = meet()
    local, remote = lists(agent, memory, peer, [0], 64)
    finish(agent, agent.make_prepped_xfer("READ", local, [0], remote, [0]))
    time.sleep(0.2)
    before = os.times()
    time.sleep(1.0)
    after = os.times()
    used = (after.user - before.user) + (after.system - before.system)
    assert used < 0.1, f"{used} s of processor in 1 s"
    assert peer.process.poll() is None


def test_the_end_of_the_interpreter(tmp_path):
    """Agents, listeners and transfers in flight at the end are no crash and no wait."""
    script = tmp_path / "ends.py"
    script.write_text(
        """
import numpy as np
from nixl._api import nixl_agent, nixl_agent_config

kept = []
for number in range(3):
    agent = nixl_agent(f"ends-{number}", nixl_agent_config(True, True, 0))
    memory = np.zeros(96 << 20, dtype=np.uint8)
    at = memory.ctypes.data
    agent.register_memory([(at, memory.nbytes, 0, "")], "DRAM")
    here = agent.get_xfer_descs([(at, 48 << 20, 0)], "DRAM")
    there = agent.get_xfer_descs([(at + (48 << 20), 48 << 20, 0)], "DRAM")
    handle = agent.initialize_xfer("WRITE", here, there, agent.name, b"x")
    assert agent.transfer(handle) == "PROC"
    kept.append((agent, memory, handle))
"""
    )
    for _ in range(3):
        ended = subprocess.run([sys.executable, str(script)], check=False, timeout=30)
        assert ended.returncode == 0
