import copy
import warnings
from pathlib import Path

import pytest
import torch
from anomalib.data import ImageBatch
from lightning import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.nn.modules.batchnorm import _BatchNorm

from anomalib_dskd import MagneticTile, Tad
from anomalib_dskd.components.discrepancy import distillation_loss
from anomalib_dskd.errors import ArgumentError, NotTrainedError
from anomalib_dskd.models.tad import lightning_model
from anomalib_dskd.models.tad.lightning_model import assistant_steps
from anomalib_dskd.models.tad.loss import entropy_loss, guidance_losses
from anomalib_dskd.training.feature_cache import FeatureCache
from tests.conftest import ASSISTANT, TEACHER, at_step, differing, engine

ABLATIONS = [{}, {"assistant": None}, {"inverse_weight": 0.0}, {"guidance": "equal"}]


def build(weights: Path | str | None, **arguments) -> Tad:
    common = {"teacher": TEACHER, "assistant": ASSISTANT, "image_size": 64, "sigma": 2.0, "seed": 0}
    return Tad(**{**common, "teacher_weights": weights, "visualizer": False, **arguments})


def fit(model: Tad, root: Path, folder: Path, *, checkpoint: Path | None = None, batch_size: int = 4, **trainer) -> Tad:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = MagneticTile(root, train_batch_size=batch_size)
        engine(folder, **trainer).fit(model, datamodule=data, ckpt_path=checkpoint)
    return model


class Record(Callback):
    """Notes, after each batch, what there is then; lets the training end after a step if told to."""

    def __init__(self, last: int | None = None) -> None:
        self.batches: list[tuple[int, int]] = []
        self.phases: list[float] = []
        self.trained: list[bool] = []
        self.students: list[dict] = []
        self.assistants: list[dict] = []
        self.last = last

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):  # noqa: ARG002
        self.batches.append((trainer.current_epoch, batch_idx))
        self.phases.append(trainer.progress_bar_metrics["phase"])
        self.trained.append(pl_module.model.is_trained)
        self.students.append(parameters(pl_module.model.student))
        if pl_module.assistant is not None:
            self.assistants.append(copy.deepcopy(pl_module.assistant.state_dict()))
        trainer.should_stop = trainer.global_step == self.last


def parameters(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}


def same(first: dict, second: dict) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def batch() -> ImageBatch:
    pixels = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return ImageBatch(image=2 * pixels - 1, image_path=[f"good/{index}.png" for index in range(4)])


# --- phases ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "share", "expected"),
    [(10, 0.3, 3), (30, 0.3, 9), (2, 0.3, 1), (5, 0.1, 1), (6, 0.3, 2), (100, 0.5, 50), (2, 0.9, 1), (10, 0.99, 9)],
)
def test_assistant_has_its_share_of_the_steps_and_both_have_one(steps, share, expected):
    assert assistant_steps(steps, share) == expected


def test_each_phase_trains_its_own_network_alone(magnetic_tile_root, teacher_weights, tmp_path):
    record = Record()
    model = build(teacher_weights, assistant_share=0.5, batch_norm_images=8)
    start = parameters(model.model.student)
    fit(model, magnetic_tile_root, tmp_path, max_epochs=3, callbacks=[record])
    assert record.batches == [(epoch, batch) for epoch in range(3) for batch in range(2)]
    assert record.phases == [1.0] * 3 + [2.0] * 3  # within an epoch
    assert record.trained == [False] * 3 + [True] * 3
    assert [same(student, start) for student in record.students] == [True] * 3 + [False] * 3
    assert not same(record.students[4], record.students[3])
    assert not same(record.assistants[2], record.assistants[1])
    assert same(record.assistants[5], record.assistants[3])
    # between the phases, batch norm alone changes
    changed = {
        name.rpartition(".")[2]
        for name, value in record.assistants[3].items()
        if not torch.equal(value, record.assistants[2][name])
    }
    assert changed == {"running_mean", "running_var", "num_batches_tracked"}
    counts = {int(norm.num_batches_tracked) for norm in model.assistant.modules() if isinstance(norm, _BatchNorm)}
    assert counts == {2}  # two batches of four


def test_a_phase_changes_between_accumulated_batches_and_batch_norm_is_estimated_once(
    magnetic_tile_root, teacher_weights, tmp_path, monkeypatch
):
    record, model, estimates = Record(), build(teacher_weights, assistant_share=0.4), []
    monkeypatch.setattr(lightning_model, "estimate_batch_norm", lambda *_, **__: estimates.append(model.global_step))
    trainer = {"max_epochs": 3, "accumulate_grad_batches": 3, "val_check_interval": 1}  # steps of 3 batches and of 1
    fit(model, magnetic_tile_root, tmp_path, batch_size=2, callbacks=[record], **trainer)
    assert model.planned_steps == 6
    assert record.phases == [1.0] * 4 + [2.0] * 8
    assert record.trained == [False] * 6 + [True] * 6  # the student's first step is after the seventh batch
    assert [same(assistant, record.assistants[3]) for assistant in record.assistants[4:]] == [True] * 8
    assert estimates == [2]


