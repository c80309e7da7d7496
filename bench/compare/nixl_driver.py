"""Measures NIXL (UCX backend, host memory) between two processes; prints a line of JSON a figure.

    nixl_driver.py blocks --lane default|tcp CELL...   bandwidth and latency of transfers
    nixl_driver.py notify [--progress-thread]          one way, alone and behind a 4 KiB write
    nixl_driver.py make                                descriptors of 10,000 blocks, and their post
    nixl_driver.py setup                               metadata, connecting, registering
    nixl_driver.py idle --seconds N                    processor time of an agent without work
    nixl_driver.py file FOLDER                         POSIX backend (io_uring), O_DIRECT
"""

import argparse
import multiprocessing
import os
import sys
import time

# Everything stays on this machine; read by UCX when it is loaded.
os.environ.setdefault("UCX_NET_DEVICES", "lo")
if "--lane" in sys.argv and sys.argv[sys.argv.index("--lane") + 1] == "tcp":
    os.environ["UCX_TLS"] = "tcp"

from common import Cell, Memory, cpu_seconds, emit, emit_cell, leave, repeat  # noqa: E402

PATIENCE = 20


def new_agent(name, progress_thread=False, port=None):
    from nixl._api import nixl_agent, nixl_agent_config

    config = {"backends": ["UCX"], "enable_prog_thread": progress_thread}
    if port is not None:
        config |= {"enable_listen_thread": True, "listen_port": port}
    return nixl_agent(name, nixl_agent_config(**config))


def register(agent, memory):
    return agent.register_memory([(memory.address, memory.size, 0, "")], "DRAM")


def descriptors(agent, base, offsets, block):
    import numpy

    table = numpy.zeros((len(offsets), 3), numpy.uint64)
    table[:, 0] = numpy.asarray(offsets, numpy.uint64) + base
    table[:, 1] = block
    return agent.get_xfer_descs(table, "DRAM")


def complete(agent, handle, notification=b""):
    """Posts and polls until done, through the bindings that the Python classes wrap."""
    from nixl._bindings import NIXL_IN_PROG, NIXL_SUCCESS

    raw, inner = agent.agent, handle._handle
    state = raw.postXferReq(inner, notification)
    while state == NIXL_IN_PROG:
        state = raw.getXferStatus(inner)
    if state != NIXL_SUCCESS:
        raise RuntimeError(f"a transfer ended as {state}")


def wait_notification(agent):
    end = time.perf_counter() + PATIENCE
    while True:
        for _ in range(1024):
            if agent.agent.getNotifs({}, []):
                return
        if time.perf_counter() > end:
            raise TimeoutError("no notification")


class Far:
    """The other process: it owns memory and does what it is told over a pipe."""

    def __init__(self, size, progress_thread):
        context = multiprocessing.get_context("spawn")
        self.pipe, end = context.Pipe()
        self.process = context.Process(target=far_main, args=(end, size, progress_thread))
        self.process.start()
        self.metadata, self.address = self.hear()

    def hear(self):
        if not self.pipe.poll(PATIENCE):
            raise TimeoutError("no answer from the other process")
        return self.pipe.recv()

    def ask(self, *order):
        self.pipe.send(order)
        return self.hear()

    def end(self):
        self.pipe.send(("end",))
        self.process.join(2)
        self.process.kill()


def far_main(pipe, size, progress_thread):
    agent = new_agent("far", progress_thread)
    memory = Memory(size, 2)
    register(agent, memory)
    pipe.send((agent.get_agent_metadata(), memory.address))
    polls = True
    while True:
        # Without a thread of its own the library moves only when it is called.
        while polls and not pipe.poll(0):
            for _ in range(64):
                agent.get_new_notifs()
        order, *rest = pipe.recv()
        if order == "connect":
            agent.add_remote_agent(rest[0])
            pipe.send(True)
        elif order == "polls":
            polls = rest[0]
            pipe.send(True)
        elif order == "fill":
            memory.fill(*rest)
            pipe.send(True)
        elif order == "holds":
            pipe.send(memory.holds(*rest))
        elif order == "echo":
            pipe.send(True)
            echo(agent, memory, *rest)
        else:
            leave()


def echo(agent, memory, count, far_address):
    """Answers `count` notifications, each behind a write when there is an address to write to."""
    handle = None
    if far_address is not None:
        handle = write_handle(agent, memory, "near", far_address)
    for _ in range(count):
        wait_notification(agent)
        answer(agent, "near", handle)


def write_handle(agent, memory, peer, address):
    near = descriptors(agent, memory.address, [0], 4096)
    far = descriptors(agent, address, [0], 4096)
    return agent.initialize_xfer("WRITE", near, far, peer, b"n")


def answer(agent, peer, handle):
    if handle is None:
        agent.send_notif(peer, b"n")
    else:
        complete(agent, handle, b"n")


