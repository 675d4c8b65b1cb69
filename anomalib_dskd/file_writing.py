"""Write a file whole or not at all: a reader, or a run after a crash, never finds half of it."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

__all__ = ["write_file"]


def write_file(path: Path, content: str | bytes | memoryview | Callable[[BinaryIO], None]) -> None:
    """Put a file in place of another once it is complete and on the disk; its folder is created if it is missing.

    The content is written to ``<name>.part`` in the same folder and renamed, which is atomic on one file system. Links
    are replaced and never followed: they may lead out of a folder that someone else has made.

    Args:
        path: file to write.
        content: bytes, text, which is written as UTF-8, or a function that writes to an open file.

    Raises:
        OSError: the file cannot be written; what was there before is left as it was.
    """
    part = path.with_name(f"{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        part.unlink(missing_ok=True)
        with part.open("xb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())  # else a rename can reach the disk before the content does
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise
