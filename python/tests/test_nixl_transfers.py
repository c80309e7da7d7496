"""Agents of one process: registration, prepared lists, transfers, messages, files."""

from __future__ import annotations

import gc
import os
import threading
import weakref

import numpy as np
import pytest
import torch
from conftest import Memory, finish, until

import nixl._bindings as bindings
import nixl._utils as utils

KIB = 1024


@pytest.fixture
def pair(make_agent):
    """Two agents that know each other, with 1 MiB each."""
    here, there = make_agent("here", capture_telemetry=True), make_agent("there")
    near, far = Memory(here, 1 << 20, seed=1), Memory(there, 1 << 20, seed=2)
    assert here.add_remote_agent(there.get_agent_metadata()) == there.name.encode()
    there.add_remote_agent(here.get_agent_metadata())
    return here, near, there, far


def sides(pair, local_offsets, remote_offsets, size):
    """Both lists prepared by the first agent."""
    here, near, there, far = pair
    return (
        here.prep_xfer_dlist("NIXL_INIT_AGENT", near.rows(local_offsets, size), "DRAM"),
        here.prep_xfer_dlist(there.name, far.rows(remote_offsets, size), "DRAM"),
    )


@pytest.mark.parametrize("operation", ["READ", "WRITE"])
@pytest.mark.parametrize(
    "kind", [list, tuple, np.int32, np.int64, np.uint32, np.uint64, "strided", "backwards"]
)
def test_indices_in_every_form(pair, operation, kind):
    """The i-th local descriptor pairs with the i-th remote one."""
    here, near, _, far = pair
    local, remote = sides(pair, np.arange(64) * 8192, np.arange(64) * 16 * KIB, 4096)
    picks = np.random.default_rng(3).permutation(64)[:20], np.random.default_rng(4).permutation(64)[:20]

    def form(indices):
        if kind in (list, tuple):
            return kind(int(index) for index in indices)
        if kind == "strided":
            return np.repeat(indices.astype(np.int32), 3)[::3]
        if kind == "backwards":
            return indices[::-1].astype(np.int32)[::-1]
        return indices.astype(kind)

    expected = near.bytes.copy(), far.bytes.copy()
    for l, r in zip(*picks, strict=True):
        source, target = (1, 0) if operation == "READ" else (0, 1)
        at = l * 8192, r * 16 * KIB
        expected[target][at[target] : at[target] + 4096] = expected[source][
            at[source] : at[source] + 4096
        ]
    handle = here.make_prepped_xfer(operation, local, form(picks[0]), remote, form(picks[1]))
    finish(here, handle)
    assert np.array_equal(near.bytes, expected[0]) and np.array_equal(far.bytes, expected[1])
    here.release_xfer_handle(handle)


def test_lists_without_any_order(pair):
    """Descriptors of all lengths at random places, in several registrations."""
    here, near, there, far = pair
    more = Memory(there, 1 << 20, seed=9)
    here.add_remote_agent(there.get_agent_metadata())
    random = np.random.default_rng(5)
    lengths = random.integers(1, 700, 600)
    local = np.zeros((600, 3), dtype=np.uint64)
    local[:, 0] = near.address + random.permutation(600) * 1500
    remote = local.copy()
    homes = random.integers(0, 2, 600)
    addresses = np.array([far.address, more.address], dtype=np.uint64)
    remote[:, 0] = addresses[homes] + random.permutation(600).astype(np.uint64) * 1700
    local[:, 1] = remote[:, 1] = lengths
    a = here.prep_xfer_dlist("", local, "DRAM")
    b = here.prep_xfer_dlist(there.name, remote, "DRAM")
    assert here.agent.describeDlist(a._handle) == (600, None)
    picks = random.permutation(600).astype(np.int32)
    finish(here, here.make_prepped_xfer("WRITE", a, picks, b, picks))
    for at in range(600):
        memory = (far, more)[homes[at]]
        x, y = int(local[at, 0]) - near.address, int(remote[at, 0]) - memory.address
        length = lengths[at]
        assert np.array_equal(near.bytes[x : x + length], memory.bytes[y : y + length])


