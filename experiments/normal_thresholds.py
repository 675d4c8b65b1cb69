"""Thresholds from normal images only: rates of false alarms, found defects, and defects whose score is 1.

The normal images of the test set are split in half at random, many times: one half is the validation set, which has no
defects; the false alarms are counted on the other half. The defects are those of the test set.

    python experiments/normal_thresholds.py --root datasets/MagneticTile --checkpoint results/.../model.ckpt
"""

import logging
from collections.abc import Callable
from functools import partial

import common
import numpy as np
import torch
from anomalib.data import ImageBatch, InferenceBatch
from anomalib.post_processing import PostProcessor

from anomalib_dskd import Dskd, MagneticTile
from anomalib_dskd.post_processing import NormalQuantilePostProcessor

VARIANTS: dict[str, Callable[[], PostProcessor]] = {
    "anomalib: largest score": PostProcessor,
    **{
        f"quantile {quantile}": partial(NormalQuantilePostProcessor, normal_quantile=quantile)
        for quantile in (0.9, 0.95, 0.99)
    },
}


def raw_scores(model: Dskd, data: MagneticTile) -> tuple[np.ndarray, np.ndarray]:
    """Return unnormalized scores and labels of the test set, both ``(N,)``."""
    scores, labels = [], []
    with torch.no_grad():
        for batch in data.test_dataloader():
            scores.append(model.model(model.pre_processor(batch.image)).pred_score.flatten())
            labels.append(batch.gt_label)
    return torch.cat(scores).numpy(), torch.cat(labels).numpy()


def validate(post_processor: PostProcessor, scores: np.ndarray) -> None:
    """Set the thresholds from the scores ``(N,)`` of normal images."""
    batch = ImageBatch(
        image=torch.zeros(len(scores), 3, 1, 1),
        pred_score=torch.from_numpy(scores)[:, None],
        gt_label=torch.zeros(len(scores), dtype=torch.bool),
    )
    post_processor.on_validation_batch_end(None, None, batch)
    post_processor.on_validation_epoch_end(None, None)


def post_process(post_processor: PostProcessor, scores: np.ndarray) -> InferenceBatch:
    """Return labels and normalized scores for scores ``(N,)``."""
    return post_processor(InferenceBatch(pred_score=torch.from_numpy(scores)[:, None], anomaly_map=None))


logging.disable(logging.WARNING)  # one for each of the many validations
options = common.option_parser(__doc__, "--root", "--checkpoint", "--rounds", rounds=100).parse_args()
model = Dskd.load_from_checkpoint(options.checkpoint, evaluator=False).eval()
data = MagneticTile(options.root, augmentations=model.pre_processor.transform.transforms[0])
data.setup()
scores, labels = raw_scores(model, data)
normal, defects = scores[labels == 0], scores[labels == 1]
random = np.random.default_rng(0)
rates: dict[str, list[list[float]]] = {name: [] for name in VARIANTS}
for _ in range(options.rounds):
    validation, others = np.split(random.permutation(normal), [len(normal) // 2])
    for name, build in VARIANTS.items():
        post_processor = build()
        validate(post_processor, validation)
        of_normal, of_defects = post_process(post_processor, others), post_process(post_processor, defects)
        events = (of_normal.pred_label, of_defects.pred_label, of_defects.pred_score >= 1)
        rates[name].append([event.float().mean().item() for event in events])
print(
    f"{len(normal) // 2} normal images in validation, {len(defects)} defects, {options.rounds} rounds; "
    "mean ± standard deviation"
)
common.print_header("threshold", "false alarms", "defects found", "defects with a score of 1")
for name, values in rates.items():
    columns = zip(np.mean(values, axis=0), np.std(values, axis=0), strict=True)
    common.print_row(name, *(f"{100 * mean:.1f} ± {100 * std:.1f} %" for mean, std in columns))
