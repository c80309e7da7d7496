"""`--model ID` and `blockplane model fetch` against a stand-in of the Hugging Face hub.

    BLOCKPLANE_BIN=target/release/blockplane python -m pytest tests/python/test_hub.py

The stand-in has the hub's file layout: small files by git's hash, weights by redirect to another path with
their SHA-256, ranges, tokens, gated models. Needs the package pytest.
"""

import hashlib
import http.server
import json
import os
import pathlib
import re
import signal
import subprocess
import threading
import urllib.request

import pytest

BINARY = os.environ.get("BLOCKPLANE_BIN")
CHECKPOINT = pathlib.Path(__file__).parents[1] / "fixtures/qwen3"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
ID = "some-org/Tiny-Qwen3_0.1"
LIMIT_S = 60

if not BINARY:
    pytest.skip("BLOCKPLANE_BIN names no binary", allow_module_level=True)


class Hub(http.server.ThreadingHTTPServer):
    """What the hub would say, and what it was asked."""

    daemon_threads = True

    def __init__(self, model=ID):
        super().__init__(("127.0.0.1", 0), Answer)
        self.model = model
        self.files = {path.name: path.read_bytes() for path in CHECKPOINT.iterdir() if path.is_file()}
        self.files["README.md"] = b"not wanted"
        self.files["pytorch_model.bin"] = b"not wanted either"
        self.token = None
        self.gated = False
        self.cuts = 0
        self.spoilt = 0
        self.asked = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def downloads(self):
        """Names and first bytes of the files that were sent, but for looks at their length."""
        return [(name, first) for name, first, last in self.asked if last != 0]


class Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):  # noqa: N802
        hub = self.server
        if hub.token and self.headers.get("authorization") != f"Bearer {hub.token}":
            return self.refuse(401)
        if hub.gated:
            return self.refuse(403)
        if self.path == f"/api/models/{hub.model}/revision/main":
            listed = {"sha": COMMIT, "siblings": [{"rfilename": name} for name in sorted(hub.files)]}
            return self.send(200, json.dumps(listed).encode(), {})
        if match := re.fullmatch(rf"/{hub.model}/resolve/{COMMIT}/(.+)", self.path):
            name = match[1]
            if name not in hub.files:
                return self.refuse(404)
            body = hub.files[name]
            if name.endswith(".safetensors"):
                headers = {"x-repo-commit": COMMIT, "location": f"/cdn/{name}",
                           "x-linked-etag": f'"{hashlib.sha256(body).hexdigest()}"'}
                # The real one sends to another host.
                headers["location"] = f"{hub.url}/cdn/{name}"
                return self.send(302, b"", headers)
            tag = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
            return self.file(name, {"x-repo-commit": COMMIT, "etag": f'"{tag}"'})
        if match := re.fullmatch(r"/cdn/(.+)", self.path):
            return self.file(match[1], {})
        return self.refuse(404)

    def file(self, name, headers):
        hub, body = self.server, self.server.files[name]
        first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["range"]).groups()
        first, last = int(first), int(last or len(body) - 1)
        hub.asked.append((name, first, last))
        piece = body[first : last + 1]
        headers["content-range"] = f"bytes {first}-{last}/{len(body)}"
        weights = name.endswith(".safetensors") and last > 0
        if weights and hub.spoilt:
            hub.spoilt -= 1
            piece = bytes([piece[0] ^ 1]) + piece[1:]
        if weights and hub.cuts:
            hub.cuts -= 1
            self.send(206, piece[: len(piece) // 2], headers, length=len(piece))
            self.close_connection = True
            return
        self.send(206, piece, headers)

    def send(self, status, body, headers, length=None):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(length or len(body)))
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, status):
        self.send(status, b'{"error": "no"}', {})

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    started = Hub()
    yield started
    started.shutdown()
    started.server_close()


@pytest.fixture
def variables(hub, tmp_path):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return kept | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}


def fetch(variables, *arguments):
    command = [BINARY, "model", "fetch", ID, *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=LIMIT_S, check=False)


def snapshot(tmp_path):
    return tmp_path / f"hf/hub/models--{ID.replace('/', '--')}/snapshots/{COMMIT}"


