"""Drawings for the report's page, by matplotlib: curves as SVG in the page's own colours, layers of the plane as WebP.

Nothing here writes text that a user chose: titles and legends are the page's, and so is the theme. Everything but ticks is
transparent, and colours of the SVGs are CSS variables.
"""

from __future__ import annotations

import base64
import io
import math
import re
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from gankit.pictures import Limits
from gankit.plane import GRID, Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIDE = 640  # pixels of a layer's side
ARROWS = 3  # an arrow at every third point of D's grid, each way
LINES = 16  # contour lines over the range of colours
COLORS = 8  # the page has for curves
POINTS = 300  # of a curve; longer ones are thinned to means over intervals
MARGIN = (0.1, 0.07, 0.88, 0.88)  # the plane's axes within the layer: left, bottom, width, height
REAL, FAKE, ARROW, CONTOUR = "#858d97", "#ee2a70", "#68707a", "#808080"
# low to high: amber, nothing, blue; opacity grows with the distance from the middle, so that either theme shows through
FIELD = [(0.8, 0.47, 0, 0.9), (0.9, 0.62, 0.1, 0.45), (0.5, 0.5, 0.5, 0), (0.1, 0.55, 0.75, 0.45), (0, 0.38, 0.62, 0.9)]
# what matplotlib is told, and what the page's style sheet calls it
INK, LINE = "#0e0000", "#0e0001"
VARIABLES = {INK: "var(--soft)", LINE: "var(--line)"}


class Series(NamedTuple):
    """One curve: ``color`` is the number of a colour of the page, -1 its ink; a gap where y is not finite."""

    x: Sequence[float]
    y: Sequence[float]
    color: int
    dashed: bool = False


class Panel(NamedTuple):
    """An SVG, and where its horizontal axis lies: (first step, last step), (left, right) as shares of the width."""

    svg: str
    steps: tuple[float, float]
    span: tuple[float, float]


# -- curves --------------------------------------------------------------------------------------------------------