def connected(size, progress_thread=False, back=True):
    far = Far(size, progress_thread)
    agent = new_agent("near", progress_thread)
    memory = Memory(size, 7)
    register(agent, memory)
    agent.add_remote_agent(far.metadata)
    if back:
        # Only who answers has to know the way back; a side that sleeps must not be asked to.
        far.ask("connect", agent.get_agent_metadata())
    agent.make_connection("far")
    return agent, memory, far


def checked_write(agent, memory, far):
    """One transfer that really arrives; it also finishes the wiring of the connection."""
    size = 1 << 20
    memory.fill(0, size, 9)
    near = descriptors(agent, memory.address, [0], size)
    target = descriptors(agent, far.address, [0], size)
    complete(agent, agent.initialize_xfer("WRITE", near, target, "far"))
    if not far.ask("holds", 0, size, 9):
        raise RuntimeError("the bytes of a WRITE are not there")


def blocks(args):
    import numpy

    agent, memory, far = connected(args.bytes, back=False)
    checked_write(agent, memory, far)
    if args.lane == "default":
        # Same-host copies need nothing from the target: asleep, it costs them no processor.
        far.ask("polls", False)
    for cell in map(Cell, args.cells):
        near = descriptors(agent, memory.address, cell.offsets(args.bytes, 1), cell.block)
        there = descriptors(agent, far.address, cell.offsets(args.bytes, 2), cell.block)
        local, remote = agent.prep_xfer_dlist("", near), agent.prep_xfer_dlist("far", there)
        index = numpy.arange(cell.count, dtype=numpy.int32)
        handle = agent.make_prepped_xfer(cell.op.upper(), local, index, remote, index)
        emit_cell(cell, args.lane, repeat(lambda: complete(agent, handle), args.seconds))
        for owned in (handle, local, remote):
            owned.release()
    far.end()


def notify(args):
    agent, memory, far = connected(1 << 24, args.progress_thread)
    checked_write(agent, memory, far)
    case = {"receiver": "progress-thread" if args.progress_thread else "spinning"}
    for metric, behind in (("notify_us", False), ("write_notify_us", True)):
        rounds = args.rounds
        far.ask("echo", rounds + 2, memory.address if behind else None)
        handle = write_handle(agent, memory, "far", far.address) if behind else None

        def round_trip():
            answer(agent, "far", handle)
            wait_notification(agent)

        times = repeat(round_trip, PATIENCE, rounds, rounds)
        emit(metric, case, "us", [t / 2 * 1e6 for t in times])
    far.end()


def make(args):
    import numpy

    count, block = 10_000, 16_384
    agent, memory, far = connected(count * block)
    checked_write(agent, memory, far)
    index = numpy.arange(count, dtype=numpy.int32)
    for pattern in ("scattered", "contiguous"):
        order = numpy.arange(count)
        other = order
        if pattern == "scattered":
            random = numpy.random.default_rng(1)
            order, other = random.permutation(count), random.permutation(count)
        near = descriptors(agent, memory.address, order * block, block)
        there = descriptors(agent, far.address, other * block, block)
        makes, preps, posts = [], [], []
        for _ in range(7):
            start = time.perf_counter()
            local, remote = agent.prep_xfer_dlist("", near), agent.prep_xfer_dlist("far", there)
            prepared = time.perf_counter()
            handle = agent.make_prepped_xfer("WRITE", local, index, remote, index)
            made = time.perf_counter()
            state = agent.agent.postXferReq(handle._handle, b"")
            posted = time.perf_counter()
            while agent.check_xfer_state(handle) == "PROC":
                pass
            preps.append((prepared - start) / count * 1e9)
            makes.append((made - prepared) / count * 1e9)
            posts.append((posted - made) / count * 1e9)
            assert state is not None
            for owned in (handle, local, remote):
                owned.release()
        case = {"pattern": pattern, "count": count, "block_bytes": block}
        emit("prep_ns_per_block", case, "ns", preps)
        emit("make_ns_per_block", case, "ns", makes)
        emit("post_ns_per_block", case, "ns", posts)
    far.end()


def listener(port, up):
    agent = new_agent("listener", port=port)
    register(agent, Memory(1 << 22, 1))
    up.send(True)
    up.poll(PATIENCE)
    leave()


