"""BlockplaneConnector in a real vLLM: tokens are those of vLLM alone, whatever happens below.

    PYTHON_OF_VLLM python/tests/vllm_connector.py --model DIR --ours SITE

`SITE` has the package blockplane. Each case is a vLLM of its own, of about a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time
from typing import Any

LIMIT_S = 400
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}
COUNTS = ("host_blocks", "disk_blocks", "saved_blocks", "loads", "loads_failed")


def main() -> int:
    """Runs all cases; the exit status is the number of those that failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--ours", required=True, help="folder with the package blockplane")
    parser.add_argument("--tensor-parallel", action="store_true", help="also with two ranks")
    parser.add_argument("--case", help="used by itself")
    args = parser.parse_args()
    if args.case:
        print("RESULT " + json.dumps(case(args.model, json.loads(args.case))))
        return 0
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        alone = run(args, {})
        assert all(alone["first"]) and alone["first"] == alone["second"]
        failed += check("kept in host memory", run(args, connector(folder)), alone, host=True)
        again = run(args, connector(folder))
        failed += check("kept on disk over a restart", again, alone, disk=True)
        damage(pathlib.Path(folder))
        failed += check("a damaged store", run(args, connector(folder)), alone, disk=False)
        late = connector(folder, {"load_timeout_s": 0.0})
        failed += check("loads that fail", run(args, late), alone, failures=True)
    with tempfile.TemporaryDirectory() as folder:
        apart = connector(folder) | {"apart": True}
        failed += check("scheduler and worker apart", run(args, apart), alone, host=True)
    if args.tensor_parallel:
        alone = run(args, {"ranks": 2})
        with tempfile.TemporaryDirectory() as folder:
            two = connector(folder) | {"ranks": 2}
            failed += check("two ranks", run(args, two), alone, host=True)
            failed += check("two ranks, over a restart", run(args, two), alone, disk=True)
    return failed


def connector(folder: str, extra: dict[str, Any] | None = None) -> dict[str, Any]:
    """A case with tiers."""
    return {"folder": folder, "extra": {"mode": "kvbm", **(extra or {})}}


def run(args: argparse.Namespace, what: dict[str, Any]) -> dict[str, Any]:
    """One vLLM, from start to end."""
    environment = dict(os.environ, **ENVIRONMENT, PYTHONPATH=args.ours)
    for name in [name for name in environment if name.startswith("DYN_KVBM_")]:
        del environment[name]
    if not what.get("apart") and what.get("ranks", 1) == 1:
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if "folder" in what:
        environment["DYN_KVBM_CPU_CACHE_GB"] = "0.02"
        environment["DYN_KVBM_DISK_CACHE_GB"] = "0.02"
        environment["DYN_KVBM_DISK_CACHE_DIR"] = what["folder"]
        environment["DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER"] = "true"
    command = [sys.executable, __file__, "--model", args.model, "--ours", args.ours]
    command += ["--case", json.dumps(what)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        print(done.stdout[-3000:], done.stderr[-5000:], sep="\n")
        sys.exit(f"vLLM did not do {what}")
    return json.loads(lines[0].removeprefix("RESULT "))


def case(model: str, what: dict[str, Any]) -> dict[str, Any]:
    """Within vLLM's process."""
    from vllm import LLM, SamplingParams

    options: dict[str, Any] = {}
    if "extra" in what:
        options["kv_transfer_config"] = {
            "kv_connector": "BlockplaneConnector",
            "kv_connector_module_path": "blockplane.vllm",
            "kv_role": "kv_both",
            "kv_connector_extra_config": what["extra"],
        }
    one_process = os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0"
    if one_process:
        options["distributed_executor_backend"] = "uni"
    llm = LLM(
        model,
        max_model_len=512,
        block_size=32,
        enforce_eager=True,
        disable_log_stats=False,
        tensor_parallel_size=what.get("ranks", 1),
        **options,
    )
    rng = random.Random(5)
    prompts = [
        {"prompt_token_ids": [rng.randrange(500) for _ in range(length)]}
        for length in (33, 64, 150, 300, 401)
    ]
    sampling = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)

    def ask() -> list[list[int]]:
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    first = ask()
    end = time.monotonic() + 20
    while not llm.reset_prefix_cache():
        assert time.monotonic() < end, "blocks of vLLM stay held"
        if one_process:
            # Nobody else makes its steps.
            llm.llm_engine.step()
        else:
            time.sleep(0.1)
    second = ask()
    counts = {
        name: sum(
            metric.value for metric in llm.get_metrics() if metric.name == f"vllm:blockplane_{name}"
        )
        for name in COUNTS
    }
    return {"first": first, "second": second, "counts": counts}


def check(
    name: str,
    got: dict[str, Any],
    alone: dict[str, Any],
    *,
    host: bool = False,
    disk: bool | None = None,
    failures: bool = False,
) -> int:
    """1 if a case is not as it should be."""
    counts = got["counts"]
    wrong = [which for which in ("first", "second") if got[which] != alone[which]]
    problems = [f"the tokens of the {which} run differ" for which in wrong]
    if host and not counts["host_blocks"]:
        problems.append("nothing came from host memory")
    if disk and not counts["disk_blocks"]:
        problems.append("nothing came from the disk")
    if disk is False and not counts["loads_failed"]:
        problems.append("the damage was not met")
    if failures and (not counts["loads_failed"] or counts["host_blocks"]):
        problems.append("loads did not fail")
    print(f"{'FAILED' if problems else 'ok'}  {name}: {counts} {'; '.join(problems)}", flush=True)
    return int(bool(problems))


def damage(folder: pathlib.Path) -> None:
    """Turns a bit in every 1,000 bytes that are not zero, behind the header of the store."""
    for path in folder.glob("*.g3"):
        contents = bytearray(path.read_bytes())
        for at in range(1 << 20, len(contents), 1000):
            if contents[at]:
                contents[at] ^= 4
        path.write_bytes(contents)


if __name__ == "__main__":
    sys.exit(main())
