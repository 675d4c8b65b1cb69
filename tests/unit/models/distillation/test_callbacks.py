import warnings

import pytest
from lightning import Callback

from anomalib_dskd import Dskd, MagneticTile
from anomalib_dskd.models.distillation.callbacks import EvaluationWeights, SeedTraining
from tests.conftest import TEACHER, engine


def build(weights, **arguments) -> Dskd:
    return Dskd(teacher=TEACHER, teacher_weights=weights, image_size=64, sigma=2.0, **arguments)


def fit(model: Dskd, root, folder, **trainer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = engine(folder, **{"max_epochs": 1, **trainer})
        run.fit(model, datamodule=MagneticTile(root, train_batch_size=4))
    return run


@pytest.mark.parametrize(("seed", "count"), [(None, 0), (3, 1)])
def test_training_is_seeded_only_with_a_seed(seed, count):
    callbacks = Dskd(teacher=TEACHER, seed=seed).configure_callbacks()
    assert [part.seed for part in callbacks if isinstance(part, SeedTraining)] == [seed] * count


def test_anomalibs_callbacks_are_kept():
    model = Dskd(teacher=TEACHER)
    callbacks = model.configure_callbacks()
    assert all(part in callbacks for part in (model.pre_processor, model.post_processor, model.evaluator))


class Interrupt(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):  # noqa: ARG002
        self.cache, self.wrapped = pl_module.model.teacher_cache, trainer.datamodule.train_data
        raise KeyboardInterrupt


def test_an_interrupted_run_leaves_no_cache_and_no_hook(magnetic_tile_root, teacher_weights, tmp_path):
    model, interrupt = build(teacher_weights, seed=0, ema_decay=0.5), Interrupt()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(model, magnetic_tile_root, tmp_path, callbacks=[interrupt])
    assert len(interrupt.cache) == 4  # the first batch
    assert type(interrupt.wrapped).__name__ == "CachedImages"
    assert model.model.teacher_cache is None
    (evaluation,) = (part for part in model.trainer.callbacks if isinstance(part, EvaluationWeights))
    assert evaluation.average is None
    assert not model.trainer.optimizers[0]._optimizer_step_post_hooks
