"""Numbers with their units, for people."""

from __future__ import annotations

UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def size_text(n_bytes: float) -> str:
    """Return a number of bytes with three digits or more: `1.23 GB`, `812 kB`, `17 bytes`."""
    for unit, name in UNITS:
        if n_bytes >= unit:
            value = n_bytes / unit
            digits = 2 if value < 10 else 1 if value < 100 else 0
            return f"{value:,.{digits}f} {name}"
    return f"{n_bytes:,.0f} bytes"
