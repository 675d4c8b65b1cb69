import copy
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch, PredictDataset
from anomalib.pre_processing import PreProcessor
from lightning import Callback, LightningModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from PIL import Image
from torchvision.transforms.v2 import Normalize, Resize

from anomalib_dskd import Dskd, MagneticTile
from anomalib_dskd.components.anomaly_map import AnomalyMapGenerator
from anomalib_dskd.data import magnetic_tile
from anomalib_dskd.errors import ArgumentError, DataError, DivergedError, NotTrainedError, TeacherWeightsError
from anomalib_dskd.evaluation import RawScoreEvaluator
from anomalib_dskd.models.distillation.resuming import constructor_defaults
from anomalib_dskd.models.dskd.loss import DskdLoss
from anomalib_dskd.training.feature_cache import FeatureCache
from tests.conftest import RESNET, TEACHER, differing, engine


@pytest.fixture(scope="module")
def trained(magnetic_tile_root: Path, teacher_weights: Path, tmp_path_factory) -> tuple[Dskd, Path]:
    """A model trained for an epoch, and its checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    # one copy, so that the checkpoint can be loaded where the weights file is gone
    weights = folder / "weights.safetensors"
    weights.write_bytes(teacher_weights.read_bytes())
    model = Dskd(teacher=TEACHER, teacher_weights=weights, image_size=64, sigma=2.0, seed=0, visualizer=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine(folder, max_epochs=1).fit(model, datamodule=MagneticTile(magnetic_tile_root, train_batch_size=4))
    weights.unlink()
    return model, next(folder.rglob("model.ckpt"))


def test_every_value_of_the_paper_is_the_default():
    model, data = constructor_defaults(Dskd), constructor_defaults(MagneticTile)
    assert model["teacher"] == "resnet18.tv_in1k"  # section 4.1.2: ResNet18, ImageNet-1K
    assert model["layers"] == (1, 2, 3)  # section 3.1: conv2_x, conv3_x, conv4_x
    assert model["l2_weight"] == 0.1  # section 4.1.2
    assert model["sigma"] == 4.0  # Eq. (9)
    assert model["hard_mining"] == 0.0  # Eq. (7)
    assert (model["learning_rate"], model["betas"]) == (1e-3, (0.5, 0.999))  # section 4.1.2
    assert (model["map_pair"], model["losses"], model["embedding"]) == ("T-D", "both", True)  # Tables 7 and 8
    assert model["map_layers"] is None  # Table 9: all
    assert model["embedding_blocks"] == 2  # Table 6, by the parameter count
    assert tuple(Dskd().input_size) == (256, 256)  # section 4.1.2
    assert (data["train_batch_size"], data["test_ratio"], data["seed"]) == (16, 0.2, 0)  # our choice
    assert constructor_defaults(DskdLoss)["l2_weight"] == model["l2_weight"]
    parts = constructor_defaults(AnomalyMapGenerator)
    assert (parts["l2_weight"], parts["sigma"]) == (model["l2_weight"], model["sigma"])


def test_optimizer_is_the_papers_and_leaves_the_teacher_out(tiny_model):
    optimizer = tiny_model.configure_optimizers()
    assert isinstance(optimizer, torch.optim.Adam)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-3, (0.5, 0.999), 0.0)
    optimized = {id(parameter) for parameter in group["params"]}
    students = [
        *tiny_model.model.encoder_student.parameters(),
        *tiny_model.model.embedding.parameters(),
        *tiny_model.model.decoder_student.parameters(),
    ]
    assert optimized == {id(parameter) for parameter in students}


@pytest.mark.parametrize(("schedule", "rates"), [("constant", [0.01] * 6), ("one_cycle", None)])
def test_schedule_sets_the_rate_of_every_step(schedule, rates, magnetic_tile_root, teacher_weights, tmp_path):
    seen = []

    class Record(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):  # noqa: ARG002
            seen.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"]))

    trained_anew(  # two steps an epoch
        tmp_path,
        magnetic_tile_root,
        teacher_weights,
        trainer={"max_epochs": 3, "limit_val_batches": 0, "callbacks": [Record()]},
        schedule=schedule,
        learning_rate=0.01,
        batch_norm_images=0,
    )
    if rates is None:  # cosine from 1/25 of the peak, up to it after 30 % of 6 steps less one, down to 1/10,000 of that
        up, down = [0.0, 1 / 0.8], [(step - 0.8) / 4.2 for step in range(1, 6)]
        rates = [0.0004 + (0.01 - 0.0004) * (1 - math.cos(math.pi * up[0])) / 2]
        rates += [4e-8 + (0.01 - 4e-8) * (1 + math.cos(math.pi * fraction)) / 2 for fraction in down]
    assert [rate for rate, _ in seen] == pytest.approx(rates, rel=1e-6)
    assert {betas for _, betas in seen} == {(0.5, 0.999)}


def test_mixed_precision_trains_and_gives_finite_results(magnetic_tile_root, teacher_weights, tmp_path):
    model = Dskd(teacher=TEACHER, teacher_weights=teacher_weights, image_size=64, sigma=2.0, seed=0, visualizer=False)
    data = MagneticTile(magnetic_tile_root, train_batch_size=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = engine(tmp_path, max_epochs=1, precision="bf16-mixed")
        trainer.fit(model, datamodule=data)
        (metrics,) = trainer.test(model, datamodule=data, verbose=False)
    assert metrics["image_AUROC"] > 0.8  # the defects are black
    assert model.post_processor.image_threshold > 0


@pytest.mark.parametrize(("precision", "fused"), [("32-true", True), ("bf16-mixed", False)])
def test_gradients_can_be_clipped_in_every_precision(precision, fused, magnetic_tile_root, teacher_weights, tmp_path):
    norms = []

    class Record(Callback):
        def on_train_start(self, trainer, pl_module):  # noqa: ARG002
            (optimizer,) = trainer.optimizers
            assert optimizer.defaults["fused"] is fused
            optimizer.register_step_post_hook(note_norm)

    def note_norm(optimizer, *_):
        gradients = [values.grad for values in optimizer.param_groups[0]["params"]]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))

    trainer = {"precision": precision, "gradient_clip_val": 1e-3, "limit_val_batches": 0, "callbacks": [Record()]}
    trained_anew(tmp_path, magnetic_tile_root, teacher_weights, trainer=trainer)
    assert norms == [pytest.approx(1e-3, rel=1e-2)] * 4


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        (
            {"max_epochs": -1},
            "this training run has no end, which its learning-rate schedule, phases or hard mining depend on",
        ),
        ({"callbacks": [GradientAccumulationScheduler({0: 2})]}, "callback GradientAccumulationScheduler: .* Give"),
    ],
)
def test_one_cycle_wants_an_end(trainer, message, magnetic_tile_root, teacher_weights, tmp_path):
    settings = {"limit_val_batches": 0, **trainer}
    with pytest.raises(ArgumentError, match=message):
        trained_anew(tmp_path, magnetic_tile_root, teacher_weights, trainer=settings, schedule="one_cycle")


def test_training_does_not_go_on_with_another_schedule(trained, magnetic_tile_root, tmp_path):
    _, checkpoint = trained
    model = Dskd(teacher=TEACHER, image_size=64, sigma=2.0, schedule="one_cycle")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = MagneticTile(magnetic_tile_root, train_batch_size=4)
        with pytest.raises(
            ArgumentError, match="run has other arguments: .*schedule: checkpoint has 'constant', model has 'one_cycle'"
        ):
            engine(tmp_path, max_epochs=2).fit(model, datamodule=data, ckpt_path=checkpoint)


def test_a_loss_that_is_not_finite_stops_the_training(magnetic_tile_root, teacher_weights, tmp_path):
    class Spoil(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):  # noqa: ARG002
            if (trainer.current_epoch, batch_idx) == (1, 1):
                pl_module.model.decoder_student.stages[0][0].main[1].weight.data.fill_(torch.nan)

    message = r"the loss is nan in batch 1 of epoch 1. .*images: .*exp1_num_\d.jpg. .*stops before the last checkpoint"
    trainer = {"max_epochs": 3, "callbacks": [Spoil()]}
    with pytest.raises(DivergedError, match=message):
        trained_anew(tmp_path, magnetic_tile_root, teacher_weights, trainer=trainer)
    kept = Dskd.load_from_checkpoint(next(tmp_path.rglob("model.ckpt")))
    assert all(parameter.isfinite().all() for parameter in kept.parameters())


def test_seed_fixes_the_students_initial_weights():
    first, same, other = (Dskd(teacher=TEACHER, seed=seed).model.state_dict() for seed in (3, 3, 4))
    name = "decoder_student.stages.0.0.main.0.weight"
    assert torch.equal(first[name], same[name])
    assert not torch.equal(first[name], other[name])


def test_seed_does_not_disturb_the_callers_generator():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    Dskd(teacher=TEACHER, seed=3)
    assert torch.equal(torch.rand(1), expected)


def trained_anew(folder: Path, root: Path, weights: Path, *, trainer: dict | None = None, **arguments) -> Dskd:
    settings = {"max_epochs": 2, **(trainer or {})}
    defaults = {"teacher": TEACHER, "teacher_weights": weights, "image_size": 64, "seed": 7, "sigma": 2.0}
    model = Dskd(**{**defaults, **arguments})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = MagneticTile(root, train_batch_size=4)
        engine(folder, **settings).fit(model, datamodule=data)
    return model


def with_and_without(cache: str, calls: list, folder: Path, root: Path, weights: Path, **arguments) -> list:
    """Train for three epochs with a cache and without; return each model, and the calls that it made."""
    results = []
    for size in (1.0, 0.0):
        calls.clear()
        trainer = {"max_epochs": 3, "limit_val_batches": 0}
        model = trained_anew(folder / str(size), root, weights, trainer=trainer, **{cache: size}, **arguments)
        results.append((list(calls), model))
    return results


@pytest.mark.parametrize(("batch_norm_images", "validation_batches"), [(99, 0), (99, 1), (6, 0)])
def test_saved_batch_norm_statistics_are_those_of_the_last_weights(
    magnetic_tile_root, teacher_weights, tmp_path, batch_norm_images, validation_batches
):
    root, weights = magnetic_tile_root, teacher_weights
    # 99 of 8 training images: all of them, in one known order
    trainer = {"limit_val_batches": validation_batches}
    model = trained_anew(tmp_path, root, weights, batch_norm_images=batch_norm_images, trainer=trainer)
    loaded = Dskd.load_from_checkpoint(next(tmp_path.rglob("*.ckpt"))).model
    data = MagneticTile(root, train_batch_size=4)
    data.setup()
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    images = torch.cat([model.pre_processor.transform(data.train_data[int(index)].image[None]) for index in order])
    net = copy.deepcopy(loaded).train()
    seen = []
    norm = net.decoder_student.stages[0][0].main[1]
    norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].transpose(0, 1).flatten(1)))
    with torch.no_grad():
        for batch in images[:batch_norm_images].tensor_split(2):
            net.student_features(batch, [])  # the encoder student reads no teacher
    saved = loaded.decoder_student.stages[0][0].main[1]
    assert len(seen) == 2
    torch.testing.assert_close(saved.running_mean, torch.stack([x.mean(1) for x in seen]).mean(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(saved.running_var, torch.stack([x.var(1) for x in seen]).mean(0), atol=1e-4, rtol=1e-3)
    assert saved.momentum == 0.1


def test_fresh_batch_norm_statistics_leave_the_training_as_it_is(magnetic_tile_root, teacher_weights, tmp_path):
    fresh, running = (
        trained_anew(tmp_path / str(count), magnetic_tile_root, teacher_weights, batch_norm_images=count)
        for count in (8, 0)
    )
    differ = set()
    for (name, mine), theirs in zip(fresh.model.named_parameters(), running.model.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    for (name, mine), theirs in zip(fresh.model.named_buffers(), running.model.buffers(), strict=True):
        if not torch.equal(mine, theirs):
            differ.add((name.split(".")[0], name.rsplit(".")[-1]))
    students = ("encoder_student", "embedding", "decoder_student")
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert differ == {(student, statistic) for student in students for statistic in statistics}


def test_images_are_decoded_once_and_train_the_same(magnetic_tile_root, teacher_weights, tmp_path, monkeypatch):
    read, original = [], magnetic_tile.read_named_image
    monkeypatch.setattr(magnetic_tile, "read_named_image", lambda path: read.append(path) or original(path))
    root, weights = magnetic_tile_root, teacher_weights
    results = with_and_without("image_cache", read, tmp_path, root, weights, batch_norm_images=0)
    (cached, mine), (uncached, theirs) = results
    assert (len(cached), len(uncached)) == (1 + 8, 3 * 8)  # one more to learn the size
    for (name, weight), other in zip(mine.model.named_parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(weight, other), name


def test_losses_are_the_same_with_the_cache(tiny_model):
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    tiny_model.train()
    teacher, students = tiny_model.model(images)
    expected = tiny_model.loss(teacher, students)
    tiny_model.model.teacher_cache = FeatureCache(tiny_model.model.teacher, images=3, memory=1.0)
    for _ in range(2):
        teacher, students = tiny_model.model(images)
        losses = tiny_model.loss(teacher, students)
        for student, loss in losses.items():
            assert loss.item() == pytest.approx(expected[student].item(), abs=1e-5)  # kept in 16 bits


def test_checkpoint_brings_the_teacher_and_the_result(trained):
    model, checkpoint = trained
    loaded = Dskd.load_from_checkpoint(checkpoint).eval()
    image = torch.rand(2, 3, 80, 100)
    with torch.no_grad():
        expected, result = model.eval()(image), loaded(image)
    assert torch.allclose(result.anomaly_map, expected.anomaly_map, atol=1e-4)  # another memory format
    assert loaded.model.teacher.weights_origin["file"] == "weights.safetensors"
    assert tuple(loaded.input_size) == (64, 64)
    assert not any(parameter.requires_grad for parameter in loaded.model.teacher.parameters())
    assert loaded.pre_processor.transform.transforms[0].antialias is True


def test_checkpoint_of_other_arguments_is_refused(trained, magnetic_tile_root, tmp_path):
    _, checkpoint = trained
    model = Dskd(teacher=TEACHER, image_size=64, sigma=3.0, map_layers=[1])
    with pytest.raises(
        ArgumentError,
        match=r"sigma: checkpoint has 2.0, model has 3.0; map_layers: checkpoint has None, model has \[1\]",
    ):
        engine(tmp_path).test(model, datamodule=MagneticTile(magnetic_tile_root), ckpt_path=checkpoint)


@pytest.mark.parametrize(
    "evaluator", [False, True, RawScoreEvaluator(validation=True)], ids=["none", "default", "both"]
)
def test_checkpoint_loads_with_any_evaluator(evaluator, trained, magnetic_tile_root, tmp_path):
    model, checkpoint = trained
    loaded = Dskd.load_from_checkpoint(checkpoint, evaluator=evaluator)
    assert loaded.model.is_trained
    built = Dskd(teacher=TEACHER, image_size=64, sigma=2.0, evaluator=evaluator, visualizer=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine(tmp_path).test(built, datamodule=MagneticTile(magnetic_tile_root), ckpt_path=checkpoint)
    assert not differing(built.model.state_dict(), model.model.state_dict())


@pytest.mark.parametrize(
    ("name", "value"), [("image_size", 96), ("l2_weight", 0.5), ("losses", "decoder"), ("sigma", 1.0)]
)
def test_what_thresholds_depend_on_cannot_be_changed_in_load_from_checkpoint(trained, name, value):
    _, checkpoint = trained
    with pytest.raises(ArgumentError, match=f"other arguments: {name}: checkpoint has .*, model has {value!r}"):
        Dskd.load_from_checkpoint(checkpoint, **{name: value})


def test_a_model_in_training_mode_says_what_to_do(trained):
    _, checkpoint = trained
    model = Dskd.load_from_checkpoint(checkpoint).train()
    with pytest.raises(ArgumentError, match=r"this Dskd is in training mode: call \.eval\(\) first"):
        model(torch.rand(1, 3, 64, 64))


def test_training_goes_on_with_the_rate_that_is_given(trained, magnetic_tile_root, tmp_path):
    _, checkpoint = trained
    seen = []

    class Record(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):  # noqa: ARG002
            (group,) = optimizer.param_groups
            seen.append((group["lr"], tuple(group["betas"]), group["weight_decay"]))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for arguments in ({}, {"learning_rate": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.1}):
            model = Dskd(teacher=TEACHER, image_size=64, sigma=2.0, visualizer=False, **arguments)
            data = MagneticTile(magnetic_tile_root, train_batch_size=8)
            trainer = engine(tmp_path / str(len(seen)), max_epochs=2, callbacks=[Record()])
            trainer.fit(model, datamodule=data, ckpt_path=checkpoint)
    assert seen == [(1e-3, (0.5, 0.999), 0.0), (1e-4, (0.9, 0.99), 0.1)]


@pytest.mark.parametrize(
    ("arguments", "trainer", "message"),
    [
        ({}, {"max_epochs": 4}, "run has other arguments: max_epochs: checkpoint has 2, model has 4"),
        ({"learning_rate": 0.1}, {}, "run has other arguments: learning_rate: checkpoint has 0.01, model has 0.1"),
        (
            {},
            {"accumulate_grad_batches": 2},
            "training run has 4 steps, and this one has 2. Give the same batch",
        ),
    ],
)
def test_one_cycle_goes_on_as_it_was_planned(
    arguments, trainer, message, magnetic_tile_root, teacher_weights, tmp_path
):
    one_cycle = {"schedule": "one_cycle", "learning_rate": 0.01}
    trained_anew(tmp_path, magnetic_tile_root, teacher_weights, trainer={"callbacks": [StopAfter(0)]}, **one_cycle)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = Dskd(**{"teacher": TEACHER, "image_size": 64, "sigma": 2.0, **one_cycle, **arguments})
        data = MagneticTile(magnetic_tile_root, train_batch_size=4)
        checkpoint = next(tmp_path.rglob("model.ckpt"))
        with pytest.raises(ArgumentError, match=message):
            engine(tmp_path / "on", **{"max_epochs": 2, **trainer}).fit(model, datamodule=data, ckpt_path=checkpoint)


def test_one_cycle_of_an_older_version_goes_on_by_its_schedules_steps(magnetic_tile_root, teacher_weights, tmp_path):
    one_cycle, stop = {"schedule": "one_cycle", "learning_rate": 0.01}, {"callbacks": [StopAfter(0)]}
    trained_anew(tmp_path, magnetic_tile_root, teacher_weights, trainer=stop, **one_cycle)
    content = torch.load(next(tmp_path.rglob("model.ckpt")), weights_only=False)
    assert content["anomalib_dskd"].pop("steps") == 4  # 0.2.0 does not save it
    torch.save(content, tmp_path / "old.ckpt")

    def resume(**trainer) -> Dskd:
        model = Dskd(teacher=TEACHER, image_size=64, sigma=2.0, **one_cycle)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = MagneticTile(magnetic_tile_root, train_batch_size=4)
            resumed = engine(tmp_path / "on", max_epochs=2, **trainer)
            resumed.fit(model, datamodule=data, ckpt_path=tmp_path / "old.ckpt")
        return model

    with pytest.raises(ArgumentError, match="training run has 4 steps, and this one has 2. Give the same batch"):
        resume(accumulate_grad_batches=2)
    assert resume().global_step == 4


class StopAfter(Callback):
    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_end(self, trainer, pl_module):  # noqa: ARG002
        trainer.should_stop = trainer.current_epoch == self.epoch


@pytest.mark.parametrize(
    "trainer", [{"max_epochs": 1, "max_steps": 1000}, {"max_steps": 4, "check_val_every_n_epoch": 2}, {"max_steps": 2}]
)
def test_a_training_that_steps_end_with_a_validation_is_fine(trainer, magnetic_tile_root, teacher_weights, tmp_path):
    settings = {"max_epochs": -1, **trainer}
    model = trained_anew(tmp_path, magnetic_tile_root, teacher_weights, trainer=settings)
    assert not model.post_processor.image_threshold.isnan()
    assert len(list(tmp_path.rglob("v0/**/*.ckpt"))) == 1


def test_students_train_in_training_mode_after_a_prediction(tiny_model, magnetic_tile_root, tmp_path):
    modes = []

    class Record(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):  # noqa: ARG002
            modes.append((pl_module.model.encoder_student.training, pl_module.model.teacher.training))

    tiny_model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = MagneticTile(magnetic_tile_root, train_batch_size=8)
        engine(tmp_path, max_epochs=1, limit_val_batches=0, callbacks=[Record()]).fit(tiny_model, datamodule=data)
    assert modes == [(True, False)]


def test_arguments_reach_what_they_are_for():
    model = Dskd(
        teacher=TEACHER,
        l2_weight=0.3,
        sigma=1.0,
        learning_rate=0.02,
        betas=(0.8, 0.9),
        weight_decay=0.7,
        embedding_blocks=3,
        batch_norm_images=5,
    )
    (group,) = model.configure_optimizers().param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.02, (0.8, 0.9), 0.7)
    assert model.loss.l2_weight == model.model.anomaly_map_generator.l2_weight == 0.3
    assert model.model.anomaly_map_generator.kernel_size == 9  # 4 sigma to each side
    assert len(model.model.embedding.residual) == 3
    assert model.options.batch_norm_images == 5


def test_a_model_around_keeps_its_arguments_to_itself():
    class Around(LightningModule):
        def __init__(self, learning_rate: float = 5.0, seed: int = 9) -> None:  # noqa: ARG002 - what is saved
            super().__init__()
            self.save_hyperparameters()
            self.part = Dskd(teacher=TEACHER, learning_rate=0.25, seed=1)

    options = Around().part.options
    assert (options.learning_rate, options.seed) == (0.25, 1)


def test_arguments_of_the_same_meaning_pass_for_the_same(trained, magnetic_tile_root, tmp_path):
    _, checkpoint = trained
    model = Dskd(
        teacher=TEACHER, layers=[1, 2, 3], map_layers=[1, 2, 3], image_size=(64, 64), sigma=2.0, visualizer=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert engine(tmp_path).test(model, datamodule=MagneticTile(magnetic_tile_root), ckpt_path=checkpoint)


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        (
            {"max_epochs": 3, "check_val_every_n_epoch": 2},
            "max_epochs 3 is not a multiple of check_val_every_n_epoch 2",
        ),
        ({"max_steps": 1}, "max_steps 1 is not a multiple of the 2 steps between validations"),
        ({"max_steps": 2, "check_val_every_n_epoch": 2}, "max_steps 2 is not a multiple of the 4 steps"),
        ({"max_epochs": 1, "precision": "64-true"}, "precision '64-true' is .* differs from the images'"),
        (
            {"max_epochs": 1, "precision": "bf16-true"},
            "'bf16-true' is too coarse .* Supported values: 32-true",
        ),
    ],
)
def test_training_that_would_end_without_a_result_is_refused(
    tiny_model, magnetic_tile_root, tmp_path, trainer, message
):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = MagneticTile(magnetic_tile_root, train_batch_size=4)
        with pytest.raises(ArgumentError, match=message):
            engine(tmp_path, **trainer).fit(tiny_model, datamodule=data)


def test_normalization_of_another_teacher_is_refused():
    with pytest.raises(ArgumentError, match=r"normalizes with .*0.485.* was trained with \[\[0.5, 0.5, 0.5\]"):
        Dskd(teacher=RESNET, pre_processor=Dskd.configure_pre_processor((64, 64)))
    for none in (PreProcessor(), PreProcessor(Resize(64))):
        with pytest.raises(
            ArgumentError, match="the pre_processor does not normalize; .* Add torchvision's v2.Normalize"
        ):
            Dskd(teacher=RESNET, pre_processor=none)
    own = Dskd.configure_pre_processor((64, 64), teacher=RESNET)
    assert Dskd(teacher=RESNET, pre_processor=own).pre_processor is own


@pytest.mark.parametrize("purpose", ["test", "predict", "validate"])
def test_no_result_before_training(purpose, tiny_model, magnetic_tile_root, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(NotTrainedError, match=f"cannot {purpose}: .* --ckpt_path"):
            getattr(engine(tmp_path), purpose)(tiny_model, datamodule=MagneticTile(magnetic_tile_root))


@pytest.mark.parametrize("export_type", ["torch", "onnx", "openvino"])
def test_no_export_before_training(export_type, tiny_model, tmp_path):
    with pytest.raises(NotTrainedError, match=r"cannot export: .* --ckpt_path"):
        engine(tmp_path).export(tiny_model, export_type)


def test_training_without_weights_lists_where_they_were_sought(magnetic_tile_root, tmp_path, monkeypatch):
    monkeypatch.delenv("ANOMALIB_DSKD_WEIGHTS", raising=False)
    model = Dskd(teacher=TEACHER, image_size=64, sigma=2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(
            TeacherWeightsError, match=r"(?s)Tried:.*ANOMALIB_DSKD_WEIGHTS: not set.*HF_HUB_OFFLINE is set"
        ):
            engine(tmp_path, max_epochs=1).fit(model, datamodule=MagneticTile(magnetic_tile_root))


def test_sixteen_bit_images_are_refused_in_training(tiny_model, tmp_path):
    path = tmp_path / "deep.png"
    Image.fromarray(np.full((64, 64), 40_000, dtype=np.uint16)).save(path)
    batch = ImageBatch(image=torch.rand(1, 3, 64, 64), image_path=[str(path)])
    with pytest.raises(DataError, match="deep.png' has more than 8 bits"):
        tiny_model.training_step(batch, 0)
    with pytest.raises(DataError, match="deep.png' has more than 8 bits"):
        tiny_model.predict_step(batch, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"teacher": "resnet_18"}, "teacher 'resnet_18' is not a timm model. Did you mean .*'resnet18'"),
        ({"teacher": "resnet18.in99k"}, "no pretrained tag 'in99k'.*tv_in1k"),
        ({"layers": [3, 4, 5]}, r"layers \[3, 4, 5\] do not fit teacher .* indices from 0 to 4"),
        ({"l2_weight": -0.1}, "l2_weight -0.1 must be a finite number, 0 or larger"),
        ({"l2_weight": float("nan")}, "l2_weight nan"),
        ({"sigma": float("inf")}, "sigma inf must be a finite number"),
        ({"sigma": -1.0}, "sigma -1.0"),
        ({"weight_decay": -1.0}, "weight_decay -1.0"),
        ({"teacher_cache": -0.5}, "teacher_cache -0.5 must be a finite number, 0 or larger"),
        ({"image_cache": -1.0}, "image_cache -1.0 must be a finite number"),
        ({"batch_norm_images": -1}, "batch_norm_images -1 must be a positive integer, or 0"),
        ({"batch_norm_images": 1.5}, "batch_norm_images 1.5 must be a positive integer"),
        ({"hard_mining": 1.0}, "hard_mining 1.0 must be a number from 0, for none, up to, not including, 1"),
        ({"hard_mining": -0.1}, "hard_mining -0.1"),
        ({"hard_mining": True}, "hard_mining True"),
        ({"seed": -1}, "seed -1 must be an integer from 0 to 4294967295, or none"),
        ({"seed": 2**32}, "seed 4294967296 must be an integer"),
        ({"schedule": "cosine"}, "schedule 'cosine' is not supported. Supported values: 'constant', 'one_cycle'"),
        ({"learning_rate": 0.0}, "learning_rate 0.0 must be a finite number larger than 0"),
        ({"betas": (0.5, 1.0)}, r"betas \(0.5, 1.0\) must be two numbers"),
        ({"image_size": 32}, "images of 32x32 pixels are too small: .* at least 64x64"),
        ({"teacher": "test_vit3", "layers": [0, 1], "image_size": 64}, r"64x64 pixels: .* supports only \(160, 160\)"),
        ({"image_size": (64, 0)}, r"image_size \(64, 0\) must be one number of pixels, or height and width"),
        ({"image_size": 64, "pre_processor": False}, "image_size and pre_processor exclude each other"),
        ({"map_pair": "T-E", "losses": "decoder"}, "Supported losses for each map_pair"),
    ],
)
def test_illegal_arguments_say_what_is_legal(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        Dskd(**{"teacher": TEACHER, **arguments})


def test_pre_processing_is_the_teachers_and_of_the_given_size():
    lite = Dskd(teacher="tf_efficientnet_lite0", image_size=(64, 96))
    resize, normalize = lite.pre_processor.transform.transforms
    assert list(resize.size) == [64, 96]
    assert (list(normalize.mean), list(normalize.std)) == ([0.5] * 3, [0.5] * 3)
    paper = Dskd.configure_pre_processor().transform.transforms[1]
    assert list(paper.mean) == [0.485, 0.456, 0.406]


def test_a_pre_processor_of_ones_own_is_taken():
    own = PreProcessor(Normalize(mean=[0.5] * 3, std=[0.5] * 3))
    assert Dskd(teacher=RESNET, pre_processor=own).pre_processor is own
    assert Dskd(teacher=RESNET, pre_processor=False).pre_processor is None


def test_a_model_without_thresholds_is_told_where_they_would_matter(trained, magnetic_tile_root, tmp_path, caplog):
    told = "no validation has set thresholds of this Dskd: scores are not normalized"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained[0].to_torch(tmp_path / "with")
        assert told not in caplog.text
        model = copy.deepcopy(trained[0])
        model.post_processor = model.configure_post_processor()
        model.to_torch(tmp_path / "without")
        assert caplog.text.count(told) == 1
        data = PredictDataset(magnetic_tile_root / "MT_Crack" / "Imgs" / "exp1_num_0.jpg")
        engine(tmp_path).predict(model, dataset=data)
        assert caplog.text.count(told) == 2
        model.post_processor.enable_thresholding = False
        model.to_torch(tmp_path / "neither")
    assert caplog.text.count(told) == 2