def setup(args):
    agent = new_agent("near")
    times = []
    for _ in range(5):
        memory = Memory(1 << 30, 1)
        start = time.perf_counter()
        registered = register(agent, memory)
        times.append((time.perf_counter() - start) * 1e6)
        agent.deregister_memory(registered)
    emit("register_gib_us", {}, "us", times)
    far = Far(1 << 22, False)
    times = []
    for i in range(5):
        fresh = new_agent(f"fresh-{i}")
        start = time.perf_counter()
        fresh.add_remote_agent(far.metadata)
        fresh.make_connection("far")
        times.append((time.perf_counter() - start) * 1e6)
        fresh.remove_remote_agent("far")
    emit("connect_us", {}, "us", times)
    far.end()

    context = multiprocessing.get_context("spawn")
    pipe, end = context.Pipe()
    process = context.Process(target=listener, args=(args.port, end))
    process.start()
    if not pipe.poll(PATIENCE):
        raise TimeoutError("the listener did not start")
    asking = new_agent("asking", port=args.port + 1)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        asking.fetch_remote_metadata("listener", "127.0.0.1", args.port)
        while not asking.check_remote_metadata("listener"):
            if time.perf_counter() - start > PATIENCE:
                raise TimeoutError("no metadata")
        times.append((time.perf_counter() - start) * 1e6)
        asking.remove_remote_agent("listener")
    emit("metadata_us", {}, "us", times)
    pipe.send(True)
    process.join(2)
    process.kill()


def idle(args):
    agent = new_agent("idle", progress_thread=True)
    time.sleep(0.3)
    before, start = cpu_seconds(), time.perf_counter()
    time.sleep(args.seconds)
    used = (cpu_seconds() - before) / (time.perf_counter() - start) * 100
    emit("idle_cpu_percent", {"seconds": args.seconds}, "percent of a core", [used])
    del agent


def file(args):
    """Random blocks of a file, as many in flight as the step says, in turn from sixteen lists."""
    from nixl._api import nixl_agent, nixl_agent_config

    import numpy

    agent = nixl_agent("disk", nixl_agent_config(backends=[], enable_prog_thread=False))
    agent.create_backend("POSIX", {"use_uring": "true"})
    path = os.path.join(args.folder, f"nixl-bench-{os.getpid()}")
    chunk = os.urandom(1 << 20)
    with open(path, "wb") as out:
        for _ in range(args.bytes >> 20):
            out.write(chunk)
        out.flush()
        os.fsync(out.fileno())
    descriptor = os.open(path, os.O_RDWR | os.O_DIRECT)
    os.unlink(path)
    memory = Memory(64 << 20, 1)
    register(agent, memory)
    agent.register_memory([(0, args.bytes, descriptor, "")], "FILE")
    random = numpy.random.default_rng(1)
    for block, count in ((4096, 64), (65536, 64), (1 << 20, 16)):
        for op in ("read", "write"):
            handles = []
            for _ in range(16):
                near = numpy.zeros((count, 3), numpy.uint64)
                near[:, 0] = memory.address + random.permutation(memory.size // block)[:count] * block
                near[:, 1] = block
                there = numpy.zeros((count, 3), numpy.uint64)
                there[:, 0] = random.permutation(args.bytes // block)[:count] * block
                there[:, 1] = block
                there[:, 2] = descriptor
                local = agent.get_xfer_descs(near, "DRAM")
                remote = agent.get_xfer_descs(there, "FILE")
                handles.append(agent.initialize_xfer(op.upper(), local, remote, "disk"))
            done, start, used = 0, time.perf_counter(), cpu_seconds()
            while time.perf_counter() - start < args.seconds:
                complete(agent, handles[done % len(handles)])
                done += 1
            took = time.perf_counter() - start
            case = {"lane": "file", "op": op, "block_bytes": block, "in_flight": count}
            emit("bandwidth_gb_per_s", case, "GB/s", [done * block * count / took / 1e9])
            emit("cpu_cores", case, "cores", [(cpu_seconds() - used) / took])
            for handle in handles:
                handle.release()
    os.close(descriptor)


def main():
    parser = argparse.ArgumentParser(description="Measures NIXL between two processes.")
    steps = parser.add_subparsers(dest="step", required=True)
    step = steps.add_parser("blocks")
    step.add_argument("--lane", choices=("default", "tcp"), default="default")
    step.add_argument("--bytes", type=int, default=512 << 20)
    step.add_argument("--seconds", type=float, default=0.5)
    step.add_argument("cells", nargs="+")
    step.set_defaults(run=blocks)
    step = steps.add_parser("notify")
    step.add_argument("--progress-thread", action="store_true")
    step.add_argument("--rounds", type=int, default=1000)
    step.set_defaults(run=notify)
    steps.add_parser("make").set_defaults(run=make)
    step = steps.add_parser("setup")
    step.add_argument("--port", type=int, default=18_555)
    step.set_defaults(run=setup)
    step = steps.add_parser("idle")
    step.add_argument("--seconds", type=float, default=5)
    step.set_defaults(run=idle)
    step = steps.add_parser("file")
    step.add_argument("folder")
    step.add_argument("--bytes", type=int, default=1 << 30)
    step.add_argument("--seconds", type=float, default=1)
    step.set_defaults(run=file)
    args = parser.parse_args()
    args.run(args)
    sys.stdout.flush()
    leave()


if __name__ == "__main__":
    main()
