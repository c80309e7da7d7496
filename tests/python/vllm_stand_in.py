#!/usr/bin/env python3
"""Stands in for `vllm serve`: its HTTP, made-up tokens, and faults on demand.

The next token follows from the one before and the number of tokens so far, so that a request that goes on
elsewhere gets what it would have got here. `POST /control` sets what goes wrong, `GET /counters` tells what
happened. Listens on loopback only.
"""

from __future__ import annotations

import json
import os
import select
import socket
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Dict, List, Optional

VOCABULARY = 500
VERSION = "0.32.0"


class State:
    """What the server was told and what it saw."""

    def __init__(self, argv: List[str]) -> None:
        self.argv = argv
        self.lock = threading.Lock()
        self.faults: Dict[str, Any] = {}
        self.held: Dict[str, int] = {}
        self.counters = {"requests": 0, "aborts": 0, "prefills": 0, "pulls": 0, "active": 0}
        self.abort_ms: List[float] = []
        self.last: Dict[str, Any] = {}

    def option(self, name: str, default: str) -> str:
        """The value of a command-line argument."""
        for at, word in enumerate(self.argv):
            if word == name and at + 1 < len(self.argv):
                return self.argv[at + 1]
            if word.startswith(name + "="):
                return word.split("=", 1)[1]
        return default

    def count(self, name: str, by: int = 1) -> None:
        """Adds to a counter."""
        with self.lock:
            self.counters[name] += by

    def fault(self, name: str) -> Any:
        """What `POST /control` said of this fault."""
        with self.lock:
            return self.faults.get(name)


