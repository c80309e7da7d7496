"""What the tests share: agents, memory, and agents in processes of their own."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

# The log of agents goes to standard output, where the answers of a peer are.
os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")

from nixl._api import nixl_agent, nixl_agent_config  # noqa: E402

WAIT_S = 10.0
_names = itertools.count()


def until(condition: Callable[[], Any], what: str = "a condition", seconds: float = WAIT_S) -> Any:
    """What a condition says once it is true; fails when that takes too long."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"{what} did not come true within {seconds} s"
        time.sleep(0.0005)
    return value


def finish(agent: nixl_agent, handle: Any, notif: bytes = b"") -> None:
    """Starts a transfer and polls until it is done."""
    state = agent.transfer(handle, notif)
    if state != "DONE":
        until(lambda: agent.check_xfer_state(handle) == "DONE", "the end of a transfer")


@pytest.fixture
def make_agent() -> Callable[..., nixl_agent]:
    """Makes agents with names that no other test uses."""

    def make(name: str = "agent", **config: Any) -> nixl_agent:
        return nixl_agent(f"{name}-{os.getpid()}-{next(_names)}", nixl_agent_config(**config))

    return make


class Memory:
    """Bytes of numpy, registered with an agent."""

    def __init__(self, agent: nixl_agent, size: int, seed: int | None = None) -> None:
        """Zeros, or random bytes of a seed."""
        self.bytes = np.zeros(size, dtype=np.uint8)
        if seed is not None:
            self.bytes[:] = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
        self.address = self.bytes.ctypes.data
        self.descs = agent.register_memory([(self.address, size, 0, "")], "DRAM")

    def rows(self, offsets: Any, size: int) -> np.ndarray:
        """Descriptors of `size` bytes at these offsets."""
        offsets = np.asarray(offsets, dtype=np.uint64)
        rows = np.empty((len(offsets), 3), dtype=np.uint64)
        rows[:, 0] = offsets + np.uint64(self.address)
        rows[:, 1] = size
        rows[:, 2] = 0
        return rows


class Peer:
    """An agent in a process of its own, with memory 0, 1, ... 255, 0, 1, ..."""

    def __init__(self, size: int) -> None:
        self.name = f"peer-{os.getpid()}-{next(_names)}"
        self.size = size
        script = pathlib.Path(__file__).with_name("peer.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script), self.name, str(size)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._answer() == "ready"
        self.address = self.call("address")

    def _answer(self) -> Any:
        line = self.process.stdout.readline()
        assert line, f"the peer ended with {self.process.poll()}"
        return json.loads(line)

    def call(self, *command: Any) -> Any:
        """Has the peer do something, and returns its answer."""
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def metadata(self) -> bytes:
        """Its metadata as of now."""
        return base64.b64decode(self.call("metadata"))

    def rows(self, offsets: Any, size: int) -> np.ndarray:
        """Descriptors of its memory."""
        offsets = np.asarray(offsets, dtype=np.uint64)
        rows = np.zeros((len(offsets), 3), dtype=np.uint64)
        rows[:, 0] = offsets + np.uint64(self.address)
        rows[:, 1] = size
        return rows

    def send_signal(self, number: signal.Signals) -> None:
        """Kills, stops or continues it."""
        self.process.send_signal(number)

    def close(self) -> None:
        """Ends it, whatever state it is in."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGCONT)
        self.process.stdin.close()
        try:
            self.process.wait(WAIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


@pytest.fixture
def make_peer() -> Iterator[Callable[[int], Peer]]:
    """Starts agents in processes of their own and ends them after the test."""
    peers: list[Peer] = []

    def make(size: int = 1 << 20) -> Peer:
        peers.append(Peer(size))
        return peers[-1]

    yield make
    for peer in peers:
        peer.close()
