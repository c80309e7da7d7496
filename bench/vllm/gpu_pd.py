"""What the KV hand-off of a real vLLM costs between two GPUs: prefill on one, decode on the other, through
vLLM's own NixlConnector and whichever package `nixl` Python finds first.

    gpu_pd.py [--label NAME] [--model qwen3-0.6b|qwen3-8b] [--out FILE] [--tokens 256,4096,...] [--repeat N]

Weights are random, of the shape of the model; no checkpoint is needed. Both engines are first warmed by
requests of random lengths, half of which are aborted, so that the blocks that are free lie scattered, as they
do in a server that has run for a while. Printed for each prompt length: prefill on P, time to the first token
on D with the KV pulled from P, D's own prefill of the same prompt, and whether the tokens are equal. One JSON
object a line, in the form of `blockplane bench --json`.
"""

import argparse
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time

SHAPES = {
    "qwen3-0.6b": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "qwen3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
}
CONTEXT = 33024
OUTPUT_TOKENS = 4
# What a prefill server is asked, and what a decode server would be told had nobody prefilled.
REMOTE_DECODE = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
WARM_REQUESTS = 96
START_TIMEOUT_S = 240
REQUEST_TIMEOUT_S = 60


def config_of(model):
    """config.json of a Qwen3 of this shape."""
    common = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "torch_dtype": "bfloat16",
    }
    return common | SHAPES[model]


def kv_bytes_per_token(model):
    shape = SHAPES[model]
    return shape["num_hidden_layers"] * 2 * shape["num_key_value_heads"] * shape["head_dim"] * 2


def serve(devices, port, folder, pipe):
    """One engine; answers the requests that come through `pipe`."""
    os.environ.update(
        CUDA_VISIBLE_DEVICES=devices,
        VLLM_NIXL_SIDE_CHANNEL_HOST="127.0.0.1",
        VLLM_NIXL_SIDE_CHANNEL_PORT=str(port),
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
    )
    try:
        from vllm import LLM
        from vllm.config import KVTransferConfig

        llm = LLM(
            model=folder,
            load_format="dummy",
            seed=1,
            skip_tokenizer_init=True,
            max_model_len=CONTEXT,
            gpu_memory_utilization=0.6,
            dtype="bfloat16",
            enable_prefix_caching=False,
            max_num_seqs=32,
            enforce_eager=True,
            kv_transfer_config=KVTransferConfig(kv_connector="NixlConnector", kv_role="kv_both"),
        )
        import nixl._api

        pipe.send(("ready", nixl._api.__file__))
        answer(llm, pipe)
    except BaseException as error:
        import traceback

        traceback.print_exc()
        pipe.send(("error", repr(error)))


def answer(llm, pipe):
    while True:
        request = pipe.recv()
        if request is None:
            return
        if request[0] == "warm":
            warm(llm, request[1])
            pipe.send(("warm", None, None))
        else:
            pipe.send(generate(llm, *request[1:]))


