"""Tars written by hand, for the tests of inputs and shards."""

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path


def write_tar(file: Path, members: Sequence[tuple[str, bytes]] | Mapping[str, bytes], mode: str = "w") -> Path:
    """Writes a tar of (name, content) and makes its folder; returns `file`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, mode) as archive:  # type: ignore[call-overload]
        for name, data in members.items() if isinstance(members, Mapping) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file