@pytest.mark.parametrize(
    ("trainer", "phases"),
    [
        ({"max_epochs": 1}, [1.0, 2.0]),
        ({"max_epochs": 2, "limit_train_batches": 1}, [1.0, 2.0]),
        ({"max_steps": 4, "max_epochs": -1}, [1.0, 2.0, 2.0, 2.0]),
        ({"max_epochs": 9, "max_steps": 6}, [1.0, 1.0, 2.0, 2.0, 2.0, 2.0]),
        ({"fast_dev_run": 2}, [1.0, 2.0]),
    ],
    ids=str,
)
def test_phases_follow_from_the_steps_that_the_training_will_have(
    trainer, phases, magnetic_tile_root, teacher_weights, tmp_path
):
    record = Record()
    model = fit(build(teacher_weights), magnetic_tile_root, tmp_path, callbacks=[record], **trainer)
    assert record.phases == phases
    assert model.model.is_trained


class SameImages(Callback):
    """Gives every batch the same images: Lightning resumes an epoch with the loader's first batch."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):  # noqa: ARG002
        batch.image = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        batch.image_path = [f"good/{index}.png" for index in range(4)]


class SaveAndStop(Callback):
    """Saves after a step, and ends the training there as Ctrl+C would."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):  # noqa: ARG002
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            raise InterruptedError


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_an_interrupted_training_goes_on_in_the_right_phase(
    step, ema_decay, magnetic_tile_root, teacher_weights, tmp_path
):
    through, resumed = Record(), Record()
    arguments, trainer = {"assistant_share": 0.5, "ema_decay": ema_decay}, {"max_epochs": 3, "limit_val_batches": 1}
    expected = build(teacher_weights, **arguments)
    fit(expected, magnetic_tile_root, tmp_path / "through", callbacks=[SameImages(), through], **trainer)
    stop = SaveAndStop(step, tmp_path / "stopped.ckpt")
    stopped, model = build(teacher_weights, **arguments), build("gone.safetensors", **arguments)
    with pytest.raises(InterruptedError):
        fit(stopped, magnetic_tile_root, tmp_path / "1", callbacks=[SameImages(), stop], **trainer)
    after = {"checkpoint": stop.path, "callbacks": [SameImages(), resumed]}
    fit(model, magnetic_tile_root, tmp_path / "2", **after, **trainer)
    assert through.phases == [1.0] * 3 + [2.0] * 3
    assert resumed.batches == through.batches[step:]
    assert resumed.phases == through.phases[step:]
    assert resumed.trained == through.trained[step:]
    assert not differing(model.state_dict(), expected.state_dict())


def test_phases_are_not_moved_by_another_end(magnetic_tile_root, teacher_weights, tmp_path):
    fit(build(teacher_weights), magnetic_tile_root, tmp_path, max_epochs=2, callbacks=[Record(last=2)])
    checkpoint = next(tmp_path.rglob("model.ckpt"))

    def resume(path: Path = checkpoint, arguments: dict | None = None, **settings) -> None:
        model = build(teacher_weights, **(arguments or {}))
        fit(model, magnetic_tile_root, tmp_path / "on", checkpoint=path, **{"max_epochs": 2, **settings})

    with pytest.raises(ArgumentError, match="run has other arguments: max_epochs: checkpoint has 2, model has 9"):
        resume(max_epochs=9)
    with pytest.raises(ArgumentError, match="other arguments: assistant_share: checkpoint has 0.3, model has 0.4"):
        resume(arguments={"assistant_share": 0.4})
    others = [({"batch_size": 2}, 8), ({"accumulate_grad_batches": 2}, 2), ({"limit_train_batches": 1}, 2)]
    for settings, steps in others:
        with pytest.raises(ArgumentError, match=f"run has 4 steps, and this one has {steps}. Give the same batch size"):
            resume(**settings)
    content = torch.load(checkpoint, weights_only=False)
    del content["anomalib_dskd"]["steps"]  # as in 0.2.0, where phases were epochs
    torch.save(content, tmp_path / "old.ckpt")
    with pytest.raises(ArgumentError, match="run has an unknown number of steps, and this one has 4. Give"):
        resume(tmp_path / "old.ckpt")


