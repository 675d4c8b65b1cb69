"""What tiling gains on images that are much larger than their defects: textures of 384x384 with dots of 6 pixels.

The images are made here, so that no data set is needed. Each row is one training run of DSKD with the same number of
steps: images resized to the size of a tile, images as they are, and tiles of them.

    python experiments/tiling.py --weights resnet18.tv_in1k.safetensors
"""

import tempfile
import time
from pathlib import Path

import common
import numpy as np
from anomalib.callbacks import TilerConfigurationCallback
from anomalib.data import Folder
from PIL import Image
from scipy.ndimage import gaussian_filter

from anomalib_dskd import Dskd

SIZE, TILE, DOT = 384, 128, 6  # pixels
COUNTS = {"train": 32, "good": 16, "bad": 16}

parser = common.option_parser(__doc__, "--weights", "--epochs", "--batch", "--learning-rate", epochs=10, batch=4)
parser.set_defaults(learning_rate=5e-3)
options = parser.parse_args()


def write_images(root: Path) -> Folder:
    """Write textures, some of them with a dot, and its mask."""
    random = np.random.default_rng(0)
    for name, count in {"masks": 0, **COUNTS}.items():
        (root / name).mkdir()
        for index in range(count):
            noise = gaussian_filter(random.standard_normal((SIZE, SIZE)), 3)
            pixels = 128 + 30 * noise / noise.std()
            if name == "bad":
                top, left = random.integers(0, SIZE - DOT, size=2)
                dot = np.s_[top : top + DOT, left : left + DOT]
                pixels[dot] -= 40
                mask = np.zeros((SIZE, SIZE), dtype=np.uint8)
                mask[dot] = 255
                Image.fromarray(mask).save(root / "masks" / f"{index}.png")
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / name / f"{index}.png")
    folders = {"normal_dir": "train", "normal_test_dir": "good", "abnormal_dir": "bad", "mask_dir": "masks"}
    batches = {"train_batch_size": options.batch, "eval_batch_size": options.batch, "num_workers": 0}
    return Folder("textures", root=root, **folders, **batches, val_split_mode="same_as_test", seed=0)


def run(data: Folder, size: int, stride: int | None) -> tuple[dict[str, float], float]:
    """Train and test; return metrics and seconds of training."""
    tiles = [] if stride is None else [TilerConfigurationCallback(enable=True, tile_size=TILE, stride=stride)]
    model = Dskd(
        teacher_weights=options.weights,
        image_size=size,
        encoder="teacher",
        embedding_input="normalized",
        learning_rate=options.learning_rate,
        schedule="one_cycle",
        ema_decay=0.9,
        seed=0,
        visualizer=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = {"max_epochs": options.epochs, "check_val_every_n_epoch": options.epochs, "callbacks": tiles}
        engine = common.quiet_engine(folder, **trainer)
        start = time.perf_counter()
        engine.fit(model, datamodule=data)
        seconds = time.perf_counter() - start
        (metrics,) = engine.test(model, datamodule=data, verbose=False)
    return metrics, seconds


with tempfile.TemporaryDirectory() as folder:
    data = write_images(Path(folder))
    common.print_header("images", "seconds of training", *common.METRICS)
    for name, size, stride in (
        (f"resized to {TILE}x{TILE}", TILE, None),
        (f"{SIZE}x{SIZE}", SIZE, None),
        (f"{SIZE}x{SIZE} in tiles of {TILE}x{TILE}", SIZE, TILE),
        (f"{SIZE}x{SIZE} in tiles of {TILE}x{TILE}, stride {TILE // 2}", SIZE, TILE // 2),
    ):
        metrics, seconds = run(data, size, stride)
        common.print_row(name, f"{seconds:.0f}", *(common.percent(metrics.get(metric)) for metric in common.METRICS))
