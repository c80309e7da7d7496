"""Runs the tests, in groups, and ends with one line: N passed, N failed, N skipped.

    tests/run                 unit, e2e, faults, hosts, python, gpu, rdma, vllm
    tests/run GROUP...        these groups
    tests/run --list          the groups

Everything is built once, in the release profile (docs/adr/0005-tests-run-in-release.md), by one cargo
command over the whole workspace: selecting packages would change the features of shared dependencies
and build them again. The test executables are then run directly. cargo-nextest is not used: it would
have to be built first on a bare machine, and the groups that take long wait for processes, which
running several tests at a time inside one executable does as well.

While cargo compiles, pip downloads: the Python environment goes to .cache/venv, the checkpoints that
are not committed are made in .cache/fixtures, the compiler of the CUDA kernels goes to .cache/nvrtc.
All are kept and only made again when what they are made from has changed.

A real vLLM goes to the user's cache, outside of the clone (vllm_env.py).

BLOCKPLANE_FIXTURES is set for all tests; BLOCKPLANE_NVRTC_DIR for the kernels' own; BLOCKPLANE_VLLM for those with a real vLLM;
BLOCKPLANE_BIN and BLOCKPLANE_URL (a running deployment) for the Python ones.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
import uuid

import vllm_env

ROOT = pathlib.Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"
VENV = CACHE / "venv"
FIXTURES = CACHE / "fixtures"
ASAN_PLATFORM = "x86_64-unknown-linux-gnu"
ASAN_TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "asan"
LOOM_TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "loom"
# Compiles the CUDA kernels without a GPU: an environment of its own, because it is large and only
# these tests need it.
NVRTC = CACHE / "nvrtc"
NVRTC_PACKAGE = "nvidia-cuda-nvrtc>=13,<14"
NVRTC_TESTS = "transfer kernels"
VM = [sys.executable, str(ROOT / "tests/rdma/vm.py")]
MAKE_FIXTURES = ROOT / "tests/fixtures/make_fixtures.py"
REQUIREMENTS = ROOT / "tests/requirements.txt"

GROUPS = {
    "unit": "every crate's own tests, the doc tests, and the shape of the repository",
    "e2e": "whole deployments of real processes",
    "faults": "processes killed, stopped and cut off; seeded schedules; leaks; liars",
    "hosts": "two hosts, as network namespaces, with a wire that is cut",
    "python": "the OpenAI client against a running deployment; the Python packages",
    "gpu": "GPUs, where there are any: blockplane selftest gpu",
    "rdma": "RDMA between two Soft-RoCE devices, in a virtual machine",
    "vllm": "a real vLLM on the processor behind blockplane; installs 6 GB once per machine",
}
# Named in the plan of the project; this version has nothing to run there.
PLANNED = {
    "web": "the web interface",
}
# Test targets that are groups of their own; every other target is `unit`.
OWN_GROUP = {
    "e2e": "e2e",
    "faults": "faults",
    "chaos": "faults",
    "leaks": "faults",
    "hostile": "faults",
    "hosts": "hosts",
    "vllm": "vllm",
    "vllm_events": "vllm",
    "rdma_layout": "rdma",
    "rdma_devices": "rdma",
}
# Tests at a time. They start several processes each and mostly wait for them. On 2 cores e2e took 26 s
# at 3 and 20 s at 6, faults 45 s at 2 and 30 s at 4, and all passed in either way.
CORES = len(os.sched_getaffinity(0))
# One vLLM computes on all cores, so those tests take turns.
THREADS = {"e2e": min(2 * CORES, 16), "faults": min(2 * CORES, 8), "hosts": min(2 * CORES, 8), "vllm": 1}
# Longest time of one test executable, in seconds. A hang is a failure, not a wait.
LIMIT_S = {"unit": 600, "e2e": 900, "faults": 900, "hosts": 300, "gpu": 600, "rdma": 900, "vllm": 1200}
# Every process that a test starts inherits it, so that none is left behind whatever happened.
MARK = f"BLOCKPLANE_TEST_RUN={uuid.uuid4()}"


@dataclasses.dataclass
class Tally:
    """Tests counted over all runners."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    failures: list = dataclasses.field(default_factory=list)

    def add(self, passed=0, failed=0, skipped=0):
        self.passed += passed
        self.failed += failed
        self.skipped += skipped

    def fail(self, what):
        self.failed += 1
        self.failures.append(what)

    def line(self):
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"


