import zipfile

import numpy as np
import pytest

from anomalib_dskd.benchmark.predictions_file import ArrayFile, read_arrays, read_rows, write_arrays
from anomalib_dskd.errors import DataError

MAPS = np.random.default_rng(0).random((5, 3, 4)).astype(np.float16)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "predictions.npz"
    write_arrays(path, {"paths": ["a.png", "b.png"], "maps": MAPS})
    return path


def test_numpy_reads_the_file(file):
    with np.load(file) as arrays:
        np.testing.assert_array_equal(arrays["maps"], MAPS)
        assert arrays["paths"].tolist() == ["a.png", "b.png"]


def test_rows_are_those_of_the_array(file):
    for read, expected in zip(read_rows(file, "maps", 5), MAPS, strict=True):
        np.testing.assert_array_equal(read, expected)


def test_what_is_missing_is_empty(file):
    assert read_arrays(file, "masks")[0].size == 0
    assert list(read_rows(file, "masks", 5)) == []


def test_rows_of_another_number_are_an_error(file):
    with pytest.raises(DataError, match=r"maps of 4 images have the shape \(5, 3, 4\)"):
        list(read_rows(file, "maps", 4))


def test_a_damaged_array_is_an_error_that_names_the_file(tmp_path, file):
    with zipfile.ZipFile(file) as archive:
        content = archive.read("maps.npy")
    with zipfile.ZipFile(tmp_path / "cut.npz", "w") as archive:
        archive.writestr("maps.npy", content[:-10])
    with pytest.raises(DataError, match=r"cut\.npz' cannot be read: .* Delete the file"):
        list(read_rows(tmp_path / "cut.npz", "maps", 5))


def test_a_file_that_cannot_be_written_leaves_the_earlier_one(file):
    before = file.read_bytes()
    with pytest.raises(ValueError, match="allow_pickle"):
        write_arrays(file, {"maps": np.array([object()])})
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_an_array_file_grows_by_rows_of_one_shape(tmp_path):
    array = ArrayFile(tmp_path / "maps", np.float32)
    assert array.read() is None
    array.append(MAPS[:2])
    array.append(MAPS[2:])
    np.testing.assert_array_equal(array.read(), MAPS.astype(np.float32))
    with pytest.raises(ValueError, match=r"\(3, 4\) and \(4, 3\) cannot be joined"):
        array.append(np.zeros((1, 4, 3)))
