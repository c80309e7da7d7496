"""The rows of the comparison: which figure of each program stands for which work."""

import json
import statistics

MISSING = None

# What a case is told apart by; everything else in it is the same for all or of no interest here.
KEYS = ("lane", "op", "block_bytes", "count", "in_flight", "receiver", "pattern", "ids", "side")


class Figures:
    """What was measured, by program, step, metric and case: one value a round."""

    def __init__(self):
        self.values = {}
        self.units = {}
        self.failures = []

    def add(self, peer, step, record):
        case = {key: record["case"][key] for key in KEYS if key in record["case"]}
        key = (peer, step, record["metric"], json.dumps(case))
        self.values.setdefault(key, []).append(record["value"])
        self.units[record["metric"]] = record["unit"]
        if record.get("peer") is not None:
            # Files are measured beside fio by our own benchmark.
            self.add("fio", step, {**record, "value": record["peer"], "peer": None})

    def failed(self, peer, step, reason):
        if (peer, step, reason) not in self.failures:
            self.failures.append((peer, step, reason))

    def all(self):
        return self.values.items()

    def unit(self, metric):
        return self.units[metric]

    def median(self, peer, step, metric, **wanted):
        """The median over the rounds of the one figure whose case says `wanted`."""
        for (a_peer, a_step, a_metric, case), values in self.values.items():
            if (a_peer, a_step, a_metric) != (peer, step, metric):
                continue
            case = json.loads(case)
            if all(case.get(key) == value for key, value in wanted.items()):
                return statistics.median(values)
        return MISSING


class Row:
    """One line of the table."""

    def __init__(self, title, unit, goal, ours, nixl=None, mooncake=None, limits=(), least=False):
        self.title, self.unit, self.goal = title, unit, goal
        self.of = {"blockplane": ours, "nixl": nixl, "mooncake": mooncake}
        self.limits = limits
        # Whether little is good.
        self.least = least

    def value(self, figures, peer):
        asked = self.of[peer]
        if asked is None:
            return MISSING
        step, metric, case = asked
        return figures.median(peer, step, metric, **case)

    def values(self, figures):
        """Of blockplane, NIXL, Mooncake, and the highest limit of the same runs."""
        step, _, case = self.of["blockplane"]
        program = "fio" if step == "file" else "blockplane"
        limits = [figures.median(program, step, metric, **case) for metric in self.limits]
        limits = [limit for limit in limits if limit is not MISSING]
        three = (self.value(figures, peer) for peer in ("blockplane", "nixl", "mooncake"))
        return (*three, max(limits, default=MISSING))

    def best(self, *peers):
        peers = [peer for peer in peers if peer is not MISSING]
        if not peers:
            return MISSING
        return min(peers) if self.least else max(peers)

    def ratio(self, ours, best):
        """How many times better than the best peer."""
        if ours is MISSING or best is MISSING:
            return MISSING
        good, bad = (best, ours) if self.least else (ours, best)
        return good / bad if bad else MISSING


def blocks(title, step, lane, cell, goal, limits, mooncake=False, peer_step=None):
    op, block, count = cell
    case = {"op": op, "block_bytes": block, "count": count}
    metric = "bandwidth_gb_per_s"
    peer_step = peer_step or step
    return Row(
        f"{title} {op} {block // 1024}K x{count}",
        "GB/s",
        goal,
        (step, metric, {"lane": lane, **case}),
        (peer_step, metric, case),
        (peer_step, metric, case) if mooncake else None,
        limits,
    )


def on_disk(op, block, count):
    case = {"op": op, "block_bytes": block, "in_flight": count}
    title = f"file {op} {block // 1024}K x{count}"
    speed, cores = "bandwidth_gb_per_s", "cpu_cores"
    return (
        Row(f"{title} (limit: fio)", "GB/s", ">= 95 %", *[("file", speed, case)] * 2, None, (speed,)),
        Row(f"{title}, cores", "cores", "<= 0.25", *[("file", cores, case)] * 2, None, (cores,), True),
    )


def once(title, unit, goal, step, metric, ours, nixl=None, peer_metric=None):
    theirs = None if nixl is None else (step, peer_metric or metric, nixl)
    return Row(title, unit, goal, (step, metric, ours), theirs, least=True)


