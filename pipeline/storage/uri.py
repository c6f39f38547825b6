"""Paths and URIs: how they are written, joined and checked."""

from __future__ import annotations

import os
import re
from urllib.parse import unquote, urlsplit

from pipeline.errors import StorageError

REMOTE_SCHEMES = ("s3", "gs", "az", "memory")


TEMPORARY_PREFIX = ".tmp-"
"""File names that start so are unfinished writes: never listed, and never a name that one may ask for."""


SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://")


def normalise(uri: str | os.PathLike[str]) -> str:
    """The one spelling of a location that this project passes around.

    Local ("data", "~/data", "file:///data"): an absolute path, so that it means the same in every process of this
    machine. Remote: "scheme://bucket/key", taken literally (no percent-decoding), without doubled or trailing slashes.

    Raises:
        StorageError: a scheme that is not supported, no bucket, or ".." in a remote key.
    """
    text = os.fspath(uri)
    if not text:
        raise StorageError("an empty path was given; name a folder or a file ('.' is the current folder)")
    match = SCHEME.match(text)
    if match is None:
        return os.path.abspath(os.path.expanduser(text))
    scheme = match[1].lower()
    if scheme == "file":
        parts = urlsplit(text)
        if parts.netloc not in ("", "localhost"):
            raise StorageError(f"{text}: a file URI names this machine only; write file:///{parts.netloc}{parts.path}")
        return os.path.abspath(unquote(parts.path))
    if scheme not in REMOTE_SCHEMES:
        known = ", ".join(f"{name}://" for name in REMOTE_SCHEMES)
        raise StorageError(f"{text}: {scheme}:// is not supported; use a local path or one of {known}")
    bucket, *segments = text[match.end() :].split("/")
    if not bucket:
        raise StorageError(f"{text}: names no bucket; write {scheme}://bucket/path")
    if ".." in segments:
        raise StorageError(f"{text}: '..' means nothing in an object store; write the path out")
    return "/".join([f"{scheme}://{bucket}", *filter(None, segments)])


def join(uri: str | os.PathLike[str], *parts: str) -> str:
    """`uri`, normalised, with relative `parts` below it.

    Raises:
        StorageError: a part that is absolute, empty, or leads outside ("..").
    """
    return "/".join([normalise(uri).rstrip("/"), *(check_path(part) for part in parts)])


def check_path(path: str) -> str:
    """`path`, if it is relative, stays below the root and is spelt in one way only."""
    names = path.split("/")
    if not all(names) or "." in names or ".." in names or "\0" in path:
        raise StorageError(
            f"{path!r} is not a path below a folder; write names with single '/' between, no '.' or '..'"
        )
    if names[-1].startswith(TEMPORARY_PREFIX):
        raise StorageError(f"{path!r}: names that start with {TEMPORARY_PREFIX} are unfinished writes; choose another")
    return path
