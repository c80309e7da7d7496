#!/usr/bin/env python3
"""Runs a command in a throw-away virtual machine that has two RDMA devices.

    vm.py prepare                       make the image; prints its folder
    vm.py run [options] -- COMMAND...   boot, run, power off; ends with the status of COMMAND

The devices are Soft-RoCE (rdma_rxe, in the kernel): rxe0 on 10.9.0.10 and rxe1 on 10.9.0.11, the two
ends of a veth pair, so that what they say to each other crosses a network device that can delay and
lose. GID 0 of each is the IPv6 link-local one and GID 1 the IPv4 one, both RoCE v2.

Nothing is installed and nothing needs root: the packages of Debian 12 (kernel, QEMU, libraries,
perftest) are fetched by apt-get with lists of its own, unpacked below

    ${XDG_CACHE_HOME:-~/.cache}/blockplane/rdma-vm-DIGEST

and used from there; the digest covers what the image is made of. QEMU emulates the processor (TCG),
which works without /dev/kvm and takes about 3 s up to the first instruction of COMMAND.

Status: that of COMMAND; 124 when it took too long; 125 when the machine could not be made or failed.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import lzma
import os
import pathlib
import platform
import re
import shlex
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import threading

FAILED, TIMED_OUT = 125, 124
MIRROR = "http://deb.debian.org/debian"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
RELEASE = "bookworm"
# The release that the metapackage of the kernel is taken from.
KERNELS = {"6.12": "bookworm-backports", "6.1": "bookworm"}
GUEST = """busybox-static iproute2 ibverbs-providers librdmacm1 ibverbs-utils rdmacm-utils perftest
 libucx0 ucx-utils libgcc-s1 libstdc++6""".split()
# For the C compiler only: what the layouts of the bindings are compared with.
HEADERS = ["libibverbs-dev", "libucx-dev"]
EMULATOR = ["qemu-system-x86"]
# crc32_generic is asked for by name when a Soft-RoCE device is made, which no dependency shows.
MODULES = """virtio_pci 9p 9pnet_virtio crc32_generic rdma_rxe ib_uverbs rdma_ucm veth
 sch_netem""".split()
# Not needed to run anything of GUEST.
SHED = "usr/share usr/include usr/games var boot etc/init.d usr/lib/x86_64-linux-gnu/perl-base".split()
# Packages and what is unpacked from them, with room to spare.
DISK_BYTES = 1 << 30
PREPARE_S = 600

# Runs as the first process. What to do lies in /job, so that the image need not change for it.
INIT = """#!/usr/bin/busybox sh
/usr/bin/busybox mount -t proc proc /proc
/usr/bin/busybox mount -t sysfs sysfs /sys
/usr/bin/busybox mount -t devtmpfs dev /dev
export PATH=/usr/sbin:/usr/bin HOME=/root
while read -r module; do insmod "/modules/$module" || echo "vm: no module $module"; done < /modules/order
mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,rw job /job || echo "vm: no /job"
sh /job/start
sync
echo o > /proc/sysrq-trigger
sleep 60
"""

START = """
# By path: the shell prefers its own `ip`, which knows less.
fail() { echo "vm: $*"; exit; }
mkdir -p /dev/shm /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /tmp
mount -t devpts devpts /dev/pts
/bin/ip link set lo up
echo 1 > /proc/sys/net/ipv4/conf/all/accept_local
for each in all default; do echo 0 > /proc/sys/net/ipv4/conf/$each/rp_filter; done
/bin/ip link add v0 type veth peer name v1
for i in 0 1; do
  /bin/ip addr add 10.9.0.1$i/24 dev v$i
  /bin/ip link set v$i up mtu 4200
done
# Both ends are in one namespace: without these, neighbours would be looked for on the wrong end.
/bin/ip neigh replace 10.9.0.11 lladdr "$(cat /sys/class/net/v1/address)" dev v0
/bin/ip neigh replace 10.9.0.10 lladdr "$(cat /sys/class/net/v0/address)" dev v1
for i in 0 1; do
  rdma link add rxe$i type rxe netdev v$i || fail "no rxe$i"
  gid=/sys/class/infiniband/rxe$i/ports/1/gids/1
  for t in 0 1 2 3 4 5 6 7 8 9; do
    grep -q '[1-9a-f]' $gid 2>/dev/null && break
    sleep 0.1
  done
