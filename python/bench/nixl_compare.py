#!/usr/bin/env python3
"""The drop-in beside NIXL's own package: what an engine's KV cache costs to register, prepare and pull.

    python/bench/nixl_compare.py --ours SITE --nixl SITE [--rounds 3] [--out FILE.jsonl]

SITE is a folder with an installed package (`pip install --target SITE ...`). Rounds alternate between
the packages; NIXL runs with each of its settings of UCX, and its best one is the figure. Each round has
two processes with 1 GiB of ordinary memory each, which stands for the cache of a vLLM server on a CPU:
131,072 blocks of 8 KiB.

* prepare: descriptors from an array, and both lists prepared
* make: a transfer of 12, 1,024 and 10,000 scattered descriptors
* pull: 12 blocks (98,304 bytes) read from the other process, from transfer() until the state is DONE,
  polled without a pause
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

BLOCKS = 131_072
BLOCK_BYTES = 8192
UCX = ("", "tcp,sm,self", "all")
CASES = {
    "register_ms": ("register 1 GiB", "ms"),
    "prepare_ms": ("prepare both lists of 131,072", "ms"),
    "make_12_us": ("make 12", "us"),
    "make_1024_us": ("make 1,024", "us"),
    "make_10000_us": ("make 10,000", "us"),
    "pull_us": ("pull 98,304 B in 12 pieces", "us"),
    "pull_p99_us": ("pull 98,304 B in 12 pieces, p99", "us"),
}


def main() -> int:
    """Runs the rounds and prints a table and, if wanted, JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ours", help="folder with the drop-in")
    parser.add_argument("--nixl", help="folder with NIXL's own package")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--role", choices=["initiator", "target"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role:
        return {"initiator": initiator, "target": target}[arguments.role]()
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(arguments.rounds):
        if arguments.ours:
            found.setdefault("ours", []).append(run(arguments.ours, ""))
        for setting in UCX if arguments.nixl else ():
            name = f"nixl, UCX_TLS={setting or 'default'}"
            found.setdefault(name, []).append(run(arguments.nixl, setting))
    medians = {
        name: {case: statistics.median(r[case] for r in rounds) for case in CASES}
        for name, rounds in found.items()
    }
    for case, (title, unit) in CASES.items():
        peers = {name: value[case] for name, value in medians.items() if name != "ours"}
        best = min(peers.values(), default=None)
        mine = medians.get("ours", {}).get(case)
        shown = f"{title:34} " + "  ".join(f"{n}: {v[case]:.1f} {unit}" for n, v in medians.items())
        print(shown, flush=True)
        if arguments.out and mine is not None:
            line = {
                "bench": "nixl",
                "case": {"operation": title},
                "metric": "time",
                "value": mine,
                "unit": unit,
                "n": arguments.rounds,
                "p50": mine,
                "p99": max(r[case] for r in found["ours"]),
                "limit": None,
                "peer": peers or None,
                "ratio": mine / best if best else None,
                "rounds": [r[case] for r in found["ours"]],
            }
            with arguments.out.open("a") as out:
                out.write(json.dumps(line) + "\n")
    return 0


def run(site: str, ucx_tls: str) -> dict[str, float]:
    """One round of one package."""
    environment = dict(os.environ, PYTHONPATH=site, NIXL_LOG_LEVEL="ERROR")
    environment.pop("UCX_TLS", None)
    if ucx_tls:
        environment["UCX_TLS"] = ucx_tls
    command = [sys.executable, __file__, "--role", "initiator"]
    result = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, text=True, check=False, timeout=300
    )
    for line in reversed(result.stdout.splitlines()):
        if line.startswith("{"):
            return json.loads(line)
    sys.exit(f"{site}: the round ended with {result.returncode} and no result")


def cache() -> tuple[object, object, object]:
    """An agent, its memory, and how long registering took in ms."""
    import numpy as np

    from nixl._api import nixl_agent, nixl_agent_config

    memory = np.empty(BLOCKS * BLOCK_BYTES, dtype=np.uint8)
    memory[::4096] = 1
    agent = nixl_agent(f"{sys.argv[-1]}-{os.getpid()}", nixl_agent_config())
    began = time.perf_counter()
    agent.register_memory([(memory.ctypes.data, memory.nbytes, 0, "")], "DRAM")
    return agent, memory, (time.perf_counter() - began) * 1e3


def rows(address: int) -> object:
    """One descriptor for each block."""
    import numpy as np

    descs = np.empty((BLOCKS, 3), dtype=np.uint64)
    descs[:, 0] = np.arange(BLOCKS, dtype=np.uint64) * np.uint64(BLOCK_BYTES) + np.uint64(address)
    descs[:, 1] = BLOCK_BYTES
    descs[:, 2] = 0
    return descs


def target() -> int:
    """Says where it is and waits for the end of its input; asleep, as an engine between steps."""
    agent, memory, _ = cache()
    blob = base64.b64encode(agent.get_agent_metadata()).decode()
    print(json.dumps([memory.ctypes.data, blob]), flush=True)
    # NIXL's own agent makes progress by itself: it has a thread for that.
    sys.stdin.read()
    return 0


def initiator() -> int:
    """Measures, and prints the figures as JSON."""
    import numpy as np

    other = subprocess.Popen(
        [sys.executable, __file__, "--role", "target"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    answer = other.stdout.readline()
    while not answer.startswith("["):
        answer = other.stdout.readline()
    address, blob = json.loads(answer)
    agent, memory, register_ms = cache()
    name = agent.add_remote_agent(base64.b64decode(blob))
    here, there = rows(memory.ctypes.data), rows(address)
    agent.make_connection(name)
    began = time.perf_counter()
    local = agent.prep_xfer_dlist("NIXL_INIT_AGENT", agent.get_xfer_descs(here, "DRAM"))
    remote = agent.prep_xfer_dlist(name, agent.get_xfer_descs(there, "DRAM"))
    figures = {"register_ms": register_ms, "prepare_ms": (time.perf_counter() - began) * 1e3}
    random = np.random.default_rng(1)
    for count in (12, 1024, 10_000):
        times = []
        for _ in range(30):
            picks = [random.permutation(BLOCKS)[:count].astype(np.int32) for _ in range(2)]
            began = time.perf_counter()
            handle = agent.make_prepped_xfer("READ", local, picks[0], remote, picks[1])
            times.append((time.perf_counter() - began) * 1e6)
            agent.release_xfer_handle(handle)
        figures[f"make_{count}_us"] = statistics.median(times)
    times = []
    for _ in range(300):
        picks = [random.permutation(BLOCKS)[:12].astype(np.int32) for _ in range(2)]
        handle = agent.make_prepped_xfer("READ", local, picks[0], remote, picks[1])
        began = time.perf_counter()
        state = agent.transfer(handle)
        while state == "PROC":
            state = agent.check_xfer_state(handle)
        times.append((time.perf_counter() - began) * 1e6)
        agent.release_xfer_handle(handle)
    times = sorted(times[50:])
    figures["pull_us"] = statistics.median(times)
    figures["pull_p99_us"] = times[int(len(times) * 0.99)]
    print(json.dumps(figures), flush=True)
    other.stdin.close()
    other.wait(30)
    # Not through the interpreter's end, where NIXL's own package is known to crash.
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
