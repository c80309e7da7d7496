"""NIXL's Python interface on blockplane."""