def generate(llm, tokens, transfer, output_tokens):
    """Seconds to the first token, all tokens, and what the connector says about the KV."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        max_tokens=output_tokens,
        ignore_eos=True,
        temperature=0,
        detokenize=False,
        extra_args={"kv_transfer_params": transfer} if transfer else None,
    )
    engine = llm.llm_engine
    name = str(random.getrandbits(60))
    first = None
    begin = time.perf_counter()
    engine.add_request(name, {"prompt_token_ids": tokens}, sampling)
    while time.perf_counter() - begin < REQUEST_TIMEOUT_S:
        for output in engine.step():
            if first is None and output.outputs[0].token_ids:
                first = time.perf_counter() - begin
            if output.finished:
                return first, list(output.outputs[0].token_ids), output.kv_transfer_params
    raise TimeoutError(f"a request of {len(tokens)} tokens did not end in {REQUEST_TIMEOUT_S} s")


def warm(llm, seed):
    """Requests of random lengths, 16 at a time, every second of them aborted on the way."""
    from vllm import SamplingParams

    rng = random.Random(seed)
    engine = llm.llm_engine
    left, running = WARM_REQUESTS, {}
    deadline = time.perf_counter() + REQUEST_TIMEOUT_S
    while (left or engine.has_unfinished_requests()) and time.perf_counter() < deadline:
        while left and len(running) < 16:
            name = f"warm-{seed}-{left}"
            steps = rng.randrange(1, 24)
            sampling = SamplingParams(
                max_tokens=steps, ignore_eos=True, temperature=0, detokenize=False
            )
            tokens = [rng.randrange(1000, 150000) for _ in range(rng.randrange(50, 6000))]
            engine.add_request(name, {"prompt_token_ids": tokens}, sampling)
            running[name] = rng.randrange(1, 12) if left % 2 else None
            left -= 1
        for output in engine.step():
            if output.finished:
                running.pop(output.request_id, None)
        for name in [name for name, steps in running.items() if steps == 0]:
            engine.abort_request([name])
            running.pop(name)
        running = {n: None if s is None else s - 1 for n, s in running.items()}


def receive(pipe, timeout):
    if not pipe.poll(timeout):
        raise TimeoutError(f"an engine said nothing for {timeout} s")
    return pipe.recv()


def ask(pipe, *request):
    pipe.send(request)
    reply = receive(pipe, REQUEST_TIMEOUT_S + 10)
    if reply[0] == "error":
        raise RuntimeError(reply[1])
    return reply


def measure(prefill, decode, arguments, emit):
    rng = random.Random(arguments.seed)

    def once(length, output_tokens=1):
        tokens = [rng.randrange(1000, 150000) for _ in range(length)]
        # One token is asked of P: its KV, without the last token's, is what D is to pull.
        p = ask(prefill, "generate", tokens, REMOTE_DECODE, 1)
        d = ask(decode, "generate", tokens, p[2], output_tokens)
        local = ask(decode, "generate", tokens, None, output_tokens)
        return {
            "prefill_ms": p[0] * 1e3,
            "remote_ms": d[0] * 1e3,
            "local_ms": local[0] * 1e3,
            "equal": d[1] == local[1],
        }

    ask(prefill, "warm", arguments.seed)
    ask(decode, "warm", arguments.seed + 1)
    first = once(256)
    second = [once(256) for _ in range(3)]
    usual = statistics.median(row["remote_ms"] for row in second)
    emit("first_handshake_ms", {"tokens": 256}, [first["remote_ms"] - usual], first["equal"], {})
    for length in arguments.tokens:
        # With more than one token wanted, vLLM launches the second step before it reports the first token:
        # times are those of requests for one.
        longer = once(length, OUTPUT_TOKENS)
        rows = [once(length) for _ in range(arguments.repeat)]
        emit(
            "remote_ttft_ms",
            {"tokens": length, "kv_bytes": length * kv_bytes_per_token(arguments.model)},
            [row["remote_ms"] for row in rows],
            all(row["equal"] for row in [longer, *rows]),
            {
                "prefill_ms": round(statistics.median(row["prefill_ms"] for row in rows), 2),
                "local_ttft_ms": round(statistics.median(row["local_ms"] for row in rows), 2),
            },
        )
        # The pool changes between lengths as it does in a server.
        ask(prefill, "warm", arguments.seed + length)
        ask(decode, "warm", arguments.seed + length + 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--label", default="nixl", help="name of the package in the results")
    parser.add_argument("--model", choices=SHAPES, default="qwen3-8b")
    parser.add_argument("--out", help="results are appended to this file too")
    parser.add_argument(
        "--tokens",
        type=lambda text: [int(n) for n in text.split(",")],
        default=[256, 1024, 4096, 16384, 32000],
    )
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--seed", type=int, default=3)
    arguments = parser.parse_args()
    multiprocessing.set_start_method("spawn")
    folder = tempfile.mkdtemp()
    with open(f"{folder}/config.json", "w", encoding="utf-8") as file:
        json.dump(config_of(arguments.model), file)
    pipes, processes = [], []
    for devices, port in (("0,1", 5600), ("1,0", 5700)):
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.Process(target=serve, args=(devices, port, folder, theirs))
        process.start()
        pipes.append(ours)
        processes.append(process)
    wrong = 0

    def emit(metric, case, values, equal, more):
        nonlocal wrong
        wrong += not equal
        line = json.dumps(
            {
                "bench": "vllm_gpu",
                "case": {"package": arguments.label, "model": arguments.model, **case},
                "metric": metric,
                "value": round(statistics.median(values), 2),
                "unit": "ms",
                "n": len(values),
                "min": round(min(values), 2),
                "max": round(max(values), 2),
                "tokens_equal": equal,
                **more,
            }
        )
        print(line, flush=True)
        if arguments.out:
            with open(arguments.out, "a", encoding="utf-8") as file:
                file.write(line + "\n")

    try:
        for pipe in pipes:
            state, detail = receive(pipe, START_TIMEOUT_S)
            if state != "ready":
                raise RuntimeError(detail)
            print(f"{arguments.label}: {detail}", file=sys.stderr, flush=True)
        measure(*pipes, arguments, emit)
        for pipe in pipes:
            pipe.send(None)
        for process in processes:
            process.join(10)
    finally:
        for process in processes:
            process.kill()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