def curves(series: Sequence[Series], steps: tuple[float, float], *, percent: bool = False) -> Panel:
    """Curves over the steps, on a logarithmic axis if they span more than two powers of ten above zero.

    percent: shares, on a fixed axis from 0 to 100 %.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = Figure((4.2, 2.4))
    left, width = 0.13, 0.84
    axes = figure.add_axes((left, 0.13, width, 0.82))
    axes.set_facecolor("none")
    for one in series:
        x, y = thinned(one.x, one.y)
        marker = "." if 0 < len(x) <= 30 and not one.dashed else ""
        axes.plot(x, y, color=_color(one.color), linewidth=1.6, linestyle="--" if one.dashed else "-", marker=marker)
    every = np.array([v for one in series for v in one.y if math.isfinite(v)])
    if percent:
        axes.set_ylim(-0.02, 1.02)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.0%}"))
    elif len(every) and every.min() > 0 and every.max() > 100 * every.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
    first, last = steps if steps[0] < steps[1] else (steps[0] - 1, steps[1] + 1)
    room = 0.02 * (last - first)
    axes.set_xlim(first - room, last + room)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
    axes.grid(color=LINE, linewidth=0.6)
    _soften(axes)
    return Panel(_svg(figure), (first - room, last + room), (left, left + width))


def thinned(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most POINTS points: means over intervals of equally many points."""
    every = max(1, -(-len(x) // POINTS))
    means = [[statistics.fmean(v[i : i + every]) for i in range(0, len(v), every)] for v in (x, y)]
    return means[0], means[1]


# -- the plane -----------------------------------------------------------------------------------------------------


def plane_axes(limits: Limits) -> str:
    """The box and ticks of a plane as SVG, to lie over its layers."""
    figure, axes = _plane(limits, visible=True)
    axes.patch.set_visible(False)
    axes.locator_params(nbins=5)
    _soften(axes, 10)
    return _svg(figure)


def points(samples: Array, limits: Limits, color: str) -> bytes:
    """Samples (N, 2) as dots on a transparent layer."""
    figure, axes = _plane(limits)
    axes.plot(samples[:, 0], samples[:, 1], ".", markersize=4.6, color=color, alpha=0.65, markeredgewidth=0)
    return _layer(figure, color)


def colors(values: Array, scale: float) -> bytes:
    """D's value as GRID x GRID colours, from -scale to scale, the largest y first."""
    from matplotlib.colors import LinearSegmentedColormap

    mapped = LinearSegmentedColormap.from_list("field", FIELD)((values[::-1] / scale + 1) / 2, bytes=True)
    return _webp(mapped)


def ramp() -> str:
    """The colours of D's value, from low to high, as the stops of a CSS gradient."""
    return ", ".join(f"rgb({255 * r:.0f} {255 * g:.0f} {255 * b:.0f} / {a})" for r, g, b, a in FIELD)


def contours(values: Array, limits: Limits, scale: float) -> bytes:
    """Lines of equal value, LINES of them from -scale to scale."""
    figure, axes = _plane(limits)
    x, y = _grid(limits)
    levels = np.linspace(-scale, scale, LINES + 1)
    axes.contour(x, y, values, levels=levels, colors=CONTOUR, linewidths=0.7, linestyles="solid", alpha=0.7)
    return _layer(figure, CONTOUR)


def arrows(slopes: Array, limits: Limits, scale: float) -> bytes:
    """D's gradient as arrows; their length goes with the root of the slope, up to ``scale``, so that small ones show."""
    figure, axes = _plane(limits)
    x, y = (side[ARROWS // 2 :: ARROWS] for side in _grid(limits))
    slopes = slopes[ARROWS // 2 :: ARROWS, ARROWS // 2 :: ARROWS].astype(float)
    norm = np.maximum(np.linalg.norm(slopes, axis=-1, keepdims=True), 1e-30)
    u, v = np.moveaxis(slopes / norm * np.sqrt(np.minimum(norm / scale, 1)), -1, 0)
    heads: dict[str, Any] = {"headwidth": 4, "headlength": 4.5, "headaxislength": 4, "minlength": 0.6, "minshaft": 1.5}
    axes.quiver(x, y, u, v, color=ARROW, pivot="middle", width=0.003, scale=len(x), scale_units="width", **heads)
    return _layer(figure, ARROW)


def data_uri(webp: bytes) -> str:
    """A WebP picture as a page holds it."""
    return f"data:image/webp;base64,{base64.b64encode(webp).decode()}"


def shrunk(path: Any, width: int) -> bytes:
    """A recorded picture, no wider than ``width`` pixels."""
    with Image.open(path) as image:
        picture = image.convert("RGB")
    if picture.width > width:
        picture = picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=78, method=2)
    return buffer.getvalue()


def _plane(limits: Limits, visible: bool = False) -> tuple[Figure, Axes]:
    """A square figure with one axes whose place in it is always the same, so that layers fit onto each other."""
    from matplotlib.figure import Figure

    figure = Figure((5.6, 5.6), dpi=SIDE / 5.6)
    axes = figure.add_axes(MARGIN)
    axes.set(xlim=limits[:2], ylim=limits[2:])
    if not visible:
        axes.set_axis_off()
    return figure, axes


def _grid(limits: Limits) -> tuple[Array, Array]:
    return np.linspace(*limits[:2], GRID), np.linspace(*limits[2:], GRID)


def _soften(axes: Axes, size: float = 8.5) -> None:
    axes.tick_params(labelsize=size, color=LINE, labelcolor=INK)
    for name, spine in axes.spines.items():
        spine.set_color(LINE)
        spine.set_visible(name in ("left", "bottom"))


def _color(number: int) -> str:
    return INK if number < 0 else f"#0f000{number % COLORS}"


def _svg(figure: Figure) -> str:
    """The figure as an element of a page: text stays text, and colours are the page's."""
    import matplotlib

    buffer = io.StringIO()
    figure.patch.set_visible(False)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "gankit"}):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    used = set(re.findall(r'(?:url\(|href=")#([\w-]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda m: m[0] if m[1] in used else "", text)
    text = re.sub(r"#0f000(\d)", r"var(--c\1)", text)
    for number, variable in VARIABLES.items():
        text = text.replace(number, variable)
    text = re.sub(r"<svg [^>]*?viewBox", '<svg aria-hidden="true" viewBox', text, count=1)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)  # it would hold for the whole page
    text = re.sub(r"font-family: [^;]*; ", "", text)
    return re.sub(r"\s*\n\s*", "\n", text)


def _layer(figure: Figure, color: str) -> bytes:
    """What was drawn in one colour, on nothing: eight degrees of opacity take a third of the bytes of all 256."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import to_rgb

    figure.patch.set_visible(False)
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.array(canvas.buffer_rgba())
    pixels[..., :3] = np.round(255 * np.array(to_rgb(color)))
    pixels[..., 3] = np.round(pixels[..., 3] / 255 * 7) * 36
    return _webp(pixels)


def _webp(pixels: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "WEBP", lossless=True, quality=0, method=2)
    return buffer.getvalue()