def test_regular_lists_are_a_few_runs(pair):
    """The list of a KV cache takes no memory for each descriptor."""
    here, near, there, _ = pair
    # Four layers of 1,000 blocks, each a range of its own; blocks of 16 bytes at a stride of 200.
    rows = np.concatenate(
        [near.rows(layer * 250_000 + np.arange(1000) * 200, 16) for layer in range(4)]
    )
    handle = here.prep_xfer_dlist("", rows, "DRAM")
    assert here.agent.describeDlist(handle._handle) == (4000, 4)
    strided = np.array(
        [[near.address + layer * 250_000, 16, 0, 200, 1000] for layer in range(4)], dtype=np.uint64
    )
    same = here.prep_xfer_dlist("", strided, "DRAM")
    assert here.agent.describeDlist(same._handle) == (4000, 4)
    for bad in ([near.address, 16, 0, 8, 2], [near.address, 16, 0, 200, 0]):
        with pytest.raises(bindings.nixlInvalidParamError):
            here.prep_xfer_dlist("", np.array([bad], dtype=np.uint64), "DRAM")
    with pytest.raises(ValueError, match="mem_type"):
        here.prep_xfer_dlist("", strided)
    with pytest.raises(bindings.nixlNotFoundError):
        here.prep_xfer_dlist(there.name, strided, "DRAM")


def test_a_run_may_cross_regions(make_agent):
    """Two registrations side by side: the array's rows are one run, and each lies in one of them."""
    here, there = make_agent(), make_agent()
    size, blocks = 64, 128
    source = np.arange(blocks * size, dtype=np.uint64).view(np.uint8)[: blocks * size].copy()
    target = np.zeros_like(source)
    half = blocks * size // 2
    for agent, memory in ((here, target), (there, source)):
        base = memory.ctypes.data
        agent.register_memory([(base, half, 0, ""), (base + half, half, 0, "")], "DRAM")
    name = here.add_remote_agent(there.get_agent_metadata())
    rows = np.full((blocks, 3), size, dtype=np.uint64)
    rows[:, 2] = 0
    handles = []
    for agent, memory in (("NIXL_INIT_AGENT", target), (name, source)):
        rows[:, 0] = memory.ctypes.data + size * np.arange(blocks)
        handles.append(here.prep_xfer_dlist(agent, here.get_xfer_descs(rows, "DRAM")))
    assert here.agent.describeDlist(handles[0]._handle) == (blocks, 2)
    some = np.array([0, 63, 64, 127, 5], dtype=np.int32)
    read = here.make_prepped_xfer("READ", handles[0], some, handles[1], some)
    finish(here, read)
    expected = np.zeros_like(source).reshape(blocks, size)
    expected[some] = source.reshape(blocks, size)[some]
    assert (target.reshape(blocks, size) == expected).all()


def test_strided_lists_move_bytes(pair):
    """A list of (address, length, device, stride, count) is the list of its blocks."""
    here, near, there, far = pair
    local = np.array([[near.address, 100, 0, 300, 50]], dtype=np.uint64)
    remote = np.array([[far.address + 7, 100, 0, 100, 50]], dtype=np.uint64)
    a = here.prep_xfer_dlist("", local, "DRAM")
    b = here.prep_xfer_dlist(there.name, remote, "DRAM")
    finish(here, here.make_prepped_xfer("WRITE", a, list(range(50)), b, list(range(50))))
    picked = np.concatenate([near.bytes[at * 300 : at * 300 + 100] for at in range(50)])
    assert np.array_equal(far.bytes[7 : 7 + 5000], picked)


def test_one_shot_transfers_of_tensors(make_agent):
    """Registration, descriptors and transfer straight from tensors."""
    here, there = make_agent("here"), make_agent("there")
    source = torch.arange(64, dtype=torch.float32).reshape(8, 8)
    target = torch.zeros((8, 8), dtype=torch.float32)
    here.register_memory(target)
    there.register_memory([source])
    here.add_remote_agent(there.get_agent_metadata())
    handle = here.initialize_xfer(
        "READ",
        here.get_xfer_descs([target[at] for at in range(8)]),
        here.get_xfer_descs([source[7 - at] for at in range(8)]),
        there.name,
        "text",
    )
    assert here.query_xfer_backend(handle) == "UCX"
    finish(here, handle)
    assert torch.equal(target, source.flip(0))
    until(lambda: there.check_remote_xfer_done(here.name, b"text"), "the message")


