"""Checksums, seeds, and names that are safe in files and on terminals.

All are pure functions of their arguments, equal on every machine. This module knows nothing of jobs or images.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path


def checksum_of(local: Path) -> str:
    """SHA-256 of a local file, hexadecimal. The file is read in pieces, so memory is bounded."""
    with local.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_safe(name: str) -> str:
    """`name` for use in output file names: everything but letters, digits, `_`, `-` and `=` becomes `_`."""
    return re.sub(r"[^\w=-]", "_", name, flags=re.ASCII)


def printable(name: str) -> str:
    """`name` as Unicode that every format can hold: a byte that is not UTF-8 becomes an escape."""
    return name.encode("utf-8", "backslashreplace").decode()


def seed_of(*parts: str | int) -> int:
    """A 64-bit seed from the plan's seed, an image's key and such. Equal parts give equal seeds on every machine."""
    digest = hashlib.sha256("\0".join(str(part) for part in parts).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "little")