def main():
    parser = argparse.ArgumentParser(
        prog="tests/run",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__.splitlines()[0],
        epilog="groups:\n"
        + "".join(f"  {name:8} {text}\n" for name, text in GROUPS.items())
        + "planned, without tests in this version:\n"
        + "".join(f"  {name:8} {text}\n" for name, text in PLANNED.items()),
    )
    parser.add_argument("groups", nargs="*", metavar="GROUP", help="default: all that have tests")
    parser.add_argument("--list", action="store_true", help="list the groups and stop")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(GROUPS))
        return 0
    unknown = [name for name in arguments.groups if name not in GROUPS and name not in PLANNED]
    if unknown:
        known = ", ".join([*GROUPS, *PLANNED])
        parser.error(f"unknown group {', '.join(unknown)}; known: {known}")
    wanted = arguments.groups or list(GROUPS)
    for name in wanted:
        if name in PLANNED:
            print(f"{name}: this version has no such tests ({PLANNED[name]})")
    groups = [name for name in GROUPS if name in wanted]

    key, value = MARK.split("=")
    os.environ[key] = value
    os.environ["RUST_LIB_BACKTRACE"] = "0"
    tally = Tally()
    try:
        if groups:
            run_groups(groups, tally)
    except KeyboardInterrupt:
        tally.fail("interrupted")
    finally:
        sweep()
    for failure in tally.failures:
        print(f"FAILED {failure}")
    print(tally.line(), flush=True)
    if tally.failed:
        return 1
    # Like pytest and nextest: having run nothing is not a success.
    return 0 if tally.passed or tally.skipped else 4


def run_groups(groups, tally):
    install_tools()
    python = Background("python environment and fixtures", prepare_python)
    browser = Background("browser", find_browser)
    nvrtc = Background("compiler of the kernels", prepare_nvrtc) if "unit" in groups else None
    machine = Background("machine of the RDMA tests", prepare_rdma) if "rdma" in groups else None
    vllm = Background("vLLM", prepare_vllm) if "vllm" in groups else None
    executables = timed("build", build)
    python_ready = python.wait()
    browser_ready = browser.wait()
    nvrtc_ready = nvrtc is not None and nvrtc.wait()
    rdma_ready = machine is not None and machine.wait()
    vllm_ready = vllm is not None and vllm.wait()
    if executables is None:
        tally.fail("build")
        return
    if python_ready:
        os.environ["BLOCKPLANE_FIXTURES"] = str(FIXTURES)
    elif "unit" in groups:
        print(f"SKIPPED the checkpoints that are not committed: {python.reason}")
        tally.add(skipped=1)
    os.environ["BLOCKPLANE_BIN"] = str(executables["binary"])

    for group in groups:
        if group == "python":
            if python_ready:
                if not browser_ready:
                    print(f"the status page is not tested in a browser: {browser.reason}")
                timed("python", lambda: run_python(executables["binary"], tally))
                timed("python: packages", lambda: run_packages(tally))
            else:
                print(f"SKIPPED python: {python.reason}")
                tally.add(skipped=1)
            continue
        if group == "gpu":
            timed("gpu", lambda: run_gpu(executables["binary"], tally))
            continue
        if group == "rdma":
            if rdma_ready:
                suites = {name: path for name, _, path in executables["unit"]}
                run_rdma(executables["rdma"], tally)
                run_verbs(suites, tally)
            else:
                print(f"SKIPPED rdma: {machine.reason}")
                tally.add(skipped=1)
            continue
        if group == "hosts" and (reason := no_namespaces()):
            print(f"SKIPPED hosts: {reason}")
            tally.add(skipped=1)
            continue
        if group == "vllm" and not vllm_ready:
            print(f"SKIPPED vllm: it cannot be installed: {vllm.reason}")
            tally.add(skipped=1)
            continue
        for name, folder, path in executables[group]:
            if name == NVRTC_TESTS and not nvrtc_ready:
                print(f"SKIPPED {group}: {name}: no NVRTC: {nvrtc.reason}")
                tally.add(skipped=1)
                continue
            timed(f"{group}: {name}", lambda: run_executable(group, name, folder, path, tally))
        if group == "vllm" and python_ready:
            timed("vllm: NixlConnector", lambda: run_vllm_pair(tally))
            timed("vllm: BlockplaneConnector", lambda: run_vllm_connector(tally))
        if group == "unit":
            timed("unit: doc tests", lambda: run_doc_tests(tally))
            timed("unit: loom models", lambda: run_loom(tally))
            timed("unit: address sanitizer", lambda: run_asan(tally))