def check_files(folder):
    for path in CHECKPOINT.iterdir():
        if path.suffix in (".json", ".safetensors", ".jinja"):
            assert (folder / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_model_is_fetched_once_into_the_usual_cache(hub, variables, tmp_path):
    done = fetch(variables)
    assert done.returncode == 0, done.stderr
    check_files(snapshot(tmp_path))
    names = {name for name, _ in hub.downloads()}
    assert "README.md" not in names and "pytorch_model.bin" not in names
    refs = snapshot(tmp_path).parents[1] / "refs/main"
    assert refs.read_text() == COMMIT
    hub.asked.clear()
    again = fetch(variables, "--to", str(tmp_path / "carried"))
    assert again.returncode == 0, again.stderr
    assert hub.asked == []
    check_files(tmp_path / "carried")
    assert not any(path.is_symlink() for path in (tmp_path / "carried").iterdir())


def test_up_serves_a_model_by_its_id(variables, tmp_path):
    command = [BINARY, "up", "--model", ID, "--http-port", "0", "--threads", "1", "--mode", "agg"]
    with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as up:
        timer = threading.Timer(LIMIT_S, up.kill)
        timer.start()
        try:
            shown = (re.search(r"^listening on (http://\S+?),", line) for line in up.stdout)
            url = next(filter(None, shown))[1]
            with urllib.request.urlopen(f"{url}/v1/models", timeout=LIMIT_S) as answer:
                assert json.load(answer)["data"][0]["id"] == ID
        finally:
            up.send_signal(signal.SIGINT)
            up.stdout.read()
            assert up.wait(LIMIT_S) == 0
            timer.cancel()


def test_what_was_downloaded_is_not_downloaded_again(hub, variables, tmp_path):
    # More breaks than one run tries again.
    hub.cuts = 5
    broken = fetch(variables)
    assert broken.returncode == 1
    assert "model.safetensors" in broken.stderr
    offline = fetch(variables | {"HF_HUB_OFFLINE": "1"})
    assert offline.returncode == 1, "half a model is none"
    hub.asked.clear()
    hub.cuts = 0
    whole = fetch(variables)
    assert whole.returncode == 0, whole.stderr
    check_files(snapshot(tmp_path))
    starts = [first for name, first in hub.downloads() if name.endswith(".safetensors")]
    assert starts and min(starts) > 0, starts


def test_wrong_contents_are_never_kept(hub, variables, tmp_path):
    hub.spoilt = 10
    wrong = fetch(variables)
    assert wrong.returncode == 1
    assert "wrong contents" in wrong.stderr and "model.safetensors" in wrong.stderr
    assert not (snapshot(tmp_path) / "model.safetensors").exists()
    hub.spoilt = 1
    right = fetch(variables)
    assert right.returncode == 0, right.stderr
    check_files(snapshot(tmp_path))


def test_offline_means_the_cache_alone(hub, variables, tmp_path):
    offline = variables | {"HF_HUB_OFFLINE": "1"}
    nothing = fetch(offline)
    assert nothing.returncode == 1
    assert "HF_HUB_OFFLINE" in nothing.stderr
    assert fetch(variables).returncode == 0
    hub.asked.clear()
    there = fetch(offline)
    assert there.returncode == 0, there.stderr
    assert str(snapshot(tmp_path)) in there.stdout
    assert hub.asked == []
    (snapshot(tmp_path) / "tokenizer.json").unlink()
    missing = fetch(offline)
    assert missing.returncode == 1 and "tokenizer.json is missing" in missing.stderr


def test_a_hub_out_of_reach_leaves_the_cache(hub, variables):
    unreachable = variables | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    nothing = fetch(unreachable)
    assert nothing.returncode == 1
    assert "127.0.0.1:9" in nothing.stderr
    assert fetch(variables).returncode == 0
    there = fetch(unreachable)
    assert there.returncode == 0, there.stderr
    assert "going on with what is cached" in there.stderr


def test_tokens_and_terms(hub, variables, tmp_path):
    hub.token = "secret"
    private = fetch(variables)
    assert private.returncode == 1
    assert "HF_TOKEN" in private.stderr and ID in private.stderr
    assert fetch(variables | {"HF_TOKEN": "secret"}).returncode == 0
    hub.gated = True
    gated = fetch(variables | {"HF_TOKEN": "secret", "HF_HOME": str(tmp_path / "other")})
    assert gated.returncode == 1
    assert f"accept its terms at {hub.url}/{ID}" in gated.stderr
    # The token of a login.
    hub.gated = False
    (tmp_path / "logged").mkdir()
    (tmp_path / "logged/token").write_text("secret\n")
    assert fetch(variables | {"HF_HOME": str(tmp_path / "logged"), "HF_TOKEN": ""}).returncode == 0


def test_names_that_are_no_models(variables):
    command = [BINARY, "model", "fetch", "../etc/passwd"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 1
    assert "ORGANISATION/NAME" in done.stderr
