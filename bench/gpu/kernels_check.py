"""Checks the copy kernels byte by byte on a GPU and measures them. Needs cupy and numpy only; with one
GPU, what goes between GPUs is left out.

    bench/gpu/kernels_check.py                     contents, then times; 3 minutes at most
    bench/gpu/kernels_check.py --only check        contents only
    bench/gpu/kernels_check.py --seconds 60

Ends with status 1 when a byte was wrong or a kernel failed. The structs are those of abi.cuh.
"""

import argparse
import ctypes
import pathlib
import sys
import time
import traceback

import numpy as np

SOURCES = pathlib.Path(__file__).resolve().parents[2] / "transfer/src/cuda/kernels"
KERNELS = ("bp_copy_bulk", "bp_copy_lanes", "bp_copy_small", "bp_permute")
# Shared memory: a warp's slots in the kernels with slots; lanes of a warp with a stage in the bulk kernel.
SLOTS = 8192
STAGES_PER_WARP = 4
CONSECUTIVE = 0xFFFFFFFF
CALLED_OFF = 0x80000000
MIB = 1 << 20


def struct(size, **fields):
    dtype = np.dtype(list(fields.items()), align=True)
    assert dtype.itemsize == size, (dtype, dtype.itemsize, size)
    return dtype


U32, U64 = np.uint32, np.uint64
SET = struct(
    96, src=U64, dst=U64, src_block=U64, dst_block=U64, src_layer=U64, dst_layer=U64, piece_bytes=U64,
    src_ids=U32, dst_ids=U32, src_first=U32, dst_first=U32, blocks=U32, layers=U32, layer_major=U32,
    chunks_per_piece=U32, first_chunk=U32, reserved=U32,
)  # fmt: skip
DONE = struct(32, arrived=U64, flag=U64, word=U64, ticket=U32, guarded=U32)
COPY = struct(
    160, one=SET, sets=U64, ids=U64, set_count=U32, chunk_bytes=U32, chunk_begin=U32, chunk_end=U32, done=DONE
)
AXIS = struct(24, src_stride=U64, dst_stride=U64, count=U32, reserved=U32)
PERMUTE = struct(
    264, src=U64, dst=U64, src_block=U64, dst_block=U64, src_ids=U32, dst_ids=U32, src_first=U32,
    dst_first=U32, blocks=U32, axes=U32, axis=(AXIS, 6), run_bytes=U32, vector_bytes=U32, ids=U64,
    unit_begin=U64, unit_end=U64, done=DONE,
)  # fmt: skip