def test_local_to_local(make_agent):
    """An agent's own name is the other side."""
    agent = make_agent()
    one, other = Memory(agent, 64 * KIB, seed=1), Memory(agent, 64 * KIB)
    a = agent.prep_xfer_dlist("NIXL_INIT_AGENT", one.rows([0, 8192], 4096), "DRAM")
    b = agent.prep_xfer_dlist(agent.name, other.rows([8192, 0], 4096), "DRAM")
    handle = agent.make_prepped_xfer("WRITE", a, [0, 1], b, [0, 1], b"to myself")
    finish(agent, handle)
    assert np.array_equal(other.bytes[:4096], one.bytes[8192:12288])
    assert np.array_equal(other.bytes[8192:12288], one.bytes[:4096])
    assert until(agent.get_new_notifs) == {agent.name: [b"to myself"]}
    # The same bytes as source and destination.
    c = agent.prep_xfer_dlist(agent.name, one.rows([100, 5000], 4096), "DRAM")
    with pytest.raises(bindings.nixlInvalidParamError, match="overlaps"):
        agent.make_prepped_xfer("WRITE", a, [0, 1], c, [0, 1])


def test_posted_again_with_other_messages(pair):
    """A transfer that is done may be started again; a message at post takes the place of the first."""
    here, near, there, far = pair
    local, remote = sides(pair, [0], [0], 4096)
    handle = here.make_prepped_xfer("WRITE", local, [0], remote, [0], b"first")
    with pytest.raises(bindings.nixlNotPostedError):
        here.check_xfer_state(handle)
    for value in range(5):
        near.bytes[:4096] = value
        finish(here, handle, b"" if value < 2 else b"turn %d" % value)
        assert (far.bytes[:4096] == value).all()
    got = until(lambda: len(there.update_notifs().get(here.name, [])) == 5 and there.notifs)
    assert got[here.name] == [b"first", b"first", b"turn 2", b"turn 3", b"turn 4"]


def test_messages(pair):
    """Their order, their kinds, and the ways to take them."""
    here, _, there, _ = pair
    for text in (b"one", "two", b"\x00three", b"x" * 100_000):
        here.send_notif(there.name, text)
    until(lambda: len(there.update_notifs().get(here.name, [])) == 4)
    assert there.check_remote_xfer_done(here.name, b"tw")
    assert not there.check_remote_xfer_done(here.name, b"tw")
    assert not there.check_remote_xfer_done(here.name, b"hree")
    assert there.check_remote_xfer_done(here.name, b"hree", tag_is_prefix=False)
    assert there.check_remote_xfer_done(here.name, b"")
    assert there.notifs[here.name] == [b"x" * 100_000]
    assert there.get_new_notifs() == {}
    assert not there.check_remote_xfer_done("nobody", b"")
    here.send_notif(here.name, b"to myself")
    assert until(here.get_new_notifs) == {here.name: [b"to myself"]}
    there.send_notif(here.name.encode(), b"back", backend="UCX")
    assert until(here.get_new_notifs) == {there.name: [b"back"]}
    with pytest.raises(bindings.nixlInvalidParamError):
        here.send_notif(there.name, b"x" * (1 << 20))


def test_what_a_transfer_tells(pair, make_agent):
    """Telemetry, estimates, plans."""
    here, near, there, _ = pair
    local, remote = sides(pair, np.arange(10) * 4096, np.arange(10) * 4096, 4096)
    handle = here.make_prepped_xfer("READ", local, list(range(10)), remote, list(range(10)))
    finish(here, handle)
    told = here.get_xfer_telemetry(handle)
    assert isinstance(told, bindings.nixlXferTelemetry)
    assert (told.totalBytes, told.descCount, told.backendName) == (40_960, 10, "UCX")
    assert told.startTime > 0 and told.xferDuration >= told.postDuration > 0
    time, margin, method = here.estimate_xfer_cost(handle)
    assert time > 0 and margin >= 0 and method == "ANALYTICAL_BACKEND"
    # Ten descriptors that touch are one piece.
    assert here.agent.describeXferReq(handle._handle)[0].startswith("1 sets, 1 pieces, loopback")
    quiet = make_agent()
    memory = Memory(quiet, 4096)
    a = quiet.prep_xfer_dlist("", memory.rows([0], 64), "DRAM")
    b = quiet.prep_xfer_dlist(quiet.name, memory.rows([64], 64), "DRAM")
    handle = quiet.make_prepped_xfer("READ", a, [0], b, [0])
    with pytest.raises(bindings.nixlNoTelemetryError):
        quiet.get_xfer_telemetry(handle)


