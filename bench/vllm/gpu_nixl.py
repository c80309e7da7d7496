"""Scattered KV blocks between two GPUs through whichever package `nixl` Python finds first: what vLLM's connector
does with it, without vLLM.

    gpu_nixl.py [--label NAME] [--out FILE] [--blocks N] [--layers N] [--repeat N]

Two processes, one GPU each. Both hold one tensor a layer, register all of them, and prepare every block of
every layer as a descriptor, as vLLM does. Then random blocks are read into random blocks and compared. One
JSON object a line.
"""

import argparse
import json
import multiprocessing
import os
import random
import statistics
import sys
import time

BLOCK = 64 << 10
TIMEOUT_S = 120


def cache(torch, layers, blocks, device, seed):
    """Tensors of known content: word `i` of a layer is a hash of layer, place and seed."""
    tensors = []
    for layer in range(layers):
        words = torch.arange(blocks * BLOCK // 8, dtype=torch.int64, device=device)
        tensors.append((words * 0x9E3779B1 + layer * 0x85EBCA6B + seed).contiguous())
    torch.cuda.synchronize(device)
    return tensors


def descriptors(numpy, tensors, blocks, device):
    """An Nx3 array: address, length, device; layer by layer."""
    parts = []
    for tensor in tensors:
        part = numpy.empty((blocks, 3), dtype=numpy.uint64)
        part[:, 0] = tensor.data_ptr() + numpy.arange(blocks, dtype=numpy.uint64) * BLOCK
        part[:, 1] = BLOCK
        part[:, 2] = device
        parts.append(part)
    return numpy.concatenate(parts)


def set_up(name, visible, arguments, seed):
    os.environ["CUDA_VISIBLE_DEVICES"] = visible
    import numpy
    import torch
    from nixl._api import nixl_agent, nixl_agent_config

    torch.cuda.set_device(0)
    tensors = cache(torch, arguments.layers, arguments.blocks, "cuda:0", seed)
    agent = nixl_agent(name, nixl_agent_config(num_threads=4))
    begin = time.perf_counter()
    agent.register_memory(tensors)
    registered = time.perf_counter() - begin
    return numpy, torch, tensors, agent, registered


def target(arguments, pipe):
    numpy, _torch, tensors, agent, _ = set_up("target", "0,1", arguments, 7)
    rows = descriptors(numpy, tensors, arguments.blocks, 0)
    pipe.send((agent.get_agent_metadata(), rows.tobytes()))
    pipe.recv()
    seen = 0
    deadline = time.perf_counter() + 5
    while time.perf_counter() < deadline and not seen:
        seen = sum(len(notes) for notes in agent.get_new_notifs().values())
    pipe.send(seen)
    pipe.recv()


def initiator(arguments, pipe, emit):
    numpy, torch, tensors, agent, registered = set_up("initiator", "1,0", arguments, 1)
    emit("register_ms", {}, [registered * 1e3])
    blocks, layers = arguments.blocks, arguments.layers
    rows = descriptors(numpy, tensors, blocks, 0)
    begin = time.perf_counter()
    local = agent.prep_xfer_dlist("NIXL_INIT_AGENT", agent.get_xfer_descs(rows, "VRAM"))
    emit("prepare_local_ms", {"descriptors": len(rows)}, [(time.perf_counter() - begin) * 1e3])
    metadata, remote_rows = pipe.recv()
    remote_rows = numpy.frombuffer(remote_rows, dtype=numpy.uint64).reshape(-1, 3)
    begin = time.perf_counter()
    name = agent.add_remote_agent(metadata)
    added = time.perf_counter()
    remote = agent.prep_xfer_dlist(name, agent.get_xfer_descs(remote_rows, "VRAM"))
    emit("add_remote_ms", {}, [(added - begin) * 1e3])
    emit(
        "prepare_remote_ms",
        {"descriptors": len(remote_rows)},
        [(time.perf_counter() - added) * 1e3],
    )
    rng = random.Random(arguments.seed)
    for count in (256, 1, 16, 64, 256, 1024, 2000):
        times = {"make_us": [], "post_us": [], "transfer_ms": []}
        for repetition in range(arguments.repeat):
            here = rng.sample(range(blocks), count)
            there = rng.sample(range(blocks), count)
            offsets = numpy.arange(layers, dtype=numpy.int64)[:, None] * blocks
            local_ids = (offsets + numpy.array(here)[None, :]).ravel()
            remote_ids = (offsets + numpy.array(there)[None, :]).ravel()
            t0 = time.perf_counter()
            handle = agent.make_prepped_xfer(
                "READ", local, local_ids, remote, remote_ids, notif_msg=b"read"
            )
            t1 = time.perf_counter()
            state = agent.transfer(handle)
            t2 = time.perf_counter()
            while state == "PROC" and time.perf_counter() - t2 < 20:
                state = agent.check_xfer_state(handle)
            t3 = time.perf_counter()
            if state != "DONE":
                raise RuntimeError(f"state {state} after {t3 - t2:.1f} s")
            agent.release_xfer_handle(handle)
            times["make_us"].append((t1 - t0) * 1e6)
            times["post_us"].append((t2 - t1) * 1e6)
            times["transfer_ms"].append((t3 - t1) * 1e3)
            if repetition < 2:
                check(torch, tensors, here, there)
        case = {"blocks": count, "layers": layers, "block_bytes": BLOCK}
        for metric, values in times.items():
            emit(metric, case, values)
        seconds = statistics.median(times["transfer_ms"]) / 1e3
        emit("bandwidth_gb_per_s", case, [count * layers * BLOCK / seconds / 1e9])
    pipe.send("done")
    if not pipe.recv():
        raise RuntimeError("no notification arrived")
    pipe.send("end")


def check(torch, tensors, here, there):
    """What was read is what the target holds."""
    words = BLOCK // 8
    device = tensors[0].device
    place = torch.arange(words, device=device, dtype=torch.int64)
    mine = torch.tensor(here, device=device)
    theirs = torch.tensor(there, device=device)
    for layer, tensor in enumerate(tensors):
        got = tensor.view(-1, words)[mine]
        index = theirs[:, None] * words + place[None, :]
        want = index * 0x9E3779B1 + layer * 0x85EBCA6B + 7
        if not torch.equal(got, want):
            raise RuntimeError(f"wrong bytes in layer {layer}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--label", default="nixl")
    parser.add_argument("--out")
    parser.add_argument("--blocks", type=int, default=8192, help="of each layer")
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--seed", type=int, default=5)
    arguments = parser.parse_args()
    multiprocessing.set_start_method("spawn")
    pipe, theirs = multiprocessing.Pipe()
    process = multiprocessing.Process(target=target, args=(arguments, theirs), daemon=True)
    process.start()

    def emit(metric, case, values):
        unit = metric.rsplit("_", 1)[1] if not metric.endswith("per_s") else "GB/s"
        line = json.dumps(
            {
                "bench": "nixl_gpu",
                "case": {"package": arguments.label, **case},
                "metric": metric,
                "value": round(statistics.median(values), 3),
                "unit": unit,
                "n": len(values),
                "min": round(min(values), 3),
                "max": round(max(values), 3),
            }
        )
        print(line, flush=True)
        if arguments.out:
            with open(arguments.out, "a", encoding="utf-8") as file:
                file.write(line + "\n")

    initiator(arguments, pipe, emit)
    process.join(10)
    return 0


if __name__ == "__main__":
    sys.exit(main())
