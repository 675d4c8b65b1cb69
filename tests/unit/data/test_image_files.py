import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from anomalib.data.utils import read_image
from PIL import Image, ImageFile

from anomalib_dskd.data.image_files import (
    check_data_files,
    check_header,
    check_headers,
    dataset_paths,
    read_named_image,
)
from anomalib_dskd.errors import DataError, UnsafeImageError
from tests.conftest import write_bomb

RGB = np.random.default_rng(0).integers(0, 256, size=(16, 20, 3), dtype=np.uint8)
GRAY16 = np.linspace(300, 60_000, 16 * 20).reshape(16, 20)


def write_high_bit_depth(path, dtype):
    Image.fromarray(GRAY16.astype(dtype)).save(path)
    return path


def pil_values(path):
    """Read an image as PIL does, as (3, H, W) floats from 0 to 1."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    return torch.from_numpy(pixels.astype(np.float32) / 255).permute(2, 0, 1)


high_bit_depth_files = pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("gray16.png", np.uint16),
        ("gray16.tif", np.uint16),
        ("gray32.tif", np.int32),
        ("float.tif", np.float32),
    ],
)


@high_bit_depth_files
def test_more_than_8_bits_are_refused_by_name(tmp_path, name, dtype):
    path = write_high_bit_depth(tmp_path / name, dtype)
    message = f"image {re.escape(repr(str(path)))} has more than 8 bits per channel .* Convert the data set to 8 bits"
    with pytest.raises(DataError, match=message):
        check_header(path)
    with pytest.raises(DataError, match=message):
        read_named_image(path)


def test_refused_file_is_refused_every_time(tmp_path):
    path = write_high_bit_depth(tmp_path / "gray16.png", np.uint16)
    for _ in range(2):
        with pytest.raises(DataError, match="more than 8 bits"):
            check_header(path)


def test_one_16_bit_file_in_a_batch_is_refused(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "gray8.png")
    gray16 = write_high_bit_depth(tmp_path / "gray16.png", np.uint16)
    with pytest.raises(DataError, match=r"gray16\.png' has more than 8 bits"):
        check_headers([str(tmp_path / "gray8.png"), str(gray16)])


@pytest.mark.parametrize("paths", [None, []])
def test_batch_without_file_names_is_accepted(paths):
    assert check_headers(paths) is None


def test_header_check_ignores_unreadable_files(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    assert check_header(tmp_path / "text.png") is None
    assert check_header(tmp_path / "missing.png") is None


# When this fails, anomalib reads 16-bit images properly, and `check_header` is no longer needed.
def test_anomalib_still_reads_16_bits_as_all_white(tmp_path):
    path = write_high_bit_depth(tmp_path / "gray16.png", np.uint16)
    assert GRAY16.min() < GRAY16.max()
    assert torch.equal(torch.as_tensor(read_image(path, as_tensor=True)), torch.ones(3, 16, 20))


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("gray.png", "L"),
        ("rgb.png", "RGB"),
        ("palette.png", "P"),
        ("rgba.png", "RGBA"),
        ("gray.jpg", "L"),
        ("rgb.jpg", "RGB"),
        ("cmyk.jpg", "CMYK"),
    ],
)
def test_8_bit_images_are_read_as_pil_reads_them(tmp_path, name, mode):
    path = tmp_path / name
    Image.fromarray(RGB).convert(mode).save(path)
    with Image.open(path) as written:
        assert written.mode == mode
    image = read_named_image(path)
    assert image.dtype == torch.float32
    assert image.shape == (3, 16, 20)
    torch.testing.assert_close(torch.as_tensor(image), pil_values(path), rtol=0, atol=1e-6, check_dtype=False)
    assert image.max() > image.min()


def test_gray_values_fill_three_channels(tmp_path):
    Image.fromarray(RGB[..., 0]).save(tmp_path / "gray.png")
    expected = torch.from_numpy(RGB[..., 0] / np.float32(255)).expand(3, 16, 20)
    torch.testing.assert_close(torch.as_tensor(read_named_image(tmp_path / "gray.png")), expected, rtol=0, atol=1e-6)


def test_transparency_is_dropped(tmp_path):
    rgba = np.dstack([RGB, np.zeros((16, 20), dtype=np.uint8)])
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    expected = torch.from_numpy(RGB / np.float32(255)).permute(2, 0, 1)
    torch.testing.assert_close(torch.as_tensor(read_named_image(tmp_path / "rgba.png")), expected, rtol=0, atol=1e-6)


def test_path_may_be_a_string(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "rgb.png")
    assert torch.equal(read_named_image(str(tmp_path / "rgb.png")), read_named_image(tmp_path / "rgb.png"))


def cannot_be_read(path):
    return f"image {re.escape(repr(str(path)))} cannot be read: .+ Replace the file, or remove it from the data set"


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # by anomalib's read_image
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("name", ["image.jpg", "image.png"])
def test_truncated_image_is_named(tmp_path, name, share):
    path = tmp_path / name
    Image.fromarray(RGB).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(DataError, match=cannot_be_read(path)):
        read_named_image(path)


@pytest.mark.parametrize("content", [b"", b"This is no image."])
def test_file_that_is_no_image_is_named(tmp_path, content):
    path = tmp_path / "text.jpg"
    path.write_bytes(content)
    with pytest.raises(DataError, match=cannot_be_read(path)):
        read_named_image(path)


def test_missing_image_is_named(tmp_path):
    path = tmp_path / "missing.png"
    with pytest.raises(DataError, match=cannot_be_read(path)) as caught:
        read_named_image(path)
    assert isinstance(caught.value.__cause__, FileNotFoundError)


# --- files that are not safe to decode ---------------------------------------------------------------------------

TOO_LARGE = [(10_000, 10_000), (50_000, 50_000), (200_000, 600)]


def too_large(path, side):
    return (
        rf"^image {re.escape(repr(str(path)))} is too large to decode\. Image size \({side[0] * side[1]} pixels\) "
        r"exceeds limit of \d+ pixels.* Cut it into tiles.* PIL\.Image\.MAX_IMAGE_PIXELS \(89478485\)"
    )


@pytest.mark.parametrize("side", TOO_LARGE, ids=str)
@pytest.mark.parametrize("read", [check_header, read_named_image])
def test_too_many_pixels_are_refused_by_the_header(tmp_path, read, side, monkeypatch):
    path = write_bomb(tmp_path / "bomb.png", *side)
    decoded = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", decoded.append)
    for _ in range(2):
        with pytest.raises(UnsafeImageError, match=too_large(path, side)):
            read(path)
    assert not decoded


def test_pixel_limit_is_that_of_pil(tmp_path, monkeypatch):
    Image.fromarray(RGB).save(tmp_path / "image.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 16 * 20 - 1)
    with pytest.raises(UnsafeImageError, match=r"Image size \(320 pixels\) exceeds limit of 319 pixels"):
        read_named_image(tmp_path / "image.png")
    check_header.cache_clear()
    for limit in (16 * 20, None):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert read_named_image(tmp_path / "image.png").shape == (3, 16, 20)


def test_postscript_is_not_run_whatever_its_suffix(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr("subprocess.check_call", lambda *arguments, **_: started.append(arguments))
    path = tmp_path / "part.png"
    Image.fromarray(RGB).save(path, "EPS")
    for read in (check_header, read_named_image):
        with pytest.raises(UnsafeImageError, match=r"part.png' is a PostScript program, which is not run. Convert it"):
            read(path)
    assert not started


def samples_of(**columns):
    return SimpleNamespace(samples=pd.DataFrame(columns))


def test_all_files_of_the_given_splits_are_checked(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "image.png")
    image, bomb = str(tmp_path / "image.png"), str(write_bomb(tmp_path / "bomb.png", 10_000, 10_000))
    gray16 = str(write_high_bit_depth(tmp_path / "gray16.png", np.uint16))
    data = SimpleNamespace(
        train_data=samples_of(image_path=[image, image]),
        val_data=samples_of(image_path=[image, bomb], mask_path=["", None]),
        test_data=samples_of(image_path=[image, image], mask_path=[gray16, bomb]),
    )
    check_data_files(data, ["absent", "train"])
    for split in ("val", "test"):
        with pytest.raises(UnsafeImageError, match="bomb.png"):
            check_data_files(data, ["absent", split])
    synthetic = SimpleNamespace(val_data=SimpleNamespace(source_samples=samples_of(image_path=[image, bomb]).samples))
    synthetic.val_data.samples = samples_of(image_path=[image, image]).samples
    with pytest.raises(UnsafeImageError, match="bomb.png"):
        check_data_files(synthetic, ["val"])
    data.test_data.samples.mask_path = [gray16, "gone.png"]
    check_data_files(data, ["test"])  # masks may have 16 bits, and missing files are ignored


def test_images_of_data_loaders_are_found():
    predict = SimpleNamespace(dataset=SimpleNamespace(image_filenames=["a.png", "b.png"]))
    test = SimpleNamespace(dataset=samples_of(image_path=["c.png"]))
    assert list(dataset_paths([predict, test])) == ["a.png", "b.png", "c.png"]
    assert list(dataset_paths(predict)) == ["a.png", "b.png"]
    assert list(dataset_paths(SimpleNamespace(dataset=[1, 2]))) == []
    assert list(dataset_paths(None)) == []
