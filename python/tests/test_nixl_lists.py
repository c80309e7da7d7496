"""Descriptor lists: forms they are made of, their operations, pickles."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

import nixl._bindings as bindings

DRAM = bindings.DRAM_SEG
ROWS = [(1000, 105, 0), (2000, 30, 0), (1010, 20, 7)]
REG = [(*row, info) for row, info in zip(ROWS, ("", "text", b"\x00\xff"), strict=True)]


def test_operations_of_a_transfer_list():
    """Every operation of NIXL's list."""
    descs = bindings.nixlXferDList(DRAM, ROWS)
    assert (descs.descCount(), descs.isEmpty(), descs.getType()) == (3, False, DRAM)
    assert [descs[at] for at in range(3)] == ROWS
    assert descs.index(ROWS[2]) == 2
    with pytest.raises(bindings.nixlNotFoundError):
        descs.index((1, 2, 3))
    descs[0] = (5, 6, 7)
    descs.addDesc((8, 9, 10))
    descs.append((11, 12, 13))
    descs.remDesc(1)
    assert [descs[at] for at in range(4)] == [(5, 6, 7), ROWS[2], (8, 9, 10), (11, 12, 13)]
    other = bindings.nixlXferDList(DRAM, [(5, 6, 7)])
    assert descs != other
    descs.clear()
    assert descs.isEmpty() and descs == bindings.nixlXferDList(DRAM)
    assert descs != bindings.nixlXferDList(bindings.VRAM_SEG)


def regular(layers: int, blocks: int, size: int) -> np.ndarray:
    """An engine's list: every block of every layer, which is kept as a few runs."""
    starts = [(1 << 32) * (layer + 1) + size * np.arange(blocks) for layer in range(layers)]
    rows = np.full((layers * blocks, 3), size, dtype=np.uint64)
    rows[:, 0], rows[:, 2] = np.concatenate(starts), 5
    return rows


def test_a_regular_array_is_its_rows():
    """Whatever a list is kept as, it holds the rows it was given, also once it is changed."""
    array = regular(3, 100, 64)
    rows = [tuple(row) for row in array.tolist()]
    descs = bindings.nixlXferDList(DRAM, array)
    assert descs.descCount() == 300 and descs[299] == rows[299]
    assert descs == bindings.nixlXferDList(DRAM, rows) and pickle.loads(pickle.dumps(descs)) == descs
    other = bindings.nixlXferDList(DRAM, array)
    other.remDesc(150)
    other.addDesc((1, 2, 3))
    other[0] = (4, 5, 6)
    kept = [(4, 5, 6), *rows[1:150], *rows[151:], (1, 2, 3)]
    assert [other[at] for at in range(300)] == kept
    array[:] = 0
    assert descs[7] == rows[7], "the array is read once"


@pytest.mark.parametrize("change", [(0, 0), (1, 1), (1, 63), (2, 6)])
def test_one_row_out_of_line(change):
    """A row with another address, length or device is no part of a run."""
    array = regular(2, 64, 64)
    column, value = change
    array[40, column] = value
    descs = bindings.nixlXferDList(DRAM, array)
    assert [list(descs[at]) for at in range(len(array))] == array.tolist()


def test_operations_of_a_registration_list():
    """The same, with what the owner says about the memory."""
    descs = bindings.nixlRegDList(DRAM, REG)
    assert descs[1] == (2000, 30, 0, b"text")
    assert descs.index((1010, 20, 7, b"\x00\xff")) == 2
    assert descs.trim() == bindings.nixlXferDList(DRAM, ROWS)
    descs.remDesc(0)
    descs.append((1, 2, 3, "x"))
    descs[0] = (4, 5, 6, "y")
    assert [descs[at] for at in range(3)] == [
        (4, 5, 6, b"y"),
        (1010, 20, 7, b"\x00\xff"),
        (1, 2, 3, b"x"),
    ]


def test_operations_of_a_remote_list():
    """Descriptors of several agents."""
    descs = bindings.nixlRemoteDList(DRAM, [(1, 2, 3, "one")])
    descs.addDesc((4, 5, 6, "other"))
    assert [descs[0], descs[1]] == [(1, 2, 3, "one"), (4, 5, 6, "other")]
    descs[0] = (7, 8, 9, "third")
    descs.remDesc(1)
    assert descs == bindings.nixlRemoteDList(DRAM, [(7, 8, 9, "third")])


@pytest.mark.parametrize("at", [3, -1, 1 << 40])
def test_no_descriptor_outside_of_the_list(at):
    """Nothing is read or written beyond either end."""
    for descs, row in [
        (bindings.nixlXferDList(DRAM, ROWS), (1, 2, 3)),
        (bindings.nixlRegDList(DRAM, REG), (1, 2, 3, "")),
    ]:
        with pytest.raises(IndexError):
            descs[at]
        with pytest.raises(IndexError):
            descs[at] = row
        with pytest.raises(IndexError):
            descs.remDesc(at)
        assert descs.descCount() == 3


@pytest.mark.parametrize("kind", ["xfer", "reg", "remote"])
def test_pickles(kind):
    """What comes out is what went in, with every protocol."""
    descs = {
        "xfer": bindings.nixlXferDList(bindings.VRAM_SEG, ROWS),
        "reg": bindings.nixlRegDList(bindings.FILE_SEG, REG),
        "remote": bindings.nixlRemoteDList(DRAM, [(*row, "peer") for row in ROWS]),
    }[kind]
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        copy = pickle.loads(pickle.dumps(descs, protocol))
        assert copy == descs and copy.getType() == descs.getType()


