"""Metrics on pseudo-defects, which can stop a training run, next to metrics on real defects, over the epochs.

A fifth of the normal training images is held out, and half of those are damaged by anomalib's synthetic validation
split. Early stopping can monitor the metrics on these pseudo-defects; those on the test set show how well it does.
``--variant`` tries changes that may keep the students from learning to copy the teacher on defects, too.

    python experiments/stopping.py --root datasets/MagneticTile --weights resnet18.tv_in1k.safetensors --seeds 0 1 2
"""

import json
import tempfile
from pathlib import Path

import common
import torch
from anomalib.callbacks import ModelCheckpoint
from lightning import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn

from anomalib_dskd import Dskd, MagneticTile
from anomalib_dskd.evaluation import RawScoreEvaluator

NOISE = 0.2  # standard deviation, relative to that of the embedding
DROPOUT = 0.2  # fraction of the embedding's channels


def halve(_embedding: nn.Module, _inputs: object, embedded: Tensor) -> Tensor:
    """Set half of the channels to zero, always the same ones."""
    return embedded * (torch.arange(embedded.shape[1]) < embedded.shape[1] // 2)[:, None, None]


def add_noise(_embedding: nn.Module, _inputs: object, embedded: Tensor) -> Tensor:
    """Add noise in training."""
    if not torch.is_grad_enabled():
        return embedded
    return embedded + NOISE * embedded.detach().std() * torch.randn_like(embedded)


def drop_channels(_embedding: nn.Module, _inputs: object, embedded: Tensor) -> Tensor:
    """Set random channels to zero in training."""
    return nn.functional.dropout2d(embedded, DROPOUT, training=torch.is_grad_enabled())


ARGUMENTS = {"weight decay": {"weight_decay": 1e-4}, "no gradient": {"embedding_gradient": False}}
HOOKS = {"noise": add_noise, "dropout": drop_channels, "half embedding": halve}

parser = common.option_parser(__doc__, *common.TRAINING_OPTIONS, epochs=50, every=5)
parser.add_argument("--schedule", default="constant", choices=["constant", "one_cycle"])
parser.add_argument("--variant", default="plain", choices=["plain", *HOOKS, *ARGUMENTS])
parser.add_argument("--output", type=Path, help="file to which each validation is appended, as a line of JSON")
options = parser.parse_args()


class Curve(Callback):
    """Records the metrics on pseudo-defects by epoch."""

    def __init__(self) -> None:
        self.metrics: dict[int, dict[str, float]] = {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        self.metrics[trainer.current_epoch] = {name: float(trainer.callback_metrics[name]) for name in common.METRICS}


def build(seed: int) -> Dskd:
    model = Dskd(
        teacher_weights=options.weights,
        image_size=options.size,
        schedule=options.schedule,
        learning_rate=options.learning_rate,
        seed=seed,
        evaluator=RawScoreEvaluator(validation=True),
        visualizer=False,
        **ARGUMENTS.get(options.variant, {}),
    )
    if options.variant in HOOKS:
        assert model.model.embedding is not None
        model.model.embedding.register_forward_hook(HOOKS[options.variant])
    return model


def train_and_test(seed: int, folder: Path) -> list[dict[str, object]]:
    """Train, and return the metrics of each validation: on pseudo-defects, and on the test set."""
    seed_everything(seed, workers=True, verbose=False)  # the pseudo-defects depend on it
    curve = Curve()
    checkpoints = folder / "checkpoints"
    common.quiet_engine(
        folder,
        callbacks=[
            curve,
            ModelCheckpoint(dirpath=checkpoints, filename="{epoch}", save_top_k=-1, every_n_epochs=options.every),
        ],
        precision=options.precision,
        max_epochs=options.epochs,
        check_val_every_n_epoch=options.every,
    ).fit(build(seed), datamodule=MagneticTile(options.root, val_split_mode="synthetic", val_split_ratio=0.2))
    results = []
    for epoch, pseudo in curve.metrics.items():
        (checkpoint,) = checkpoints.glob(f"epoch={epoch}.ckpt")
        (real,) = common.quiet_engine(folder).test(
            build(seed), datamodule=MagneticTile(options.root), ckpt_path=checkpoint, verbose=False
        )
        result = {"variant": options.variant, "seed": seed, "epoch": epoch + 1}
        result |= {f"pseudo {name}": pseudo[name] for name in common.METRICS}
        result |= {name: real[name] for name in common.METRICS}
        if options.output:
            with options.output.open("a") as file:
                file.write(json.dumps(result) + "\n")
        results.append(result)
    return results


print(f"{options.variant}, {options.schedule} {options.learning_rate}, {options.epochs} epochs")
common.print_header(
    "seed",
    "epoch",
    "pseudo-defects: image AUROC",
    "pixel AUROC",
    "AUPRO",
    "test: image AUROC",
    "pixel AUROC",
    "AUPRO",
)
for seed in options.seeds:
    with tempfile.TemporaryDirectory() as name:
        results = train_and_test(seed, Path(name))
    columns = [*(f"pseudo {name}" for name in common.METRICS), *common.METRICS]
    for result in results:
        common.print_row(seed, result["epoch"], *(common.percent(result[column]) for column in columns))
    best = max(results, key=lambda result: result["image_AUROC"])
    for name in common.METRICS:
        chosen = max(results, key=lambda result: result[f"pseudo {name}"])
        print(
            f"seed {seed}, largest {name} on pseudo-defects: epoch {chosen['epoch']} with image AUROC "
            f"{common.percent(chosen['image_AUROC'])}; best: epoch {best['epoch']} with "
            f"{common.percent(best['image_AUROC'])}",
            flush=True,
        )