done
"""

# What the kernel prints at the end whatever it is told.
FAREWELL = re.compile(r"^\[ *\d+\.\d+\] (sysrq|reboot): ")


class Unable(Exception):
    """Why there is no machine here."""


def main():
    parser = argparse.ArgumentParser(
        prog="vm.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
    )
    commands = parser.add_subparsers(dest="action", required=True)
    prepare = commands.add_parser("prepare", help="make the image, unless it is there; print its folder")
    run = commands.add_parser("run", help="run a command in the machine")
    for command in [prepare, run]:
        command.add_argument("--kernel", choices=KERNELS, default="6.12", help="default: 6.12")
    run.add_argument("--timeout", type=float, default=180, metavar="S", help="for everything; default 180")
    run.add_argument("--share", action="append", default=[], metavar="DIR", help="visible there at the same path, read-only; the folder of COMMAND always is")
    run.add_argument("--cwd", metavar="DIR", help="where COMMAND runs: a shared folder; default: /tmp, which is memory of the machine")
    run.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
    run.add_argument("--delay", metavar="TIME", help="on the way from each device, like 1ms")
    run.add_argument("--loss", metavar="PERCENT", help="of the packets of each device, like 1%%")
    run.add_argument("--memlock", metavar="KIB", help="run COMMAND as an ordinary user who may lock this much memory")
    run.add_argument("--memory", type=int, default=768, metavar="MIB", help="of the machine; default 768")
    run.add_argument("--log", action="store_true", help="print what the kernel says")
    run.add_argument("command", nargs="+", metavar="COMMAND")
    arguments = parser.parse_args()
    try:
        image = image_of(arguments.kernel)
        if arguments.action == "prepare":
            print(image)
            return 0
        return boot(image, arguments)
    except (Unable, OSError, subprocess.SubprocessError) as error:
        print(f"vm.py: {error}", file=sys.stderr)
        return FAILED


def why_not():
    """What is missing to make and to run the machine; nothing when it can be tried."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"the machine is for x86_64 Linux, this is {platform.machine()} {platform.system()}"
    missing = [tool for tool in ("apt-get", "apt-cache", "dpkg-deb", "tar") if not shutil.which(tool)]
    if missing:
        return f"{', '.join(missing)} not found: the image is made of Debian packages"
    if not os.path.exists(KEYRING):
        return f"{KEYRING} not found (package debian-archive-keyring): packages could not be checked"
    return ""


def cache_folder():
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return pathlib.Path(base) / "blockplane"


def image_of(kernel):
    """The folder of the image, made first if need be."""
    parts = [MIRROR, RELEASE, KERNELS, kernel, GUEST, HEADERS, EMULATOR, MODULES, SHED, INIT, 1]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    folder = cache_folder() / f"rdma-vm-{digest}"
    if folder.is_dir():
        return folder
    if reason := why_not():
        raise Unable(reason)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / "rdma-vm.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.is_dir():
            return folder
        free = shutil.disk_usage(folder.parent).free
        if free < DISK_BYTES:
            raise Unable(f"{free >> 20} MiB free in {folder.parent}, {DISK_BYTES >> 20} needed")
        work = pathlib.Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
        try:
            make_image(work, kernel)
            shutil.rmtree(work / "apt")
            work.chmod(0o755)
            work.rename(folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return folder


def make_image(work, kernel):
    apt = Apt(work / "apt")
    apt.update([RELEASE, KERNELS[kernel]])
    image = apt.kernel(KERNELS[kernel])
    print(f"vm.py: fetching {image}, QEMU and libraries", file=sys.stderr)
    unpack(apt.fetch_one(image), work / "kernel")
    unpack(apt.fetch_all(GUEST), work / "root")
    unpack(apt.fetch_all(GUEST + HEADERS), work / "headers")
    unpack(apt.fetch_all(EMULATOR), work / "qemu")
    (work / "headers/usr/include").rename(work / "include")
    shutil.rmtree(work / "headers")
    for name in SHED:
        remove(work / "root" / name)
    for name in ["usr/share/doc", "usr/share/locale", "usr/share/man", "var"]:
        remove(work / "qemu" / name)
    root = work / "root"
    take_modules(work / "kernel", root / "modules")
    (vmlinuz,) = (work / "kernel/boot").glob("vmlinuz-*")
    shutil.move(vmlinuz, work / "vmlinuz")
    shutil.rmtree(work / "kernel")
    for name in ["proc", "sys", "dev", "tmp", "run", "root", "job", "etc"]:
        (root / name).mkdir(exist_ok=True)
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/tmp:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\nuser:x:1000:\n")
    (root / "etc/hosts").write_text("127.0.0.1 localhost\n10.9.0.10 rxe0\n10.9.0.11 rxe1\n")
    listed = subprocess.run([root / "usr/bin/busybox", "--list"], capture_output=True, text=True, check=True)
    for name in listed.stdout.split():
        for folder in ["usr/bin", "usr/sbin"]:
            if os.path.lexists(root / folder / name):
                break
        else:
            (root / "usr/bin" / name).symlink_to("busybox")
    (root / "init").write_text(INIT)
    (root / "init").chmod(0o755)
    write_cpio(root, work / "initramfs")
    shutil.rmtree(root)
    (work / "kernel-version").write_text(f"{image.removeprefix('linux-image-')}\n")


class Apt:
    """apt-get with lists, a cache and a dpkg status of its own, so that it neither needs rights nor
    depends on what this machine has."""

    def __init__(self, folder):
        self.folder = folder
        for name in ["lists/partial", "cache"]:
            (folder / name).mkdir(parents=True)
        (folder / "status").touch()
        settings = {
            "Dir::Etc::sourcelist": folder / "sources.list",
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::State::lists": folder / "lists",
            "Dir::State::status": folder / "status",
            "Dir::Cache": folder / "cache",
            "APT::Architecture": "amd64",
            "APT::Sandbox::User": "",
            "Acquire::Languages": "none",
            "Acquire::Retries": "3",
            # Kept: some installations remove packages as soon as they are unpacked.
            "Binary::apt-get::APT::Keep-Downloaded-Packages": "true",
        }
        self.options = [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]

    def call(self, tool, *arguments, cwd=None):
        command = [tool, *self.options, "-q", *arguments]
        environment = dict(os.environ, LC_ALL="C", DEBIAN_FRONTEND="noninteractive")
        result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=PREPARE_S)
        if result.returncode:
            said = [line for line in (result.stderr + result.stdout).splitlines() if line.strip()]
            raise Unable(f"{tool} {' '.join(arguments[:3])}: {said[0] if said else result.returncode}")
        return result.stdout

    def update(self, releases):
        lines = [f"deb [arch=amd64 signed-by={KEYRING}] {MIRROR} {release} main\n" for release in dict.fromkeys(releases)]
        (self.folder / "sources.list").write_text("".join(lines))
        self.call("apt-get", "update")

    def kernel(self, release):
        """The package of the newest kernel of a release."""
        out = self.call("apt-cache", "-o", f"APT::Default-Release={release}", "depends", "linux-image-amd64")
        found = re.search(r"Depends: (linux-image-\S+-amd64)", out)
        if not found:
            raise Unable(f"{release} has no kernel for amd64")
        return found[1]

    def fetch_one(self, package):
        folder = self.folder / "one"
        folder.mkdir()
        self.call("apt-get", "download", package, cwd=folder)
        return sorted(folder.glob("*.deb"))

    def fetch_all(self, packages):
        """Packages and all that they depend on."""
        archives = pathlib.Path(tempfile.mkdtemp(prefix="archives.", dir=self.folder))
        (archives / "partial").mkdir()
        arguments = ["--yes", "--no-install-recommends", "--download-only", *packages]
        self.call("apt-get", "-o", f"Dir::Cache::archives={archives}", "install", *arguments)
        return sorted(archives.glob("*.deb"))


