"""Metrics with averaged weights (``ema_decay``) and with the last step's weights, of the same training run.

A fifth of the normal training images is held out; their loss, summed over both students, compares the weights without
any defects. The metrics on the test set show whether it chooses the better weights.

    python experiments/weight_average.py --root PATH --weights resnet18.tv_in1k.safetensors --seeds 0 1 2
"""

import tempfile
from pathlib import Path

import common
import torch
from lightning import Callback, Trainer
from torch.utils.data import DataLoader

from anomalib_dskd import Dskd, MagneticTile
from anomalib_dskd.models.distillation.callbacks import EvaluationWeights
from anomalib_dskd.models.distillation.training_loader import estimate_batch_norm

parser = common.option_parser(__doc__, *common.TRAINING_OPTIONS)
parser.add_argument("--decay", type=float, default=0.99)
options = parser.parse_args()
if not 0 < options.decay < 1:
    parser.error(f"--decay {options.decay}: must be larger than 0 and smaller than 1")


class SaveWeights(Callback):
    """Saves the averaged and the last step's weights at each validation, each with its own batch-norm statistics."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_validation_end(self, trainer: Trainer, pl_module: Dskd) -> None:
        epoch = trainer.current_epoch + 1
        (evaluation,) = (part for part in trainer.callbacks if isinstance(part, EvaluationWeights))
        assert evaluation.average is not None
        torch.save(pl_module.model.state_dict(), self.folder / f"{epoch} average")
        evaluation.average.restore()
        estimate_batch_norm(pl_module, pl_module.model, pl_module.run_students)
        torch.save(pl_module.model.state_dict(), self.folder / f"{epoch} last step")


def build(seed: int) -> Dskd:
    return Dskd(
        teacher_weights=options.weights,
        image_size=options.size,
        learning_rate=options.learning_rate,
        ema_decay=options.decay,
        seed=seed,
        visualizer=False,
    )


def build_data() -> MagneticTile:
    return MagneticTile(options.root, val_split_mode="from_train", val_split_ratio=0.2)


@torch.no_grad()
def held_out_loss(model: Dskd, loader: DataLoader) -> float:
    """Return the mean over the images of the sum of both students' losses."""
    total = 0.0
    for batch in loader:
        images = model.pre_processor(batch.image)
        teacher = model.model.teacher_features(images)
        losses = model.loss(teacher, model.model.student_features(images, teacher))
        total += float(sum(losses.values())) * len(images)
    return total / len(loader.dataset)


def train_and_test(seed: int, folder: Path) -> None:
    """Train, and print the held-out loss and the test metrics of both sets of weights at each validation."""
    common.quiet_engine(
        folder,
        callbacks=[SaveWeights(folder)],
        precision=options.precision,
        max_epochs=options.epochs,
        check_val_every_n_epoch=options.every,
    ).fit(build(seed), datamodule=build_data())
    data = build_data()
    data.setup()
    for epoch in range(options.every, options.epochs + 1, options.every):
        for weights in ("last step", "average"):
            model = build(seed)
            model.model.load_state_dict(torch.load(folder / f"{epoch} {weights}"))
            model.eval()
            (metrics,) = common.quiet_engine(folder).test(model, datamodule=data, verbose=False)
            loss = held_out_loss(model, data.val_dataloader())  # the test has set the data module's resizing
            common.print_row(
                seed, epoch, weights, f"{loss:.4f}", *(common.percent(metrics[name]) for name in common.METRICS)
            )


print(f"learning rate {options.learning_rate}, decay {options.decay}, {options.epochs} epochs")
common.print_header("seed", "epoch", "weights", "held-out loss", "image AUROC", "pixel AUROC", "AUPRO")
for seed in options.seeds:
    with tempfile.TemporaryDirectory() as name:
        train_and_test(seed, Path(name))
