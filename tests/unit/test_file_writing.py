import errno
import os
from pathlib import Path
from unittest.mock import Mock

import pytest

from anomalib_dskd.file_writing import write_file


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("content", ["Prüfstück\n", "Prüfstück\n".encode(), memoryview("Prüfstück\n".encode())])
def test_text_and_bytes_are_written_to_a_new_folder(content, tmp_path):
    write_file(tmp_path / "new" / "file.txt", content)
    assert contents(tmp_path / "new") == {"file.txt": b"Pr\xc3\xbcfst\xc3\xbcck\n"}


def test_old_file_is_replaced_only_once_the_new_one_is_complete(tmp_path, monkeypatch):
    path, seen = tmp_path / "file.txt", []
    write_file(path, "old")
    monkeypatch.setattr(os, "fsync", lambda _: seen.append(contents(tmp_path)))
    write_file(path, "new")
    assert seen == [{"file.txt": b"old", "file.txt.part": b"new"}]
    assert contents(tmp_path) == {"file.txt": b"new"}


def test_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    write_file(path, "old")
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    with pytest.raises(OSError, match="No space left on device"):
        write_file(path, "new")
    assert contents(tmp_path) == {"file.txt": b"old"}


@pytest.mark.parametrize("name", ["file.txt", "file.txt.part"])
def test_links_are_replaced_and_not_followed(name, tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    (tmp_path / name).symlink_to(tmp_path / "precious.txt")
    write_file(tmp_path / "file.txt", "new")
    assert not (tmp_path / "file.txt").is_symlink()
    assert contents(tmp_path) == {"file.txt": b"new", "precious.txt": b"mine"}
