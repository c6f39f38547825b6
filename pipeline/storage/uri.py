"""Spells, joins and checks the paths and URIs of storages.

This module works on strings alone: it knows no storage and looks at no file.
"""

from __future__ import annotations

import os
import re
from urllib.parse import unquote, urlsplit

from pipeline.errors import StorageError

SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://")
"""The start of a URI. A location that does not match is a local path."""

REMOTE_SCHEMES = ("s3", "gs", "az", "memory")
"""Schemes of the supported object stores."""

TEMPORARY_PREFIX = ".tmp-"
"""File names with this start are unfinished writes. They are never listed, and callers cannot use them."""


def normalise(uri: str | os.PathLike[str]) -> str:
    """The spelling of a location that this project passes around.

    A local location ("data", "~/data", "file:///data") becomes an absolute path, so that it means the same in every
    process of this machine. A remote location becomes "scheme://bucket/key", without doubled or trailing slashes; its
    characters are taken literally (no percent-decoding).

    Raises:
        StorageError: The scheme is not supported, the bucket is missing, or a remote key contains "..".
    """
    text = os.fspath(uri)
    if not text:
        raise StorageError("the path is empty; name a folder or a file ('.' is the current folder)")
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
        raise StorageError(f"{text}: an object store has no '..'; write the path out")
    return "/".join([f"{scheme}://{bucket}", *filter(None, segments)])


def join(uri: str | os.PathLike[str], *parts: str) -> str:
    """`uri`, normalised, with the relative paths `parts` below it.

    Raises:
        StorageError: A part is absolute or empty, or leads outside ("..").
    """
    return "/".join([normalise(uri).rstrip("/"), *(check_path(part) for part in parts)])


def check_path(path: str) -> str:
    """Returns `path` if it is relative, stays below the root and has no other spelling.

    Raises:
        StorageError: `path` is anything else, or the name of an unfinished write.
    """
    names = path.split("/")
    if not all(names) or "." in names or ".." in names or "\0" in path:
        raise StorageError(
            f"{path!r} is not a path below a folder; separate names by a single '/' and leave out '.' and '..'"
        )
    if names[-1].startswith(TEMPORARY_PREFIX):
        raise StorageError(f"{path!r}: names that start with {TEMPORARY_PREFIX} are unfinished writes; choose another")
    return path