def install_tools():
    """System packages that the tests call."""
    missing = [
        package
        for tool, package in (("cc", "gcc"), ("curl", "curl"), ("ip", "iproute2"))
        if shutil.which(tool) is None
    ]
    if subprocess.run([sys.executable, "-c", "import ensurepip"], capture_output=True).returncode:
        missing.append("python3-venv")
    if not missing:
        return
    if os.geteuid() == 0 and shutil.which("apt-get"):
        print(f"installing {' '.join(missing)}", flush=True)
        subprocess.run(["apt-get", "update", "-qq"], check=False)
        subprocess.run(["apt-get", "install", "-y", "-qq", *missing], check=False)
    else:
        print(f"not installed, and this user cannot install it: {' '.join(missing)}")


def find_browser(log):
    """Installs Chromium where that is possible and it is missing."""
    if browser_path() is None and os.geteuid() == 0 and shutil.which("apt-get"):
        quiet(["apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium"], log)
    if browser_path() is None:
        raise RuntimeError("chromium is not installed, and this user cannot install it")


def browser_path():
    """The browser on this machine, if there is one."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


class Background:
    """Work beside the build. Its output is shown when it is waited for."""

    def __init__(self, name, work):
        self.name = name
        self.reason = ""
        self.log = []
        self.began = time.monotonic()
        self.seconds = 0.0
        self.thread = threading.Thread(target=self.run, args=(work,), daemon=True)
        self.thread.start()

    def run(self, work):
        try:
            work(self.log)
        except (OSError, subprocess.SubprocessError, RuntimeError) as error:
            self.reason = str(error)
        self.seconds = time.monotonic() - self.began

    def wait(self):
        self.thread.join()
        for line in self.log:
            print(line)
        print(f"-- {self.name}: {self.seconds:.0f} s, beside the build", flush=True)
        return not self.reason


def prepare_python(log):
    """.cache/venv and .cache/fixtures."""
    CACHE.mkdir(exist_ok=True)
    python = VENV / "bin/python"
    stamp = VENV / "requirements.sha256"
    wanted = digest(REQUIREMENTS)
    if not (python.exists() and stamp.exists() and stamp.read_text() == wanted):
        shutil.rmtree(VENV, ignore_errors=True)
        quiet([sys.executable, "-m", "venv", str(VENV)], log)
        uv = shutil.which("uv")
        if uv is None:
            # A sixth of pip's time for an environment of several GB, for one small wheel.
            quiet([str(python), "-m", "pip", "install", "-q", "uv"], log)
            uv = str(VENV / "bin/uv")
        install = [uv, "pip", "install", "-q", "--python", str(python), "-r", str(REQUIREMENTS)]
        quiet(install, log)
        stamp.write_text(wanted)
    make_fixtures(python, log)


def prepare_nvrtc(log):
    """.cache/nvrtc, and where the compiler is in it."""
    CACHE.mkdir(exist_ok=True)
    stamp = NVRTC / "package"
    if not (stamp.exists() and stamp.read_text() == NVRTC_PACKAGE):
        shutil.rmtree(NVRTC, ignore_errors=True)
        quiet([sys.executable, "-m", "venv", str(NVRTC)], log)
        quiet([str(NVRTC / "bin/python"), "-m", "pip", "install", "-q", NVRTC_PACKAGE], log)
        stamp.write_text(NVRTC_PACKAGE)
    found = list(NVRTC.glob("lib/python*/site-packages"))
    if not found:
        raise RuntimeError(f"no site-packages below {NVRTC}")
    os.environ["BLOCKPLANE_NVRTC_DIR"] = str(found[0])


def prepare_vllm(log):
    """A vLLM in the user's cache."""
    os.environ["BLOCKPLANE_VLLM"] = str(vllm_env.prepare(log))


