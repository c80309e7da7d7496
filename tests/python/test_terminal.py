"""`blockplane up` and `blockplane chat` as a person at a terminal sees them.

    BLOCKPLANE_BIN=target/release/blockplane python -m pytest tests/python/test_terminal.py

Needs the package pytest. Makes no assumption about what the model says.
"""

import os
import pty
import re
import select
import signal
import subprocess
import time

import pytest

BINARY = os.environ.get("BLOCKPLANE_BIN")
LIMIT_S = 60
LONG = "Please tell me, in a few plain words, how blocks of a key-value cache move between workers."

if not BINARY:
    pytest.skip("BLOCKPLANE_BIN names no binary", allow_module_level=True)


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, *arguments):
        self.seen = ""
        self.process, self.terminal = pty.fork()
        if self.process == 0:
            os.environ["TERM"] = "xterm"
            os.execv(BINARY, [BINARY, *arguments])

    def until(self, pattern, after=0):
        """Reads until the pattern appears behind a place; returns the match."""
        end = time.monotonic() + LIMIT_S
        while not (match := re.compile(pattern).search(self.seen, after)):
            ready, _, _ = select.select([self.terminal], [], [], 0.2)
            assert time.monotonic() < end, f"no {pattern!r} in:\n{self.seen[after:]}"
            if ready:
                self.seen += os.read(self.terminal, 65536).decode(errors="replace")
        return match

    def type(self, text):
        """Types a text; returns the place behind all that was shown before it."""
        place = len(self.seen)
        os.write(self.terminal, text.encode())
        return place

    def end(self, number=None):
        """The exit status, after a signal if there is one to send."""
        if number:
            os.kill(self.process, number)
        end = time.monotonic() + LIMIT_S
        while time.monotonic() < end:
            ready, _, _ = select.select([self.terminal], [], [], 0.05)
            try:
                self.seen += os.read(self.terminal, 65536).decode(errors="replace") if ready else ""
            except OSError:
                pass
            ended, status = os.waitpid(self.process, os.WNOHANG)
            if ended:
                self.process = None
                return os.waitstatus_to_exitcode(status)
        raise AssertionError(f"it does not end:\n{self.seen}")


@pytest.fixture(scope="module")
def up():
    shown = Terminal("up", "--http-port", "0", "--threads", "1")
    try:
        yield shown
    finally:
        if shown.process:
            os.kill(shown.process, signal.SIGKILL)


@pytest.fixture(scope="module")
def url(up):
    return up.until(r"listening on (http://\S+?),")[1]


def chat(url, *arguments, **options):
    command = [BINARY, "chat", "--url", url, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False, **options)


def test_up_shows_progress_roles_and_figures(up, url):
    for role in ("frontend-0", "prefill-0", "decode-0"):
        up.until(rf"{role}\s+(ready|serving)")
    up.until(r"loading +\S+ layer \d+ of \d+")
    answered = chat(url, "--max-tokens", "8", LONG)
    assert answered.returncode == 0, answered.stderr
    place = len(up.seen)
    up.until(r"\d+ in flight, [1-9]\d* requests.* tokens/s out, .*TTFT \d", place)
    up.until(r"KV moved [1-9]\d* blocks, [\d.]+ GB/s \| reused G1", place)


def test_a_conversation_in_a_terminal(url):
    talk = Terminal("chat", "--url", url, "--max-tokens", "8")
    place = talk.until(r"/help lists what can be done").end()
    talk.until("> ", place)
    place = talk.type("/stats\r")
    talk.until("nothing was answered yet", place)
    place = talk.type(f"{LONG}\r")
    talk.until(r"\n.*> ", place + len(LONG) + 20)
    place = talk.type("/stats\r")
    talk.until(r"prompt +\d+ tokens, .*reused", place)
    talk.until(r"moved +\S", place)
    talk.until(r"time +TTFT [\d.]+ ms, ITL ", place)
    place = talk.type("/nonsense\r")
    talk.until("/nonsense is not known here", place)
    talk.until("/quit", place)
    talk.type("\x04")
    assert talk.end() == 0


def test_a_conversation_through_a_pipe_remembers_what_was_said(url):
    script = f"{LONG}\n/stats\nAnd again, please.\n/stats\n/new\nAnd again, please.\n/stats\n/quit\nnever said\n"
    done = chat(url, "--max-tokens", "4", input=script)
    assert done.returncode == 0, done.stderr
    prompts = [int(tokens) for tokens in re.findall(r"^prompt +(\d+) tokens", done.stdout, re.MULTILINE)]
    assert len(prompts) == 3, done.stdout
    first, second, fresh = prompts
    assert second > first > fresh, prompts
    assert "from G1" in done.stdout, "the second prompt begins with the first"


def test_what_cannot_be_done_is_said(url):
    unknown = chat(url, "--model", "no-such-model", "hello")
    assert unknown.returncode == 1
    assert "has no model 'no-such-model'; accepted: " in unknown.stderr
    nobody = chat("http://127.0.0.1:9", "hello")
    assert nobody.returncode == 1
    assert "blockplane up" in nobody.stderr and "127.0.0.1:9" in nobody.stderr
    tls = chat("https://127.0.0.1", "hello")
    assert tls.returncode == 1
    assert "accepted: http://HOST" in tls.stderr
    too_long = chat(url, "--max-tokens", "100000000", "hello")
    assert too_long.returncode == 1
    assert "max_tokens" in too_long.stderr


def test_ctrl_c_stops_an_answer_and_a_second_conversation_goes_on(url):
    talk = Terminal("chat", "--url", url)
    talk.until("> ")
    place = talk.type("Say as much as you can.\r")
    time.sleep(0.5)
    os.kill(talk.process, signal.SIGINT)
    talk.until(r"\n.*> ", place + 30)
    place = talk.type("/stats\r")
    talk.until(r"time +TTFT", place)
    talk.type("/quit\r")
    assert talk.end() == 0


def test_ctrl_c_ends_up_with_the_screen_in_order(up, url):
    assert up.end(signal.SIGINT) == 0
    assert up.seen.rstrip().endswith("stopped")
