"""Peak memory of a training run on 200, 1,000 and 5,000 images, by the size of the feature and image caches.

Each training run is a process of its own, on images of random noise. Pages of files on disk, such as the part of a
cache beyond its memory limit, are not counted.

    python experiments/training_memory.py --weights resnet18.tv_in1k.safetensors
"""

import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import common
import numpy as np
from anomalib.data import Folder
from PIL import Image

from anomalib_dskd import Dskd

CACHES = {"none": 0.0, "0.05 GiB": 0.05, "1 GiB": 1.0}  # of features, and the same of images; the last is the default
EPOCHS = 2  # the second reads what the first has cached


def write_images(folder: Path, images: int, size: int) -> None:
    random = np.random.default_rng(0)
    for index in range(images):
        pixels = random.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:05d}.png")


def train(root: Path, weights: str, size: int, batch: int, cache: float) -> float:
    """Train on the images of a folder, and return the peak memory in MiB."""
    caches = {"teacher_cache": cache, "image_cache": cache}
    model = Dskd(teacher_weights=weights, image_size=size, **caches, seed=0, **common.NO_EVALUATION)
    data = Folder(
        "textures",
        root=root,
        normal_dir="good",
        train_batch_size=batch,
        num_workers=0,
        test_split_mode="none",
        val_split_mode="none",
    )
    with common.MemorySampler() as sampler, tempfile.TemporaryDirectory() as results:
        engine = common.quiet_engine(results, precision="bf16-mixed", max_epochs=EPOCHS, limit_val_batches=0)
        engine.fit(model, datamodule=data)
    return sampler.peak_mib


def main() -> None:
    parser = common.option_parser(__doc__, "--weights", "--size", "--batch", size=64)
    parser.add_argument("--images", type=int, nargs="+", default=[200, 1000, 5000])
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=list(CACHES), help="size of each cache")
    options = parser.parse_args()
    print(f"peak memory in MiB, {options.size}x{options.size}, batch {options.batch}, bf16-mixed, {EPOCHS} epochs")
    common.print_header("cache", *(f"{images} images" for images in options.images))
    with tempfile.TemporaryDirectory() as root:
        for images in options.images:
            folder = Path(root) / str(images) / "good"
            folder.mkdir(parents=True)
            write_images(folder, images, options.size)
        for name in options.caches:
            peaks = []
            for images in options.images:
                arguments = (Path(root) / str(images), options.weights, options.size, options.batch, CACHES[name])
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                    peaks.append(process.submit(train, *arguments).result())
            common.print_row(name, *(f"{peak:.0f}" for peak in peaks))


if __name__ == "__main__":
    main()
