"""What the environment says about agents. It is read here and nowhere else.

==================================  ========================================================
``BLOCKPLANE_HOST``                 IP address of the interface that other hosts connect to
                                    (default: none, only agents of this host can connect)
``BLOCKPLANE_NIXL_DEADLINE_S``      longest time of a transfer or a notification (300)
``BLOCKPLANE_PEER_LOSS_TIMEOUT_S``  silence after which a peer is lost (5)
``BLOCKPLANE_CONNECT_TIMEOUT_S``    longest time of a connection attempt (5)
``BLOCKPLANE_KERNEL_CACHE``         folder for compiled GPU kernels (``~/.cache/blockplane/kernels``,
                                    or below ``XDG_CACHE_HOME``)
``BLOCKPLANE_GPU_SMS``              multiprocessors of a GPU that one transfer takes (16)
``NIXL_TELEMETRY_ENABLE``           turns telemetry of requests on (y, yes, on, true, 1) or off
                                    (anything else), whatever the configuration says
``NIXL_LOG_LEVEL``                  TRACE, DEBUG, INFO, WARN, ERROR or FATAL
==================================  ========================================================
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

_SECONDS = {
    "BLOCKPLANE_NIXL_DEADLINE_S": "deadline_s",
    "BLOCKPLANE_PEER_LOSS_TIMEOUT_S": "peer_loss_timeout_s",
    "BLOCKPLANE_CONNECT_TIMEOUT_S": "connect_timeout_s",
}


def agent_options() -> dict[str, Any]:
    """Keyword arguments of an agent, beside its name and its configuration."""
    options: dict[str, Any] = {"nvrtc_folders": _nvrtc_folders()}
    if host := os.environ.get("BLOCKPLANE_HOST"):
        options["host"] = _address(host)
    for name, keyword in _SECONDS.items():
        if value := os.environ.get(name):
            try:
                options[keyword] = float(value)
            except ValueError:
                raise ValueError(f"{name} is {value!r}; accepted: seconds") from None
    if value := os.environ.get("BLOCKPLANE_GPU_SMS"):
        if not (value.isascii() and value.isdigit() and 1 <= int(value) <= 1024):
            raise ValueError(f"BLOCKPLANE_GPU_SMS is {value!r}; accepted: 1 to 1024")
        options["gpu_sms"] = int(value)
    if cache := _kernel_cache():
        options["kernel_cache"] = cache
    return options


def telemetry(configured: bool) -> bool:
    """Whether an agent keeps telemetry of its requests."""
    value = os.environ.get("NIXL_TELEMETRY_ENABLE")
    if not value:
        return configured
    return value.lower() in ("y", "yes", "on", "true", "1")


def log_level() -> str | None:
    """Name of the level of the log, if one is set."""
    return os.environ.get("NIXL_LOG_LEVEL") or None


def _address(host: str) -> Any:
    import ipaddress

    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        raise ValueError(f"BLOCKPLANE_HOST is {host!r}; accepted: an IP address") from None
    if address.is_unspecified:
        raise ValueError(
            f"BLOCKPLANE_HOST is {host!r}; accepted: the address of one interface, which is told to "
            "other agents"
        )
    return address


def _nvrtc_folders() -> list[Path]:
    """Folders of packages with libraries of CUDA in them, such as those that come with torch."""
    folders = [Path(entry) for entry in sys.path if entry]
    folders = [folder for folder in folders if (folder / "nvidia").is_dir()]
    return folders + [
        Path(toolkit) for name in ("CUDA_HOME", "CUDA_PATH") if (toolkit := os.environ.get(name))
    ]


def _kernel_cache() -> Path | None:
    if folder := os.environ.get("BLOCKPLANE_KERNEL_CACHE"):
        return Path(folder)
    home = os.environ.get("HOME")
    cache = os.environ.get("XDG_CACHE_HOME") or (home and os.path.join(home, ".cache"))
    if not cache or not os.path.isabs(cache):
        return None
    return Path(cache) / "blockplane" / "kernels"