@pytest.mark.parametrize(
    ("variable", "configured", "kept"),
    [("y", False, True), ("no", True, False), ("", True, True)],
)
def test_the_environment_decides_about_telemetry(
    monkeypatch, make_agent, variable, configured, kept
):
    """As for NIXL."""
    monkeypatch.setenv("NIXL_TELEMETRY_ENABLE", variable)
    agent = make_agent(capture_telemetry=configured)
    memory = Memory(agent, 4096)
    a = agent.prep_xfer_dlist("", memory.rows([0], 64), "DRAM")
    b = agent.prep_xfer_dlist(agent.name, memory.rows([64], 64), "DRAM")
    handle = agent.make_prepped_xfer("READ", a, [0], b, [0])
    finish(agent, handle)
    if kept:
        assert agent.get_xfer_telemetry(handle).totalBytes == 64
    else:
        with pytest.raises(bindings.nixlNoTelemetryError):
            agent.get_xfer_telemetry(handle)


def test_what_does_not_fit_is_named(pair):
    """Wrong sides, indices, lengths, agents, memory."""
    here, near, there, far = pair
    local, remote = sides(pair, [0, 4096], [0, 4096], 4096)
    short = here.prep_xfer_dlist(there.name, far.rows([0, 4096], 2048), "DRAM")
    invalid = [
        (local, [0], remote, [0, 1], "equally many"),
        (local, [], remote, [], "at least one"),
        (local, [2], remote, [0], "local index 2 at position 0"),
        (local, [0, -1], remote, [0, 1], "local index -1 at position 1"),
        (local, [0], remote, np.array([1 << 40]), "out of range"),
        (local, [0], remote, np.array([-5], dtype=np.int32), "-5"),
        (local, [0], short, [0], "4096 bytes, the remote one 2048"),
        (remote, [0], remote, [0], "local side"),
        (local, [0], local, [0], "remote side"),
    ]
    for operation in ("READ", "WRITE"):
        for *arguments, match in invalid:
            with pytest.raises(bindings.nixlInvalidParamError, match=match):
                here.make_prepped_xfer(operation, *arguments)
    with pytest.raises(bindings.nixlInvalidParamError, match="named twice"):
        here.make_prepped_xfer("WRITE", local, [0, 1], remote, [1, 1])
    with pytest.raises(TypeError):
        here.make_prepped_xfer("READ", local, np.array([0.0]), remote, [0])
    with pytest.raises(ValueError, match="dimensions"):
        here.make_prepped_xfer("READ", local, np.zeros((1, 2), dtype=np.int32), remote, [0, 1])
    with pytest.raises(KeyError):
        here.make_prepped_xfer("RD", local, [0], remote, [0])
    for agent, rows, match in [
        ("", near.rows([1 << 20], 1), "registered"),
        ("", near.rows([(1 << 20) - 8], 9), "registered"),
        (there.name, near.rows([0], 8), "told by its metadata"),
        ("nobody", near.rows([0], 8), "nobody"),
    ]:
        with pytest.raises(bindings.nixlNotFoundError, match=match):
            here.prep_xfer_dlist(agent, rows, "DRAM")
    with pytest.raises(bindings.nixlInvalidParamError, match="no bytes"):
        here.prep_xfer_dlist("", near.rows([0], 0), "DRAM")
    with pytest.raises(bindings.nixlInvalidParamError, match="no descriptors"):
        here.prep_xfer_dlist("", np.zeros((0, 3), dtype=np.uint64), "DRAM")
    one, two = (here.get_xfer_descs(near.rows(at, 64), "DRAM") for at in ([0], [0, 64]))
    with pytest.raises(bindings.nixlInvalidParamError, match="equally many"):
        here.initialize_xfer("READ", one, two, there.name)
    with pytest.raises(bindings.nixlNotFoundError):
        here.initialize_xfer("READ", one, one, "nobody")


