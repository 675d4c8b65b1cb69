"""How long an epoch of training takes: DSKD with and without what makes it fast, beside its peers.

All variants train on the same tiles with the same ResNet18, one after the other in each round, so that a slower
minute of the machine meets all of them. The first epoch of each, which fills caches, is left out.

    python experiments/training_speed.py --root datasets/MagneticTile --weights resnet18.tv_in1k.safetensors
"""

import argparse
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--root", type=Path, required=True, help="folder of the Magnetic Tile Defects data")
parser.add_argument("--weights", required=True, help="file with the weights of resnet18.tv_in1k")
parser.add_argument("--images", type=int, default=160, help="training images")
parser.add_argument("--size", type=int, default=128, help="height and width")
parser.add_argument("--batch", type=int, default=16)
parser.add_argument("--rounds", type=int, default=3)
options = parser.parse_args()

CACHE = tempfile.TemporaryDirectory(prefix="anomalib-dskd-")
os.environ.update(HF_HUB_CACHE=CACHE.name, HF_HUB_OFFLINE="1")  # before anything imports huggingface_hub
warnings.simplefilter("ignore")

import torch  # noqa: E402 - after the environment
from anomalib.engine import Engine  # noqa: E402
from anomalib.models import ReverseDistillation, Stfpm  # noqa: E402
from anomalib.models.components import AnomalibModule  # noqa: E402
from lightning import Callback  # noqa: E402

from anomalib_dskd import Dskd, MagneticTile  # noqa: E402
from anomalib_dskd.benchmark.hub_cache import write_hub_cache  # noqa: E402
from anomalib_dskd.components.convolution import WideConv2d  # noqa: E402

OFF = {"visualizer": False, "evaluator": False}


class Straightforward(Dskd):
    """DSKD as one would write it down first: channels first, PyTorch's own gradients, nothing kept."""

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.model.to(memory_format=torch.contiguous_format)
        for module in self.modules():
            if isinstance(module, WideConv2d):
                module.forward = torch.nn.Conv2d.forward.__get__(module)


class Clock(Callback):
    """Seconds of each epoch's training."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, *_: object) -> None:
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: object, _module: object, _out: object, _batch: object, index: int) -> None:
        if index + 1 == trainer.num_training_batches:
            self.seconds.append(time.perf_counter() - self.start)


def dskd(model_class: type[Dskd] = Dskd, **arguments: float) -> AnomalibModule:
    return model_class(teacher_weights=options.weights, image_size=options.size, seed=0, **OFF, **arguments)


def peer(model_class: type[AnomalibModule]) -> AnomalibModule:
    pre_processor = model_class.configure_pre_processor(image_size=(options.size, options.size))
    return model_class(backbone="resnet18", pre_processor=pre_processor, **OFF)


PLAIN = {"teacher_cache": 0.0, "image_cache": 0.0}
VARIANTS: dict[str, tuple[Callable[[], AnomalibModule], str]] = {
    "DSKD, straightforward, f32": (lambda: dskd(Straightforward, **PLAIN), "32-true"),
    "DSKD, f32": (dskd, "32-true"),
    "DSKD, bf16, nothing kept": (lambda: dskd(**PLAIN), "bf16-mixed"),
    "DSKD, bf16": (dskd, "bf16-mixed"),
    "STFPM, bf16": (lambda: peer(Stfpm), "bf16-mixed"),
    "Reverse Distillation, bf16": (lambda: peer(ReverseDistillation), "bf16-mixed"),
}


def seconds_an_epoch(make: Callable[[], AnomalibModule], precision: str) -> float:
    data = MagneticTile(options.root, train_batch_size=options.batch)
    data.setup()
    data.train_data.samples = data.train_data.samples.iloc[: options.images].reset_index(drop=True)
    data._is_setup = True  # keep the subset
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(
            default_root_dir=folder,
            callbacks=[clock],
            accelerator="cpu",
            devices=1,
            precision=precision,
            max_epochs=3,
            limit_val_batches=0,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        engine.fit(make(), datamodule=data)
    return statistics.median(clock.seconds[1:])


write_hub_cache({"resnet18": options.weights}, Path(CACHE.name))
times: dict[str, list[float]] = {name: [] for name in VARIANTS}
for _ in range(options.rounds):
    for name, (make, precision) in VARIANTS.items():
        times[name].append(seconds_an_epoch(make, precision))
reference = statistics.median(times["DSKD, straightforward, f32"])
print(f"\n{options.images} images of {options.size}x{options.size}, batch {options.batch}, {options.rounds} rounds")
print("| variant | ms an image | of the straightforward |\n|---|---|---|")
for name, seconds in times.items():
    median = statistics.median(seconds)
    print(f"| {name} | {1000 * median / options.images:.1f} | {median / reference:.2f} |")
