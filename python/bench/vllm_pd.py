#!/usr/bin/env python3
"""What the KV hand-off of a vLLM on a processor costs: prefill in one process, decode in another, through
vLLM's own NixlConnector and whichever package `nixl` it finds.

    python/bench/vllm_pd.py --model FOLDER --ours SITE --nixl SITE [--rounds 2] [--out FILE.jsonl]

Runs in an environment with vLLM. SITE is a folder with an installed package; rounds alternate between
them, NIXL with each setting of UCX. Figures: time to the first token at the decode side with the KV pulled,
its own prefill of the same prompt, and the pull as vLLM's statistics have it. Tokens have to be equal.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import pathlib
import random
import socket
import statistics
import subprocess
import sys
import time
from typing import Any

PROMPT_TOKENS = 254
REQUESTS = 24
WARM = 4
UCX = ("", "tcp,sm,self", "all")
ROLES = ("prefill", "decode")
LIMIT_S = 60
REMOTE_DECODE = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TORCHDYNAMO_DISABLE": "1",
    "NIXL_LOG_LEVEL": "ERROR",
}


def main() -> int:
    """Runs the rounds and prints them; JSON lines, if wanted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--ours")
    parser.add_argument("--nixl")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--round", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.round:
        print(json.dumps(measure(arguments.model)), flush=True)
        os._exit(0)
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(arguments.rounds):
        if arguments.ours:
            found.setdefault("ours", []).append(run(arguments.model, arguments.ours, ""))
        for setting in UCX if arguments.nixl else ():
            name = f"nixl, UCX_TLS={setting or 'default'}"
            found.setdefault(name, []).append(run(arguments.model, arguments.nixl, setting))
    report(found, arguments)
    return 0


def report(found: dict[str, list[dict[str, float]]], arguments: argparse.Namespace) -> None:
    """Medians of the rounds by figure."""
    medians = {
        name: {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
        for name, rounds in found.items()
    }
    for key in next(iter(medians.values())):
        print(f"{key:18}", "  ".join(f"{n}: {value[key]:.3f}" for n, value in medians.items()))
        peers = {name: value[key] for name, value in medians.items() if name != "ours"}
        if arguments.out and "ours" in medians:
            mine, best = medians["ours"][key], min(peers.values(), default=None)
            line = {
                "bench": "vllm_pd",
                "case": {"tokens": PROMPT_TOKENS, "model": pathlib.Path(arguments.model).name},
                "metric": key,
                "value": mine,
                "unit": "ms",
                "n": arguments.rounds,
                "p50": mine,
                "p99": max(r[key] for r in found["ours"]),
                "limit": None,
                "peer": peers or None,
                "ratio": mine / best if best else None,
            }
            with arguments.out.open("a") as out:
                out.write(json.dumps(line) + "\n")


def run(model: str, site: str, ucx_tls: str) -> dict[str, float]:
    """One round with one package, in processes of its own."""
    environment = dict(os.environ, PYTHONPATH=site, **SETTINGS)
    environment.pop("UCX_TLS", None)
    if ucx_tls:
        environment["UCX_TLS"] = ucx_tls
    command = [sys.executable, __file__, "--model", model, "--round"]
    result = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, text=True, check=False, timeout=600
    )
    for line in reversed(result.stdout.splitlines()):
        if line.startswith("{"):
            return json.loads(line)
    sys.exit(f"{site}: the round ended with {result.returncode} and no result")


