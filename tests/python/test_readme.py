"""Every command of README.md does what the text around it says.

    BLOCKPLANE_URL=http://127.0.0.1:8000 BLOCKPLANE_BIN=target/release/blockplane \\
        python -m pytest tests/python/test_readme.py

A command that stands in README.md and not here fails the test: whoever adds one says here how it is tried.
Benchmarks run in their short form; those for GPUs and other systems' packages are asked for their help.
"""

import contextlib
import os
import pathlib
import re
import shlex
import signal
import subprocess
import threading

import pytest
from test_hub import CHECKPOINT, Hub

BINARY = os.environ.get("BLOCKPLANE_BIN")
URL = os.environ.get("BLOCKPLANE_URL")
ROOT = pathlib.Path(__file__).parents[2]
MODEL = "/models/Qwen3-0.6B"
LIMIT_S = 120

if not BINARY or not URL:
    pytest.skip("BLOCKPLANE_BIN or BLOCKPLANE_URL is not set", allow_module_level=True)


def commands():
    """The commands of the console blocks, without comments."""
    blocks = re.findall(r"```console\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("$ ")]
    return [re.sub(r"\s+#.*$", "", line[2:]).strip() for line in lines]


@pytest.fixture
def place(tmp_path):
    """Where a command runs: its variables, and what stands for paths that only the reader has."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "DYN_"))}
    return Place(tmp_path, kept | {"DYN_DISCOVERY": f"file:{tmp_path}/discovery", "DYN_HTTP_PORT": "0"})


class Place:
    def __init__(self, folder, variables):
        self.folder = folder
        self.variables = variables

    def words(self, command):
        """The command's words, with this machine's paths."""
        command = command.replace("cargo run --release --", "blockplane").removesuffix(" &")
        words = [word.replace(MODEL, str(CHECKPOINT)) for word in shlex.split(command)]
        words[0] = BINARY if words[0] == "blockplane" else str(ROOT / words[0])
        return words

    def run(self, command, *more, stdin="", accepted=(0,)):
        done = subprocess.run(
            [*self.words(command), *more],
            env=self.variables, cwd=self.folder, input=stdin, capture_output=True, text=True, timeout=LIMIT_S, check=False,
        )
        assert done.returncode in accepted, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    @contextlib.contextmanager
    def running(self, command, *more):
        """The lines of a command that goes on until it is interrupted."""
        process = subprocess.Popen(
            [*self.words(command), *more],
            env=self.variables, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        killer = threading.Timer(LIMIT_S, process.kill)
        killer.start()
        try:
            yield process.stdout
            process.send_signal(signal.SIGINT)
            process.stdout.read()
            assert process.wait(LIMIT_S) == 0, command
        finally:
            killer.cancel()
            process.kill()
            process.wait()

    def serves(self, command, *more):
        with self.running(command, *more) as lines:
            until(r"^listening on http", lines)


def until(pattern, lines):
    seen = []
    for line in lines:
        seen.append(line)
        if re.search(pattern, line):
            return line
    raise AssertionError(f"no {pattern!r} in:\n{''.join(seen)}")


def from_the_hub(place, command, check):
    hub = Hub("Qwen/Qwen3-0.6B")
    place.variables |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(place.folder / "hf")}
    try:
        check(command)
    finally:
        hub.shutdown()
        hub.server_close()


def fetch(place, command):
    def check(command):
        elsewhere = command.replace(MODEL, str(place.folder / "model"))
        place.run(elsewhere)
        assert (place.folder / "model/config.json").exists()

    from_the_hub(place, command, check)


def by_hand(place, _):
    """The three processes of the two terminals, started as they stand in README.md."""
    prefill, decode, frontend = (next(c for c in commands() if part in c) for part in
                                 ("--role prefill", "--role decode", "blockplane frontend"))
    small = ("--threads", "1", "--kv-gb", "0.1")
    with place.running(prefill, *small) as one, place.running(decode, *small) as two, place.running(frontend) as three:
        until("^ready: prefill", one)
        until("^ready: decode", two)
        until("^serving model", three)


def two_nodes(place, command):
    """Both nodes on this machine: addresses, folder and model are replaced."""
    text = (ROOT / "deploy/two-nodes.toml").read_text()
    text = re.sub(r"10\.0\.0\.\d", "127.0.0.1", text).replace("/srv/blockplane", str(place.folder)).replace(MODEL, str(CHECKPOINT))
    text = text.replace("http_port = 8000", "http_port = 0").replace("0.0.0.0", "127.0.0.1").replace("threads = 8", "threads = 1")
    here = place.folder / "nodes.toml"
    here.write_text(text)
    del place.variables["DYN_DISCOVERY"], place.variables["DYN_HTTP_PORT"]
    command = command.replace("deploy/two-nodes.toml", str(here))
    with place.running(command) as a, place.running(command.replace("--node a", "--node b")):
        until(r"^listening on http", a)


def export(place, command):
    """Sets the variables, for the commands that stand below."""
    for setting in shlex.split(command)[1:]:
        name, value = setting.split("=", 1)
        place.variables[name] = value.replace("/var/tmp/kv", str(place.folder / "kv"))
    small = {"DYN_KVBM_CPU_CACHE_GB": "0.02", "DYN_KVBM_DISK_CACHE_GB": "0.05"}
    assert small.keys() <= place.variables.keys()
    place.variables |= small
    text = place.run(next(c for c in commands() if "kvbm config" in c))
    assert "DYN_KVBM_DISK_CACHE_DIR" in text and "variable" in text
    place.serves(f"blockplane up --model {MODEL}", "--threads", "1")
    assert any((place.folder / "kv").iterdir())


CHECKS = {
    "cargo run --release -- up": lambda place, command: place.serves(command, "--threads", "1"),
    "blockplane chat": lambda place, command: place.run(command, "--max-tokens", "8", stdin="Hello!\n/stats\n/quit\n"),
    'blockplane chat --stats "Hello! Who are you?"': lambda place, command: place.run(command, "--max-tokens", "8"),
    # It is what runs this test.
    "tests/run": lambda place, command: place.run(command, "--help"),
    "blockplane up --model Qwen/Qwen3-0.6B": lambda place, command: from_the_hub(place, command, place.serves),
    f"blockplane up --model {MODEL}": lambda place, command: place.serves(command, "--threads", "1"),
    f"blockplane model fetch Qwen/Qwen3-0.6B --to {MODEL}": fetch,
    f"blockplane worker --role prefill --model {MODEL}": by_hand,
    f"blockplane worker --role decode --model {MODEL} &": by_hand,
    "blockplane frontend": by_hand,
    "blockplane launch deploy/two-nodes.toml --node a": two_nodes,
    "export DYN_KVBM_CPU_CACHE_GB=2 DYN_KVBM_DISK_CACHE_GB=8 DYN_KVBM_DISK_CACHE_DIR=/var/tmp/kv": export,
    f"blockplane kvbm config --model {MODEL}": lambda place, command: place.run(command),
    "blockplane doctor": lambda place, command: place.run(command),
    "blockplane man --to ~/.local/share/man/man1": lambda place, command: place.run(command.replace("~", str(place.folder))),
    # Without a GPU it says so and fails.
    "blockplane selftest gpu": lambda place, command: place.run(command, "--help"),
    "blockplane bench transfer": lambda place, command: place.run(command, "--quick", "--json"),
    "bench/gpu.sh": lambda place, command: place.run(command, "--help"),
    "blockplane bench kvbm": lambda place, command: place.run(command, "--quick", "--json"),
    "blockplane bench serve": lambda place, command: place.run(command, "--quick", "--url", URL),
    "blockplane bench vllm --model DIR": lambda place, command: place.run(command, "--help"),
    "bench/compare/run.py": lambda place, command: place.run(command, "--help"),
}


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_command(place, command):
    assert command in CHECKS, f"README.md says '{command}'; say in CHECKS how it is tried"
    CHECKS[command](place, command)


def test_every_check_stands_in_the_readme():
    assert set(CHECKS) == set(commands())


def test_every_file_that_the_readme_names_is_there():
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / target).exists(), target
