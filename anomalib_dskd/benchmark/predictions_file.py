"""The file of a job's predictions: a compressed NumPy archive whose largest arrays are written and read image by image.

Anomaly maps and masks of a test set can be larger than the memory.
"""

import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import DTypeLike, NDArray

from anomalib_dskd.errors import DataError
from anomalib_dskd.file_writing import write_file

__all__ = ["ArrayFile", "read_arrays", "read_rows", "unreadable", "write_arrays"]

MOST_BYTES = 8 * 2**30  # limit for an uncompressed predictions file: 40,000 images with maps and masks of 256x256


class ArrayFile:
    """An array on the disk that rows are appended to.

    Args:
        path: a new file.
        dtype: type of the array's elements.
    """

    def __init__(self, path: Path, dtype: DTypeLike) -> None:
        self._path, self._dtype = path, np.dtype(dtype)
        self._rows = 0
        self._shape: tuple[int, ...] = ()

    def append(self, rows: NDArray[Any]) -> None:
        """Write rows ``(n, ...)``.

        Raises:
            ValueError: their shape differs from that of earlier ones.
        """
        if self._rows and rows.shape[1:] != self._shape:
            msg = f"arrays of the shapes {self._shape} and {rows.shape[1:]} cannot be joined."
            raise ValueError(msg)
        with self._path.open("ab") as file:
            file.write(np.ascontiguousarray(rows, dtype=self._dtype).data)
        self._rows, self._shape = self._rows + len(rows), rows.shape[1:]

    def read(self) -> NDArray[Any] | None:
        """Return all rows ``(N, ...)``, mapped into memory, or None if there are none."""
        return np.memmap(self._path, self._dtype, "r", shape=(self._rows, *self._shape)) if self._rows else None


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write an archive that ``numpy.load`` reads; arrays that are mapped into memory are never whole in it.

    Raises:
        OSError: the file cannot be written.
    """

    def write(file: BinaryIO) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, values in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, np.asarray(values), allow_pickle=False)

    write_file(path, write)


def read_arrays(path: Path, *names: str) -> list[NDArray[Any]]:
    """Read whole arrays; a missing one is empty.

    Raises:
        DataError: the file is damaged, or larger than any that is written.
    """
    with _errors_that_name(path), path.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
        _check_size(arrays.zip)
        return [arrays[name] if name in arrays else np.zeros(0) for name in names]


def read_rows(path: Path, name: str, number: int) -> Iterator[NDArray[Any]]:
    """Read the rows of an array ``(number, h, w)`` one after the other; a missing one has none.

    Raises:
        DataError: as :func:`read_arrays`, or the array has another shape.
    """
    with _errors_that_name(path), zipfile.ZipFile(path) as archive:
        _check_size(archive)
        if f"{name}.npy" not in archive.namelist():
            return
        with archive.open(f"{name}.npy") as member:
            np.lib.format.read_magic(member)
            shape, _, dtype = np.lib.format.read_array_header_1_0(member)
            if len(shape) != 3 or shape[0] != number:  # noqa: PLR2004 - (N, h, w)
                msg = f"{name} of {number} images have the shape {shape}"
                raise ValueError(msg)
            for _ in range(number):
                content = member.read(int(np.prod(shape[1:])) * dtype.itemsize)
                yield np.frombuffer(content, dtype).reshape(shape[1:])


def unreadable(path: Path, reason: str) -> DataError:
    """Return the error of a file that cannot be read."""
    return DataError(
        f"predictions {str(path)!r} cannot be read: {reason}. Delete the file to write the report without its images; "
        "or remove the job's line from results.jsonl, and run the benchmark again."
    )


@contextmanager
def _errors_that_name(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a damaged or forged archive raises errors of many types
        raise unreadable(path, str(error) or type(error).__name__) from error


def _check_size(archive: zipfile.ZipFile) -> None:
    size = sum(info.file_size for info in archive.infolist())
    if size > MOST_BYTES:
        msg = f"its uncompressed size is {size / 2**30:.1f} GiB, the limit is {MOST_BYTES / 2**30:.0f} GiB"
        raise ValueError(msg)
