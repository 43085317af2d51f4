"""Files in a folder that may come from anywhere."""

from __future__ import annotations

import errno
import os
import re
import stat
from io import BufferedReader
from pathlib import Path

from kdcache.errors import StoreError

# What huggingface_hub puts in the place of a file that it fetched.
_HUB_BLOB = re.compile(r"(\.\./)+blobs/[0-9a-f]{40,64}")


def open_file(path: Path) -> BufferedReader:
    """Open a regular file for reading.

    No link is followed, for it may lead to anybody's file, but one that huggingface_hub made to its own blobs; a pipe or a device is
    not waited for.

    Raises:
        StoreError: A link, a pipe, a device.
        OSError: It is not there, a folder, or cannot be read.
    """
    try:
        file = open(path, "rb", opener=_open)  # noqa: SIM115
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise _no_file(path, "a socket or a device") from error
        if error.errno != errno.ELOOP:
            raise
        target = os.readlink(path)
        if not _HUB_BLOB.fullmatch(target):
            raise _no_file(path, f"a link to {target}", hint="a copy made with cp -rL has files for links") from error
        file = open(path.parent / target, "rb", opener=_open)  # noqa: SIM115
    try:
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return file
        raise _no_file(path, "a pipe or a device")
    except (OSError, StoreError):
        file.close()
        raise


def _no_file(path: Path, found: str, hint: str | None = None) -> StoreError:
    return StoreError(f"{path}: cannot read ({found}, where a file was expected)", hint=hint)


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
