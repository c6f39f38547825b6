"""Seeds, checksums and names that are safe in files and on terminals."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path


def checksum_of(local: Path) -> str:
    """SHA-256 of a local file, hexadecimal; reads it in pieces."""
    with local.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_safe(name: str) -> str:
    """The name with everything but letters, digits, `_`, `-` and `=` replaced, for use in output file names."""
    return re.sub(r"[^\w=-]", "_", name, flags=re.ASCII)


def printable(name: str) -> str:
    """The name as Unicode that every format can hold: a byte that is no UTF-8 becomes an escape."""
    return name.encode("utf-8", "backslashreplace").decode()


def seed_of(*parts: str | int) -> int:
    """A 64-bit seed from the plan's seed and an image's key: the same on every machine, in any order."""
    digest = hashlib.sha256("\0".join(str(part) for part in parts).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "little")
