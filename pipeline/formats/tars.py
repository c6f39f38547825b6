"""WebDataset tars: written to a byte bound, read as a stream or sample by sample."""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.errors import DamagedDataError, Reason, Rejected
from pipeline.formats import images
from pipeline.identity import printable

# Members that webdataset's iterators pass over.
_META = re.compile(r"__[^/]*__($|/)")


MAX_SHARD_BYTES = 256_000_000
"""Bytes of a shard at most, unless the configuration says otherwise."""


def make_sample(key: str, source: str, info: images.ImageInfo, data: bytes) -> dict[str, Any]:
    """The WebDataset sample of an image file: its bytes under its format's ending, and a JSON member about it.

    Args:
        key: Identifies the image.
        source: Where it came from.
        info: What `data` holds.
        data: The file.
    """
    about = {
        "key": key,
        "source": source,
        "format": info.format,
        "width": info.width,
        "height": info.height,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    return {"__key__": key, info.extension: data, "json": json.dumps(about).encode()}


class TarWriter:
    """Writes samples to `<unit>.tar`, then `<unit>-1.tar` and so on where one would grow beyond the limit.

    Equal samples give equal bytes: times and owners are fixed.
    """

    def __init__(self, unit: str, scratch: Path, max_bytes: int) -> None:
        self._unit = unit
        self._scratch = scratch
        self._max_bytes = max_bytes
        self._files: list[tuple[Path, int]] = []
        self._stream: BinaryIO | None = None
        self._tar: Any = None
        self._count = 0
        self._bytes = 0

    def add(self, result: dict[str, Any]) -> Mapping[str, float]:
        """Appends a sample; counts images, bytes and pixels."""
        key = result["__key__"]
        size = sum(member_bytes(f"{key}.{name}", len(value)) for name, value in result.items() if name != "__key__")
        if self._tar is not None and tar_bytes(self._bytes + size) > self._max_bytes:
            self._close()
        if self._tar is None:
            self._tar = self._open()
        self._tar.write(result)
        self._count += 1
        self._bytes += size
        about = json.loads(result["json"])
        return {"images": 1, "image_bytes": about["bytes"], "pixels": about["width"] * about["height"]}

    def finish(self) -> list[tuple[Path, int]]:
        """Closes the last tar. A unit without samples gives none."""
        self._close()
        return self._files

    def _open(self) -> Any:
        part = f"-{len(self._files)}" if self._files else ""
        path = self._scratch / f"{self._unit}{part}.tar"
        self._stream = path.open("wb")
        self._files.append((path, 0))
        self._count, self._bytes = 0, 0
        return open_tar(self._stream)

    def _close(self) -> None:
        if self._tar is None or self._stream is None:
            return
        self._tar.close()
        self._stream.close()
        self._files[-1] = (self._files[-1][0], self._count)
        self._tar = self._stream = None


def open_tar(stream: BinaryIO) -> Any:
    """A writer of WebDataset samples {"__key__": key, ending: bytes} to a tar; equal samples give equal bytes."""
    from webdataset.writer import TarWriter as WebDatasetWriter  # imports torch: only workers pay for it

    return WebDatasetWriter(stream, encoder=False, mtime=0, format="GNU_FORMAT")


def member_bytes(name: str, size: int) -> int:
    """What a tar member takes: a header and its content in whole blocks, and as much again for a long name."""
    length = len(name.encode("utf-8", "surrogateescape"))
    long_name = tarfile.BLOCKSIZE + _whole(length + 1, tarfile.BLOCKSIZE) if length > tarfile.LENGTH_NAME else 0
    return long_name + tarfile.BLOCKSIZE + _whole(size, tarfile.BLOCKSIZE)


def tar_bytes(members: int) -> int:
    """The size of a tar: its members and two empty blocks, in whole records."""
    return _whole(members + 2 * tarfile.BLOCKSIZE, tarfile.RECORDSIZE)


def _whole(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def count_samples(local: Path) -> int:
    """Samples of a local shard: distinct runs of members with one key, as webdataset groups them.

    Raises:
        DamagedDataError: It is not a whole tar.
    """
    from webdataset.tariterators import base_plus_ext

    count, last = 0, None
    try:
        with tarfile.open(local, mode="r:") as archive:
            for member in archive:
                taken = member.isreg() and not _META.match(member.name)
                key, _ = base_plus_ext(member.name) if taken else (None, None)
                if key is not None and key != last:
                    count, last = count + 1, key
                archive.members = []  # type: ignore[attr-defined]  # a million headers would stay in memory
    except tarfile.TarError as error:
        raise DamagedDataError(f"{local} is not a whole tar: {error}") from None
    return count


class TarIndex:
    """A tar on this machine's disk, and where in it the image of each sample lies. Keeps the file open.

    Args:
        local: The tar. It may be unlinked afterwards.
        uri: What messages call it.

    Attributes:
        keys: Of the samples, in the tar's order.

    Raises:
        DamagedDataError: It is not a whole tar.
    """

    def __init__(self, local: Path, uri: str) -> None:
        from webdataset.tariterators import base_plus_ext

        self.keys: list[str] = []
        self._places: list[tuple[int, int] | None] = []
        self._stream = local.open("rb")
        try:
            with tarfile.open(fileobj=self._stream, mode="r:") as archive:
                for member in archive:
                    key, ending = base_plus_ext(member.name) if member.isreg() else (None, None)
                    if key is None or key.startswith("__"):
                        continue
                    if not self.keys or self.keys[-1] != printable(key):
                        self.keys.append(printable(key))
                        self._places.append(None)
                    if f".{ending}".lower() in images.IMAGE_EXTENSIONS and self._places[-1] is None:
                        self._places[-1] = (member.offset_data, member.size)
        except tarfile.TarError as error:
            self.close()
            raise DamagedDataError(f"{uri} is not a whole tar: {error}; run `air verify`") from None

    def read(self, row: int) -> bytes:
        """The bytes of a sample's image.

        Raises:
            Rejected: The sample has no image.
        """
        place = self._places[row]
        if place is None:
            raise Rejected(Reason.NO_IMAGE, "the sample has no image member")
        self._stream.seek(place[0], io.SEEK_SET)
        return self._stream.read(place[1])

    def close(self) -> None:
        """Closes the file."""
        self._stream.close()