def test_a_stop_in_the_assistants_phase_is_told(magnetic_tile_root, teacher_weights, tmp_path, caplog):
    message = "training has stopped in the assistant's phase"
    for last, told in ((2, True), (3, False)):  # of 8 steps the assistant has 2
        caplog.clear()
        model = build(teacher_weights)
        fit(model, magnetic_tile_root, tmp_path / str(last), max_epochs=4, callbacks=[Record(last)])
        assert model.model.is_trained is not told
        assert (message in caplog.text) == told


def test_a_checkpoint_of_the_assistants_phase_gives_no_results(magnetic_tile_root, teacher_weights, tmp_path):
    fit(build(teacher_weights), magnetic_tile_root, tmp_path, max_epochs=4, callbacks=[Record(last=2)])
    model = Tad.load_from_checkpoint(next(tmp_path.rglob("model.ckpt")), evaluator=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(NotTrainedError, match="the networks of this Tad that score images have not been trained"):
            engine(tmp_path / "test").test(model, datamodule=MagneticTile(magnetic_tile_root))


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"max_epochs": 1, "batch_size": 8}, "a training run of one optimizer step trains only the assistant"),
        ({"max_epochs": 1, "accumulate_grad_batches": 2}, "of one optimizer step .* Supported: 2 steps or more"),
        ({"max_epochs": -1, "max_steps": 1, "limit_val_batches": 0}, "a training run of one optimizer step"),
        ({"fast_dev_run": True}, "a training run of one optimizer step .* Give .* --trainer.fast_dev_run 2"),
        (
            {"max_epochs": -1},
            "this training run has no end, which its .* phases or hard mining depend on: give --trainer.max_epochs",
        ),
        (
            {"max_epochs": 1, "callbacks": [GradientAccumulationScheduler({0: 2})]},
            "callback GradientAccumulationScheduler: .* Give --trainer.accumulate_grad_batches instead",
        ),
    ],
)
def test_a_training_without_a_step_for_the_student_is_refused(
    trainer, message, magnetic_tile_root, teacher_weights, tmp_path
):
    with pytest.raises(ArgumentError, match=message):
        fit(build(teacher_weights), magnetic_tile_root, tmp_path, **trainer)
    fit(build(teacher_weights, assistant=None), magnetic_tile_root, tmp_path, **{**trainer, "max_time": {"seconds": 1}})


@pytest.mark.parametrize("arguments", ABLATIONS, ids=str)
def test_ablations_train(arguments, magnetic_tile_root, teacher_weights, tmp_path):
    record = Record()
    model = build(teacher_weights, **arguments)
    start = parameters(model.model.student)
    fit(model, magnetic_tile_root, tmp_path, max_epochs=1, limit_val_batches=0, callbacks=[record])
    first = 2.0 if "assistant" in arguments else 1.0
    assert record.phases == [first, 2.0]
    assert not same(record.students[-1], start)
    logged = {name.removeprefix("train_loss_") for name in model.trainer.callback_metrics if "train_loss_" in name}
    expected = {"assistant", "from_teacher", "from_assistant", "entropy", "inverse"}
    if "assistant" in arguments:
        expected -= {"assistant", "from_assistant", "entropy"}
    if "inverse_weight" in arguments:
        expected -= {"inverse"}
    if "guidance" in arguments:
        expected -= {"entropy"}
    assert logged == expected


# --- losses ------------------------------------------------------------------------------------------------------


def test_assistant_learns_the_teacher(teacher_weights, batch):
    model = at_step(build(teacher_weights), 2)
    teacher = model.model.teacher(batch.image)
    losses = model.compute_losses(batch)
    expected = distillation_loss(teacher, model._assist(batch, teacher), l2_weight=0.0)
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx({"assistant": expected.item()})


def test_losses_of_the_student_are_those_of_both_paths(teacher_weights, batch):
    model = at_step(build(teacher_weights, entropy_weight=0.2, inverse_weight=0.7), 3)
    torch.nn.init.normal_(model.attention.queries[0].weight)
    model.assistant.eval()
    losses = model.compute_losses(batch)
    teacher, student = model.model.teacher(batch.image), model.model.student(batch.image)
    guides = [teacher, model._assist(batch, teacher)]
    weights = model.attention(student, guides)
    damaged, masks = model.pseudo_defects(batch.image, batch.image_path, epoch=0)
    from_teacher, from_assistant = guidance_losses(student, guides, weights)
    expected = {
        "from_teacher": from_teacher,
        "from_assistant": from_assistant,
        "entropy": 0.2 * entropy_loss(weights),
        "inverse": 0.7 * distillation_loss(teacher, model.model.student(damaged), l2_weight=0.0),
    }
    assert masks.flatten(1).any(dim=1).all()
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(
        {name: loss.item() for name, loss in expected.items()}, abs=1e-6
    )
    assert losses["entropy"] > 0


