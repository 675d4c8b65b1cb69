"""Arguments of all models that only training depends on, checked."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from typing_extensions import Self

from anomalib_dskd.argument_checks import check_choice, check_not_negative, is_number
from anomalib_dskd.errors import ArgumentError

__all__ = ["TRAINING_ONLY", "Schedule", "TrainingOptions"]

Schedule = Literal["constant", "one_cycle"]
LARGEST_SEED = 2**32 - 1  # of NumPy's generator


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Arguments that every model takes for training, and that a trained model's results do not depend on.

    :class:`~anomalib_dskd.models.distillation.lightning_model.DistillationModule` documents each of them.

    Raises:
        ArgumentError: a value is out of range.
    """

    teacher_weights: str | Path | None
    learning_rate: float
    schedule: Schedule
    betas: tuple[float, float]
    weight_decay: float
    hard_mining: float
    batch_norm_images: int
    ema_decay: float
    teacher_cache: float
    image_cache: float
    seed: int | None

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> Self:
        """Select the training options from all arguments of a model's constructor."""
        return cls(**{option.name: arguments[option.name] for option in fields(cls)})

    def __post_init__(self) -> None:
        """Check the values."""
        check_choice(Schedule, schedule=self.schedule)
        check_not_negative(
            weight_decay=self.weight_decay, teacher_cache=self.teacher_cache, image_cache=self.image_cache
        )
        if not (is_number(self.learning_rate) and self.learning_rate > 0):
            msg = f"learning_rate {self.learning_rate!r} must be a finite number larger than 0."
            raise ArgumentError(msg)
        betas = self.betas if isinstance(self.betas, (list, tuple)) else ()
        if len(betas) != 2 or not all(is_number(beta) and 0 <= beta < 1 for beta in betas):  # noqa: PLR2004 - of Adam
            msg = f"betas {self.betas!r} must be two numbers from 0 up to, not including, 1."
            raise ArgumentError(msg)
        if not (is_number(self.hard_mining) and 0 <= self.hard_mining < 1):
            msg = f"hard_mining {self.hard_mining!r} must be a number from 0, for none, up to, not including, 1."
            raise ArgumentError(msg)
        if self.seed is not None and not (type(self.seed) is int and 0 <= self.seed <= LARGEST_SEED):
            msg = f"seed {self.seed!r} must be an integer from 0 to {LARGEST_SEED}, or none for a random one."
            raise ArgumentError(msg)
        self._check_averaging()

    def _check_averaging(self) -> None:
        if not (type(self.batch_norm_images) is int and self.batch_norm_images >= 0):
            msg = f"batch_norm_images {self.batch_norm_images!r} must be a positive integer, or 0 for running averages."
            raise ArgumentError(msg)
        if not (is_number(self.ema_decay) and 0 <= self.ema_decay < 1):
            msg = f"ema_decay {self.ema_decay!r} must be a number from 0, for no average, up to, not including, 1."
            raise ArgumentError(msg)
        if self.ema_decay > 0 and self.batch_norm_images == 0:
            msg = (
                f"ema_decay {self.ema_decay!r} with batch_norm_images 0: averaged weights need batch-norm statistics "
                "of their own. Give batch_norm_images above 0, such as 256, or ema_decay 0."
            )
            raise ArgumentError(msg)


TRAINING_ONLY = frozenset(option.name for option in fields(TrainingOptions))
