#!/usr/bin/env python3
"""Runs NIXL and Mooncake beside blockplane on this machine and prints who is how fast.

    python3 bench/compare/run.py [--quick] [--out FILE.jsonl]

Installs the peers from PyPI into .cache/compare-venv, then measures the same cells with each of
them in turn, three rounds, everything on loopback. The table shows medians of the rounds; a peer
that cannot be installed or run is reported with the reason. Takes about ten minutes, with --quick
three.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import shlex
import statistics
import subprocess
import sys

from rows import MISSING, ROWS, Figures, table

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent

# NIXL's wheels ask for PyTorch and CUDA, which transfers of host memory do not touch.
PACKAGES = {
    "nixl": [["numpy"], ["--no-deps", "nixl", "nixl-cu13"]],
    "mooncake": [["mooncake-transfer-engine-non-cuda"]],
}
IMPORTS = {"nixl": "import nixl._api", "mooncake": "import mooncake.engine"}

HOST = ["write:4096:128", "write:16384:128", "write:65536:1024"]
TCP = [
    f"{op}:{block}:{count}"
    for op in ("write", "read")
    for block, count in ((4096, 128), (16384, 128), (65536, 128), (1 << 20, 16))
]


def steps(quick, folder):
    """(peer, name of the step, arguments); each ends within the time of one step."""
    seconds = "0.2" if quick else "0.5"
    case_ms = "200" if quick else "500"
    idle = "2" if quick else "10"
    bench = ["bench", "transfer", "--json", "--patterns", "scattered", "--case-ms", case_ms]
    blocks = [*bench, "--measure", "blocks", "--arena-mib", "512"]

    def cells(lane, list_of_cells, *more):
        by_shape = {}
        for cell in list_of_cells:
            op, block, count = cell.split(":")
            by_shape.setdefault((block, count), []).append(op)
        for (block, count), ops in by_shape.items():
            cell = ["--block-bytes", block, "--counts", count, "--ops", ",".join(ops)]
            yield [*blocks, "--lanes", lane, *cell, *more]

    for arguments in cells("shm", HOST):
        yield "blockplane", "arena", arguments
    yield "nixl", "host", ["blocks", "--lane", "default", "--seconds", seconds, *HOST]
    for arguments in cells("shm", HOST[:2], "--from", "host", "--to", "host"):
        yield "blockplane", "host", arguments
    for arguments in cells("tcp", TCP):
        yield "blockplane", "tcp", arguments
    for op in ("write", "read"):
        some = [cell for cell in TCP if cell.startswith(op)]
        yield "nixl", "tcp", ["blocks", "--lane", "tcp", "--seconds", seconds, *some]
        yield "mooncake", "tcp", ["--seconds", seconds, *some]
    yield "blockplane", "notify", [*bench, "--measure", "notify", "--lanes", "shm"]
    yield "nixl", "notify", ["notify"]
    yield "nixl", "notify", ["notify", "--progress-thread", "--rounds", "100"]
    yield "blockplane", "make", [*bench, "--measure", "make", "--lanes", "shm"]
    yield "nixl", "make", ["make"]
    yield "blockplane", "setup", [*bench, "--measure", "setup", "--lanes", "shm"]
    yield "blockplane", "setup", [*bench, "--measure", "setup", "--lanes", "tcp"]
    yield "nixl", "setup", ["setup"]
    idling = ["--measure", "idle", "--lanes", "shm", "--idle-seconds", idle]
    yield "blockplane", "idle", [*bench, *idling]
    yield "nixl", "idle", ["idle", "--seconds", idle]
    for op in ("read", "write"):
        disk = ["bench", "transfer", "--json", "--to", f"file:{folder}", "--ops", op]
        yield "blockplane", "file", [*disk, *(["--quick"] if quick else [])]
    yield "nixl", "file", ["file", folder, "--seconds", "0.5" if quick else "2"]


class Peers:
    """The installed programs, or why one is missing."""

    def __init__(self, args):
        self.missing = {}
        self.versions = {}
        self.wrap = shlex.split(args.wrap)
        self.time = args.step_seconds
        self.python = args.venv / "bin" / "python"
        self.blockplane = [str(args.blockplane)]
        if not self.python.exists():
            subprocess.run([sys.executable, "-m", "venv", args.venv], check=True)
        for peer in PACKAGES:
            if self.usable(peer) is None:
                continue
            for packages in PACKAGES[peer]:
                install = [self.python, "-m", "pip", "install", "--quiet", *packages]
                subprocess.run(install, capture_output=True, check=False)
            reason = self.usable(peer)
            if reason is not None:
                self.missing[peer] = reason

    def usable(self, peer):
        """None, or the last line of what went wrong."""
        run = [self.python, "-c", IMPORTS[peer]]
        done = subprocess.run(run, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return None
        return (done.stderr.strip().splitlines() or ["it cannot be imported"])[-1]

    def describe(self):
        names = "nixl", "mooncake-transfer-engine-non-cuda"
        show = [self.python, "-m", "pip", "list", "--format", "json"]
        listed = subprocess.run(show, capture_output=True, text=True, check=False).stdout
        versions = {each["name"]: each["version"] for each in json.loads(listed or "[]")}
        return {name: versions.get(name) for name in names}

    def run(self, peer, arguments):
        """The figures that a step printed; raises RuntimeError with the reason otherwise."""
        program = {
            "blockplane": self.blockplane,
            "nixl": [str(self.python), str(HERE / "nixl_driver.py")],
            "mooncake": [str(self.python), str(HERE / "mooncake_driver.py")],
        }[peer]
        command = [*self.wrap, *program, *arguments]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=self.time, check=False
            )
        except subprocess.TimeoutExpired as late:
            raise RuntimeError(f"no end within {self.time} s") from late
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise RuntimeError(lines[-1])
        lines = (line for line in done.stdout.splitlines() if line.startswith("{"))
        return [json.loads(line) for line in lines]


def measure(peers, args):
    figures = Figures()
    for number in range(args.rounds):
        for peer, step, arguments in steps(args.quick, args.folder):
            if peer in peers.missing or (args.only and step not in args.only):
                continue
            print(f"round {number + 1}: {peer} {step}", file=sys.stderr, flush=True)
            try:
                for record in peers.run(peer, arguments):
                    figures.add(peer, step, record)
            except RuntimeError as error:
                figures.failed(peer, step, str(error))
    return figures


def machine():
    model = "unknown processor"
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    return f"{os.cpu_count()} CPU {model}, Linux {platform.release()}"


def commit():
    ask = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(ask, capture_output=True, text=True, check=False).stdout.strip()


def lines(figures, common):
    """Every figure of every peer, and every row of the table, as objects."""
    for (peer, step, metric, case), values in figures.all():
        yield {
            "bench": "compare",
            "case": {"program": peer, "step": step, **json.loads(case)},
            "metric": metric,
            "value": statistics.median(values),
            "unit": figures.unit(metric),
            "n": len(values),
            "rounds": values,
            **common,
        }
    for row in ROWS:
        ours, nixl, mooncake, limit = row.values(figures)
        best = row.best(nixl, mooncake)
        yield {
            "bench": "compare",
            "case": {"row": row.title, "goal": row.goal},
            "metric": "row",
            "value": ours,
            "unit": row.unit,
            "n": 1,
            "limit": limit,
            "peer": best,
            "ratio": row.ratio(ours, best),
            "nixl": nixl,
            "mooncake": mooncake,
            **common,
        }


def main():
    parser = argparse.ArgumentParser(
        description="Runs NIXL and Mooncake beside blockplane and prints who is how fast."
    )
    parser.add_argument("--blockplane", type=pathlib.Path, help="the binary [default: built here]")
    parser.add_argument("--venv", type=pathlib.Path, default=ROOT / ".cache" / "compare-venv")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="shorter cells")
    parser.add_argument("--only", action="append", help="one step of arena, host, tcp, notify, make, setup, idle, file; can be repeated")
    parser.add_argument("--wrap", default="", help="command in front of every step, such as 'nice'")
    parser.add_argument("--step-seconds", type=int, default=120, help="bound on each step")
    parser.add_argument("--folder", default=str(ROOT), help="where files are measured")
    parser.add_argument("--out", type=pathlib.Path, help="also write the figures as JSON lines")
    args = parser.parse_args()
    if args.blockplane is None:
        build = ["cargo", "build", "--release", "-p", "blockplane"]
        subprocess.run(build, cwd=ROOT, check=True)
        target = os.environ.get("CARGO_TARGET_DIR", ROOT / "target")
        args.blockplane = pathlib.Path(target) / "release" / "blockplane"

    peers = Peers(args)
    figures = measure(peers, args)
    versions = {name: version for name, version in peers.describe().items() if version}
    common = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "commit": commit(),
        "versions": versions,
    }
    print(f"{common['machine']}; {common['commit']}; {versions}; medians of {args.rounds} rounds")
    print(table(figures))
    for peer, reason in peers.missing.items():
        print(f"{peer} did not run: {reason}")
    for peer, step, reason in figures.failures:
        print(f"{peer} {step} failed: {reason}")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(line) + "\n" for line in lines(figures, common))
        args.out.write_text(text)
    nothing = all(row.values(figures)[0] is MISSING for row in ROWS)
    return 1 if nothing else 0


if __name__ == "__main__":
    sys.exit(main())