def test_handles_that_are_none(pair):
    """Raw handles of nothing, released ones, and those of another agent."""
    here, _, there, _ = pair
    local, remote = sides(pair, [0], [0], 64)
    handle = here.make_prepped_xfer("READ", local, [0], remote, [0])
    raw = handle._handle
    here.release_xfer_handle(handle)
    here.release_xfer_handle(handle)
    for call in (here.agent.getXferStatus, here.agent.postXferReq, here.agent.releaseXferReq):
        for bad in (raw, 0, 12345, (1 << 64) - 1):
            with pytest.raises(bindings.nixlInvalidParamError, match="no request"):
                call(bad)
    with pytest.raises(bindings.nixlInvalidParamError, match="no prepared list"):
        there.agent.releasedDlistH(local._handle)
    here.release_dlist_handle(local)
    with pytest.raises(bindings.nixlInvalidParamError, match="no prepared list"):
        here.make_prepped_xfer("READ", local, [0], remote, [0])


def test_registration_is_all_or_nothing(make_agent):
    """One bad descriptor registers none; addresses without memory are refused."""
    agent = make_agent()
    memory = np.zeros(4096, dtype=np.uint8)
    good = (memory.ctypes.data, 4096, 0, "")
    for bad, error in [
        ((0, 64, 0, ""), bindings.nixlInvalidParamError),
        ((memory.ctypes.data, 0, 0, ""), bindings.nixlInvalidParamError),
        (((1 << 64) - 10, 64, 0, ""), bindings.nixlInvalidParamError),
        ((64, 64, 0, ""), bindings.nixlBackendError),
        ((memory.ctypes.data, 1 << 46, 0, ""), bindings.nixlBackendError),
    ]:
        with pytest.raises(error):
            agent.register_memory([good, bad], "DRAM")
        with pytest.raises(bindings.nixlNotFoundError):
            agent.prep_xfer_dlist("", [good[:3]], "DRAM")
    descs = agent.register_memory([good, good], "DRAM")
    inner = agent.register_memory([(memory.ctypes.data + 100, 100, 0, "")], "DRAM")
    agent.deregister_memory(inner)
    agent.prep_xfer_dlist("", [(memory.ctypes.data + 50, 300, 0)], "DRAM")
    agent.deregister_memory(descs)
    with pytest.raises(bindings.nixlNotFoundError):
        agent.deregister_memory(descs)
    for kind, error in [
        ("BLOCK", bindings.nixlNotSupportedError),
        ("OBJ", bindings.nixlNotSupportedError),
        ("FILE", bindings.nixlNotFoundError),
    ]:
        with pytest.raises(error):
            agent.register_memory([good], kind)
    with pytest.raises(bindings.nixlNotFoundError):
        make_agent(backends=[]).register_memory([good], "DRAM")


