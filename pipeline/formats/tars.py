"""WebDataset tars on this machine's disk: written up to a bound in bytes, counted, and read sample by sample.

A sample is one image file and one JSON member with its description. This module must not know storages, jobs or
Gaussians.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.errors import DamagedDataError, Reason, Rejected
from pipeline.formats import images
from pipeline.identity import printable

MAX_SHARD_BYTES = 256_000_000
"""Default limit of the bytes of a shard."""

# Members that webdataset's iterators skip.
_META = re.compile(r"__[^/]*__($|/)")


def make_sample(key: str, source: str, info: images.ImageInfo, data: bytes) -> dict[str, Any]:
    """The WebDataset sample of an image file: its bytes under its format's ending, and a JSON member that describes it.

    Args:
        key: Identifies the image.
        source: Where the image came from, for people.
        info: The header of `data`.
        data: The image file.
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
    """Writes samples to `<unit>.tar`, and to `<unit>-1.tar` and so on when a tar would exceed `max_bytes`.

    A sample larger than `max_bytes` gets a tar of its own. Equal samples give equal bytes: times and owners are fixed.
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
        """Appends a sample; returns its counts of images, bytes and pixels."""
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
        """Closes the last tar; returns each tar with its number of samples. A unit without samples has no tar."""
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
    """A writer of WebDataset samples {"__key__": key, ending: bytes} to a tar. Equal samples give equal bytes."""
    from webdataset.writer import TarWriter as WebDatasetWriter  # imports torch, which only workers need

    return WebDatasetWriter(stream, encoder=False, mtime=0, format="GNU_FORMAT")


def member_bytes(name: str, size: int) -> int:
    """Bytes of a tar member: a header and the content in whole blocks, and for a long name a header and the name."""
    length = len(name.encode("utf-8", "surrogateescape"))
    long_name = tarfile.BLOCKSIZE + _whole(length + 1, tarfile.BLOCKSIZE) if length > tarfile.LENGTH_NAME else 0
    return long_name + tarfile.BLOCKSIZE + _whole(size, tarfile.BLOCKSIZE)


def tar_bytes(members: int) -> int:
    """Bytes of a tar: its members, `members` bytes together, and two empty blocks, in whole records."""
    return _whole(members + 2 * tarfile.BLOCKSIZE, tarfile.RECORDSIZE)


def _whole(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def count_samples(local: Path) -> int:
    """The number of samples in a local tar. As in webdataset, a sample is a run of members with one key.

    Raises:
        DamagedDataError: The file is not a whole tar.
    """
    count, last = 0, None
    try:
        with tarfile.open(local, mode="r:") as archive:
            for key, _, _ in _sample_members(archive):
                if key != last:
                    count, last = count + 1, key
    except (tarfile.TarError, ValueError) as error:
        raise DamagedDataError(f"{local} is not a whole tar: {error}") from None
    return count


def _sample_members(archive: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """(key, ending, member) of each member that belongs to a sample, by the rules of webdataset's iterators."""
    from webdataset.tariterators import base_plus_ext  # imports torch, which only workers need

    for member in archive:
        if member.isreg() and not _META.match(member.name):
            key, ending = base_plus_ext(member.name)
            if key is not None and ending is not None:
                yield key, ending, member
        archive.members = []  # type: ignore[attr-defined]  # else a million headers stay in memory


class TarIndex:
    """The place of each sample's image in a tar. Reads any sample without reading the others.

    The index keeps the file open until `close`. The file may be deleted meanwhile, as a storage deletes its local copy.

    Args:
        local: The tar, on this machine's disk.
        uri: Names the tar in messages.

    Attributes:
        keys: The samples' keys, in the tar's order.

    Raises:
        DamagedDataError: The file is not a whole tar.
    """

    def __init__(self, local: Path, uri: str) -> None:
        self.keys: list[str] = []
        self._places: list[tuple[int, int] | None] = []
        self._stream = local.open("rb")
        try:
            with tarfile.open(fileobj=self._stream, mode="r:") as archive:
                for key, ending, member in _sample_members(archive):
                    if not self.keys or self.keys[-1] != printable(key):
                        self.keys.append(printable(key))
                        self._places.append(None)
                    if f".{ending}".lower() in images.IMAGE_EXTENSIONS and self._places[-1] is None:
                        self._places[-1] = (member.offset_data, member.size)
        except (tarfile.TarError, ValueError) as error:  # ValueError: a header whose numbers cannot be read
            self.close()
            raise DamagedDataError(f"{uri} is not a whole tar: {error}; run `air verify`") from None

    def read(self, row: int) -> bytes:
        """The bytes of a sample's image.

        Args:
            row: Position of the sample in `keys`.

        Raises:
            Rejected: `no_image`: the sample has no image member.
        """
        place = self._places[row]
        if place is None:
            raise Rejected(Reason.NO_IMAGE, "the sample has no image member")
        self._stream.seek(place[0], io.SEEK_SET)
        return self._stream.read(place[1])

    def close(self) -> None:
        """Closes the file. Closing twice is allowed; reading afterwards raises ValueError."""
        self._stream.close()
