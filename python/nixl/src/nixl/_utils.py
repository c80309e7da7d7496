"""Raw memory for examples and tests."""

from blockplane import _core

malloc_passthru = _core.nixl.malloc_passthru
free_passthru = _core.nixl.free_passthru
ba_buf = _core.nixl.ba_buf
verify_transfer = _core.nixl.verify_transfer

__all__ = ["ba_buf", "free_passthru", "malloc_passthru", "verify_transfer"]
