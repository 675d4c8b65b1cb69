import shutil
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import skimage.data
from anomalib.data import Folder, MVTecAD
from PIL import Image

from anomalib_dskd import MagneticTile
from anomalib_dskd.check.check_data import check_data
from anomalib_dskd.check.dataset_checks import check_splits
from tests.conftest import png_chunk, write_bomb

SIDE = 48


def crop(seed: int, side: int = SIDE) -> Image.Image:
    random = np.random.default_rng(seed)
    top, left = random.integers(0, 512 - 4 * side, size=2)
    pixels = skimage.data.astronaut()[top : top + 4 * side, left : left + 4 * side]
    return Image.fromarray(pixels[:: random.integers(1, 4), :: random.integers(1, 4)][:side, :side])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A valid data set: 12 normal training images, 3 normal test images, 3 defective test images with masks."""
    folder = tmp_path / "parts"
    for seed, name in enumerate([f"good/{i:02}" for i in range(12)] + [f"test/{i}" for i in range(3)]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        crop(seed).save(folder / f"{name}.png")
    for index in range(3):
        for name in ("bad", "mask"):
            (folder / name).mkdir(exist_ok=True)
        crop(100 + index).save(folder / "bad" / f"{index}.png")
        mask = np.zeros((SIDE, SIDE), dtype=np.uint8)
        mask[10:20, 10:30] = 255
        Image.fromarray(mask).save(folder / "mask" / f"{index}.png")
    return folder


def module(root: Path, **arguments) -> Folder:
    folders = {"normal_dir": "good", "normal_test_dir": "test", "abnormal_dir": "bad", "mask_dir": "mask"}
    settings = {"name": "parts", "root": root, "val_split_mode": "same_as_test", "test_split_mode": "from_dir"}
    return Folder(**{**settings, **folders, **arguments})


def found(root: Path, **arguments) -> dict[str, tuple[str, list[str]]]:
    findings = check_data(module(root, **arguments))
    assert len({finding.kind for finding in findings}) == len(findings)
    return {finding.kind: (finding.severity, [Path(file).name for file in finding.files]) for finding in findings}


def test_valid_data_set_has_no_findings(root):
    assert found(root) == {}


def save(root: Path, name: str, image: Image.Image, **arguments) -> None:
    image.save(root / name, **arguments)


def with_exif(root: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    save(root, "good/00.jpg", crop(50), exif=exif)


def transparent_palette(root: Path) -> None:
    save(root, "good/00.png", crop(0).convert("P"), transparency=0)


def truncated(root: Path) -> None:
    contents = (root / "good" / "03.png").read_bytes()
    (root / "good" / "03.png").write_bytes(contents[: len(contents) // 2])


def truncated_jpeg(root: Path) -> None:
    crop(60, 96).save(root / "good" / "zz.jpg")
    contents = (root / "good" / "zz.jpg").read_bytes()
    (root / "good" / "zz.jpg").write_bytes(contents[: len(contents) // 2])


def mask(root: Path, values: np.ndarray) -> None:
    Image.fromarray(values.astype(np.uint8)).save(root / "mask" / "0.png")


def noise(*levels: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(*levels, (SIDE, SIDE, 3), dtype=np.uint8))


def sort_masks_differently(root: Path) -> None:
    """``1.png`` sorts before ``11.png``, and ``11_mask.png`` before ``1_mask.png``."""
    for folder, suffix in (("bad", ""), ("mask", "_mask")):
        (root / folder / "0.png").unlink()
        (root / folder / "2.png").rename(root / folder / f"11{suffix}.png")
        (root / folder / "1.png").rename(root / folder / f"1{suffix}.png")


def swap_mask_folders(root: Path) -> None:
    """Let the folders of defect classes sort differently than those of masks; equal file names hide the exchange."""
    for index in (1, 2):
        for folder in ("bad", "mask"):
            (root / folder / f"{index}.png").unlink()
    for kind, above in (("dent", "b"), ("scratch", "a")):
        for folder, part in (("bad", kind), ("mask", f"{above}/{kind}")):
            (root / folder / part).mkdir(parents=True)
            shutil.copy(root / folder / "0.png", root / folder / part / "0.png")
    crop(150).save(root / "bad/dent/0.png")
    for folder in ("bad", "mask"):
        (root / folder / "0.png").unlink()


def png_with_16_bits(image: Image.Image) -> bytes:
    """PIL cannot write one. Repeating the byte of an 8-bit value gives the same value with 16 bits."""
    pixels = np.repeat(np.asarray(image), 2, axis=-1)  # (H, W, 6)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", image.width, image.height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        png_chunk(kind, content)
        for kind, content in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    )


def ramp() -> np.ndarray:
    return np.arange(SIDE * SIDE).reshape(SIDE, SIDE) % 256


PROBLEMS = {
    "truncated PNG": (truncated, {"unreadable": ("error", ["03.png"])}),
    "truncated JPEG": (truncated_jpeg, {"unreadable": ("error", ["zz.jpg"])}),
    "empty file": (lambda r: (r / "good/00.png").write_bytes(b""), {"unreadable": ("error", ["00.png"])}),
    "text": (lambda r: (r / "bad/1.png").write_text("no image"), {"unreadable": ("error", ["1.png"])}),
    "16 bits": (
        lambda r: save(r, "good/00.png", Image.fromarray((ramp() * 200).astype(np.uint16))),
        {"deep": ("error", ["00.png"])},
    ),
    "100 million pixels": (
        lambda r: write_bomb(r / "good/00.png", 10_000, 10_000),
        {"unsafe": ("error", ["00.png"])},
    ),
    "a decompression bomb": (
        lambda r: write_bomb(r / "bad/1.png", 50_000, 50_000),
        {"unsafe": ("error", ["1.png"])},
    ),
    "a mask with too many pixels": (
        lambda r: write_bomb(r / "mask/0.png", 50_000, 50_000),
        {"unsafe": ("error", ["0.png"])},
    ),
    "a program": (
        lambda r: save(r, "good/00.png", crop(0), format="EPS"),
        {"unsafe": ("error", ["00.png"])},
    ),
    "32 bits": (
        lambda r: save(r, "good/00.tiff", Image.fromarray(ramp().astype(np.int32))),
        {"deep": ("error", ["00.tiff"])},
    ),
    "floats": (
        lambda r: save(r, "good/00.tiff", Image.fromarray(ramp().astype(np.float32))),
        {"deep": ("error", ["00.tiff"])},
    ),
    "palette": (lambda r: save(r, "good/00.png", crop(0).convert("P")), {"mode-p": ("note", ["00.png"])}),
    "transparent palette": (transparent_palette, {"mode-p": ("note", ["00.png"])}),
    "CMYK": (lambda r: save(r, "good/zz.jpg", crop(70).convert("CMYK")), {"mode-cmyk": ("warning", ["zz.jpg"])}),
    "alpha": (lambda r: save(r, "good/00.png", crop(0).convert("RGBA")), {"mode-rgba": ("warning", ["00.png"])}),
    "gray and alpha": (
        lambda r: save(r, "good/00.png", crop(0).convert("LA")),
        {"mode-la": ("warning", ["00.png"])},
    ),
    "one bit": (lambda r: save(r, "good/00.png", crop(0).convert("1")), {"mode-1": ("note", ["00.png"])}),
    "transparent color": (
        lambda r: save(r, "good/00.png", crop(0), transparency=(0, 0, 0)),
        {"mode-transparency": ("warning", ["00.png"])},
    ),
    "rotated by EXIF": (with_exif, {"exif-orientation": ("warning", ["00.jpg"])}),
    "pages": (
        lambda r: save(r, "good/zz.tiff", crop(80), save_all=True, append_images=[crop(81)]),
        {"frames": ("warning", ["zz.tiff"])},
    ),
    "black": (lambda r: save(r, "good/00.png", Image.new("RGB", (SIDE, SIDE))), {"flat": ("warning", ["00.png"])}),
    "white": (
        lambda r: save(r, "test/0.png", Image.new("L", (SIDE, SIDE), 255)),
        {"flat": ("warning", ["0.png"])},
    ),
    "a covered camera": (
        lambda r: save(r, "good/00.png", noise(0, 2)),
        {"flat": ("warning", ["00.png"])},
    ),
    "another size": (lambda r: save(r, "good/00.png", crop(0, 60)), {"sizes": ("note", [])}),
    "stretched": (
        lambda r: save(r, "good/00.png", crop(0).resize((100, 48))),
        {"sizes": ("note", []), "aspect-ratio": ("warning", ["00.png"])},
    ),
    "mask of another size": (
        lambda r: save(r, "mask/0.png", Image.fromarray(np.tri(30, dtype=np.uint8) * 255)),
        {"mask-size": ("error", ["0.png"])},
    ),
    "inverted mask": (
        lambda r: mask(r, np.where(np.arange(SIDE * SIDE).reshape(SIDE, SIDE) < SIDE, 0, 255)),
        {"mask-inverted": ("warning", ["0.png"])},
    ),
    "empty mask": (lambda r: mask(r, np.zeros((SIDE, SIDE))), {"mask-empty": ("warning", ["0.png"])}),
    "soft mask": (lambda r: mask(r, np.tril(ramp())), {"mask-not-binary": ("warning", ["0.png"])}),
    "truncated mask": (
        lambda r: (r / "mask/0.png").write_bytes((r / "mask/0.png").read_bytes()[:50]),
        {"unreadable-mask": ("error", ["0.png"])},
    ),
    "mask missing": (lambda r: (r / "mask/0.png").unlink(), {"setup": ("error", []), "no-mask": ("error", ["0.png"])}),
    "mask too many": (
        lambda r: shutil.copy(r / "mask/0.png", r / "mask/9.png"),
        {"setup": ("error", []), "surplus-mask": ("error", ["9.png"])},
    ),
    "mask twice": (
        lambda r: shutil.copy(r / "mask/0.png", r / "mask/0_copy.png"),
        {"setup": ("error", []), "masks-twice": ("error", ["0.png"])},
    ),
    "mask missing, with names that have no separator": (
        lambda r: (
            [(r / f"mask/{i}.png").rename(r / f"mask/mask{i}.png") for i in range(2)] + [(r / "mask/2.png").unlink()]
        ),
        {"setup": ("error", []), "no-mask": ("error", ["2.png"])},
    ),
    "masks that sort differently": (
        sort_masks_differently,
        {"setup": ("error", []), "mask-order": ("error", ["1.png", "11.png"])},
    ),
    "same image as normal and as defective": (
        lambda r: shutil.copy(r / "test/0.png", r / "bad/0.png"),
        {"same-picture": ("error", ["0.png", "0.png"])},
    ),
    "16 bits per channel": (
        lambda r: (r / "good/00.png").write_bytes(png_with_16_bits(crop(0))),
        {"mode-16": ("note", ["00.png"])},
    ),
    "same image in training and test": (
        lambda r: shutil.copy(r / "good/00.png", r / "test/copy.png"),
        {"same-picture": ("error", ["00.png", "copy.png"])},
    ),
    "same image in another format": (
        lambda r: save(r, "test/copy.bmp", crop(0)),
        {"same-picture": ("error", ["00.png", "copy.bmp"])},
    ),
    "same image twice in training": (
        lambda r: shutil.copy(r / "good/00.png", r / "good/copy.png"),
        {"same-picture": ("warning", ["00.png", "copy.png"])},
    ),
    "nearly the same image": (
        lambda r: save(r, "test/copy.jpg", crop(0), quality=80),
        {"near-duplicate": ("warning", ["00.png", "copy.jpg"])},
    ),
    "a suffix that is not read": (
        lambda r: save(r, "good/00.gif", crop(90)),
        {"ignored": ("warning", ["00.gif"])},
    ),
    "no folder": (lambda r: shutil.rmtree(r / "good"), {"setup": ("error", [])}),
    "empty folder": (
        lambda r: (shutil.rmtree(r / "good"), (r / "good").mkdir()),
        {"setup": ("error", [])},
    ),
    "few images": (
        lambda r: [(r / "good" / f"{i:02}.png").unlink() for i in range(3)],
        {"few-training-images": ("warning", [])},
    ),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_each_problem_is_found_with_its_file(name, root):
    damage, expected = PROBLEMS[name]
    damage(root)
    assert found(root) == expected


def test_wrong_pairs_of_images_and_masks_are_found(root):
    swap_mask_folders(root)
    findings = [finding for finding in check_data(module(root)) if finding.severity == "error"]
    names = [[str(Path(file).relative_to(root)) for file in finding.files] for finding in findings]
    assert {finding.kind for finding in findings} == {"mask-of-other-image"}
    assert names == [["bad/dent/0.png", "mask/a/scratch/0.png"], ["bad/scratch/0.png", "mask/b/dent/0.png"]]
    assert "the folder" in findings[0].message


def test_a_set_of_16_bit_images_has_one_kind_of_error(root):
    """Clipped to white, all images would be the same and without contrast."""
    paths = [path for name in ("good", "test", "bad") for path in (root / name).iterdir()]
    for path in paths:
        gray = np.asarray(Image.open(path).convert("L")).astype(np.uint16)
        Image.fromarray(gray * 40 + 500).save(path)
    assert {kind: len(files) for kind, (_, files) in found(root).items()} == {"deep": len(paths)}


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_a_deep_image_without_contrast_is_still_found(mode, root):
    Image.fromarray(np.full((SIDE, SIDE), 3000).astype({"I;16": "u2", "I": "i4", "F": "f4"}[mode])).save(
        root / "good" / "00.tiff"
    )
    assert found(root) == {"deep": ("error", ["00.tiff"]), "flat": ("warning", ["00.tiff"])}


def test_equal_deep_images_are_still_found(root):
    for name in ("good/00", "test/copy"):
        Image.fromarray(np.asarray(crop(0).convert("L")).astype(np.uint16) * 100).save(root / f"{name}.png")
    assert found(root)["same-picture"] == ("error", ["00.png", "copy.png"])


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        ({"train": (50, 0), "val": (5, 5), "test": (5, 5)}, {}),
        ({"train": (0, 0), "val": (5, 5), "test": (5, 5)}, {"no-training-images": "error"}),
        ({"train": (40, 2), "val": (5, 5), "test": (5, 5)}, {"defects-in-training": "error"}),
        ({"train": (50, 0), "val": None, "test": (5, 5)}, {"no-validation-images": "error"}),
        ({"train": (50, 0), "val": (5, 5), "test": (0, 0)}, {"no-test-images": "error"}),
        ({"train": (50, 0), "val": (5, 0), "test": (5, 5)}, {"no-defects-in-validation": "warning"}),
        ({"train": (50, 0), "val": (5, 5), "test": (0, 5)}, {"no-good-images-in-test": "warning"}),
    ],
)
def test_splits_that_make_metrics_meaningless_are_found(splits, expected):
    data = SimpleNamespace()
    for name, counts in splits.items():
        if counts is not None:
            labels = [0] * counts[0] + [1] * counts[1]
            setattr(data, f"{name}_data", SimpleNamespace(samples=pd.DataFrame({"label_index": labels})))
    assert {finding.kind: finding.severity for finding in check_splits(data)} == expected


def test_folder_without_defects_has_no_metrics(root):
    assert found(root, abnormal_dir=None, mask_dir=None)["no-defects-in-test"][0] == "warning"


def test_file_in_two_splits_is_an_error(root):
    kinds = found(root, normal_test_dir="good")
    assert kinds["same-file"][0] == "error"
    assert len(kinds["same-file"][1]) == 12


def test_defective_image_without_mask_is_an_error_if_others_have_one(root):
    data = module(root)
    data.setup()
    for split in (data.val_data, data.test_data):
        split.samples.loc[split.samples.label_index == 1, "mask_path"] = ""
    data.setup = data.prepare_data = lambda: None
    (finding,) = [finding for finding in check_data(data) if finding.severity == "error"]
    assert (finding.kind, len(finding.files)) == ("no-mask", 3)


def test_messages_say_what_to_do(root):
    truncated(root)
    (finding,) = check_data(module(root))
    assert finding.message.startswith("cannot be read: ")
    assert finding.message.endswith("Replace or remove it")
    assert finding.files == [str(root / "good" / "03.png")]


def test_mask_threshold_of_the_data_set_is_used(magnetic_tile_root):
    kinds = {finding.kind for finding in check_data(MagneticTile(magnetic_tile_root))}
    assert "mask-not-binary" not in kinds
    assert not {"no-mask", "mask-size", "mask-of-good-image"} & kinds


def test_every_image_is_checked_once(root):
    seen = []
    check_data(module(root), progress=lambda paths: seen.extend(paths) or iter(paths))
    assert len(seen) == len(set(seen)) == 12 + 3 + 3


@pytest.mark.parametrize("split", ["val", "test"])
def test_source_images_of_synthetic_defects_are_checked(split, root):
    settings = {f"{split}_split_mode": "synthetic", f"{split}_split_ratio": 0.5}
    if split == "test":
        settings |= {"abnormal_dir": None, "normal_test_dir": None, "mask_dir": None}
    seen = []
    findings = check_data(module(root, **settings), progress=lambda paths: seen.extend(paths) or iter(paths))
    expected = {
        path for folder in ["good", "test", "bad"][: 3 if split == "val" else 1] for path in (root / folder).iterdir()
    }
    assert set(map(Path, seen)) == expected
    assert {finding.kind for finding in findings} <= {"few-training-images"}


def test_missing_mask_is_named_in_the_layout_of_mvtec_ad(root, tmp_path):
    category = tmp_path / "mvtec" / "bottle"
    shutil.copytree(root / "good", category / "train" / "good")
    shutil.copytree(root / "test", category / "test" / "good")
    for kind in ("dent", "scratch"):
        shutil.copytree(root / "bad", category / "test" / kind)
        (category / "ground_truth" / kind).mkdir(parents=True)
        for index in range(3):
            shutil.copy(root / "mask" / f"{index}.png", category / "ground_truth" / kind / f"{index}_mask.png")
    (category / "ground_truth" / "dent" / "1_mask.png").unlink()
    setup, missing = check_data(MVTecAD(category.parent, "bottle"))
    assert (setup.kind, missing.kind) == ("setup", "no-mask")
    assert missing.files == [str(category / "test" / "dent" / "1.png")]


def test_all_masks_of_an_image_are_read(root):
    """As in MVTec LOCO, whose table has a list in each cell."""
    data = module(root)
    data.setup()
    (root / "mask/2.png").write_bytes(b"")
    for split in (data.val_data, data.test_data):
        masks = [[path, str(root / "mask/2.png")] if path else [] for path in split.samples.mask_path]
        split.samples["mask_path"] = masks
    data.setup = data.prepare_data = lambda: None
    (finding,) = check_data(data)
    assert (finding.kind, [Path(file).name for file in finding.files]) == ("unreadable-mask", ["2.png"])


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        (lambda path: path.write_bytes(b"no image"), "unreadable-depth"),
        (lambda path: write_bomb(path, 9**5, 9**4), "unsafe"),
    ],
    ids=["no image", "bomb"],
)
def test_depth_images_are_read(damage, kind, root):
    data = module(root, extensions=(".png",))
    data.setup()
    for split in (data.train_data, data.val_data, data.test_data):
        split.samples["depth_path"] = [depth_image(path) for path in split.samples.image_path]
    damage(root / "good" / "00.tiff")
    data.setup = data.prepare_data = lambda: None
    (finding,) = check_data(data)
    assert (finding.kind, [Path(file).name for file in finding.files]) == (kind, ["00.tiff"])


def depth_image(image: str) -> str:
    path = Path(image).with_suffix(".tiff")
    Image.fromarray(ramp().astype(np.float32)).save(path)
    return str(path)


def test_data_without_labels_is_an_error(root):
    data = module(root)
    data.setup()
    for split in (data.train_data, data.val_data, data.test_data):
        split.samples = split.samples.drop(columns="label_index")
    data.setup = data.prepare_data = lambda: None
    (finding,) = check_data(data)
    assert (finding.severity, finding.kind) == ("error", "no-labels")
    assert "Folder has no label per image" in finding.message


def test_missing_mask_is_named_among_several_folders(root):
    for name in ("bad", "mask"):
        (root / f"{name}2").mkdir()
        (root / name / "2.png").rename(root / f"{name}2" / "7.png")
    several = {"abnormal_dir": ["bad", "bad2"], "mask_dir": ["mask", "mask2"]}
    assert found(root, **several) == {}
    (root / "mask2" / "7.png").unlink()
    assert found(root, **several) == {"setup": ("error", []), "no-mask": ("error", ["7.png"])}
