"""Opens a location as a `Storage`, so that jobs treat local folders and object stores alike.

    storage = open_storage("s3://bucket/targets")        # or a local path, gs://..., az://container/...
    storage.write("plan.json", data)
    for path, size in storage.list("manifest"): ...

Every write is whole: a reader sees the old file, the new file or none, whichever process is killed. The commit protocol
needs one primitive, `put_if_absent`. `pipeline.storage.local` and `pipeline.storage.remote` implement both.

Object stores are reached through obstore and configured by the environment variables of the stores' own tools, such as
AWS_ACCESS_KEY_ID, AWS_REGION, AWS_ENDPOINT_URL and AWS_ALLOW_HTTP, GOOGLE_APPLICATION_CREDENTIALS, and
AZURE_STORAGE_ACCOUNT_NAME. `memory://bucket` is for tests: it lasts as long as the process.

This module must not know what is in a file.
"""

from __future__ import annotations

import os
import uuid

from pipeline.errors import StorageError
from pipeline.storage.base import Storage
from pipeline.storage.uri import SCHEME, normalise


def open_storage(uri: str | os.PathLike[str]) -> Storage:
    """The folder `uri` as a `Storage`. Opening reads nothing: the folder may not exist and the network may be down.

    Raises:
        StorageError: As for `normalise`.
    """
    root = normalise(uri)
    # Most jobs need one of the two.
    if SCHEME.match(root):
        from pipeline.storage.remote import RemoteStorage

        return RemoteStorage(root)
    from pipeline.storage.local import LocalStorage

    return LocalStorage(root)


def open_parent(uri: str | os.PathLike[str]) -> tuple[Storage, str]:
    """The folder of the file `uri`, and the file's name in the folder: for a single file that a user names.

    Raises:
        StorageError: As for `normalise`; or `uri` is a bucket.
    """
    whole = normalise(uri)
    folder, _, name = whole.rpartition("/")
    if not name or folder.endswith("/"):
        raise StorageError(f"{whole}: names no file; add the file's path")
    return open_storage(folder or "/"), name


def check_writable(uri: str | os.PathLike[str]) -> None:
    """Checks that the file `uri` can be written, before a job works for hours towards it. Makes the file's folder.

    Raises:
        StorageError: The file cannot be written.
    """
    storage, name = open_parent(uri)
    if os.path.isdir(storage.uri(name)):  # never true of a remote storage
        raise StorageError(f"cannot write {storage.uri(name)}: it is a folder; choose another name")
    probe = f"air-probe-{uuid.uuid4().hex}"
    try:
        storage.write(probe, b"")
        storage.delete(probe)
    except StorageError as error:
        raise StorageError(f"{storage.uri(name)} could not be written: {error}") from None