MEMCPY = ("limit_memcpy_x1_gb_per_s", "limit_memcpy_x2_gb_per_s")
RAW = ("limit_raw_tcp_x1_gb_per_s", "limit_raw_tcp_x2_gb_per_s")
CMA = ("limit_cma_gb_per_s",)

ROWS = [
    blocks("same host, arenas:", "arena", "shm", ("write", 4096, 128), "", MEMCPY, False, "host"),
    blocks(
        "same host, arenas:", "arena", "shm", ("write", 16384, 128), ">= 30", MEMCPY, False, "host"
    ),
    blocks(
        "same host, arenas:", "arena", "shm", ("write", 65536, 1024), ">= 17", MEMCPY, False, "host"
    ),
    blocks("foreign memory:", "host", "shm", ("write", 4096, 128), ">= 9", CMA),
    blocks("foreign memory:", "host", "shm", ("write", 16384, 128), ">= 15", CMA),
    *(
        blocks("TCP:", "tcp", "tcp", (op, block, count), ">= 5", RAW, True)
        for op in ("write", "read")
        for block, count in ((4096, 128), (16384, 128), (65536, 128), (1 << 20, 16))
    ),
    *(
        once(
            f"{title}, {shown}",
            "us",
            goal,
            "notify",
            metric,
            {"receiver": ours},
            {"receiver": nixl},
        )
        for title, metric, goals in (
            ("notification one way", "notify_us", ("<= 1", "<= 25")),
            ("4 KiB write + notification", "write_notify_us", ("<= 3", "")),
        )
        for (shown, ours, nixl), goal in zip(
            (
                ("receivers spin", "spinning", "spinning"),
                ("receivers sleep (NIXL: its threads)", "asleep", "progress-thread"),
            ),
            goals,
            strict=True,
        )
    ),
    once(
        "make 10,000 scattered, a block",
        "ns",
        "<= 5",
        "make",
        "make_ns_per_block",
        {"pattern": "scattered"},
        {"pattern": "scattered"},
    ),
    once(
        "make 10,000 contiguous, a block",
        "ns",
        "<= 0.5",
        "make",
        "make_ns_per_block",
        {"pattern": "contiguous", "ids": "range"},
        {"pattern": "contiguous"},
    ),
    once(
        "post of the same, scattered, a block",
        "ns",
        "<= 20",
        "make",
        "post_ns_per_block",
        {"pattern": "scattered"},
        {"pattern": "scattered"},
    ),
    once("idle agent", "% of core", "0", "idle", "idle_cpu_percent", {"side": "target"}, {}),
    once("metadata exchange between processes", "us", "<= 1000", "setup", "metadata_us", {"lane": "shm"}, {}),
    once("connect a new agent", "us", "<= 1000", "setup", "connect_us", {"lane": "shm"}, {}),
    once("register 1 GiB", "us", "", "setup", "register_gib_us", {"lane": "shm"}, {}),
    *(
        row
        for op in ("read", "write")
        for block, count in ((4096, 64), (65536, 64), (1 << 20, 16))
        for row in on_disk(op, block, count)
    ),
]


def number(value):
    if value is MISSING:
        return "-"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f}"


def table(figures):
    titles = ["work", "unit", "NIXL", "Mooncake", "blockplane", "limit", "to reach", "ratio"]
    lines = [titles]
    for row in ROWS:
        ours, nixl, mooncake, limit = row.values(figures)
        if ours is MISSING and nixl is MISSING and mooncake is MISSING:
            continue
        ratio = row.ratio(ours, row.best(nixl, mooncake))
        shown = [number(nixl), number(mooncake), number(ours), number(limit)]
        times = "-" if ratio is MISSING else f"{number(ratio)}x"
        lines.append([row.title, row.unit, *shown, row.goal, times])
    widths = [max(len(line[column]) for line in lines) for column in range(len(titles))]
    rule = ["-" * width for width in widths]
    lines.insert(1, rule)

    def cells(line):
        padded = (
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        return f"| {' | '.join(padded)} |"

    return "\n".join(map(cells, lines))