def measure(model: str) -> dict[str, float]:
    """Starts both engines and hands requests over."""
    context = multiprocessing.get_context("spawn")
    pipes, engines = {}, []
    for role in ROLES:
        pipes[role], theirs = context.Pipe()
        engines.append(context.Process(target=serve, args=(free_port(), model, theirs), daemon=True))
        engines[-1].start()
    for pipe in pipes.values():
        assert receive(pipe, 300) == "ready"
    rng = random.Random(3)
    remote, local, first = [], [], None
    for number in range(WARM + REQUESTS):
        tokens = [rng.randrange(3, 500) for _ in range(PROMPT_TOKENS)]
        prefilled = ask(pipes["prefill"], tokens, REMOTE_DECODE, 1)
        pulled = ask(pipes["decode"], tokens, prefilled[2], 4)
        own = ask(pipes["decode"], tokens, None, 4)
        if pulled[1] != own[1]:
            sys.exit(f"other tokens with the KV of the other engine: {pulled[1]}, {own[1]}")
        if first is None:
            first = pulled[0]
        if number >= WARM:
            remote.append(pulled[0] * 1e3)
            local.append(own[0] * 1e3)
    pulls = ask(pipes["decode"], None, None, 0)
    if len(pulls) != WARM + REQUESTS:
        sys.exit(f"{len(pulls)} pulls of {WARM + REQUESTS} prompts: KV was computed again")
    for pipe in pipes.values():
        pipe.send(None)
    for engine in engines:
        engine.join(10)
        engine.kill()
    return {
        "remote_ttft_ms": statistics.median(remote),
        "remote_ttft_p90_ms": sorted(remote)[int(len(remote) * 0.9)],
        "first_ttft_ms": first * 1e3,
        "local_ttft_ms": statistics.median(local),
        "pull_ms": statistics.median(pulls),
    }


def receive(pipe: Any, timeout: float) -> Any:
    """What an engine says, in time."""
    if not pipe.poll(timeout):
        sys.exit(f"an engine said nothing for {timeout} s")
    return pipe.recv()


def ask(pipe: Any, *request: Any) -> Any:
    """One request and its answer."""
    pipe.send(request)
    return receive(pipe, LIMIT_S + 10)


def free_port() -> int:
    """A port where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serve(port: int, model: str, pipe: Any) -> None:
    """One engine in this process."""
    os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(port)
    from vllm import LLM
    from vllm.config import KVTransferConfig

    llm = LLM(
        model=model,
        skip_tokenizer_init=True,
        max_model_len=512,
        block_size=32,
        enable_prefix_caching=False,
        enforce_eager=True,
        distributed_executor_backend="uni",
        kv_transfer_config=KVTransferConfig(
            kv_connector="NixlConnector", kv_role="kv_both", kv_buffer_device="cpu"
        ),
    )
    import nixl._api

    pulls: list[float] = []
    watch(nixl._api.nixl_agent, pulls)
    pipe.send("ready")
    while (request := pipe.recv()) is not None:
        pipe.send(pulls if request[0] is None else generate(llm, *request))
    os._exit(0)


def watch(agent: Any, pulls: list[float]) -> None:
    """Takes the time from transfer() until the engine saw the end, in ms."""
    begun: dict[int, float] = {}
    transfer, check = agent.transfer, agent.check_xfer_state

    def timed_transfer(self: Any, handle: Any, *arguments: Any) -> str:
        begun[id(handle)] = time.perf_counter()
        return transfer(self, handle, *arguments)

    def timed_check(self: Any, handle: Any) -> str:
        state = check(self, handle)
        if state == "DONE" and (at := begun.pop(id(handle), None)) is not None:
            pulls.append((time.perf_counter() - at) * 1e3)
        return state

    agent.transfer, agent.check_xfer_state = timed_transfer, timed_check


def generate(llm: Any, tokens: list[int], transfer: dict | None, count: int) -> tuple:
    """Seconds to the first token, all tokens, and what the connector says about the KV."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        max_tokens=count,
        ignore_eos=True,
        temperature=0,
        detokenize=False,
        extra_args={"kv_transfer_params": transfer} if transfer else None,
    )
    engine = llm.llm_engine
    first = None
    begin = time.perf_counter()
    engine.add_request(str(random.getrandbits(60)), {"prompt_token_ids": tokens}, sampling)
    while time.perf_counter() - begin < LIMIT_S:
        for output in engine.step():
            if first is None and output.outputs[0].token_ids:
                first = time.perf_counter() - begin
            if output.finished:
                return first, list(output.outputs[0].token_ids), output.kv_transfer_params
    raise TimeoutError(f"a request did not end in {LIMIT_S} s")


if __name__ == "__main__":
    sys.exit(main())