def make_fixtures(python, log):
    """The checkpoints that are not committed."""
    if not MAKE_FIXTURES.exists():
        raise RuntimeError(f"{MAKE_FIXTURES} is missing")
    stamp = FIXTURES / "made-from.sha256"
    wanted = digest(MAKE_FIXTURES, REQUIREMENTS)
    if stamp.exists() and stamp.read_text() == wanted:
        return
    shutil.rmtree(FIXTURES, ignore_errors=True)
    FIXTURES.mkdir(parents=True)
    committed = MAKE_FIXTURES.parent
    code = "import make_fixtures; print(*make_fixtures.FIXTURES)"
    names = subprocess.run(
        [str(python), "-c", code], cwd=committed, capture_output=True, text=True, check=True
    ).stdout.split()
    # Readers look in one folder only.
    for name in names:
        if (committed / name / "config.json").exists():
            (FIXTURES / name).symlink_to(committed / name)
    missing = [name for name in names if not (FIXTURES / name).exists()]
    if missing:
        quiet([str(python), str(MAKE_FIXTURES), str(FIXTURES), *missing], log)
    stamp.write_text(wanted)


def quiet(command, log):
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if result.returncode:
        output = (result.stdout + result.stderr).strip().splitlines()
        log.extend(output[-30:])
        last = output[-1] if output else f"status {result.returncode}"
        raise RuntimeError(f"{' '.join(command[:6])} ...: {last}")
    log.extend(line for line in result.stdout.splitlines() if line.strip())


def build():
    """Builds everything that any group runs and says where it is; None when it does not build."""
    command = ["cargo", "build", "--release", "--workspace", "--lib", "--bins", "--tests"]
    command += ["--message-format", "json-render-diagnostics"]
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        return None
    found = {"unit": [], "e2e": [], "faults": [], "hosts": [], "rdma": [], "vllm": [], "binary": None}
    for line in result.stdout.splitlines():
        message = json.loads(line)
        path = message.get("executable")
        if message.get("reason") != "compiler-artifact" or not path:
            continue
        target = message["target"]
        folder = pathlib.Path(message["manifest_path"]).parent
        if message["profile"]["test"]:
            group = OWN_GROUP.get(target["name"], "unit")
            kind = "" if target["kind"] == ["lib"] else f" {target['name']}"
            found[group].append((f"{folder.name}{kind}", folder, path))
        elif target["kind"] == ["bin"] and target["name"] == "blockplane":
            found["binary"] = pathlib.Path(path)
    if found["binary"] is None:
        raise RuntimeError("cargo built no binary called blockplane")
    for group in OWN_GROUP.values():
        if not found[group]:
            raise RuntimeError(f"cargo built no test target called {group}")
    found["unit"].sort(key=lambda item: item[0])
    return found