class Gpu:
    """The device calls of this script."""

    def __init__(self):
        import cupy

        self.cp = cupy
        self.runtime = cupy.cuda.runtime
        self.driver = ctypes.CDLL("libcuda.so.1")
        self.count = self.runtime.getDeviceCount()
        self.use(0)
        self.runtime.free(0)
        if self.count > 1:
            self.use(1)
            self.runtime.free(0)
            self.runtime.deviceEnablePeerAccess(0)
            self.use(0)
            self.runtime.deviceEnablePeerAccess(1)
        name = self.runtime.getDeviceProperties(0)["name"].decode()
        self.arch = self.cp.cuda.Device(0).compute_capability
        print(f"{self.count} x {name}, sm_{self.arch}, driver {self.runtime.driverGetVersion()}", flush=True)
        self.alive = []

    def call(self, name, *arguments):
        status = getattr(self.driver, name)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self.driver.cuGetErrorString(status, ctypes.byref(text))
            raise RuntimeError(f"{name}: {status} {text.value}")

    def use(self, device):
        self.runtime.setDevice(device)

    def compile(self, *options):
        from cupy_backends.cuda.libs import nvrtc

        headers = {f.name.encode(): f.read_bytes() for f in sorted(SOURCES.iterdir()) if f.suffix in (".cu", ".cuh")}
        source = '#include "copy.cu"\n#include "permute.cu"\n'
        program = nvrtc.createProgram(source, "kernels.cu", tuple(headers.values()), tuple(headers))
        options = (f"--gpu-architecture=sm_{self.arch}", "--std=c++17", *options)
        try:
            nvrtc.compileProgram(program, options)
        except Exception as error:
            raise RuntimeError(f"{error}\n{nvrtc.getProgramLog(program)}") from None
        image = nvrtc.getCUBIN(program)
        module = ctypes.c_void_p()
        self.call("cuModuleLoadData", ctypes.byref(module), image)
        functions = {}
        for name in KERNELS:
            function = ctypes.c_void_p()
            if name == "bp_copy_bulk" and int(self.arch) < 90:
                continue
            self.call("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
            functions[name] = function
        for name, function in functions.items():
            if name == "bp_copy_small":
                continue
            # All that the static part leaves: attributes SHARED_SIZE_BYTES, MAX_DYNAMIC_SHARED_SIZE_BYTES.
            static = ctypes.c_int()
            self.call("cuFuncGetAttribute", ctypes.byref(static), 1, function)
            self.call("cuFuncSetAttribute", function, 8, (227 << 10) - static.value)
        return functions

    def alloc(self, where, size):
        """An address; `where` is a device or "host"."""
        if where == "host":
            memory = self.cp.cuda.alloc_pinned_memory(size)
            self.alive.append(memory)
            return memory.ptr
        self.use(where)
        memory = self.cp.cuda.alloc(size)
        self.alive.append(memory)
        self.use(0)
        return memory.ptr

    def release(self):
        self.alive.clear()
        for device in range(self.count):
            self.use(device)
            self.cp.get_default_memory_pool().free_all_blocks()
        self.cp.get_default_pinned_memory_pool().free_all_blocks()
        self.use(0)

    def put(self, address, array):
        array = np.ascontiguousarray(array)
        self.runtime.memcpy(address, array.ctypes.data, array.nbytes, 4)
        for device in range(self.count):
            self.use(device)
            self.runtime.deviceSynchronize()
        self.use(0)

    def get(self, address, size):
        out = np.empty(size, np.uint8)
        self.runtime.memcpy(out.ctypes.data, address, size, 4)
        return out

    def host_view(self, address, count, dtype):
        size = count * np.dtype(dtype).itemsize
        return np.frombuffer((ctypes.c_char * size).from_address(address), dtype)

    def launch(self, function, grid, block, shared, parameter):
        parameter = np.ascontiguousarray(parameter)
        pointers = (ctypes.c_void_p * 1)(parameter.ctypes.data)
        stream = ctypes.c_void_p(self.cp.cuda.get_current_stream().ptr)
        self.call("cuLaunchKernel", function, grid, 1, 1, block, 1, 1, shared, stream, pointers, None)

    def sync(self):
        self.cp.cuda.get_current_stream().synchronize()

    def median_ms(self, work, count=7):
        begin, end = self.cp.cuda.Event(), self.cp.cuda.Event()
        times = []
        for i in range(count + 2):
            begin.record()
            work()
            end.record()
            end.synchronize()
            if i > 1:
                times.append(self.cp.cuda.get_elapsed_time(begin, end))
        return sorted(times)[len(times) // 2]


def lanes(warps):
    """Threads and shared memory of a CTA of bp_copy_lanes or bp_permute."""
    return 32 * warps, warps * SLOTS


def small(warps):
    return 32 * warps, 0


def bulk(stages, chunk):
    """The same of bp_copy_bulk."""
    return stages // STAGES_PER_WARP * 32, stages * chunk


class Slot:
    """The words of one launch: counter on the device, flag, abort and started in pinned memory."""

    def __init__(self, gpu):
        self.gpu = gpu
        self.arrived = gpu.alloc(0, 256)
        gpu.put(self.arrived, np.zeros(64, U32))
        self.base = gpu.alloc("host", 4096)
        self.words = gpu.host_view(self.base, 64, U32)
        self.words[:] = 0
        self.ticket = 0

    def next(self, guarded=0):
        self.ticket += 1
        done = np.zeros((), DONE)
        done["arrived"], done["flag"], done["word"] = self.arrived, self.base, self.base + 128
        done["ticket"], done["guarded"] = self.ticket, guarded
        return done

    def wait(self, expected, limit_s=5.0):
        """By the flag alone, as a host would."""
        end = time.monotonic() + limit_s
        while self.words[0] != expected:
            if time.monotonic() > end:
                self.gpu.sync()
                raise RuntimeError(f"flag {self.words[0]:#x} after {limit_s} s, expected {expected:#x}")

    def check_idle(self):
        self.gpu.sync()
        arrived = self.gpu.get(self.arrived, 4).view(U32)[0]
        assert arrived == 0, f"counter {arrived:#x} after the end"


# ---- contents ---------------------------------------------------------------------------------------


class Wrong(Exception):
    pass


def compare(name, expected, found):
    if np.array_equal(expected, found):
        return
    bad = np.flatnonzero(expected != found)
    raise Wrong(
        f"{name}: {bad.size} of {expected.size} bytes wrong, first at {bad[0]} (mod 16: {bad[0] % 16}), last "
        f"{bad[-1]}; expected {expected[bad[:8]]}, found {found[bad[:8]]}"
    )


def random_set(rng, table, src, dst, piece, blocks, layers, layer_major, step, ids=True):
    """A set whose regions begin at offsets src and dst of the two memories; returns it, its end in both,
    and the plain list of (src, dst) offsets of its pieces."""
    item = np.zeros((), SET)
    gap = step * int(rng.integers(0, 3))
    layer = piece + gap
    layer = -(-layer // step) * step
    block = layers * layer
    total = blocks * 2
    for side, base in (("src", src), ("dst", dst)):
        item[side], item[f"{side}_layer"], item[f"{side}_block"] = base, layer, block
        if ids:
            chosen = rng.permutation(total)[:blocks].astype(U32)
            item[f"{side}_ids"] = len(table)
            table.extend(chosen)
        else:
            item[f"{side}_ids"] = CONSECUTIVE
            item[f"{side}_first"] = first = int(rng.integers(0, blocks + 1))
            chosen = np.arange(first, first + blocks)
        if side == "src":
            source = chosen
    item["piece_bytes"], item["blocks"], item["layers"], item["layer_major"] = piece, blocks, layers, layer_major
    pairs = [
        (src + int(a) * block + k * layer, dst + int(b) * block + k * layer)
        for a, b in zip(source, chosen)
        for k in range(layers)
    ]
    return item, src + total * block, dst + total * block, pairs


def copy_case(gpu, rng, where, unit, shapes):
    """Random sets of the given (piece, blocks, layers, layer_major, with ids), addresses multiples of `unit`
    (1: any). Returns a function that runs one kernel over them and compares the whole target."""
    table, sets, copies = [], [], []
    src_end, dst_end = 64, 64
    for piece, blocks, layers, layer_major, ids in shapes:
        src = -(-src_end // unit) * unit + unit * int(rng.integers(0, 9))
        dst = -(-dst_end // unit) * unit + unit * int(rng.integers(0, 9))
        item, src_end, dst_end, pairs = random_set(rng, table, src, dst, piece, blocks, layers, layer_major, unit, ids)
        sets.append(item)
        copies += [(s, d, piece) for s, d in pairs]
    src_size, dst_size = src_end + 64, dst_end + 64
    source = rng.integers(0, 256, src_size, dtype=np.uint8)
    canary = rng.integers(0, 256, dst_size, dtype=np.uint8)
    expected = canary.copy()
    for s, d, size in copies:
        expected[d : d + size] = source[s : s + size]
    src_at, dst_at = gpu.alloc(where[0], src_size), gpu.alloc(where[1], dst_size)
    ids_at = gpu.alloc(0, max(4 * len(table), 16))
    sets_at = gpu.alloc(0, 96 * len(sets))
    gpu.put(src_at, source)
    gpu.put(ids_at, np.array(table or [0], U32))

    def run(slot, function, chunk, grid, block, shared, launches=1, guarded=0, abort=False):
        numbered, total = np.array(sets, SET), 0
        for item in numbered:
            item["src"] += src_at
            item["dst"] += dst_at
            item["chunks_per_piece"] = -(-int(item["piece_bytes"]) // chunk)
            item["first_chunk"] = total
            total += int(item["chunks_per_piece"]) * int(item["blocks"]) * int(item["layers"])
        gpu.put(sets_at, numbered)
        gpu.put(dst_at, canary)
        bounds = np.linspace(0, total, launches + 1).astype(int)
        for begin, end in zip(bounds, bounds[1:]):
            parameter = np.zeros((), COPY)
            parameter["one"], parameter["set_count"] = numbered[0], len(sets)
            parameter["sets"], parameter["ids"], parameter["chunk_bytes"] = sets_at, ids_at, chunk
            parameter["chunk_begin"], parameter["chunk_end"] = begin, end
            slot.words[32:34] = abort, 0
            parameter["done"] = slot.next(guarded)
            gpu.launch(function, grid, block, shared, parameter)
            slot.wait(slot.ticket | (CALLED_OFF if guarded and abort else 0))
        # Pinned memory is compared as the flag left it, nothing else waited for.
        found = gpu.host_view(dst_at, dst_size, np.uint8).copy() if where[1] == "host" else gpu.get(dst_at, dst_size)
        name = f"{where[0]}->{where[1]} chunk {chunk} grid {grid}x{block} shapes {shapes}"
        compare(name, canary if guarded and abort else expected, found)
        if guarded and slot.words[33] != slot.ticket:
            raise Wrong(f"{name}: started is {slot.words[33]}, not {slot.ticket}")
        slot.check_idle()

    return run


def places(gpu):
    out = [(0, 0), (0, "host"), ("host", 0)]
    return out + [(0, 1), (1, 0)] if gpu.count > 1 else out


ALIGNED = [
    [(4096, 200, 3, 0, True)],
    [(4096, 200, 3, 1, True)],
    [(16, 700, 1, 0, True)],
    [(32768, 33, 4, 0, True)],
    [(20016, 40, 2, 1, True)],
    [(1 << 20, 6, 1, 0, False)],
    [(4096, 50, 3, 0, True), (48, 100, 7, 1, True), (70000, 9, 2, 0, False), (16, 1, 1, 0, False), (8208, 30, 5, 1, True)],
    [(512 * (1 + i % 5), 3 + i, 1 + i % 4, i % 2, i % 3 > 0) for i in range(40)],
]
UNALIGNED = [
    [(1, 300, 2, 0, True)],
    [(7, 300, 2, 1, True)],
    [(4099, 60, 3, 0, True)],
    [(65537, 9, 2, 1, False)],
    [(4096, 60, 3, 0, True)],
    [(31, 40, 3, 0, True), (5000, 20, 3, 1, True), (2, 5, 1, 0, False), (12345, 7, 2, 1, True)],
]


def check_copies(gpu, functions):
    slot, cases = Slot(gpu), 0
    for where in places(gpu):
        for unit, shapes in [(16, s) for s in ALIGNED] + [(u, s) for u in (1, 2, 4, 8) for s in UNALIGNED]:
            rng = np.random.default_rng(unit * 1000 + len(shapes) + shapes[0][0])
            run = copy_case(gpu, rng, where, unit, shapes)
            launches = [
                ("bp_copy_lanes", chunk, grid, lanes(warps))
                for chunk, grid, warps in ((4096, 16, 24), (16384, 1, 1), (1024, 132, 8), (8192, 7, 24))
            ]
            launches += [
                ("bp_copy_small", chunk, grid, small(warps))
                for chunk, grid, warps in ((2048, 1, 32), (512, 3, 7))
            ]
            if "bp_copy_bulk" in functions and unit == 16:
                launches += [
                    ("bp_copy_bulk", chunk, grid, bulk(stages, chunk))
                    for chunk, grid, stages in ((4096, 16, 48), (16384, 1, 12), (1024, 132, 48), (4096, 3, 4), (8192, 8, 24))
                ]
            for name, chunk, grid, (block, shared) in launches:
                run(slot, functions[name], chunk, grid, block, shared)
                cases += 1
            for name, chunk, grid, (block, shared) in launches[:: 2 if unit == 16 else 4]:
                for options in ({"launches": 3}, {"guarded": 1}, {"guarded": 1, "abort": True}):
                    run(slot, functions[name], chunk, grid, block, shared, **options)
                    cases += 1
        gpu.sync()
    return cases


def permute_parameter(shape, ids_at, src_at, dst_at, where_units, vector):
    """shape: blocks, table of ids, block strides, axes [(src, dst, count)], run."""
    parameter = np.zeros((), PERMUTE)
    parameter["src"], parameter["dst"], parameter["ids"] = src_at, dst_at, ids_at
    parameter["src_block"], parameter["dst_block"] = shape["src_block"], shape["dst_block"]
    parameter["src_ids"], parameter["dst_ids"] = shape["src_ids"], shape["dst_ids"]
    parameter["src_first"], parameter["dst_first"] = shape["src_first"], shape["dst_first"]
    parameter["blocks"], parameter["axes"] = shape["blocks"], len(shape["axes"])
    for k, (s, d, count) in enumerate(shape["axes"]):
        parameter["axis"][k]["src_stride"], parameter["axis"][k]["dst_stride"], parameter["axis"][k]["count"] = s, d, count
    parameter["run_bytes"], parameter["vector_bytes"] = shape["run"], vector
    parameter["unit_begin"], parameter["unit_end"] = where_units
    return parameter


def permute_shape(rng, blocks, sizes, src_order, dst_order, run, table):
    """Axes of `sizes`, stored in src_order on one side and dst_order on the other, outermost first; walked
    in the order of dst."""

    def strides(order):
        out, step = [0] * len(sizes), run
        for axis in reversed(order):
            out[axis] = step
            step *= sizes[axis]
        return out, step

    src, block = strides(src_order)
    dst, _ = strides(dst_order)
    shape = {
        "blocks": blocks, "src_block": block, "dst_block": block, "run": run, "src_first": 0, "dst_first": 0,
        "axes": [(src[a], dst[a], sizes[a]) for a in dst_order],
    }  # fmt: skip
    for side in ("src", "dst"):
        chosen = rng.permutation(blocks * 2)[:blocks].astype(U32)
        shape[f"{side}_ids"], shape[f"{side}_chosen"] = len(table), chosen
        table.extend(chosen)
    shape["block"], shape["units"] = block, blocks * int(np.prod(sizes))
    return shape


# (blocks, sizes, order in src, order in dst, run bytes): axes are layer, plane, token, head where there are 4.
PERMUTES = [
    (9, (4, 2, 16, 8), (0, 1, 2, 3), (0, 1, 3, 2), 256),
    (9, (4, 2, 16, 8), (0, 1, 3, 2), (0, 1, 2, 3), 256),
    (5, (3, 2, 16, 8), (0, 1, 2, 3), (1, 2, 0, 3), 192),
    (7, (6, 16, 3), (0, 1, 2), (2, 1, 0), 160),
    (3, (5, 7), (0, 1), (1, 0), 1152),
    (3, (5, 7), (0, 1), (1, 0), 528),
    (11, (13,), (0,), (0,), 16),
    (4, (3, 5, 2, 3, 2, 3), (0, 1, 2, 3, 4, 5), (5, 3, 1, 0, 2, 4), 48),
    (40, (1,), (0,), (0,), 8192),
    (6, (16, 9), (0, 1), (1, 0), 24),
    (6, (16, 9), (0, 1), (1, 0), 20),
    (6, (16, 9), (0, 1), (1, 0), 6),
    (6, (16, 9), (0, 1), (1, 0), 5),
    (6, (16, 9), (0, 1), (1, 0), 1),
]


def check_permutes(gpu, functions):
    slot, cases = Slot(gpu), 0
    for where in places(gpu):
        for blocks, sizes, src_order, dst_order, run in PERMUTES:
            rng, table = np.random.default_rng(run + blocks), []
            shape = permute_shape(rng, blocks, sizes, src_order, dst_order, run, table)
            size = 2 * blocks * shape["block"]
            source = rng.integers(0, 256, size, dtype=np.uint8)
            canary = rng.integers(0, 256, size, dtype=np.uint8)
            expected = canary.copy()
            to = [*dst_order, len(sizes)]
            for s, d in zip(shape["src_chosen"], shape["dst_chosen"]):
                block = source[int(s) * shape["block"] :][: shape["block"]]
                block = block.reshape([sizes[a] for a in src_order] + [run])
                block = block.transpose([*np.argsort(src_order), len(sizes)]).transpose(to)
                expected[int(d) * shape["block"] :][: shape["block"]] = block.ravel()
            src_at, dst_at = gpu.alloc(where[0], size), gpu.alloc(where[1], size)
            ids_at = gpu.alloc(0, 4 * len(table))
            gpu.put(src_at, source)
            gpu.put(ids_at, np.array(table, U32))
            widest = run & -run if run & -run < 16 else 16
            for vector in sorted({widest, 1, min(widest, 2), min(widest, 4), min(widest, 8)}, reverse=True):
                for grid, warps, launches, guard in ((16, 24, 1, 0), (3, 2, 1, 0), (5, 3, 3, 0), (4, 24, 1, 1), (4, 24, 1, 2)):
                    gpu.put(dst_at, canary)
                    bounds = np.linspace(0, shape["units"], launches + 1).astype(int)
                    for units in zip(bounds, bounds[1:]):
                        parameter = permute_parameter(shape, ids_at, src_at, dst_at, units, vector)
                        slot.words[32:34] = guard == 2, 0
                        parameter["done"] = slot.next(int(guard > 0))
                        gpu.launch(functions["bp_permute"], grid, *lanes(warps), parameter)
                        slot.wait(slot.ticket | (CALLED_OFF if guard == 2 else 0))
                    found = gpu.host_view(dst_at, size, np.uint8).copy() if where[1] == "host" else gpu.get(dst_at, size)
                    name = f"permute {where[0]}->{where[1]} {sizes} {src_order}->{dst_order} run {run} vector {vector} grid {grid}x{warps}"
                    compare(name, canary if guard == 2 else expected, found)
                    slot.check_idle()
                    cases += 1
        gpu.sync()
    return cases


# ---- times ------------------------------------------------------------------------------------------

GRIDS = (4, 8, 16, 24, 32, 64)


class Times:
    """Scattered blocks between two memories, one row per kernel and shape."""

    def __init__(self, gpu, deadline, total):
        self.gpu, self.deadline, self.total = gpu, deadline, total
        self.slot = Slot(gpu)
        self.memory = {}

    def at(self, where, side):
        if (where, side) not in self.memory:
            self.memory[where, side] = self.gpu.alloc(where, self.total)
        return self.memory[where, side]

    def copies(self, title, where, function, block, chunk, threads, shared, grids=GRIDS, total=None, major=0, layers=1):
        total = total or self.total
        pieces = total // block
        blocks = pieces // layers
        key = ("ids", blocks)
        if key not in self.memory:
            rng = np.random.default_rng(blocks)
            table = np.concatenate([rng.permutation(blocks), rng.permutation(blocks)]).astype(U32)
            self.memory[key] = self.gpu.alloc(0, table.nbytes)
            self.gpu.put(self.memory[key], table)
        parameter = np.zeros((), COPY)
        one = np.zeros((), SET)
        one["src"], one["dst"] = self.at(where[0], "src"), self.at(where[1], "dst")
        for side in ("src", "dst"):
            one[f"{side}_block"], one[f"{side}_layer"] = block * layers, block
        one["src_ids"], one["dst_ids"] = 0, blocks
        one["piece_bytes"], one["blocks"], one["layers"], one["layer_major"] = block, blocks, layers, major
        one["chunks_per_piece"] = -(-block // chunk)
        parameter["one"], parameter["set_count"], parameter["chunk_bytes"] = one, 1, chunk
        parameter["ids"] = self.memory[key]
        parameter["chunk_end"] = pieces * int(one["chunks_per_piece"])
        parameter["done"] = self.slot.next()
        self.row(title, lambda grid: self.gpu.launch(function, grid, threads, shared, parameter), total, grids)

    def row(self, title, work, total, grids=GRIDS):
        rates = []
        for grid in grids:
            if time.monotonic() > self.deadline:
                rates.append("    -")
                continue
            ms = self.gpu.median_ms(lambda: work(grid))
            rates.append(f"{total / ms / 1e6:5.0f}")
        print(f"{title:44} {' '.join(rates)}", flush=True)


def head(title, grids=GRIDS):
    print(f"\n{title:44} {' '.join(f'{grid:5d}' for grid in grids)}  <- CTAs; GB/s")


def paths(gpu):
    out = []
    if gpu.count > 1:
        out += [("push", (0, 1)), ("pull", (1, 0))]
    return [*out, ("d2h", (0, "host")), ("h2d", ("host", 0)), ("same", (0, 0))]


def time_copies(gpu, functions, times):
    for name, where in paths(gpu):
        total = times.total // 4 if "host" in where else times.total
        head(f"{name}, {total // MIB} MiB")
        for block in (4096, 16384, 32768, 131072, MIB):
            chunk = min(block, 8192)
            text = f"{name} {block // 1024} KiB"
            times.copies(f"{text} lanes", where, functions["bp_copy_lanes"], block, chunk, *lanes(24), total=total)
            if "bp_copy_bulk" in functions:
                stages = (192 << 10) // chunk
                times.copies(f"{text} bulk {stages} x {chunk}", where, functions["bp_copy_bulk"], block, chunk, *bulk(stages, chunk), total=total)
        # Layers innermost, chunks that do not fill their slots: index arithmetic in full.
        rest = total // (36 * 20480) * 36 * 20480
        times.copies(f"{name} 36 layers of 20 KiB lanes", where, functions["bp_copy_lanes"], 20480, 7168, *lanes(24), total=rest, layers=36)
        # What the kernel for small copies, through registers, would do with much.
        times.copies(f"{name} 4 KiB small", where, functions["bp_copy_small"], 4096, 2048, *small(32), total=total)


def time_permute(gpu, functions, times, label, where, grids, src_order=(0, 1, 2, 3), dst_order=(0, 1, 3, 2), run=256):
    sizes, total = (36, 2, 16, 8), times.total
    block = int(np.prod(sizes)) * run
    # Ids go to twice the number of blocks.
    blocks = total // block // 2
    rng, table = np.random.default_rng(1), []
    shape = permute_shape(rng, blocks, sizes, src_order, dst_order, run, table)
    ids_at = gpu.alloc(0, 4 * len(table))
    gpu.put(ids_at, np.array(table, U32))
    parameter = permute_parameter(shape, ids_at, times.at(where[0], "src"), times.at(where[1], "dst"), (0, shape["units"]), 16)
    parameter["done"] = times.slot.next()
    times.row(label, lambda grid: gpu.launch(functions["bp_permute"], grid, *lanes(24), parameter), blocks * block, grids)


def time_permutes(gpu, functions, times):
    for name, where in paths(gpu):
        if "host" in where:
            continue
        head(f"permute {name}, 36 layers x 2 x 16 tokens x 8 heads")
        for text, src_order, dst_order in (
            ("NHD->HND", (0, 1, 2, 3), (0, 1, 3, 2)),
            ("HND->NHD", (0, 1, 3, 2), (0, 1, 2, 3)),
            ("layer-first->token-first", (0, 1, 2, 3), (2, 0, 1, 3)),
        ):
            for run in (256, 128):
                time_permute(gpu, functions, times, f"{name} {text} run {run}", where, GRIDS, src_order, dst_order, run)


# Bytes, kernel, CTAs, warps of each, chunk.
SMALL = (
    (16, "bp_copy_small", 1, 1, 16),
    (4096, "bp_copy_small", 1, 8, 512),
    (4096, "bp_copy_small", 1, 2, 2048),
    (4096, "bp_copy_lanes", 1, 8, 512),
    (16384, "bp_copy_small", 1, 32, 512),
    (65536, "bp_copy_small", 1, 32, 2048),
    (65536, "bp_copy_small", 2, 32, 1024),
    (65536, "bp_copy_small", 4, 16, 1024),
    (65536, "bp_copy_small", 8, 16, 512),
    (65536, "bp_copy_lanes", 4, 16, 1024),
    (MIB, "bp_copy_small", 16, 32, 2048),
    (MIB, "bp_copy_lanes", 16, 22, 3072),
    (MIB, "bp_copy_lanes", 32, 24, 1536),
)


def time_small(gpu, functions, times):
    """Launch to flag, seen by this thread; mostly the interpreter's own time."""
    ways = [path for path in paths(gpu) if path[0] != "same"]
    names = [name for name, _ in ways]
    names.insert(1, f"{names[0]} guarded")
    print(f"\nlaunch to flag, us, p50 and min: {' / '.join(names)}")
    for size, kernel, grid, warps, chunk in SMALL:
        row = []
        for number, (_, where) in enumerate(ways):
            src, dst = times.at(where[0], "src"), times.at(where[1], "dst")
            for guarded in (0, 1) if number == 0 else (0,):
                spent = []
                for _ in range(200):
                    parameter = np.zeros((), COPY)
                    one = parameter["one"]
                    one["src"], one["dst"], one["piece_bytes"], one["blocks"], one["layers"] = src, dst, size, 1, 1
                    one["src_ids"] = one["dst_ids"] = CONSECUTIVE
                    one["chunks_per_piece"] = -(-size // chunk)
                    parameter["set_count"], parameter["chunk_bytes"], parameter["chunk_end"] = 1, chunk, -(-size // chunk)
                    times.slot.words[32:34] = 0
                    parameter["done"] = times.slot.next(guarded)
                    threads, shared = small(warps) if kernel == "bp_copy_small" else lanes(warps)
                    began = time.perf_counter()
                    gpu.launch(functions[kernel], grid, threads, shared, parameter)
                    times.slot.wait(times.slot.ticket)
                    spent.append(time.perf_counter() - began)
                spent.sort()
                row.append(f"{spent[100] * 1e6:5.1f} {spent[0] * 1e6:5.1f}")
        print(f"{size:8d} bytes, {kernel[8:]:5} {grid:2d} CTAs x {warps:2d} warps: {' / '.join(row)}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("check", "time"))
    parser.add_argument("--seconds", type=float, default=170, help="after this no further time is taken")
    parser.add_argument("--mib", type=int, default=512, help="bytes of a timed copy")
    arguments = parser.parse_args()
    gpu = Gpu()
    began = time.monotonic()
    deadline = began + arguments.seconds
    failures = []

    def part(name, work):
        start = time.monotonic()
        if start > deadline:
            print(f"-- {name}: left out, out of time", flush=True)
            return
        try:
            result = work()
            said = "" if result is None else f"{result} cases, every byte right, "
            print(f"-- {name}: {said}{time.monotonic() - start:.1f} s", flush=True)
        except Wrong as error:
            failures.append(name)
            print(f"WRONG {name}: {error}", flush=True)
        except Exception:
            failures.append(name)
            print(f"FAILED {name}\n{traceback.format_exc()}", flush=True)

    functions = gpu.compile()
    print(f"compiled in {time.monotonic() - began:.1f} s", flush=True)
    if arguments.only != "time":
        part("copies", lambda: check_copies(gpu, functions))
        gpu.release()
        part("permutes", lambda: check_permutes(gpu, functions))
        gpu.release()
    if arguments.only != "check":
        times = Times(gpu, deadline, arguments.mib * MIB)
        part("copy times", lambda: time_copies(gpu, functions, times))
        part("permute times", lambda: time_permutes(gpu, functions, times))
        part("small", lambda: time_small(gpu, functions, times))
    print("failed: " + ", ".join(failures) if failures else "ok", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
