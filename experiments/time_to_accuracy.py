"""Metrics on real defects against seconds of training: DSKD as recommended, and Reverse Distillation.

The learning rate of the recommended configuration falls to nearly 0 at its last epoch, so that its metrics after some
epochs say little about a shorter training run: it is trained for each number of epochs. Reverse Distillation, whose
learning rate is constant, is trained once and validated on the way. Seconds count from the call of ``fit``, without
validations. A PNG file next to the CSV file shows the curves of all rows in it, those of earlier calls too.

    python experiments/time_to_accuracy.py --root datasets/MagneticTile --weights resnet18.tv_in1k.safetensors
"""

import tempfile
import time
from pathlib import Path

import common
import pandas as pd
from anomalib.models import ReverseDistillation
from anomalib.models.components import AnomalibModule
from lightning import LightningModule, Trainer, seed_everything
from matplotlib.figure import Figure

from anomalib_dskd import Dskd, MagneticTile
from anomalib_dskd.benchmark.predictions import ScoreRecorder, compute_metrics

METRICS = {name: title for name, title in common.BENCHMARK_METRICS.items() if name != "image_F1"}
COLORS = {"DSKD, recommended": "#0969da", "Reverse Distillation": "#bc4c00"}

parser = common.option_parser(
    __doc__, *(name for name in common.TRAINING_OPTIONS if name != "--learning-rate"), "--batch", epochs=30, every=5
)
parser.add_argument("--lengths", type=int, nargs="*", default=[6, 12, 18, 24], help="epochs of DSKD's training runs")
parser.add_argument("--output", type=Path, default="time_to_accuracy.csv", help="CSV file to which rows are added")
options = parser.parse_args()


class Curve(ScoreRecorder):
    """Records seconds of training and metrics at each validation."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.rows: list[dict[str, float]] = []
        self.seconds = 0.0
        self.running_since = time.perf_counter()

    def on_validation_batch_start(self, trainer: Trainer, module: LightningModule, _batch: object, index: int) -> None:
        if index == 0:  # what comes before, such as re-estimating batch-norm statistics, belongs to the training
            self.seconds += time.perf_counter() - self.running_since
            self.on_test_start(trainer, module)

    on_validation_batch_end = ScoreRecorder.on_test_batch_end

    def on_validation_end(self, trainer: Trainer, _module: object) -> None:
        metrics = compute_metrics(self.predictions({}))
        row = {"epochs": trainer.current_epoch + 1, "seconds": round(self.seconds)}
        self.rows.append(row | {name: round(getattr(metrics, name), 4) for name in METRICS})
        self.running_since = time.perf_counter()


def train(model: AnomalibModule, epochs: int, every: int) -> list[dict[str, float]]:
    """Train, and return seconds and metrics of each validation."""
    with tempfile.TemporaryDirectory() as folder:
        curve = Curve(Path(folder))
        engine = common.quiet_engine(
            folder,
            callbacks=[curve],
            precision=options.precision,
            max_epochs=epochs,
            check_val_every_n_epoch=every,
            num_sanity_val_steps=0,
        )
        engine.fit(model, datamodule=MagneticTile(options.root, train_batch_size=options.batch))
    return curve.rows


def train_recommended(seed: int, epochs: int) -> list[dict[str, float]]:
    arguments = {"teacher_weights": options.weights, "image_size": options.size, "seed": seed}
    return train(Dskd(**arguments, **common.RECOMMENDED, **common.NO_EVALUATION), epochs, epochs)


def train_reverse_distillation(seed: int) -> list[dict[str, float]]:
    seed_everything(seed, workers=True, verbose=False)
    with common.offline_resnet18(options.weights):
        return train(common.build_peer(ReverseDistillation, options.size), options.epochs, options.every)


def report(model: str, seed: int, rows: list[dict[str, float]]) -> None:
    """Print the rows of a training run, and add them to the file."""
    for row in rows:
        metrics = (common.percent(row[name]) for name in METRICS)
        common.print_row(model, seed, row["epochs"], row["seconds"], *metrics)
    table = pd.DataFrame([{"model": model, "seed": seed, **row} for row in rows])
    table.to_csv(options.output, mode="a", header=not options.output.exists(), index=False)


def draw_curves(table: pd.DataFrame, path: Path) -> None:
    """Draw each metric against minutes of training."""
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    for axes, (metric, title) in zip(figure.subplots(1, len(METRICS)), METRICS.items(), strict=True):
        for (model, seed), rows in table.groupby(["model", "seed"]):
            line = rows.sort_values("seconds")
            label = model if seed == table.seed.min() else None
            axes.plot(line.seconds / 60, 100 * line[metric], marker="o", color=COLORS[model], label=label)
        axes.set(title=title, xlabel="minutes of training", ylabel="%")
        axes.grid(color="#e4e7eb")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=110)


common.print_header("model", "seed", "epochs", "seconds", *METRICS.values())
for seed in options.seeds:
    for length in options.lengths:
        report("DSKD, recommended", seed, train_recommended(seed, length))
    if options.epochs:
        report("Reverse Distillation", seed, train_reverse_distillation(seed))
draw_curves(pd.read_csv(options.output), options.output.with_suffix(".png"))
