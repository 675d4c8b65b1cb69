"""Links to folders, which anomalib does not follow, and links to files, which it does."""

from collections.abc import Callable
from pathlib import Path

import pytest
from anomalib.data import Folder, MVTecAD, PredictDataset

from anomalib_dskd.check.check_data import check_data
from anomalib_dskd.data.links import check_data_links
from anomalib_dskd.errors import DataError
from tests.conftest import engine
from tests.unit.data.conftest import parts, write


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("good/a", "bad", "good_test"):
        write(tmp_path / "parts" / name)
    return tmp_path / "parts"


def setup(data: Folder) -> Folder:
    data.setup()
    return data


def test_images_in_a_linked_folder_are_not_left_out_in_silence(root, tmp_path, tiny_model):
    (root / "good" / "b").symlink_to(write(tmp_path / "elsewhere"))
    message = r"^3 images below '.*good', such as '.*good/b/0.png', would be left out, .* links such as '.*good/b'\."
    with pytest.raises(DataError, match=message):
        check_data_links(setup(parts(root)))
    with pytest.raises(DataError, match=message):
        engine(tmp_path, max_epochs=1).fit(tiny_model, datamodule=parts(root))
    (finding,) = [finding for finding in check_data(parts(root)) if finding.kind == "linked"]
    assert finding.severity == "error"
    assert finding.message.startswith("3 images below")


def test_the_link_is_named_where_the_data_set_cannot_be_set_up(root, tmp_path):
    elsewhere = write(tmp_path / "elsewhere")
    for path in (root / "bad").iterdir():
        path.unlink()
    (root / "bad" / "b").symlink_to(elsewhere)
    assert [finding.kind for finding in check_data(parts(root))] == ["setup", "linked"]


def link_a_whole_folder(root: Path, _: Path) -> None:
    (root / "bad").rename(root / "bad_images")
    (root / "bad").symlink_to(root / "bad_images")


def link_above(root: Path, elsewhere: Path) -> None:
    root.rename(elsewhere)
    root.symlink_to(elsewhere)


def link_files(root: Path, elsewhere: Path) -> None:
    for path in write(elsewhere).iterdir():
        (root / "good" / f"linked_{path.name}").symlink_to(path)


def link_what_is_there(root: Path, _: Path) -> None:
    (root / "good" / "again").symlink_to(root / "good" / "a")


def link_in_a_circle(root: Path, _: Path) -> None:
    (root / "good" / "circle").symlink_to(root / "good")


def link_other_files(root: Path, elsewhere: Path) -> None:
    elsewhere.mkdir()
    (elsewhere / "notes.txt").write_text("text")
    (root / "good" / "notes").symlink_to(elsewhere)


@pytest.mark.parametrize(
    ("link", "images"),
    [
        (link_a_whole_folder, 3),
        (link_above, 3),
        (link_files, 6),
        (link_what_is_there, 3),
        (link_in_a_circle, 3),
        (link_other_files, 3),
    ],
)
def test_links_that_leave_nothing_out_are_supported(link: Callable, images, root, tmp_path):
    link(root, tmp_path / "elsewhere")
    data = setup(parts(root))
    check_data_links(data)
    assert len(data.train_data) == images


@pytest.mark.parametrize("linked", ["a folder", "files"])
def test_links_in_the_layout_of_mvtec_ad(linked, tmp_path):
    """anomalib leaves out linked folders, and linked files that are outside of the data set."""
    root = tmp_path / "mvtec" / "bottle"
    for name in ("train/good", "test/good"):
        write(root / name)
    elsewhere = write(tmp_path / "elsewhere")
    if linked == "a folder":
        (root / "test" / "more").symlink_to(elsewhere)
        (root / "ground_truth").mkdir()
    else:
        for path in elsewhere.iterdir():
            (root / "train" / "good" / f"linked_{path.name}").symlink_to(path)
    data = setup(MVTecAD(root.parent, "bottle", num_workers=0))
    with pytest.raises(DataError, match="^3 images below .*bottle', such as"):
        check_data_links(data)


def test_images_that_a_user_leaves_out_may_be_links(root, tmp_path):
    link_files(root, tmp_path / "elsewhere")
    data = setup(parts(root))
    data.train_data.samples = data.train_data.samples.head(2)
    check_data_links(data)


def test_predictions_leave_no_image_out(tmp_path):
    new = write(tmp_path / "new" / "day1").parent
    assert len(PredictDataset(new)) == 3
    (new / "day2").symlink_to(write(tmp_path / "elsewhere", 2))
    with pytest.raises(DataError, match=r"^2 images below '.*new', such as '.*new/day2/0.png', would be left out"):
        PredictDataset(new)
    with pytest.raises(FileNotFoundError, match="Path does not exist: .*none"):
        PredictDataset(new / "none")