@pytest.mark.parametrize("state", [b"", b"\x00\x01", b"\x09" + bytes(24), bytes(40), bytes(26)])
def test_states_that_are_none(state):
    """A broken pickle is an error and changes nothing."""
    for descs in (bindings.nixlXferDList(DRAM, ROWS), bindings.nixlRegDList(DRAM, REG)):
        before = pickle.dumps(descs)
        with pytest.raises(ValueError, match="state of a descriptor list"):
            descs.__setstate__(state)
        assert pickle.dumps(descs) == before


@pytest.mark.parametrize(
    "array",
    [
        np.array(ROWS, dtype=np.uint64),
        np.array(ROWS, dtype=np.int64),
        np.array(ROWS, dtype=np.int32),
        np.array(ROWS, dtype=np.uint32),
        np.asfortranarray(np.array(ROWS, dtype=np.uint64)),
        np.array([row + row for row in ROWS], dtype=np.uint64)[:, ::2][:, [0, 2, 1]],
        np.array(ROWS[::-1], dtype=np.uint64)[::-1],
        np.array(ROWS, dtype=np.uint64)[:, :],
    ],
    ids=["u8", "i8", "i4", "u4", "fortran", "columns", "backwards", "view"],
)
def test_arrays_of_any_layout(array):
    """Strides, widths and signs of arrays do not matter."""
    rows = [tuple(int(number) for number in row) for row in array]
    for kind in (bindings.nixlXferDList, bindings.nixlRegDList):
        descs = kind(DRAM, array)
        assert [descs[at][:3] for at in range(len(rows))] == rows


def test_unaligned_and_large_arrays():
    """Numbers above 2^63, at addresses that are no multiple of 8."""
    raw = np.zeros(1 + 24, dtype=np.uint8)
    array = raw[1:].view(np.uint64).reshape(1, 3)
    array[:] = [(1 << 64) - 1, 5, 0]
    assert bindings.nixlXferDList(DRAM, array)[0] == ((1 << 64) - 1, 5, 0)


@pytest.mark.parametrize(
    "descs",
    [
        np.zeros((2, 4), dtype=np.uint64),
        np.zeros((2, 3, 1), dtype=np.uint64),
        np.zeros((2, 3), dtype=np.float64),
        np.zeros((2, 3), dtype=">u8"),
        [(1, 2)],
        [(1, 2, -3)],
        [(1, 2, 1 << 64)],
        [(1, 2, "x")],
        ["abc"],
        "abc",
        1 << 40,
    ],
)
def test_forms_that_are_none(descs):
    """Anything else is a TypeError, ValueError or OverflowError, and never a crash."""
    with pytest.raises((TypeError, ValueError, OverflowError)):
        bindings.nixlXferDList(DRAM, descs)


def test_forms_of_the_agent(make_agent):
    """Tensors and lists of tensors become descriptors of their memory; bad forms become None."""
    agent = make_agent(backends=[])
    tensor = torch.zeros((4, 8), dtype=torch.float32)
    whole = agent.get_reg_descs(tensor)
    assert whole[0] == (tensor.data_ptr(), 128, 0, b"")
    rows = agent.get_xfer_descs([tensor[at] for at in range(4)])
    assert [rows[at] for at in range(4)] == [(tensor[at].data_ptr(), 32, 0) for at in range(4)]
    assert agent.get_xfer_descs(rows) is rows and agent.get_reg_descs(whole) is whole
    assert agent.deserialize_descs(agent.get_serialized_descs(rows)) == rows
    assert agent.get_remote_descs([(1, 2, 3, "peer")], "DRAM")[0] == (1, 2, 3, "peer")
    for bad in (
        agent.get_xfer_descs(whole),
        agent.get_reg_descs(rows),
        agent.get_xfer_descs(tensor.t()),
        agent.get_xfer_descs([tensor.t()]),
        agent.get_xfer_descs([(1, 2, 3)]),
        agent.get_xfer_descs([(1, 2, 3, 4)], "DRAM"),
        agent.get_xfer_descs(np.zeros((1, 4), dtype=np.uint64), "DRAM"),
        agent.get_xfer_descs(np.zeros((1, 3), dtype=np.uint64)),
    ):
        assert bad is None
    with pytest.raises(KeyError):
        agent.get_xfer_descs([(1, 2, 3)], "V-RAM")


def test_enumerations():
    """They compare with each other and with numbers, and say their names."""
    assert bindings.NIXL_SUCCESS == 0 and bindings.NIXL_IN_PROG == 1
    assert bindings.NIXL_ERR_NOT_FOUND == bindings.nixl_status_t.NIXL_ERR_NOT_FOUND == -4
    assert {bindings.DRAM_SEG: "x"}[bindings.nixl_mem_t.DRAM_SEG] == "x"
    assert (bindings.VRAM_SEG.name, bindings.VRAM_SEG.value) == ("VRAM_SEG", 1)
    assert str(bindings.NIXL_READ) == "nixl_xfer_op_t.NIXL_READ"