def test_without_assistant_the_teacher_has_all_the_weight(teacher_weights, batch):
    model = at_step(build(teacher_weights, assistant=None, inverse_weight=0.0), 0)
    losses = model.compute_losses(batch)
    teacher, student = model.model.teacher(batch.image), model.model.student(batch.image)
    expected = distillation_loss(teacher, student, l2_weight=0.0).item()
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx({"from_teacher": expected}, abs=1e-6)


def test_equal_guidance_weighs_both_alike(teacher_weights, batch):
    model = at_step(build(teacher_weights, guidance="equal", inverse_weight=0.0), 3)
    model.assistant.eval()
    losses = model.compute_losses(batch)
    teacher, student = model.model.teacher(batch.image), model.model.student(batch.image)
    guides = {"from_teacher": teacher, "from_assistant": model._assist(batch, teacher)}
    expected = {name: distillation_loss(guide, student, l2_weight=0.0).item() / 2 for name, guide in guides.items()}
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("step", [0, 3])
def test_gradient_reaches_what_learns_and_nothing_else(step, teacher_weights, batch):
    model = at_step(build(teacher_weights), step)
    torch.stack(list(model.compute_losses(batch).values())).sum().backward()
    assert all(parameter.grad is None for parameter in model.model.teacher.parameters())
    for network, learns in (
        (model.assistant, step == 0),
        (model.model.student, step == 3),
        (model.attention, step == 3),
    ):
        assert {parameter.grad is not None for parameter in network.parameters()} == {learns}


@pytest.mark.parametrize("step", [0, 3])
def test_no_parameter_is_unused_and_the_idle_ones_do_not_move(step, teacher_weights, batch, monkeypatch):
    model = at_step(build(teacher_weights), step)
    monkeypatch.setattr(model, "log", lambda *_, **__: None)
    batch.image_path = None  # there are no such files
    optimizer = model.configure_optimizers()
    for _ in range(2):  # with momentum of all
        optimizer.zero_grad()
        sum(parameter.square().sum() for parameter in model.parameters() if parameter.requires_grad).backward()
        optimizer.step()
    before = {name: parameters(network) for name, network in model.named_children() if parameters(network)}
    optimizer.zero_grad()
    loss = model.training_step(batch, 0)
    assert loss.item() == pytest.approx(sum(model.compute_losses(batch).values()).item(), abs=1e-6)
    loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None for parameter in trained)  # which several processes wait for
    model.on_before_optimizer_step(optimizer)
    optimizer.step()
    assert same(parameters(model.assistant), before["assistant"]) == (step == 3)
    assert same(parameters(model.model), before["model"]) == (step == 0)
    assert same(parameters(model.attention), before["attention"]) == (step == 0)


def test_cache_holds_clean_images_alone(teacher_weights, batch):
    model = at_step(build(teacher_weights), 3)
    seen = []
    model.model.teacher.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    model.model.teacher_cache = FeatureCache(model.model.teacher, images=4, memory=1.0)
    for _ in range(2):
        model.compute_losses(batch)
    assert torch.equal(torch.cat(seen), batch.image)  # each image once


def test_batch_norm_of_the_student_sees_clean_images(teacher_weights, batch):
    model = at_step(build(teacher_weights), 3)
    seen = []
    model.model.student.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    model.run_students(batch)
    assert [torch.equal(image, batch.image) for image in seen] == [True]


# --- outside training --------------------------------------------------------------------------------------------


def test_assistant_and_attention_are_no_part_of_the_model():
    with_all, without = build(None), build(None, assistant=None)
    assert {name for name, _ in with_all.model.named_parameters()} == {n for n, _ in without.model.named_parameters()}
    assert len(list(with_all.parameters())) > len(list(without.parameters()))


def test_nothing_but_teacher_and_student_predicts(teacher_weights, batch, monkeypatch):
    model = build(teacher_weights)
    model.load_teacher_weights()
    for part in Tad.training_components:
        monkeypatch.setattr(model, part, None)
    batch.image_path = None
    with torch.no_grad():
        assert model.eval().predict_step(batch, 0).anomaly_map.shape == (4, 64, 64)


def test_exported_torch_model_has_no_training_parts(teacher_weights, tmp_path):
    model = build(teacher_weights)
    model.load_teacher_weights()
    model.model.is_trained = True
    path = model.to_torch(tmp_path)
    exported = torch.load(path, weights_only=False)["model"]
    assert (exported.assistant, exported.attention, exported.pseudo_defects) == (None, None, None)
    assert {name.split(".")[0] for name, _ in exported.named_parameters()} == {"model"}
    assert model.assistant is not None  # it can still be trained
    assert model.attention is not None
    assert model.pseudo_defects is not None
