"""Score a folder of images with an exported model, at maximum throughput.

OpenVINO's throughput mode runs several inference requests in parallel, here each with a batch, and calls a function
when one is done. The output is CSV with a line per image: file, score from 0 to 1, and whether it is defective.

    python examples/predict_folder.py results/.../weights/openvino/model.xml new_images --batch 4 > scores.csv
"""

import argparse
import csv
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import openvino
from numpy.typing import NDArray


class Prediction(NamedTuple):
    """A model's result for an image."""

    path: Path
    score: float
    is_defective: bool


def image_files(folder: Path) -> list[Path]:
    """Return the images in a folder and its subfolders, of all types that anomalib reads.

    Raises:
        ValueError: there are none.
        DataError: links lead to some, and they would be left out.
    """
    from anomalib_dskd.data.anomalib_files import get_image_filenames_from_dir  # noqa: PLC0415 - for a quick --help

    return get_image_filenames_from_dir(folder)


def batches(paths: Iterable[Path], size: int) -> Iterator[tuple[list[Path], NDArray[np.float32]]]:
    """Yield batches of images of the same size: their files, and pixels ``(B, 3, H, W)`` from 0 to 1.

    Images that cannot be read are reported on stderr and skipped.
    """
    from anomalib_dskd.data.image_files import read_named_image  # noqa: PLC0415 - for a quick --help
    from anomalib_dskd.errors import DataError  # noqa: PLC0415

    names: list[Path] = []
    images: list[NDArray[np.float32]] = []
    for path in paths:
        try:
            image = read_named_image(path).numpy()
        except DataError as error:
            print(error, file=sys.stderr)
            continue
        if images and (len(images) == size or image.shape != images[0].shape):
            yield names, np.stack(images)
            names, images = [], []
        names.append(path)
        images.append(image)
    if images:
        yield names, np.stack(images)


def predict(model: Path, paths: Iterable[Path], *, batch: int = 4) -> list[Prediction]:
    """Return predictions in the order in which inference requests complete.

    Args:
        model: exported ``.xml`` file.
        paths: image files.
        batch: images per inference request.
    """
    compiled = openvino.Core().compile_model(model, "CPU", {"PERFORMANCE_HINT": "THROUGHPUT"})
    queue = openvino.AsyncInferQueue(compiled)
    predictions: list[Prediction] = []

    def collect(request: Any, names: list[Path]) -> None:  # noqa: ANN401 - OpenVINO's
        scores, labels = (request.get_tensor(name).data.reshape(-1) for name in ("pred_score", "pred_label"))
        predictions.extend(map(Prediction, names, scores.tolist(), labels.astype(bool).tolist()))

    queue.set_callback(collect)
    for names, images in batches(paths, batch):
        queue.start_async([images], names)  # waits while all requests are busy
    queue.wait_all()
    return predictions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the .xml file that `anomalib export --export_type openvino` wrote")
    parser.add_argument("folder", type=Path, help="folder of images, which may be in subfolders")
    parser.add_argument("--batch", type=int, default=4, help="images per inference request; try 1, 4 and 16")
    options = parser.parse_args()
    if not options.model.is_file():
        parser.error(f"model {str(options.model)!r} does not exist: export one with `anomalib export`")
    if options.batch < 1:
        parser.error(f"batch {options.batch} must be 1 or larger")
    from anomalib_dskd.errors import DataError  # noqa: PLC0415 - for a quick --help

    try:
        paths = image_files(options.folder)
    except (DataError, ValueError) as error:
        parser.error(f"folder {str(options.folder)!r} contains no images that can be read: {error}")
    writer = csv.writer(sys.stdout)
    writer.writerow(Prediction._fields)
    predictions = predict(options.model, paths, batch=options.batch)
    writer.writerows(sorted(predictions))
    sys.exit(0 if len(predictions) == len(paths) else 1)


if __name__ == "__main__":
    main()