def next_token(before: int, position: int) -> int:
    """The token after `before` at `position`; never an end token."""
    return 10 + (before * 31 + position * 7) % (VOCABULARY - 10)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    state: State

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Nothing: a line per request says nothing here."""

    def do_GET(self) -> None:
        """What vLLM says of itself."""
        state = self.state
        if self.path == "/health":
            self.reply(state.fault("health") or 200, {})
        elif self.path == "/version":
            self.reply(200, {"version": state.option("--stand-in-version", VERSION)})
        elif self.path == "/v1/models":
            model = {
                "id": state.option("--served-model-name", "model"),
                "root": state.argv[1] if len(state.argv) > 1 else "",
                "parent": None,
                "max_model_len": int(state.option("--max-model-len", "4096")),
            }
            self.reply(200, {"object": "list", "data": [model]})
        elif self.path == "/metrics":
            self.text(200, self.metrics())
        elif self.path == "/openapi.json":
            paths = {"/v1/completions": {}, "/inference/v1/generate": {}}
            self.reply(200, {"paths": paths})
        elif self.path == "/kv_event_sources":
            self.reply(200, {})
        elif self.path == "/counters":
            with state.lock:
                told = {"abort_ms": state.abort_ms, "held": len(state.held), "last": state.last}
                self.reply(200, {**state.counters, **told})
        else:
            self.reply(404, {"error": {"message": f"no {self.path}", "code": 404}})

    def do_POST(self) -> None:
        """Tokens, and control."""
        body = json.loads(self.rfile.read(int(self.headers.get("content-length", "0"))) or b"{}")
        state = self.state
        if self.path == "/control":
            if body.get("die"):
                os._exit(1)
            with state.lock:
                state.faults.update(body)
            self.reply(200, {})
        elif self.path == "/pull":
            with state.lock:
                known = state.held.pop(body["remote_request_id"], None)
            self.reply(200 if known is not None else 404, {"tokens": known})
        elif self.path == "/inference/v1/generate":
            state.count("requests")
            state.count("active")
            try:
                self.generate(body)
            except (BrokenPipeError, ConnectionResetError):
                state.count("aborts")
                self.close_connection = True
            finally:
                state.count("active", -1)
        else:
            self.reply(404, {"error": {"message": f"no {self.path}", "code": 404}})

    def generate(self, body: Dict[str, Any]) -> None:
        """One request for tokens."""
        state = self.state
        with state.lock:
            state.last = {"body": body, "rank": self.headers.get("x-data-parallel-rank")}
        if state.fault("status"):
            message = {"message": "told to refuse", "code": state.fault("status")}
            self.reply(state.fault("status"), {"error": message})
            return
        prompt, sampling = body["token_ids"], body["sampling_params"]
        kv = body.get("kv_transfer_params") or {}
        if body.get("stream"):
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            self.stream(prompt, sampling, kv)
            return
        self.work(state.fault("prefill_ms") or 0.1 * len(prompt) ** 0.5)
        answer: Dict[str, Any] = {
            "choices": [{"index": 0, "finish_reason": "length", "token_ids": self.tokens(prompt, 1)}],
            "usage": {"prompt_tokens": len(prompt), "prompt_tokens_details": {"cached_tokens": 0}},
            "kv_transfer_params": None,
        }
        if kv.get("do_remote_decode"):
            state.count("prefills")
            name = str(self.headers.get("x-request-id"))
            with state.lock:
                state.held[name] = len(prompt)
            answer["kv_transfer_params"] = {
                "do_remote_prefill": True,
                "do_remote_decode": False,
                "remote_request_id": name,
                "remote_block_ids": [[1, 2]],
                "remote_host": "127.0.0.1",
                "remote_port": self.server.server_address[1],
            }
        self.reply(200, answer)

    def stream(self, prompt: List[int], sampling: Dict[str, Any], kv: Dict[str, Any]) -> None:
        """Tokens as server-sent events."""
        state = self.state
        cached = 0
        if kv.get("do_remote_prefill"):
            cached = self.pull(kv)
            if cached == 0:
                error = {"message": "KV could not be loaded", "type": "x", "code": 500}
                self.event({"error": error})
                self.end()
                return
        else:
            self.work(state.fault("prefill_ms") or 0)
        if state.fault("wrong"):
            self.event({"choices": "nonsense"})
            self.end()
            return
        tokens = self.tokens(prompt, sampling["max_tokens"])
        for index, token in enumerate(tokens):
            self.work(float(state.fault("token_ms") or 0))
            last = index + 1 == len(tokens)
            choice = {"index": 0, "finish_reason": "length" if last else None, "token_ids": [token]}
            if sampling.get("logprobs") is not None:
                scored = {"token_id": token, "logprob": -0.5, "rank": 1}
                choice["logprobs"] = {"content": [{**scored, "top_logprobs": [scored]}]}
            self.event({"usage": None, "choices": [choice]})
        usage = {
            "prompt_tokens": len(prompt),
            "completion_tokens": len(tokens),
            "prompt_tokens_details": {"cached_tokens": cached},
        }
        self.event({"usage": usage, "choices": []})
        self.end()

    def pull(self, kv: Dict[str, Any]) -> int:
        """Takes over what another server holds; 0 when that fails."""
        self.work(self.state.fault("pull_ms") or 0)
        url = f"http://{kv['remote_host']}:{kv['remote_port']}/pull"
        request = urllib.request.Request(url, json.dumps(kv).encode())
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                tokens = int(json.load(answer)["tokens"])
        except (OSError, ValueError, TypeError):
            return 0
        self.state.count("pulls")
        return tokens

    def tokens(self, prompt: List[int], count: int) -> List[int]:
        """What follows a prompt."""
        found: List[int] = []
        for index in range(count):
            before = found[-1] if found else prompt[-1]
            found.append(next_token(before, len(prompt) + index))
        return found

    def work(self, milliseconds: float) -> None:
        """Takes time, for ever when told to hang; ends with the connection."""
        until = time.monotonic() + milliseconds / 1000
        while True:
            left = until - time.monotonic()
            if self.state.fault("hang"):
                left = 0.05
            elif left <= 0:
                return
            before = time.monotonic()
            readable, _, _ = select.select([self.connection], [], [], min(left, 0.05))
            if readable and not self.connection.recv(1, socket.MSG_PEEK):
                with self.state.lock:
                    self.state.abort_ms.append((time.monotonic() - before) * 1000)
                raise BrokenPipeError

    def event(self, said: Dict[str, Any]) -> None:
        """Sends one event."""
        self.chunk(f"data: {json.dumps(said)}\n\n".encode())

    def end(self) -> None:
        """Ends a stream."""
        self.chunk(b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def chunk(self, data: bytes) -> None:
        """Sends one chunk."""
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def reply(self, status: int, said: Dict[str, Any]) -> None:
        """Sends one document."""
        self.text(status, json.dumps(said))

    def text(self, status: int, text: str) -> None:
        """Sends text."""
        data = text.encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def metrics(self) -> str:
        """As much of vLLM's metrics as anybody reads."""
        state = self.state
        ranks = int(state.option("--data-parallel-size", "1"))
        block = state.option("--block-size", "16")
        lines = []
        for rank in range(ranks):
            labels = f'block_size="{block}",cache_dtype="auto",enable_prefix_caching="True"'
            lines.append(
                f'vllm:cache_config_info{{{labels},engine="{rank}",num_gpu_blocks="1000"}} 1.0'
            )
            lines.append(f'vllm:kv_cache_usage_perc{{engine="{rank}"}} 0.0')
        return "\n".join(lines) + "\n"


class Server(ThreadingHTTPServer):
    """Answers each connection in a thread of its own."""

    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is none."""


def main(argv: Optional[List[str]] = None) -> int:
    """Serves until it is killed."""
    state = State(list(sys.argv[1:] if argv is None else argv))
    if state.option("--fail", ""):
        print(f"stand-in: {state.option('--fail', '')}", flush=True)
        return 3
    time.sleep(float(state.option("--start-after", "0")))
    Handler.state = state
    port = int(state.option("--port", "0"))
    server = Server(("127.0.0.1", port), Handler)
    print(f"stand-in pid {os.getpid()} port {server.server_address[1]}", flush=True)
    server.serve_forever(poll_interval=0.05)
    return 0


if __name__ == "__main__":
    sys.exit(main())