def unpack(packages, folder):
    for name in ["bin", "sbin", "lib", "lib64"]:
        (folder / "usr" / name).mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(f"usr/{name}")
    for package in packages:
        with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE) as reader:
            # Packages of Debian 12 still name /lib, which is a link to /usr/lib.
            subprocess.run(
                ["tar", "-x", "--keep-directory-symlink", "--no-same-owner", "-C", folder, "-f", "-"],
                stdin=reader.stdout,
                check=True,
            )
        if reader.returncode:
            raise Unable(f"cannot unpack {package}")


def remove(path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def take_modules(kernel, to):
    """The modules that are needed, unpacked, and the order in which they can be loaded."""
    packed = {}
    for path in kernel.rglob("*.ko*"):
        packed[path.name.split(".")[0].replace("-", "_")] = path
    to.mkdir()
    order = []

    def take(name):
        # What is not there is built in.
        if name in order or name not in packed:
            return
        path = packed[name]
        data = lzma.open(path).read() if path.suffix == ".xz" else path.read_bytes()
        needs = re.search(rb"\0depends=([^\0]*)\0", data)
        for need in needs[1].decode().split(",") if needs else []:
            take(need.replace("-", "_"))
        (to / name).write_bytes(data)
        order.append(name)

    for name in MODULES:
        take(name)
    if "rdma_rxe" not in order:
        raise Unable("this kernel has no rdma_rxe")
    (to / "order").write_text("".join(f"{name}\n" for name in order))


def write_cpio(root, to):
    """A folder as an initramfs (cpio, format newc), everything owned by root."""
    with open(to, "wb") as out:

        def entry(name, mode, data, inode):
            name = name.encode() + b"\0"
            fields = [inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name), 0]
            out.write(b"070701" + b"".join(b"%08x" % field for field in fields) + name)
            out.write(b"\0" * (-out.tell() % 4) + data)
            out.write(b"\0" * (-out.tell() % 4))

        names = []
        for folder, folders, files in os.walk(root):
            names += [os.path.join(folder, name) for name in folders + files]
        # A folder comes before what lies in it.
        for inode, path in enumerate(sorted(names), 1):
            mode = os.lstat(path).st_mode
            if stat.S_ISLNK(mode):
                data = os.readlink(path).encode()
            else:
                data = pathlib.Path(path).read_bytes() if stat.S_ISREG(mode) else b""
            entry(os.path.relpath(path, root), mode, data, inode)
        entry("TRAILER!!!", 0, b"", 0)