def run_executable(group, name, folder, path, tally):
    """A test executable of Rust's own harness, or one that prints its results in the same form."""
    command = [path]
    if group in THREADS:
        command += ["--test-threads", str(THREADS[group])]
    if group == "vllm":
        # Without this group's preparation, as by `cargo test`, they are ignored.
        command += ["--include-ignored"]
    # Hundreds of unit tests pass; only the others are worth a line.
    code, output = stream(command, folder, LIMIT_S[group], hide=PASSED if group == "unit" else None)
    count_rust(f"{group}: {name}", code, output, tally)


def no_namespaces():
    """Why two hosts cannot be made here; nothing when they can."""
    name = f"blockplane-{os.getpid()}-probe"
    wire = ["link", "add", "wire", "netns", name, "type", "veth", "peer", "name", "other"]
    steps = [["netns", "add", name], [*wire, "netns", name]]
    try:
        for step in steps:
            result = subprocess.run(["ip", *step], capture_output=True, text=True, check=False)
            if result.returncode:
                return f"no network namespaces: {result.stderr.strip()}"
    except OSError as error:
        return f"no network namespaces: {error}"
    finally:
        if shutil.which("ip"):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
    return ""


def run_gpu(binary, tally):
    """The checks of the binary itself. It says what is missing on a machine without a GPU."""
    command = [str(binary), "selftest", "gpu"]
    code, output = stream(command, ROOT, LIMIT_S["gpu"])
    summary = re.search(r"^(\d+) passed, (\d+) failed, (\d+) skipped$", output, re.MULTILINE)
    if summary is None:
        tally.fail(f"gpu: selftest ended with status {code}, without a result")
        return
    passed, failed, skipped = map(int, summary.groups())
    tally.add(passed, failed, skipped)
    tally.failures += [f"gpu: {name}" for name in re.findall(r"^FAILED (.*)$", output, re.MULTILINE)]
    if code and not failed:
        tally.fail(f"gpu: selftest ended with status {code}")


def prepare_rdma(log):
    """The image of the machine, in the user's cache."""
    result = subprocess.run([*VM, "prepare"], capture_output=True, text=True, check=False)
    said = result.stderr.strip().splitlines()
    if result.returncode:
        raise RuntimeError(said[-1] if said else f"vm.py ended with status {result.returncode}")
    log.extend(said)


def run_rdma(executables, tally):
    """What runs in the machine. It is emulated: seconds there are not seconds here."""
    lossy = ["--delay", "1ms", "--loss", "1%"]
    pingpong = ["--share", str(ROOT / "tests/rdma"), "--", "sh", str(ROOT / "tests/rdma/pingpong.sh")]
    for name, options in [("tools", []), ("tools, 1 ms and 1 % loss", lossy)]:
        code, _ = timed(f"rdma: {name}", lambda: in_machine([*options, *pingpong]))
        if code:
            tally.fail(f"rdma: {name}: ended with status {code}")
        else:
            tally.add(passed=1)
    for name, folder, path in executables:
        command = [path, "--include-ignored"]
        if name.endswith("rdma_layout"):
            # A question to the compiler; only its headers are the machine's.
            image = subprocess.run([*VM, "prepare"], capture_output=True, text=True, check=True)
            headers = pathlib.Path(image.stdout.strip()) / "include"
            environment = dict(os.environ, BLOCKPLANE_RDMA_HEADERS=str(headers))
            code, output = timed(
                f"rdma: {name}", lambda: stream(command, folder, LIMIT_S["rdma"], environment)
            )
        else:
            code, output = timed(f"rdma: {name}", lambda: in_machine(["--", *command]))
        count_rust(f"rdma: {name}", code, output, tally)


