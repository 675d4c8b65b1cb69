"""Training time per image: DSKD with and without its optimizations, as recommended, STFPM and Reverse Distillation.

All variants train on the same images with the same ResNet18, interleaved: every round trains each variant once, so that
a slow period of the machine affects all of them. The first epoch of each, which fills the caches, is not timed.

    python experiments/training_speed.py --root datasets/MagneticTile --weights resnet18.tv_in1k.safetensors
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial

import common
import torch
from anomalib.models import ReverseDistillation, Stfpm
from anomalib.models.components import AnomalibModule
from lightning import Callback

from anomalib_dskd import Dskd, MagneticTile
from anomalib_dskd.components.convolution import WideConv2d

parser = common.option_parser(__doc__, "--root", "--weights", "--size", "--batch", "--rounds", "--precision", rounds=3)
parser.add_argument("--images", type=int, default=160, help="training images")
options = parser.parse_args()


class BaselineDskd(Dskd):
    """DSKD without optimizations of the training step: channels first, PyTorch's own convolution gradients."""

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.model.to(memory_format=torch.contiguous_format)
        for module in self.modules():
            if isinstance(module, WideConv2d):
                module.forward = torch.nn.Conv2d.forward.__get__(module)


class EpochTimer(Callback):
    """Measures the training time of each epoch, in seconds."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, *_: object) -> None:
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: object, _module: object, _out: object, _batch: object, index: int) -> None:
        if index + 1 == trainer.num_training_batches:
            self.seconds.append(time.perf_counter() - self.start)


def build(model_class: type[Dskd], **arguments: object) -> AnomalibModule:
    common_arguments = {"teacher_weights": options.weights, "image_size": options.size, "seed": 0}
    return model_class(**common_arguments, **arguments, **common.NO_EVALUATION)


BASELINE = "DSKD, baseline, FP32"
NO_CACHE = {"teacher_cache": 0.0, "image_cache": 0.0}
VARIANTS: dict[str, tuple[Callable[[], AnomalibModule], str]] = {
    BASELINE: (partial(build, BaselineDskd, **NO_CACHE), "32-true"),
    "DSKD, no cache": (partial(build, Dskd, **NO_CACHE), options.precision),
    "DSKD": (partial(build, Dskd), options.precision),
    "DSKD, recommended": (partial(build, Dskd, **common.RECOMMENDED), options.precision),
    "STFPM": (partial(common.build_peer, Stfpm, options.size), options.precision),
    "Reverse Distillation": (partial(common.build_peer, ReverseDistillation, options.size), options.precision),
}


def seconds_per_epoch(model: AnomalibModule, precision: str) -> float:
    data = MagneticTile(options.root, train_batch_size=options.batch)
    data.setup()
    data.train_data.samples = data.train_data.samples.iloc[: options.images].reset_index(drop=True)
    data._is_setup = True  # otherwise the engine would set up all images again
    timer = EpochTimer()
    with tempfile.TemporaryDirectory() as folder:
        engine = common.quiet_engine(folder, callbacks=[timer], precision=precision, max_epochs=3, limit_val_batches=0)
        engine.fit(model, datamodule=data)
    return statistics.median(timer.seconds[1:])


times: dict[str, list[float]] = {name: [] for name in VARIANTS}
with common.offline_resnet18(options.weights):
    for _ in range(options.rounds):
        for name, (build_variant, precision) in VARIANTS.items():
            times[name].append(seconds_per_epoch(build_variant(), precision))
medians = {name: statistics.median(seconds) for name, seconds in times.items()}
setting = f"{options.images} images of {options.size}x{options.size}, batch {options.batch}, {options.rounds} rounds"
print(f"\n{setting}, {options.precision} but for the baseline")
common.print_header("variant", "ms per image", "relative to baseline")
for name, median in medians.items():
    common.print_row(name, f"{1000 * median / options.images:.1f}", f"{median / medians[BASELINE]:.2f}")