def boot(image, arguments):
    command = arguments.command
    shares = [os.path.realpath(share) for share in arguments.share]
    if "/" in command[0]:
        program = os.path.realpath(command[0])
        shares.append(os.path.dirname(program))
        command = [program, *command[1:]]
    # One inside another is visible already.
    shares = sorted({share for share in shares if not any(inside(share, other) for other in shares)})
    with tempfile.TemporaryDirectory(prefix="rdma-vm-") as job:
        pathlib.Path(job, "start").write_text(start_script(arguments, command, shares))
        late, kernel_failed = run_qemu(image, arguments, job, shares)
        status = pathlib.Path(job, "status")
        if status.exists():
            return int(status.read_text())
    if late:
        print(f"vm.py: killed after {arguments.timeout:g} s", file=sys.stderr)
        return TIMED_OUT
    print(f"vm.py: the machine ended without a result (QEMU: {kernel_failed})", file=sys.stderr)
    return FAILED


def inside(path, other):
    return path != other and os.path.commonpath([path, other]) == other


def start_script(arguments, command, shares):
    lines = [START]
    for index, share in enumerate(shares):
        at = shlex.quote(share)
        lines.append(f"mkdir -p {at}")
        # Files do not change while the machine runs.
        options = "trans=virtio,version=9p2000.L,msize=512000,ro,cache=loose"
        lines.append(f"mount -t 9p -o {options} share{index} {at} || fail no {at}")
    impair = [f"{name} {value}" for name, value in [("delay", arguments.delay), ("loss", arguments.loss)] if value]
    if impair:
        for i in range(2):
            lines.append(f"/sbin/tc qdisc add dev v{i} root netem limit 100000 {' '.join(impair)} || fail no netem")
    for pair in arguments.env:
        name, _, value = pair.partition("=")
        lines.append(f"export {name}={shlex.quote(value)}")
    lines.append(f"cd {shlex.quote(arguments.cwd or '/tmp')}")
    run = shlex.join(command)
    if arguments.memlock:
        lines += ["chmod 666 /dev/infiniband/*", "chmod 1777 /tmp /dev/shm", f"ulimit -l {int(arguments.memlock)}"]
        run = f"su user -c {shlex.quote(run)}"
    else:
        lines.append("ulimit -l unlimited")
    lines += [f"{run} < /dev/null", "echo $? > /job/status"]
    return "\n".join(lines) + "\n"


def run_qemu(image, arguments, job, shares):
    """Boots, prints what comes from the console; whether it took too long, and QEMU's status."""
    root = image / "qemu"
    libraries = root / "usr/lib/x86_64-linux-gnu"
    # Its own loader and libraries: those of this machine may be older.
    command = [libraries / "ld-linux-x86-64.so.2", "--library-path", libraries]
    command += [root / "usr/bin/qemu-system-x86_64", "-L", root / "usr/share/qemu", "-L", root / "usr/share/seabios"]
    command += ["-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2"]
    command += ["-m", str(arguments.memory), "-nodefaults", "-no-user-config", "-no-reboot"]
    command += ["-display", "none", "-serial", "stdio", "-kernel", image / "vmlinuz", "-initrd", image / "initramfs"]
    quiet = "" if arguments.log else " quiet loglevel=1"
    command += ["-append", f"console=ttyS0 panic=-1 mitigations=off{quiet}"]
    # The machine draws its randomness from ours; without it, boot waits for some.
    command += ["-device", "virtio-rng-pci"]
    for tag, path, access in [("job", job, ""), *((f"share{i}", s, ",readonly=on") for i, s in enumerate(shares))]:
        path = path.replace(",", ",,")
        command += ["-fsdev", f"local,id={tag},path={path},security_model=none,multidevs=remap{access}"]
        command += ["-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]
    qemu = subprocess.Popen(
        [str(word) for word in command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=dict(os.environ, QEMU_MODULE_DIR=str(libraries / "qemu"))
    )
    late = threading.Event()

    def kill():
        late.set()
        qemu.kill()

    timer = threading.Timer(arguments.timeout, kill)
    timer.start()
    # Ended from outside, the machine ends as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(FAILED))
    try:
        for line in qemu.stdout:
            text = line.decode(errors="replace").rstrip("\r\n")
            if arguments.log or not FAREWELL.match(text):
                print(text, flush=True)
        qemu.wait()
    finally:
        timer.cancel()
        qemu.kill()
        qemu.wait()
    return late.is_set(), qemu.returncode


if __name__ == "__main__":
    sys.exit(main())
