"""The losses of the two students (section 3.1, Eq. 7)."""

from collections.abc import Sequence

from torch import Tensor, nn

from anomalib_dskd.components.discrepancy import distillation_loss

__all__ = ["DskdLoss"]


class DskdLoss(nn.Module):
    """Losses of the students: ``l_e`` for the encoder, ``l_d`` for the decoder, Eq. (7).

    Args:
        l2_weight: lambda of Eq. (6); the paper's is 0.1 (section 4.1.2).
    """

    def __init__(self, l2_weight: float = 0.1) -> None:
        super().__init__()
        self.l2_weight = l2_weight

    def forward(
        self, teacher: Sequence[Tensor], students: dict[str, Sequence[Tensor]], *, hard_mining: float = 0.0
    ) -> dict[str, Tensor]:
        """Map each student's features to its loss, under the same name.

        Args:
            teacher: features of the teacher, one ``(B, C_k, H_k, W_k)`` per level.
            students: features of each student, of the same shapes.
            hard_mining: share of the pixels whose gradient is reduced.
        """
        return {
            name: distillation_loss(teacher, features, l2_weight=self.l2_weight, hard_mining=hard_mining)
            for name, features in students.items()
        }
