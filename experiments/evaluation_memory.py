"""Peak memory of a validation, test, benchmark job and report on few and on many images of 512x512 pixels, with masks.

Each row is a process of its own, on images of random noise, half of them with a defect. The model, whose teacher is the
one of the extra `lite`, is trained for one step. Pages of files on disk are not counted.

    python experiments/evaluation_memory.py
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
from anomalib_dskd.benchmark.config import BenchmarkConfig, DatasetSpec, Measurements, ModelSpec, expand
from anomalib_dskd.benchmark.report.write_report import write_report
from anomalib_dskd.benchmark.run_folder import RunFolder
from anomalib_dskd.benchmark.run_job import run_job

MODEL = {"teacher": "tf_efficientnet_lite0", "encoder": "teacher", "embedding_input": "normalized"}


def write_data_set(root: Path, images: int, size: int) -> dict[str, object]:
    """Write images and masks, and return the arguments of their data module."""
    random = np.random.default_rng(0)
    for split, number in {"train": 8, "good": images // 2, "bad": images // 2, "masks": images // 2}.items():
        (root / split).mkdir(parents=True)
        for index in range(number):
            pixels = np.zeros((size, size), np.uint8)
            top, left = random.integers(0, size // 2, 2)
            pixels[top : top + size // 4, left : left + size // 8] = 255
            if split != "masks":
                pixels = random.integers(0, 256, (size // 8, size // 8), np.uint8).repeat(8, 0).repeat(8, 1)
            Image.fromarray(pixels).save(root / split / f"{index:05d}.png")
    folders = {"normal_dir": "train", "normal_test_dir": "good", "abnormal_dir": "bad", "mask_dir": "masks"}
    sizes = {"train_batch_size": 8, "eval_batch_size": 8, "num_workers": 0}
    splits = {"test_split_mode": "from_dir", "val_split_mode": "same_as_test"}
    return {"name": "noise", "root": str(root), **folders, **sizes, **splits}


def measure(kind: str, images: int, size: int) -> float:
    """Return the peak memory in MiB."""
    with tempfile.TemporaryDirectory() as folder, common.MemorySampler() as sampler:
        data = write_data_set(Path(folder, "data"), images, size)
        if kind == "benchmark":
            evaluate_in_benchmark(data, Path(folder, "run"), size)
        else:
            model = Dskd(**MODEL, image_size=size, seed=0, visualizer=False)
            engine = common.quiet_engine(folder, max_epochs=1)
            engine.fit(model, datamodule=Folder(**data))  # with a validation
            engine.test(model, datamodule=Folder(**data), verbose=False)
    return sampler.peak_mib


def evaluate_in_benchmark(data: dict[str, object], folder: Path, size: int) -> None:
    config = BenchmarkConfig(
        models=[ModelSpec({"class_path": "anomalib_dskd.Dskd", "init_args": MODEL})],
        datasets=[DatasetSpec({"class_path": "anomalib.data.Folder", "init_args": data})],
        epochs=1,
        image_size=size,
        measure=Measurements(speed=False),
    )
    (job,) = expand(config)
    with RunFolder(folder, "") as run:
        run.write_plan([job])
        run.append(run_job(job, run.job_folder(job.id), lambda *_: None))
        write_report(folder)


def main() -> None:
    parser = common.option_parser(__doc__, "--size", size=512)
    parser.add_argument("--images", type=int, nargs="+", default=[100, 1000])
    options = parser.parse_args()
    print(f"peak memory in MiB, {options.size}x{options.size}")
    common.print_header("", *(f"{images} images" for images in options.images))
    for kind in ("validation and test", "benchmark"):
        peaks = []
        for images in options.images:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                peaks.append(process.submit(measure, kind, images, options.size).result())
        common.print_row(kind, *(f"{peak:.0f}" for peak in peaks))


if __name__ == "__main__":
    main()