def run_verbs(suites, tally):
    """The verbs lane: the conformance suite, also on a bad wire, real processes, and what the lane has
    of its own, which changes the machine and so runs alone."""
    suite = [suites["transfer transfer"], "--include-ignored", "--test-threads"]
    unit = [suites["transfer"], "--include-ignored"]
    bad_wire = ["--delay", "1ms", "--loss", "1%"]
    for name, options, command in [
        ("units", [], [*unit, "rdma::"]),
        ("conformance", [], [*suite, "2", "verbs::"]),
        ("conformance, 1 ms and 1 % loss", bad_wire, [*suite, "2", "--skip", "process::", "verbs::"]),
        ("alone", [], [*suite, "1", "--skip", "may_not_be_locked", "verbs_alone::"]),
        ("1 MiB of locked memory", ["--memlock", "1024"], [*suite, "1", "may_not_be_locked"]),
    ]:
        code, output = timed(f"rdma: verbs: {name}", lambda: in_machine([*options, "--", *command]))
        count_rust(f"rdma: verbs: {name}", code, output, tally)


def in_machine(arguments):
    command = [*VM, "run", "--timeout", str(LIMIT_S["rdma"] - 30), *arguments]
    return stream(command, ROOT, LIMIT_S["rdma"])


def run_doc_tests(tally):
    command = ["cargo", "test", "--release", "--workspace", "--doc"]
    code, output = stream(command, ROOT, LIMIT_S["unit"], hide=PASSED)
    count_rust("unit: doc tests", code, output, tally)


def run_loom(tally):
    """Every order in which threads can meet. The flag changes all crates below, so it has a target
    folder of its own; what is built there is small."""
    flags = dict(os.environ, RUSTFLAGS="--cfg loom")
    for crate in ["blockplane-transfer", "blockplane-kvbm"]:
        command = ["cargo", "test", "--release", "-p", crate, "--lib"]
        command += ["--no-default-features", "--target-dir", str(LOOM_TARGET), "loom_"]
        code, output = stream(command, ROOT, LIMIT_S["unit"], flags, hide=PASSED)
        count_rust(f"unit: loom models of {crate}", code, output, tally)


def run_asan(tally):
    """The lanes that touch other processes' memory, under AddressSanitizer. The flag changes all
    crates below: a target folder of its own, and no object stores, which would double the build."""
    sysroot = subprocess.run(["rustc", "--print", "sysroot"], capture_output=True, text=True, cwd=ROOT)
    libraries = pathlib.Path(sysroot.stdout.strip()) / "lib/rustlib" / ASAN_PLATFORM / "lib"
    if not list(libraries.glob("librustc*_rt.asan.a")):
        print(f"SKIPPED unit: address sanitizer: no sanitizer for {ASAN_PLATFORM} in this toolchain")
        tally.add(skipped=1)
        return
    # The flag needs leave on a stable compiler. Leaks are counted by tests of their own.
    flags = dict(
        os.environ,
        RUSTC_BOOTSTRAP="1",
        RUSTFLAGS="-Zsanitizer=address",
        ASAN_OPTIONS="detect_leaks=0",
    )
    command = ["cargo", "test", "--release", "-p", "blockplane-transfer", "--test", "transfer"]
    command += ["--no-default-features", "--target", ASAN_PLATFORM, "--target-dir", str(ASAN_TARGET)]
    command += ["--", "shm::", "memory::", "loopback::"]
    code, output = stream(command, ROOT, LIMIT_S["unit"], flags, hide=PASSED)
    count_rust("unit: address sanitizer", code, output, tally)


PASSED = re.compile(r"^test .* \.\.\. ok$|^$|^running \d+ tests?$")
SUMMARY = re.compile(r"^test result: \w+\. (\d+) passed; (\d+) failed;", re.MULTILINE)
LINE = re.compile(r"^test (\S+) .*\.\.\. (ok|FAILED)$", re.MULTILINE)
IGNORED = re.compile(r"^test (.+?) \.\.\. ignored(?:, (.*))?$", re.MULTILINE)
# Processes that other tests start from their own executable, by running one "test" of it.
HELPER = re.compile(r"\bstarted by\b|\bother tests start\b")

# Tests that another group runs.
ELSEWHERE = re.compile(r": tests/run \w+$")


