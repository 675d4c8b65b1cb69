"""What thresholds from good images alone are worth: false alarms, defects found, and defects whose score is 1.

The good tiles of the test set are halved at random, many times: one half is the validation, which has no defects, the
other half tells the false alarms. The defects are those of the test set.

    python experiments/normal_thresholds.py --root datasets/MagneticTile --checkpoint results/.../model.ckpt
"""

import argparse
import logging
import warnings
from pathlib import Path

import numpy as np
import torch
from anomalib.data import ImageBatch, InferenceBatch
from anomalib.post_processing import PostProcessor

from anomalib_dskd import Dskd, MagneticTile
from anomalib_dskd.post_processing import NormalQuantilePostProcessor

VARIANTS = {
    "anomalib: the largest": PostProcessor,
    **{
        f"quantile {quantile}": lambda quantile=quantile: NormalQuantilePostProcessor(normal_quantile=quantile)
        for quantile in (0.9, 0.95, 0.99)
    },
}


def raw_scores(model: Dskd, data: MagneticTile) -> tuple[np.ndarray, np.ndarray]:
    """Return scores and labels of the test set, both ``(N,)``."""
    scores, labels = [], []
    with torch.no_grad():
        for batch in data.test_dataloader():
            scores.append(model.model(model.pre_processor(batch.image)).pred_score.flatten())
            labels.append(batch.gt_label)
    return torch.cat(scores).numpy(), torch.cat(labels).numpy()


def batch_of(scores: np.ndarray) -> ImageBatch:
    values = torch.from_numpy(scores)[:, None]
    labels = torch.zeros(len(scores), dtype=torch.bool)
    return ImageBatch(image=torch.zeros(len(scores), 3, 1, 1), pred_score=values, gt_label=labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder of the Magnetic Tile Defects data")
    parser.add_argument("--checkpoint", type=Path, required=True, help="trained with --data.seed 0")
    parser.add_argument("--size", type=int, default=128, help="height and width that the model was trained at")
    parser.add_argument("--rounds", type=int, default=100)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)  # of each of the many validations
    model = Dskd.load_from_checkpoint(options.checkpoint, evaluator=False).eval()
    data = MagneticTile(options.root, augmentations=model.pre_processor.transform.transforms[0])
    data.setup()
    scores, labels = raw_scores(model, data)
    good, bad = scores[labels == 0], scores[labels == 1]
    random = np.random.default_rng(0)
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in VARIANTS}
    for _ in range(options.rounds):
        order = random.permutation(good)
        validation, others = order[: len(order) // 2], order[len(order) // 2 :]
        for name, make in VARIANTS.items():
            post_processor = make()
            post_processor.on_validation_batch_end(None, None, batch_of(validation))
            post_processor.on_validation_epoch_end(None, None)
            of_good, of_bad = (
                post_processor(InferenceBatch(pred_score=torch.from_numpy(some)[:, None], anomaly_map=None))
                for some in (others, bad)
            )
            rates = (of_good.pred_label, of_bad.pred_label, of_bad.pred_score >= 1)
            found[name].append(tuple(rate.float().mean().item() for rate in rates))
    print(f"{len(good) // 2} good tiles in validation, {len(bad)} defects, {options.rounds} rounds; mean ± deviation")
    print("| threshold | false alarms | defects found | defects with a score of 1 |\n|---|---|---|---|")
    for name, rates in found.items():
        columns = [
            f"{100 * mean:.1f} ± {100 * std:.1f} %"
            for mean, std in zip(np.mean(rates, 0), np.std(rates, 0), strict=True)
        ]
        print(f"| {name} | {' | '.join(columns)} |")


if __name__ == "__main__":
    main()
