"""How much memory a training takes for 200, 1,000 and 5,000 images, by how much is kept.

Each training is a process of its own, on pictures of random noise that are written beforehand. What is told is the
largest of ten looks a second at the memory that is the process's own or shared (Linux). Pages of files on a disk, such
as those beyond what is kept in memory, are not counted: the system takes them back when others need the room.

    python experiments/training_memory.py --weights resnet18.tv_in1k.safetensors
"""

import argparse
import tempfile
import threading
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

KEPT = {"nothing": 0.0, "0.05 GiB": 0.05, "1 GiB": 1.0}  # of images, and as much of features; the last is the default
STATUS = Path("/proc/self/status")
EPOCHS = 2  # the second takes what the first has kept


class Peak(threading.Thread):
    """Looks at this process's memory ten times a second (Linux)."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.mib = 0.0
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.1):
            self.look()

    def look(self) -> None:
        status = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
        kib = sum(int(status[name].split()[0]) for name in ("RssAnon", "RssShmem"))
        self.mib = max(self.mib, kib / 1024)


def write_pictures(folder: Path, images: int, size: int) -> None:
    random = np.random.default_rng(0)
    for index in range(images):
        pixels = random.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:05d}.png")


def train(root: Path, weights: str, size: int, batch: int, kept: float) -> float:
    """Train on the pictures of a folder, and return the largest memory in MiB."""
    warnings.simplefilter("ignore")
    from anomalib.data import Folder  # noqa: PLC0415 - only the processes that train need these
    from anomalib.engine import Engine  # noqa: PLC0415

    from anomalib_dskd import Dskd  # noqa: PLC0415

    caches = {"teacher_cache": kept, "image_cache": kept}
    model = Dskd(teacher_weights=weights, image_size=size, **caches, seed=0, visualizer=False, evaluator=False)
    data = Folder(
        "textures",
        root=root,
        normal_dir="good",
        train_batch_size=batch,
        num_workers=0,
        test_split_mode="none",
        val_split_mode="none",
    )
    peak = Peak()
    peak.look()
    peak.start()
    with tempfile.TemporaryDirectory() as results:
        Engine(
            default_root_dir=results,
            accelerator="cpu",
            devices=1,
            precision="bf16-mixed",
            max_epochs=EPOCHS,
            limit_val_batches=0,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(model, datamodule=data)
    peak.look()
    peak.ended.set()
    peak.join()
    return peak.mib


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="file with the weights of resnet18.tv_in1k")
    parser.add_argument("--images", type=int, nargs="+", default=[200, 1000, 5000])
    parser.add_argument("--kept", nargs="+", choices=KEPT, default=list(KEPT))
    parser.add_argument("--size", type=int, default=64, help="height and width")
    parser.add_argument("--batch", type=int, default=16)
    options = parser.parse_args()
    print(f"peak memory in MiB, {options.size}x{options.size}, batch {options.batch}, bf16-mixed, {EPOCHS} epochs")
    print("| kept |", " | ".join(f"{images} images" for images in options.images), "|")
    print("|---|", "---|" * len(options.images), sep="")
    folders = {}
    with tempfile.TemporaryDirectory() as root:
        for images in options.images:
            folders[images] = Path(root) / str(images)
            (folders[images] / "good").mkdir(parents=True)
            write_pictures(folders[images] / "good", images, options.size)
        for name in options.kept:
            peaks = []
            for folder in folders.values():
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                    peaks.append(
                        process.submit(train, folder, options.weights, options.size, options.batch, KEPT[name]).result()
                    )
            print(f"| {name} |", " | ".join(f"{peak:.0f}" for peak in peaks), "|", flush=True)


if __name__ == "__main__":
    main()