def count_rust(name, code, output, tally):
    summaries = SUMMARY.findall(output)
    if summaries:
        passed = sum(int(summary[0]) for summary in summaries)
        failed = sum(int(summary[1]) for summary in summaries)
    else:
        results = [result for _, result in LINE.findall(output)]
        passed, failed = results.count("ok"), results.count("FAILED")
    skipped = 0
    for test, reason in IGNORED.findall(output):
        if not HELPER.search(reason) and not ELSEWHERE.search(reason):
            print(f"SKIPPED {name}: {test}: {reason or 'no reason given'}")
            skipped += 1
    tally.add(passed, failed, skipped)
    if failed:
        names = re.findall(r"^    (\S+)$", output.split("\nfailures:\n")[-1], re.MULTILINE)
        names = names or [test for test, result in LINE.findall(output) if result == "FAILED"]
        tally.failures.append(f"{name}: {' '.join(names)}")
    elif code or not (summaries or passed):
        # It did not get as far as a summary: crashed, killed, or out of time.
        tally.fail(f"{name}: ended with status {code}, without a result")


def run_python(binary, tally):
    """Starts a deployment and runs the Python tests against it."""
    log_path = CACHE / "python-deployment.log"
    with log_path.open("w") as log:
        deployment = subprocess.Popen(
            [str(binary), "up", "--http-port", "0", "--threads", "1"],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=ROOT,
        )
        try:
            url = first_url(deployment, log)
            if url is None:
                print(log_path.read_text())
                tally.fail("python: the deployment did not come up")
                return
            environment = dict(os.environ, BLOCKPLANE_URL=url, BLOCKPLANE_BIN=str(binary))
            if browser := browser_path():
                environment["BLOCKPLANE_BROWSER"] = browser
            command = [str(VENV / "bin/python"), "-m", "pytest", "-q", "-ra", "tests/python"]
            command += ["-p", "no:cacheprovider"]
            code, output = stream(command, ROOT, 300, environment)
            count_pytest(code, output, tally)
        finally:
            deployment.send_signal(signal.SIGINT)
            try:
                if deployment.wait(30):
                    tally.fail(f"python: the deployment ended with {deployment.returncode}")
            except subprocess.TimeoutExpired:
                deployment.kill()
                tally.fail("python: the deployment did not stop")


