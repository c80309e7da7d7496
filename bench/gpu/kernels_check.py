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

KERNELS = pathlib.Path(__file__).resolve().parents[2] / "transfer/src/cuda/kernels"
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

        headers = {f.name.encode(): f.read_bytes() for f in sorted(KERNELS.iterdir()) if f.suffix in (".cu", ".cuh")}
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
        for name in ("bp_copy_bulk", "bp_copy_lanes", "bp_permute"):
            function = ctypes.c_void_p()
            if name == "bp_copy_bulk" and int(self.arch) < 90:
                continue
            self.call("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
            functions[name] = function
        for function in functions.values():
            # All that the static part leaves: attributes SHARED_SIZE_BYTES, MAX_DYNAMIC_SHARED_SIZE_BYTES.
            static = ctypes.c_int()
            self.call("cuFuncGetAttribute", ctypes.byref(static), 1, function)
            self.call("cuFuncSetAttribute", function, 8, (227 << 10) - static.value)
        # Bytes of shared memory per thread that the kernels without bulk copies take.
        functions["slots"] = 16 * sum(int(o.split("=")[1]) for o in options if "BP_ASYNC_DEPTH" in o)
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


def check_copies(gpu, functions, threads=lambda lanes: lanes, stages=1, per_warp=32, kernels=None, few=False):
    slot, cases = Slot(gpu), 0
    kernels = kernels or functions
    for where in places(gpu)[-1:] if few else places(gpu):
        for unit, shapes in [(16, s) for s in ALIGNED] + [(u, s) for u in (1, 2, 4, 8) for s in UNALIGNED]:
            if few and unit != 16:
                continue
            rng = np.random.default_rng(unit * 1000 + len(shapes) + shapes[0][0])
            run = copy_case(gpu, rng, where, unit, shapes)
            if "bp_copy_lanes" in kernels:
                f = functions["bp_copy_lanes"]
                for chunk, grid, block in ((4096, 16, 384), (16384, 1, 32), (1024, 132, 256)):
                    run(slot, f, chunk, grid, block, block * functions["slots"])
                    cases += 1
                shared = 384 * functions["slots"]
                run(slot, f, 4096, 7, 384, shared, launches=3)
                run(slot, f, 4096, 7, 384, shared, guarded=1)
                run(slot, f, 4096, 7, 384, shared, guarded=1, abort=True)
                cases += 3
            if "bp_copy_bulk" in kernels and unit == 16:
                f = functions["bp_copy_bulk"]
                for chunk, grid, lanes in ((4096, 16, 48), (16384, 1, 12), (1024, 132, 200), (4096, 3, 1), (8192, 8, 24)):
                    lanes = max(1, lanes // stages)
                    if per_warp < 32:
                        lanes = -(-lanes // per_warp) * per_warp
                    if threads(lanes) > 512 or chunk * lanes * stages > 220 << 10:
                        continue
                    run(slot, f, chunk, grid, threads(lanes), chunk * lanes * stages)
                    cases += 1
                lanes = 48 // stages
                for options in ({"launches": 3}, {"guarded": 1}, {"guarded": 1, "abort": True}):
                    run(slot, f, 4096, 7, threads(lanes), 4096 * lanes * stages, **options)
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


def check_permutes(gpu, functions, few=False):
    slot, cases = Slot(gpu), 0
    for where in places(gpu)[-1:] if few else places(gpu):
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
                for grid, block, launches, guard in ((16, 384, 1, 0), (3, 64, 1, 0), (5, 96, 3, 0), (4, 384, 1, 1), (4, 384, 1, 2)):
                    gpu.put(dst_at, canary)
                    bounds = np.linspace(0, shape["units"], launches + 1).astype(int)
                    for units in zip(bounds, bounds[1:]):
                        parameter = permute_parameter(shape, ids_at, src_at, dst_at, units, vector)
                        slot.words[32:34] = guard == 2, 0
                        parameter["done"] = slot.next(int(guard > 0))
                        gpu.launch(functions["bp_permute"], grid, block, block * functions["slots"], parameter)
                        slot.wait(slot.ticket | (CALLED_OFF if guard == 2 else 0))
                    found = gpu.host_view(dst_at, size, np.uint8).copy() if where[1] == "host" else gpu.get(dst_at, size)
                    name = f"permute {where[0]}->{where[1]} {sizes} {src_order}->{dst_order} run {run} vector {vector} grid {grid}x{block}"
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
            if "bp_copy_bulk" in functions:
                for lanes, chunk in ((48, 4096), (12, 16384)):
                    if chunk <= block:
                        times.copies(f"{name} {block // 1024} KiB bulk {lanes} x {chunk}", where, functions["bp_copy_bulk"], block, chunk, lanes, lanes * chunk, total=total)
            if block in (4096, 32768):
                times.copies(f"{name} {block // 1024} KiB lanes 4096", where, functions["bp_copy_lanes"], block, 4096, 512, 0, total=total)
        # A piece that 16 bytes divide but the chunks do not, layers innermost: index arithmetic in full.
        if "bp_copy_bulk" in functions:
            times.copies(f"{name} 36 layers of 20 KiB, bulk 24 x 8192", where, functions["bp_copy_bulk"], 20480, 8192, 24, 24 * 8192, total=total // (36 * 20480) * 36 * 20480, layers=36)


def time_variants(gpu, times):
    """What the kernels leave open."""
    few = (4, 8, 16, 24, 64)
    ways = [path for path in paths(gpu) if path[0] in ("push", "pull")] or [("same", (0, 0))]

    def bulk(label, functions, name, where, blocks, shapes, stages=1, per_warp=32):
        def threads(lanes):
            return lanes if per_warp == 32 else -(-lanes // per_warp) * 32

        for block in blocks:
            for lanes, chunk in shapes:
                lanes = lanes // stages
                if per_warp < 32:
                    lanes = lanes // per_warp * per_warp
                if lanes and threads(lanes) <= 512 and chunk <= block:
                    times.copies(f"{label} {name} {block // 1024} KiB {lanes} x {chunk}", where, functions["bp_copy_bulk"], block, chunk, threads(lanes), lanes * stages * chunk, few)

    both = (4096, 32768)
    if int(gpu.arch) >= 90:
        head("bulk: order of chunks (0 lanes side by side, 1 a range per lane, 2 a range per CTA)", few)
        for order in (0, 1, 2):
            functions = gpu.compile(f"-DBP_BULK_ORDER={order}", f"-DBP_LANES_ORDER={order}")
            check_copies(gpu, functions, kernels=("bp_copy_bulk", "bp_copy_lanes"), few=True)
            for name, where in ways:
                bulk(f"order {order}", functions, name, where, both, ((48, 4096), (12, 16384)))
        head("bulk: stages and lanes", few)
        for label, options, stages, per_warp in (
            ("2 stages", ("-DBP_BULK_STAGES=2",), 2, 32),
            ("3 stages", ("-DBP_BULK_STAGES=3",), 3, 32),
            ("4 lanes/warp", ("-DBP_LANES_PER_WARP=4",), 1, 4),
            ("12 lanes/warp", ("-DBP_LANES_PER_WARP=12",), 1, 12),
            ("16 lanes/warp", ("-DBP_LANES_PER_WARP=16",), 1, 16),
            ("2 stages 4 lanes/warp", ("-DBP_BULK_STAGES=2", "-DBP_LANES_PER_WARP=4"), 2, 4),
            ("evict_first", ("-DBP_EVICT_FIRST",), 1, 32),
        ):
            functions = gpu.compile(*options)
            wide = (lambda lanes: lanes) if per_warp == 32 else (lambda lanes, per_warp=per_warp: -(-lanes // per_warp) * 32)
            check_copies(gpu, functions, wide, stages, per_warp, ("bp_copy_bulk",), few=True)
            for name, where in ways:
                bulk(label, functions, name, where, both, ((48, 4096), (24, 8192), (12, 16384)), stages, per_warp)
        functions = gpu.compile()
        for name, where in ways:
            bulk("plain", functions, name, where, both, ((16, 4096), (24, 4096), (32, 4096), (54, 4096), (96, 2048), (6, 16384), (13, 16384), (24, 8192), (6, 32768)))
    head("lanes: order, threads, loads in flight", few)
    for order in (3, 1, 2):
        for threads, flight in ((512, 8), (512, 4), (1024, 4), (1024, 8), (256, 16), (256, 8)):
            if order == 2 and (threads, flight) != (512, 8):
                continue
            functions = gpu.compile(f"-DBP_LANES_ORDER={order}", f"-DBP_THREADS={threads}", f"-DBP_IN_FLIGHT={flight}")
            label = f"order {order} {threads} x {flight}"
            if (threads, flight) == (512, 8):
                check_copies(gpu, functions, kernels=("bp_copy_lanes",), few=True)
            for name, where in ways:
                for block in (*both, MIB):
                    times.copies(f"{label} lanes {name} {block // 1024} KiB", where, functions["bp_copy_lanes"], block, 4096, threads, 0, few)
                if order == 3:
                    time_permute(gpu, functions, times, f"{label} permute {name}", where, threads, few)
    head("lanes: fetched into shared memory", few)
    for threads, depth in ((512, 16), (768, 16), (768, 8), (1024, 8), (1024, 12), (384, 32), (384, 16)):
        functions = gpu.compile(f"-DBP_THREADS={threads}", f"-DBP_ASYNC_DEPTH={depth}")
        if threads == 384:
            check_copies(gpu, functions, kernels=("bp_copy_lanes",), few=True)
            check_permutes(gpu, functions, few=True)
        label = f"async {threads} x {depth}"
        for name, where in ways:
            for block in both:
                times.copies(f"{label} lanes {name} {block // 1024} KiB", where, functions["bp_copy_lanes"], block, min(block, 512 * depth), threads, threads * functions["slots"], few)
            time_permute(gpu, functions, times, f"{label} permute {name}", where, threads, few)
    functions = gpu.compile("-DBP_LANES_ORDER=1")
    for name, where in ways:
        for chunk in (1024, 2048, 8192, 16384, 32768):
            times.copies(f"order 1 lanes {name} 32 KiB chunks of {chunk}", where, functions["bp_copy_lanes"], 32768, chunk, 512, 0, few)


def time_permute(gpu, functions, times, label, where, threads, grids, src_order=(0, 1, 2, 3), dst_order=(0, 1, 3, 2), run=256):
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
    times.row(label, lambda grid: gpu.launch(functions["bp_permute"], grid, threads, threads * functions["slots"], parameter), blocks * block, grids)


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
                time_permute(gpu, functions, times, f"{name} {text} run {run}", where, 512, GRIDS, src_order, dst_order, run)


def time_small(gpu, functions, times):
    """Launch to flag, seen by this thread; mostly the interpreter's own time."""
    if "bp_copy_bulk" not in functions:
        return
    where = (0, 1) if gpu.count > 1 else (0, 0)
    src, dst = times.at(where[0], "src"), times.at(where[1], "dst")
    print("\nlaunch to flag, us: p50, min (guarded: p50, min)")
    for size, grid, lanes in ((16, 1, 1), (4096, 1, 1), (4096, 1, 4), (65536, 4, 16), (65536, 16, 4), (MIB, 16, 32), (MIB, 32, 32)):
        chunk = min(size, 4096 if lanes != 4 or size > 4096 else 1024)
        row = []
        for guarded in (0, 1):
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
                began = time.perf_counter()
                gpu.launch(functions["bp_copy_bulk"], grid, lanes, lanes * chunk, parameter)
                times.slot.wait(times.slot.ticket)
                spent.append(time.perf_counter() - began)
            spent.sort()
            row.append(f"{spent[100] * 1e6:6.1f} {spent[0] * 1e6:6.1f}")
        print(f"{size:8d} bytes, {grid:2d} CTAs x {lanes:2d}: {row[0]} ({row[1]})", flush=True)


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
        part("variants", lambda: time_variants(gpu, times))
    print("failed: " + ", ".join(failures) if failures else "ok", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
