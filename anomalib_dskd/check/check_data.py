"""Check all files of a data set before training."""

from collections.abc import Callable, Iterable

from anomalib import TaskType
from anomalib.data import AnomalibDataModule

from anomalib_dskd.check.dataset_checks import (
    check_duplicates,
    check_linked_files,
    check_sizes,
    check_splits,
    check_unread_files,
)
from anomalib_dskd.check.finding import Finding, merge_findings
from anomalib_dskd.check.image_checks import ImageSummary, check_depth, check_image
from anomalib_dskd.check.mask_checks import check_masks, check_pairs
from anomalib_dskd.check.mask_pairs import find_unpaired
from anomalib_dskd.check.samples import list_datasets, list_samples

__all__ = ["check_data"]


def check_data(data: AnomalibDataModule, *, progress: Callable[[Iterable[str]], Iterable[str]] = iter) -> list[Finding]:
    """Set up a data module and check all its files.

    Args:
        data: any data module of anomalib or of a plugin.
        progress: wraps the iteration over the image files.

    Returns:
        The findings, errors first. Each one lists all files that it applies to.
    """
    try:
        data.prepare_data()
        data.setup()
    except Exception as error:  # data modules raise many kinds
        text = f"the data module cannot be set up: {type(error).__name__}: {error}"
        return [Finding("error", "setup", text), *check_linked_files(data), *find_unpaired(data)]
    if not all("label_index" in dataset.samples for dataset in list_datasets(data).values()):
        text = (
            f"{type(data).__name__} has no label per image (label_index). Supported data sets: those of single images"
        )
        return [Finding("error", "no-labels", text)]
    samples = list_samples(data)
    by_path = {sample.image: sample for sample in samples}
    needs_mask = getattr(getattr(data, "test_data", None), "task", None) == TaskType.SEGMENTATION
    findings = [*check_splits(data), *check_linked_files(data)]
    images: dict[str, ImageSummary] = {}
    for path in progress(list(by_path)):
        found, image = check_image(path)
        if image is not None:
            images[path] = image
        findings += [*found, *check_masks(by_path[path], image, needs_mask=needs_mask)]
        findings += [finding for depth in by_path[path].depths for finding in check_depth(depth)]
    findings += [*check_pairs(data), *check_sizes(images)]
    findings += [*check_duplicates(samples, images), *check_unread_files(samples)]
    return merge_findings(findings)
