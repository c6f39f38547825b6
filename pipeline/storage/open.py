"""Files on this machine and in object stores behind one small interface, so that no job cares which it was given.

    storage = open_storage("s3://bucket/targets")        # or a local path, gs://..., az://container/...
    storage.write("plan.json", data)
    for path, size in storage.list("manifest"): ...

Every write is whole: a reader sees the old file, the new file or none, whatever is killed. `put_if_absent` is the one
primitive that the commit protocol and leases rest on. How both come about is in `storage_local` and `storage_remote`.

Object stores are reached through obstore and configured by the environment variables of their own tools, such as
AWS_ACCESS_KEY_ID, AWS_REGION, AWS_ENDPOINT_URL and AWS_ALLOW_HTTP, GOOGLE_APPLICATION_CREDENTIALS,
AZURE_STORAGE_ACCOUNT_NAME. `memory://bucket` lives as long as the process: for tests.

This module must not know what is in a file.
"""

from __future__ import annotations

import os
import uuid

from pipeline.errors import StorageError
from pipeline.storage.base import Storage
from pipeline.storage.uri import SCHEME, normalise


def open_storage(uri: str | os.PathLike[str]) -> Storage:
    """The folder `uri` as a `Storage`. Nothing is touched yet: the folder may be missing, the network down.

    Raises:
        StorageError: see `normalise`.
    """
    root = normalise(uri)
    # Both build on this module, and a job mostly needs one of them.
    if SCHEME.match(root):
        from pipeline.storage.remote import RemoteStorage

        return RemoteStorage(root)
    from pipeline.storage.local import LocalStorage

    return LocalStorage(root)


def open_parent(uri: str | os.PathLike[str]) -> tuple[Storage, str]:
    """The folder of the file `uri`, and the file's name in it: for a single file that a user names.

    Raises:
        StorageError: see `normalise`; or `uri` is a bucket.
    """
    whole = normalise(uri)
    folder, _, name = whole.rpartition("/")
    if not name or folder.endswith("/"):
        raise StorageError(f"{whole}: names no file; add the file's path")
    return open_storage(folder or "/"), name


def check_writable(uri: str | os.PathLike[str]) -> None:
    """Raises StorageError if the file `uri` cannot be written, before work is done for it. Makes the file's folder."""
    storage, name = open_parent(uri)
    if os.path.isdir(storage.uri(name)):  # never so for a remote one
        raise StorageError(f"cannot write {storage.uri(name)}: it is a folder; choose another name")
    probe = f"air-probe-{uuid.uuid4().hex}"
    try:
        storage.write(probe, b"")
        storage.delete(probe)
    except StorageError as error:
        raise StorageError(f"{storage.uri(name)} could not be written: {error}") from None