def install_packages(group, tally):
    """Builds the wheels and installs them into a folder, which is returned; None when that is not
    possible, which is counted."""
    built = subprocess.run(
        [sys.executable, "python/build"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if built.returncode:
        output = (built.stdout + built.stderr).strip()
        if "No matching distribution" in output or "Could not find a version" in output:
            print(f"SKIPPED {group}: packages: maturin cannot be had: {output.splitlines()[-1]}")
            tally.add(skipped=1)
        else:
            print(output[-4000:])
            tally.fail(f"{group}: packages: python/build")
        return None
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    site = target / "python-packages"
    shutil.rmtree(site, ignore_errors=True)
    wheels = sorted(map(str, (target / "wheels").glob("*.whl")))
    # Not into an environment, all of which are kept: they are as good as before.
    install = [str(target / "python-build/bin/python"), "-m", "pip", "install", "-q", "--no-deps"]
    code, _ = stream([*install, "--target", str(site), *wheels], ROOT, 120)
    if code:
        tally.fail(f"{group}: packages: the wheels cannot be installed")
        return None
    return site


def run_packages(tally):
    """The Python packages' own tests."""
    site = install_packages("python", tally)
    if site is None:
        return
    environment = dict(os.environ, PYTHONPATH=str(site))
    command = [str(VENV / "bin/python"), "-m", "pytest", "-q", "-ra", "python/tests"]
    command += ["-p", "no:cacheprovider"]
    code, output = stream(command, ROOT, 600, environment)
    count_pytest(code, output, tally)


def run_vllm_pair(tally):
    """Two real vLLM engines, prefill and decode, with their own NixlConnector on our `nixl`: the KV is
    pulled for every prompt, and the tokens are those of the decode engine alone."""
    site = install_packages("vllm", tally)
    if site is None:
        return
    python = pathlib.Path(os.environ["BLOCKPLANE_VLLM"]).with_name("python")
    command = [str(python), "python/bench/vllm_pd.py", "--model", str(FIXTURES / "qwen3")]
    code, _ = stream([*command, "--ours", str(site), "--rounds", "1"], ROOT, LIMIT_S["vllm"])
    if code:
        tally.fail("vllm: NixlConnector on our nixl")
    else:
        tally.add(passed=1)


def run_vllm_connector(tally):
    """A real vLLM whose KV cache is in our tiers: kept, found after a restart, damaged, not loaded."""
    site = install_packages("vllm", tally)
    if site is None:
        return
    python = pathlib.Path(os.environ["BLOCKPLANE_VLLM"]).with_name("python")
    command = [str(python), "python/tests/vllm_connector.py", "--model", str(FIXTURES / "qwen3")]
    code, output = stream([*command, "--ours", str(site)], ROOT, LIMIT_S["vllm"])
    passed = sum(line.startswith("ok  ") for line in output.splitlines())
    tally.add(passed=passed)
    if code or not passed:
        tally.fail("vllm: BlockplaneConnector")


def first_url(deployment, log):
    """Where it listens, from what it prints; None when it ends or takes too long."""
    found = []

    def read():
        for line in deployment.stdout:
            log.write(line)
            match = re.search(r"listening on (http://\S+?),", line)
            if match:
                found.append(match[1])

    threading.Thread(target=read, daemon=True).start()
    end = time.monotonic() + 60
    while not found and time.monotonic() < end and deployment.poll() is None:
        time.sleep(0.05)
    if not found:
        return None
    with urllib.request.urlopen(f"{found[0]}/health", timeout=10) as answer:
        answer.read()
    return found[0]


def count_pytest(code, output, tally):
    counts = dict.fromkeys(("passed", "failed", "skipped", "error", "errors"), 0)
    summary = output.strip().splitlines()[-1] if output.strip() else ""
    for number, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)", summary):
        counts[what] += int(number)
    failed = counts["failed"] + counts["error"] + counts["errors"]
    tally.add(counts["passed"], failed, counts["skipped"])
    tally.failures += re.findall(r"^(?:FAILED|ERROR) (.*)$", output, re.MULTILINE)
    # 5: nothing collected.
    if code and not failed:
        tally.fail(f"python: pytest ended with status {code}")


def stream(command, folder, limit_s, environment=None, hide=None):
    """Runs a command, shows its output as it comes but for lines that match `hide`, and returns
    (status, output)."""
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    late = threading.Timer(limit_s, process.kill)
    late.start()
    lines = []
    try:
        for line in process.stdout:
            lines.append(line)
            if hide is None or not hide.match(line.rstrip()):
                sys.stdout.write(line)
                sys.stdout.flush()
        code = process.wait()
    finally:
        if not late.is_alive():
            print(f"killed: {command[0]} took longer than {limit_s} s")
        late.cancel()
        process.kill()
    return code, "".join(lines)


def timed(name, work):
    print(f"== {name}", flush=True)
    began = time.monotonic()
    result = work()
    print(f"-- {name}: {time.monotonic() - began:.0f} s", flush=True)
    return result


def sweep():
    """Kills what the tests of this run have left behind, by the mark in its environment."""
    for folder in pathlib.Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        try:
            marked = MARK.encode() in (folder / "environ").read_bytes().split(b"\0")
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if marked and command:
                os.kill(int(folder.name), signal.SIGKILL)
                print(f"killed process {folder.name}, left behind by a test: {command}")
        except OSError:
            continue


def digest(*paths):
    sha = hashlib.sha256()
    for path in paths:
        sha.update(path.read_bytes())
    return sha.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