def test_memory_of_gpus_is_refused_without_one(make_agent):
    """The reason says what is missing."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(bindings.nixlBackendError, match=r"(?i)cuda"):
        make_agent().register_memory([(1 << 40, 4096, 0, "")], "VRAM")


def test_deregistered_memory_is_not_touched(pair):
    """Lists and requests that name it end, on both sides; the rest goes on."""
    here, near, there, far = pair
    other = Memory(here, 4096)
    local, remote = sides(pair, [0], [0], 4096)
    handle = here.make_prepped_xfer("READ", local, [0], remote, [0])
    finish(here, handle)
    here.deregister_memory(near.descs)
    with pytest.raises(bindings.nixlNotFoundError, match="deregistered"):
        here.transfer(handle)
    with pytest.raises(bindings.nixlNotFoundError, match="deregistered"):
        here.make_prepped_xfer("READ", local, [0], remote, [0])
    again = here.prep_xfer_dlist("", other.rows([0], 4096), "DRAM")
    finish(here, here.make_prepped_xfer("READ", again, [0], remote, [0]))
    there.deregister_memory(far.descs)
    with pytest.raises(bindings.nixlNotFoundError):
        here.make_prepped_xfer("READ", again, [0], remote, [0])


def test_backends(make_agent):
    """Names, kinds of memory, creation."""
    agent = make_agent(backends=["UCX", "UVX"])
    assert {"UCX", "POSIX", "BLOCKPLANE"} <= set(agent.get_plugin_list())
    assert agent.get_plugin_mem_types("UCX") == ["DRAM_SEG", "VRAM_SEG"]
    assert agent.get_backend_mem_types("UCX") == ["DRAM_SEG", "VRAM_SEG"]
    assert agent.get_backend_mem_types("POSIX") == []
    assert agent.get_plugin_mem_types("UVX") == [] and agent.get_plugin_params("UVX") == {}
    agent.create_backend("POSIX", {"use_uring": "true"})
    assert "FILE_SEG" in agent.get_backend_mem_types("POSIX")
    with pytest.raises(bindings.nixlInvalidParamError):
        agent.create_backend("POSIX")
    with pytest.raises(bindings.nixlNotFoundError):
        agent.create_backend("UVX")
    with pytest.raises(KeyError):
        agent.register_memory([(1, 2, 3, "")], "DRAM", backends=["GDS"])
    assert not bindings.HAVE_UCX_GPU_DEVICE_API
    with pytest.raises(bindings.nixlNotSupportedError):
        agent.prep_mem_view(agent.get_xfer_descs([(1, 2, 3)], "VRAM"))


@pytest.mark.parametrize("by", ["descriptor", "path", "modes"])
@pytest.mark.parametrize("backend", ["POSIX", "GDS_MT"])
def test_files(make_agent, tmp_path, by, backend):
    """Blocks go to two files and come back; a message follows the last of them."""
    agent = make_agent(backends=[backend, "UCX"])
    memory = Memory(agent, 64 * KIB, seed=6)
    paths = [tmp_path / "one", tmp_path / "other"]
    for path in paths:
        path.write_bytes(bytes(64 * KIB))
    opened = [path.open("r+b") for path in paths]
    if by == "descriptor":
        keys = [(file.fileno(), "") for file in opened]
    else:
        keys = [(at + 1, f"{'rw:' if by == 'modes' else ''}{path}") for at, path in enumerate(paths)]
    files = agent.register_memory([(0, 64 * KIB, *key) for key in keys], "FILE")
    # Block i is at 8 KiB * i of memory, and at 4 KiB * i of one or the other file.
    local = agent.get_xfer_descs(memory.rows(np.arange(8) * 8192, 4096), "DRAM")
    remote = agent.get_xfer_descs([(at * 4096, 4096, keys[at % 2][0]) for at in range(8)], "FILE")
    write = agent.initialize_xfer("WRITE", local, remote, agent.name, b"written")
    finish(agent, write)
    assert until(agent.get_new_notifs) == {agent.name: [b"written"]}
    assert agent.query_xfer_backend(write) == backend
    for at in range(8):
        stored = paths[at % 2].read_bytes()[at * 4096 : (at + 1) * 4096]
        assert stored == memory.bytes[at * 8192 : at * 8192 + 4096].tobytes()
    before = memory.bytes.copy()
    memory.bytes[:] = 0
    a = agent.prep_xfer_dlist("", local)
    b = agent.prep_xfer_dlist(agent.name, remote)
    finish(agent, agent.make_prepped_xfer("READ", a, [1, 3, 6], b, [1, 3, 6]))
    for at in range(8):
        block = memory.bytes[at * 8192 : at * 8192 + 4096]
        if at in (1, 3, 6):
            assert np.array_equal(block, before[at * 8192 : at * 8192 + 4096])
        else:
            assert not block.any()
    agent.deregister_memory(files)
    for file in opened:
        file.close()


def test_queries_of_files(make_agent, tmp_path):
    """What the file system tells, by path and by descriptor."""
    agent = make_agent(backends=["POSIX"])
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    missing = str(tmp_path / "missing")
    told = agent.query_memory([(0, 0, 0, str(path)), (0, 0, 0, missing)], "POSIX", "FILE")
    assert told[0]["size"] == "5" and int(told[0]["mode"]) & 0o100000 and told[1] is None
    assert int(told[0]["mtime"]) == int(path.stat().st_mtime)
    with path.open() as file:
        told = agent.query_memory([(0, 0, file.fileno(), "")], "POSIX", "FILE")
    assert told[0]["size"] == "5"
    with pytest.raises(ValueError, match="UCX"):
        agent.query_memory([(0, 0, 0, str(path))], "UCX", "FILE")
    with pytest.raises(bindings.nixlNotSupportedError):
        agent.query_memory([(0, 0, 0, "")], "POSIX", "DRAM")
    for descriptor in (999_999, 1 << 40):
        with pytest.raises(bindings.nixlInvalidParamError):
            agent.register_memory([(0, 64, descriptor, "")], "FILE")
    with pytest.raises(bindings.nixlBackendError):
        agent.register_memory([(0, 64, 0, missing)], "FILE")


def test_release_of_a_transfer_in_flight_calls_it_off(make_agent):
    """No byte lands after release has returned, and the agent goes on."""
    agent = make_agent()
    size = 256 << 20
    source, target = Memory(agent, size), Memory(agent, size)
    source.bytes[:] = 1
    a = agent.prep_xfer_dlist("", source.rows([0], size), "DRAM")
    b = agent.prep_xfer_dlist(agent.name, target.rows([0], size), "DRAM")
    handle = agent.make_prepped_xfer("WRITE", a, [0], b, [0], b"never")
    assert agent.transfer(handle) == "PROC"
    with pytest.raises(bindings.nixlRepostActiveError):
        agent.transfer(handle)
    agent.release_xfer_handle(handle)
    landed = int(np.count_nonzero(target.bytes))
    assert landed < size
    small = agent.prep_xfer_dlist("", source.rows([0], 64), "DRAM")
    far = agent.prep_xfer_dlist(agent.name, target.rows([size - 64], 64), "DRAM")
    finish(agent, agent.make_prepped_xfer("WRITE", small, [0], far, [0]))
    assert int(np.count_nonzero(target.bytes)) == landed + 64
    assert agent.get_new_notifs() == {}


def test_everything_is_given_back(make_agent):
    """Handles and agents go with their last reference, also with transfers in flight."""
    agent = make_agent()
    size = 64 << 20
    source, target = Memory(agent, size), Memory(agent, size)
    a = agent.prep_xfer_dlist("", source.rows([0], size), "DRAM")
    b = agent.prep_xfer_dlist(agent.name, target.rows([0], size), "DRAM")
    handle = agent.make_prepped_xfer("WRITE", a, [0], b, [0])
    gone = weakref.ref(agent)
    agent.transfer(handle)
    threads = threading.active_count(), len(os.listdir("/proc/self/task"))
    del agent, handle, a, b
    gc.collect()
    assert gone() is None
    del source, target
    until(lambda: len(os.listdir("/proc/self/task")) < threads[1], "the end of its threads")


def test_a_hundred_agents_leave_nothing(make_agent):
    """Descriptors and threads of agents that came and went."""
    for _ in range(3):
        make_agent()
    before = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
    for _ in range(100):
        agent = make_agent()
        Memory(agent, 4096)
        del agent
    gc.collect()
    until(
        lambda: len(os.listdir("/proc/self/fd")) <= before[0]
        and len(os.listdir("/proc/self/task")) <= before[1],
        "the end of their threads and descriptors",
    )


def test_many_threads(pair):
    """One agent may be used from all of them."""
    here, near, there, far = pair
    local, remote = sides(pair, np.arange(64) * 16 * KIB, np.arange(64) * 16 * KIB, 16 * KIB)
    errors = []

    def work(number):
        try:
            for turn in range(50):
                block = number * 8 + turn % 8
                handle = here.make_prepped_xfer(
                    "WRITE", local, [block], remote, [block], b"%d" % number
                )
                finish(here, handle)
                here.release_xfer_handle(handle)
        except Exception as error:  # noqa: BLE001 - shown below
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert np.array_equal(near.bytes, far.bytes)
    until(lambda: len(there.update_notifs().get(here.name, [])) == 400, "all messages")


def test_raw_memory():
    """The helpers of NIXL's examples check what they are given."""
    one, other = utils.malloc_passthru(256), utils.malloc_passthru(256)
    utils.ba_buf(one, 256)
    utils.ba_buf(other + 8, 8)
    utils.verify_transfer(one, other + 8, 8)
    with pytest.raises(ValueError, match="byte 8"):
        utils.verify_transfer(one, other + 8, 9)
    for call in (
        lambda: utils.ba_buf(one + 200, 57),
        lambda: utils.ba_buf(4096, 8),
        lambda: utils.free_passthru(one + 1),
    ):
        with pytest.raises(ValueError, match="malloc_passthru"):
            call()
    utils.free_passthru(one)
    utils.free_passthru(other)
    with pytest.raises(ValueError, match="malloc_passthru"):
        utils.free_passthru(one)
