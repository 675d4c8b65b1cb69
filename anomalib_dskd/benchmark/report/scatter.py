"""A report's picture of accuracy against latency."""

import html
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

__all__ = ["Point", "draw_accuracy_against_latency"]

INK, FAINT, ACCENT = "#010203", "#010204", "#010205"
COLOURS: Final = {INK: "currentColor", FAINT: "var(--faint)", ACCENT: "var(--accent)"}
"""Stand-ins that the SVG is drawn in, and the page's own colours, which follow its light or dark scheme."""

WIDE_RANGE = 8  # of latencies, from where on the axis is logarithmic
LONGEST_NAME = 34


@dataclass(frozen=True)
class Point:
    """A model: accuracy in percent, and milliseconds an image with either runtime, where measured."""

    name: str
    accuracy: float
    pytorch: float | None
    openvino: float | None

    @property
    def latencies(self) -> list[float]:
        """What was measured, in the order of the fields."""
        return [latency for latency in (self.pytorch, self.openvino) if latency is not None and latency > 0]


def draw_accuracy_against_latency(points: Iterable[Point], *, accuracy: str, label: str) -> str | None:
    """Draw one mark a model and runtime: hollow for PyTorch, filled for OpenVINO.

    Args:
        points: models, of which those without any latency are left out.
        accuracy: what the accuracy is called.
        label: text for readers who cannot see the picture.

    Returns:
        An ``<svg>`` element in the page's own font and colours, or None where there is nothing to draw.
    """
    shown = sorted((point for point in points if point.latencies), key=lambda point: point.accuracy)
    if not shown:
        return None
    height = max(3.4, 0.9 + 0.22 * len(shown))
    figure = Figure(figsize=(7.6, height), layout=None)
    axes = figure.add_axes((0.085, 0.55 / height, 0.545, 1 - 0.75 / height))
    for point in shown:
        axes.plot(point.latencies, [point.accuracy] * len(point.latencies), color=FAINT, linewidth=1, zorder=1)
        for latency, filled in ((point.pytorch, False), (point.openvino, True)):
            if latency:
                face = ACCENT if filled else "none"
                axes.plot(latency, point.accuracy, "o", markersize=6, mfc=face, mec=ACCENT, mew=1.4, zorder=2)
    _style(axes, [latency for point in shown for latency in point.latencies])
    axes.set_ylabel(f"{accuracy}, %", color=INK)
    _name_points(axes, shown)
    return _inline_svg(figure, label)


def _style(axes: Any, latencies: Sequence[float]) -> None:  # noqa: ANN401 - matplotlib's Axes is hardly typed
    if max(latencies) > WIDE_RANGE * min(latencies):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(min(latencies) / 1.3, max(latencies) * 1.3)
    else:
        axes.set_xlim(0, 1.1 * max(latencies))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.margins(y=0.12)
    axes.set_xlabel("milliseconds an image", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set(color=FAINT, linewidth=0.8)
    axes.tick_params(color=FAINT, labelcolor=INK, labelsize=9)


def _name_points(axes: Any, points: Sequence[Point]) -> None:  # noqa: ANN401 - as above
    """Write the names in a column on the right, in the points' order, where they cannot cover one another."""
    low, high = axes.get_ylim()
    wanted = [(point.accuracy - low) / (high - low) for point in points]  # rising
    step = 0.2 / (axes.figure.get_figheight() * axes.get_position().height)  # 0.2 inches, in the axes' own units
    places: list[float] = []
    for place in wanted:
        places.append(max(place, places[-1] + step) if places else place)
    excess = max(0.0, places[-1] - 1)
    for index in range(len(places) - 1, -1, -1):  # pushed beyond the top: move down as far as needed
        ceiling = places[index + 1] - step if index + 1 < len(places) else 1.0
        places[index] = min(places[index], ceiling) if excess else places[index]
    for point, place in zip(points, places, strict=True):
        name = point.name if len(point.name) <= LONGEST_NAME else point.name[: LONGEST_NAME - 1] + "…"
        axes.annotate(
            name,
            xy=(max(point.latencies), point.accuracy),
            xytext=(1.04, place),
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            color=INK,
            parse_math=False,  # a dollar sign in a name is a dollar sign
            arrowprops={"arrowstyle": "-", "color": FAINT, "linewidth": 0.6, "relpos": (0, 0.5), "shrinkB": 5},
        )


def _inline_svg(figure: Figure, label: str) -> str:
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):  # text stays text; the same each time
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)  # of groups; several pictures on a page would share them
    for stand_in, colour in COLOURS.items():
        svg = svg.replace(stand_in, colour)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1)
