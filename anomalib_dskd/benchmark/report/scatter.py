"""Plot of accuracy against latency, as an SVG element of a report."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jinja2 import Template
from matplotlib.ticker import LogLocator, MaxNLocator

__all__ = ["Point", "draw_accuracy_against_latency"]

TEMPLATE = Path(__file__).parent / "templates" / "scatter.svg"
LEFT, RIGHT, TOP, BOTTOM = 72, 504, 16, 58  # x of the axes; margins above and below them
NAME_STEP = 21  # distance of the models' names
WIDE_RANGE = 8  # ratio of the latencies above which the axis is logarithmic


@dataclass(frozen=True)
class Point:
    """A model: accuracy in percent, and latency with PyTorch and OpenVINO in ms per image, or None."""

    name: str
    accuracy: float
    pytorch: float | None
    openvino: float | None

    @property
    def latencies(self) -> list[float]:
        """The measured latencies, in the order of the fields."""
        return [latency for latency in (self.pytorch, self.openvino) if latency is not None and latency > 0]


@dataclass(frozen=True)
class _Axis:
    """Converts values from ``low`` to ``high`` to coordinates from ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def at(self, value: float) -> float:
        low, high, value = np.log((self.low, self.high, value)) if self.is_log else (self.low, self.high, value)
        return round(float(self.start + (self.end - self.start) * (value - low) / (high - low)), 1)

    @property
    def ticks(self) -> list[tuple[str, float]]:
        """Text and coordinate of each tick."""
        locator = LogLocator(subs=(1, 2, 5)) if self.is_log else MaxNLocator(6, steps=(1, 2, 5, 10))
        values = locator.tick_values(self.low, self.high)
        return [(f"{value:g}", self.at(value)) for value in values if self.low <= value <= self.high]


def draw_accuracy_against_latency(points: Iterable[Point], *, accuracy: str, label: str) -> str | None:
    """Draw one mark per model and runtime: hollow for PyTorch, filled for OpenVINO.

    Args:
        points: models; those without any latency are left out.
        accuracy: name of the accuracy metric.
        label: text for screen readers.

    Returns:
        An ``<svg>`` element in the page's font and colors, or None if there is nothing to draw.
    """
    shown = sorted((point for point in points if point.latencies), key=lambda point: -point.accuracy)
    if not shown:
        return None
    bottom = max(340, TOP + NAME_STEP * len(shown))
    x_axis = _latency_axis([latency for point in shown for latency in point.latencies])
    y_axis = _accuracy_axis([point.accuracy for point in shown], bottom)
    heights = [y_axis.at(point.accuracy) for point in shown]
    template = Template(TEMPLATE.read_text(encoding="utf-8"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    svg: str = template.render(
        label=label,
        accuracy=accuracy,
        axes=(LEFT, RIGHT, TOP, bottom),
        height=bottom + BOTTOM,
        x_axis=x_axis,
        y_axis=y_axis,
        points=list(zip(shown, heights, _spread(heights, bottom), strict=True)),
    )
    return svg


def _latency_axis(latencies: Sequence[float]) -> _Axis:
    low, high = min(latencies), max(latencies)
    if high > WIDE_RANGE * low:
        return _Axis(low / 1.3, high * 1.3, LEFT, RIGHT, is_log=True)
    return _Axis(0, 1.1 * high, LEFT, RIGHT)


def _accuracy_axis(accuracies: Sequence[float], bottom: float) -> _Axis:
    low, high = min(accuracies), max(accuracies)
    margin = 0.12 * (high - low) or 1.0
    return _Axis(low - margin, high + margin, bottom, TOP)


def _spread(heights: Sequence[float], bottom: float) -> list[float]:
    """Move heights, in rising order, apart to at least ``NAME_STEP``, the last one at most to ``bottom``."""
    offsets = NAME_STEP * np.arange(len(heights))
    moved = np.maximum.accumulate(np.asarray(heights) - offsets)
    spread: list[float] = (np.minimum(moved, bottom - offsets[-1]) + offsets).round(1).tolist()
    return spread
