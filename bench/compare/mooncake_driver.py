"""Measures Mooncake's transfer engine (TCP, host memory) between two processes; prints a line of
JSON a figure.

    mooncake_driver.py CELL...
"""

import argparse
import multiprocessing
import sys
import time

from common import Cell, Memory, emit, emit_cell, leave, repeat

PATIENCE = 20


def new_engine(port):
    from mooncake.engine import TransferEngine

    engine = TransferEngine()
    code = engine.initialize(f"127.0.0.1:{port}", "P2PHANDSHAKE", "tcp", "")
    if code != 0:
        raise RuntimeError(f"initialize returned {code}")
    return engine


def register(engine, memory):
    code = engine.register_memory(memory.address, memory.size)
    if code != 0:
        raise RuntimeError(f"register_memory returned {code}")


def far_main(pipe, size, port):
    engine = new_engine(port)
    memory = Memory(size, 2)
    register(engine, memory)
    pipe.send((f"127.0.0.1:{engine.get_rpc_port()}", memory.address))
    while True:
        order = pipe.recv()
        if order is None:
            leave()
        pipe.send(memory.holds(*order))


def main():
    parser = argparse.ArgumentParser(description="Measures Mooncake between two processes.")
    parser.add_argument("--bytes", type=int, default=512 << 20)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--port", type=int, default=17_811)
    parser.add_argument("cells", nargs="+")
    args = parser.parse_args()

    context = multiprocessing.get_context("spawn")
    pipe, end = context.Pipe()
    process = context.Process(target=far_main, args=(end, args.bytes, args.port + 1))
    process.start()
    engine = new_engine(args.port)
    memory = Memory(args.bytes, 7)
    start = time.perf_counter()
    register(engine, memory)
    emit("register_us", {"bytes": args.bytes}, "us", [(time.perf_counter() - start) * 1e6])
    if not pipe.poll(PATIENCE):
        raise TimeoutError("the other process did not start")
    name, address = pipe.recv()

    def move(op, near, far, sizes):
        call = {
            "write": engine.batch_transfer_sync_write,
            "read": engine.batch_transfer_sync_read,
        }[op]
        code = call(name, near, far, sizes)
        if code != 0:
            raise RuntimeError(f"a transfer returned {code}")

    size = 1 << 20
    memory.fill(0, size, 9)
    move("write", [memory.address], [address], [size])
    pipe.send((0, size, 9))
    if not pipe.poll(PATIENCE) or not pipe.recv():
        raise RuntimeError("the bytes of a WRITE are not there")

    for cell in map(Cell, args.cells):
        near = [memory.address + offset for offset in cell.offsets(args.bytes, 1)]
        far = [address + offset for offset in cell.offsets(args.bytes, 2)]
        sizes = [cell.block] * cell.count
        times = repeat(lambda: move(cell.op, near, far, sizes), args.seconds)
        emit_cell(cell, "tcp", times)
    pipe.send(None)
    process.join(2)
    process.kill()
    sys.stdout.flush()
    leave()


if __name__ == "__main__":
    main()
