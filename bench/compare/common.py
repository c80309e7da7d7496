"""What the drivers of the peers share: memory, cells, measured loops, and lines of JSON."""

import ctypes
import json
import mmap
import os
import random
import statistics
import time


class Memory:
    """Private memory of this process with all its pages in place, huge ones where there are any."""

    def __init__(self, size, value):
        self.size = size
        self.map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.map.madvise(mmap.MADV_HUGEPAGE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        ctypes.memset(self.address, value, size)

    def fill(self, offset, size, value):
        ctypes.memset(self.address + offset, value, size)

    def holds(self, offset, size, value):
        return self.map[offset : offset + size] == bytes([value]) * size


class Cell:
    """An operation on `count` blocks of `block` bytes, written `write:16384:128`."""

    def __init__(self, text):
        op, block, count = text.split(":")
        if op not in ("write", "read"):
            raise ValueError(f"{text}: the operation is write or read")
        self.op, self.block, self.count = op, int(block), int(count)

    @property
    def bytes(self):
        return self.block * self.count

    def offsets(self, size, seed):
        """Places of the blocks: scattered, so that no two can be merged."""
        places = random.Random(seed).sample(range(size // self.block), self.count)
        return [place * self.block for place in places]

    def case(self, lane):
        return {"lane": lane, "op": self.op, "block_bytes": self.block, "count": self.count}


def repeat(action, seconds, least=3, most=10_000):
    """Seconds of each call of `action` within about `seconds`, after two that do not count."""
    action()
    action()
    times = []
    end = time.perf_counter() + seconds
    while len(times) < least or (time.perf_counter() < end and len(times) < most):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return times


def percentile(values, percent):
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-len(ordered) * percent // 100) - 1))]


def emit(metric, case, unit, values):
    """Prints the median of some values; of a bandwidth the slow end is the 1st percentile."""
    slow = 1 if metric.startswith("bandwidth") else 99
    line = {
        "metric": metric,
        "case": case,
        "unit": unit,
        "value": statistics.median(values),
        "p99": percentile(values, slow),
        "n": len(values),
    }
    print(json.dumps(line), flush=True)


def emit_cell(cell, lane, times):
    emit("bandwidth_gb_per_s", cell.case(lane), "GB/s", [cell.bytes / t / 1e9 for t in times])
    emit("latency_us", cell.case(lane), "us", [t * 1e6 for t in times])


def cpu_seconds():
    """Processor time of all threads of this process."""
    return time.clock_gettime(time.CLOCK_PROCESS_CPUTIME_ID)


def leave(code=0):
    """Ends without the destructors of a library that may wait for its peer."""
    os._exit(code)
