"""blockplane moves blocks of KV cache between GPUs, host memory, disks and machines."""

from ._core import __version__

__all__ = ["__version__"]
