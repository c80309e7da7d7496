"""What the user says: `kv_connector_extra_config` and the environment, which only this reads."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MODES = ("kvbm", "nixl", "kvbm+nixl")
KVBM_PREFIX = "DYN_KVBM_"

KNOWN_VLLM = ("0.26", "0.32")
"""Versions of vLLM whose base class of connectors this one was checked against."""


@dataclass(frozen=True)
class ConnectorSettings:
    """`kv_connector_extra_config` of BlockplaneConnector."""

    mode: str = "kvbm"
    """`kvbm`, `nixl`, or `kvbm+nixl`."""
    load_timeout_s: float = 30.0
    """Blocks that are not loaded by then are computed."""
    lookup_timeout_s: float = 1.0
    """A worker that does not answer by then has nothing."""
    hold_s: float = 30.0
    """How long blocks that were found are held for a request that vLLM does not start."""
    shutdown_s: float = 20.0
    """Time to write what was offloaded when vLLM stops."""
    events_max: int = 1 << 16
    """Blocks whose KV events are known, at most."""
    nixl: dict[str, Any] = field(default_factory=dict)
    """`kv_connector_extra_config` for vLLM's NixlConnector."""

    @classmethod
    def read(cls, extra: Mapping[str, Any] | None) -> ConnectorSettings:
        """Checks names, types and ranges.

        Raises:
            ValueError: says which key is wrong, and what is accepted.
        """
        given = dict(extra or {})
        accepted = cls.__dataclass_fields__
        unknown = sorted(set(given) - set(accepted))
        if unknown:
            raise ValueError(
                f"kv_connector_extra_config of BlockplaneConnector: {', '.join(unknown)} is not "
                f"known; accepted are {', '.join(accepted)}"
            )
        settings = cls(**given)
        if settings.mode.replace(" ", "+") not in MODES:
            raise ValueError(
                f"mode {settings.mode!r} of BlockplaneConnector; accepted are {', '.join(MODES)}"
            )
        for name in ("load_timeout_s", "lookup_timeout_s", "hold_s", "shutdown_s"):
            value = getattr(settings, name)
            if not isinstance(value, (int, float)) or not 0 <= value <= 86_400:
                raise ValueError(f"{name} is {value!r}; 0 to 86400 seconds are accepted")
        if not isinstance(settings.nixl, dict):
            raise ValueError("nixl must be an object: the extra config of NixlConnector")
        return settings

    @property
    def kvbm(self) -> bool:
        """Whether blocks are offloaded."""
        return "kvbm" in self.mode

    @property
    def uses_nixl(self) -> bool:
        """Whether prefill and decode are apart."""
        return "nixl" in self.mode


def kvbm_variables() -> list[tuple[str, str]]:
    """The settings of the tiers: all variables `DYN_KVBM_*`."""
    return sorted(item for item in os.environ.items() if item[0].startswith(KVBM_PREFIX))


def socket_path(engine_id: str, rank: int) -> Path:
    """Where the worker of this rank answers, for its own user alone.

    Raises:
        PermissionError: the folder is somebody else's, or others may write to it.
    """
    base = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    folder = Path(base) / f"blockplane-kv-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PermissionError(f"{folder} must be a folder of this user alone (mode 0700)")
    sweep(folder)
    digest = hashlib.sha256(f"{engine_id}/{rank}".encode()).hexdigest()[:24]
    return folder / f"kv-{digest}.sock"


def sweep(folder: Path) -> None:
    """Removes sockets at which nobody answers any more: their workers were killed."""
    for path in folder.glob("kv-*.sock"):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink(missing_ok=True)


def version_warning(version: str) -> str | None:
    """What to say of a version of vLLM; `None` where it is known."""
    if any(version == known or version.startswith(f"{known}.") for known in KNOWN_VLLM):
        return None
    return (
        f"vLLM {version} is not one of the versions that BlockplaneConnector was checked against "
        f"({', '.join(KNOWN_VLLM)}). It probably works; if not, try one of these."
    )
