"""Pictures a user looks at: image grids, scatter plots of samples, and curves of a run.

Everything but `curves` needs Pillow only. Pictures are `PIL.Image` values; nothing is shown or printed.
"""

import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from gankit.errors import UsageError
from gankit.files import write_atomic

Limits = tuple[float, float, float, float]
Color = tuple[int, int, int]

PAPER: Color = (255, 255, 255)
INK: Color = (38, 42, 48)
FAINT: Color = (120, 126, 134)
LINE: Color = (196, 201, 208)
REAL: Color = (112, 118, 126)
FAKE: Color = (214, 40, 96)

GRID_WIDTH = 640  # pixels aimed at; the integer scale keeps grids of small images within 400..1000
GAP = 2

SCALE = 3  # supersampling of scatter plots, scaled down for smooth edges
PANEL = 520  # side of the plotting area in pixels
LEFT, TOP, RIGHT, BOTTOM = 60, 64, 24, 40  # margins around it
CAPTION = 24  # more below for a caption
MAX_POINTS = 5000  # drawn of each set; more only hide each other
PCA_POINTS = 1000  # real samples that define the principal components
BINS = 60


def image_grid(images: Tensor, columns: int | None = None) -> Image.Image:
    """Tile images (N, C, H, W) in [-1, 1] row by row, with a gap of 2 pixels, into one RGB picture.

    C = 1 is grey, 3 is RGB, 2 gets an empty third channel, of more than 3 the first 3 are shown. Values outside
    [-1, 1] are clipped, nan is grey. columns: default the root of N, rounded up. Small images are enlarged by an
    integer factor. `UsageError` for another shape or no images.
    """
    if images.ndim != 4 or 0 in images.shape:
        raise UsageError(f"a grid needs images of shape (N, C, H, W), not {tuple(images.shape)}")
    if columns is not None and columns < 1:
        raise UsageError(f"columns must be 1 or more, not {columns}")
    pixels = _to_rgb(images)
    count, height, width, _ = pixels.shape
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    rows = math.ceil(count / columns)
    scale = max(1, round(GRID_WIDTH / (columns * (width + GAP))))
    pixels = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
    step_y, step_x = height * scale + GAP, width * scale + GAP
    canvas = np.full((rows * step_y + GAP, columns * step_x + GAP, 3), PAPER, dtype=np.uint8)
    for i, tile in enumerate(pixels):
        y, x = GAP + i // columns * step_y, GAP + i % columns * step_x
        canvas[y : y + height * scale, x : x + width * scale] = tile
    return Image.fromarray(canvas)


def scatter(real: Tensor | None, fake: Tensor, *, title: str = "", limits: Limits | None = None) -> Image.Image:
    """Draw real samples in grey and fake ones in colour above them, on one square panel with equal axes.

    real None: the fake ones alone.

    real (N, ...), fake (M, ...), flattened: two dimensions are drawn as they are, one as a pair of histograms, more
    on the first two principal components of the real samples, which the picture then says. At most 5,000 of each are
    drawn. limits: (x_low, x_high, y_low, y_high), for 1-D data only the first two matter; default `scatter_limits`.
    Fakes outside are not drawn but counted in a corner, as are those that are not finite.
    `UsageError` for empty or unequal sample shapes.
    """
    alone, real = real is None, fake if real is None else real
    if real.ndim < 1 or real.shape[1:] != fake.shape[1:] or 0 in real.shape or 0 in fake.shape:
        raise UsageError(
            "a scatter plot needs non-empty real and fake samples of equal shape, "
            f"not {tuple(real.shape)} and {tuple(fake.shape)}"
        )
    real_points, fake_points, caption = _to_plane(real, fake)
    if limits is None:
        limits = _limits(real_points, fake_points)
    if real_points.shape[1] == 1:
        return _histograms(real_points[:, 0], fake_points[:, 0], title, limits)
    panel = _Panel(_squared(limits), title, caption)
    inside = panel.inside(fake_points)
    if not alone:
        panel.points(real_points[panel.inside(real_points)], REAL)
    panel.points(fake_points[inside], FAKE)
    panel.axes(y_labels=True)
    panel.legend(0 if alone else real.shape[0], fake.shape[0])
    panel.note(_outside_note(fake_points, inside))
    return panel.finish()


def scatter_limits(real: Tensor, fake: Tensor | None = None) -> Limits:
    """Limits for `scatter`: the box of the real samples with a margin of 5 %, as a square.

    It is enlarged in fixed steps (x1.25, x1.5, x2) where that is needed to hold 98 % of the fakes, and no further, so
    that frames of one run are mostly drawn on the same axes; pass the limits of the first frame to make it exact.
    """
    real_points, fake_points, _ = _to_plane(real, real if fake is None else fake)
    return _limits(real_points, fake_points)


def side_by_side(left: Image.Image, right: Image.Image, labels: tuple[str, str] = ("real", "generated")) -> Image.Image:
    """Put two pictures next to each other, each under its label, for example two grids."""
    margin, head = 16, 44
    width = left.width + right.width + 3 * margin
    height = max(left.height, right.height) + head + margin
    canvas = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=20)
    for picture, x, label in ((left, margin, labels[0]), (right, left.width + 2 * margin, labels[1])):
        draw.text((x + picture.width / 2, head / 2), label, INK, font, anchor="mm")
        canvas.paste(picture, (x, head))
    return canvas


def stacked(images: Sequence[Image.Image], title: str) -> Image.Image:
    """Put pictures of one width below each other, under a title."""
    gap, head = 12, 44
    height = head + sum(image.height + gap for image in images)
    canvas = Image.new("RGB", (max(image.width for image in images), height), PAPER)
    ImageDraw.Draw(canvas).text((gap, head / 2), title, INK, ImageFont.load_default(size=18), anchor="lm")
    y = head
    for image in images:
        canvas.paste(image, (0, y))
        y += image.height + gap
    return canvas


def sheet(images: Mapping[str, Image.Image], width: int = 1240) -> Image.Image:
    """Tile pictures, each shrunk and under its label of two lines, in rows of four, or of two where they are wide.

    `UsageError` without pictures.
    """
    if not images:
        raise UsageError("a sheet needs a picture")
    margin, head = 8, 46
    across = 2 if any(image.width > 1.3 * image.height for image in images.values()) else 4
    cell = width // across
    side = cell - 2 * margin
    shrunk = [
        image.convert("RGB").resize((side, round(image.height * side / image.width)), Image.Resampling.LANCZOS)
        for image in images.values()
    ]
    rows = [shrunk[i : i + across] for i in range(0, len(shrunk), across)]
    heights = [head + margin + max(image.height for image in row) for row in rows]
    canvas = Image.new("RGB", (cell * min(across, len(shrunk)), sum(heights)), PAPER)
    draw, fonts = ImageDraw.Draw(canvas), [ImageFont.load_default(size=size) for size in (16, 13)]
    for i, (label, image) in enumerate(zip(images, shrunk, strict=True)):
        x, y = margin + i % across * cell, sum(heights[: i // across])
        for line, font, color, down in zip(label.split("\n"), fonts, (INK, FAINT), (14, 33), strict=False):
            draw.text((x, y + down), line, color, font, anchor="lm")
        canvas.paste(image, (x, y + head))
    return canvas


def save_png(image: Image.Image, path: str | os.PathLike[str]) -> None:
    """Write a PNG so that `path` is either the old file or the whole new one, also after a crash."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    write_atomic(Path(path), buffer.getvalue())


def curves(groups: Mapping[str, Sequence[Mapping[str, Any]]], path: str | os.PathLike[str], *, x: str = "step") -> None:
    """Draw one small panel for each numeric column of each group over the column `x`, and save them to `path`.

    groups: {"losses": rows, "metrics": rows, ...}, rows as a run logs them: {"step": 10, "d/adv": 1.3, ...}. Columns
    may be missing from some rows; values that are no finite numbers leave a gap. Long noisy columns are drawn faint
    with a running mean. The format follows the suffix (png, svg, pdf). Needs `pip install "gankit[plot]"`.
    `UsageError` without matplotlib, with another suffix or where there is nothing to draw.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise UsageError('curves need matplotlib: pip install "gankit[plot]"') from error
    suffix = Path(path).suffix.lower().lstrip(".")
    if suffix not in ("png", "svg", "pdf"):
        raise UsageError(f"curves are saved as .png, .svg or .pdf, not as {Path(path).name!r}")
    panels = {group: _columns(rows, x) for group, rows in groups.items()}
    panels = {group: columns for group, columns in panels.items() if columns}
    if not panels:
        raise UsageError(f"there is nothing to draw: no row has {x!r} and another number")

    widest = max(len(columns) for columns in panels.values())
    across = 2 if widest == 4 else min(3, widest)
    heights = [math.ceil(len(columns) / across) for columns in panels.values()]
    size = (3.7 * across, 2.45 * sum(heights) + 0.45 * len(panels))
    figure = Figure(size, dpi=110, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.06))
    parts = figure.subfigures(len(panels), 1, squeeze=False, height_ratios=heights).ravel()
    for part, (group, columns), down, color in zip(parts, panels.items(), heights, _cycle(len(panels)), strict=True):
        part.suptitle(group, x=0.01, ha="left", fontsize=12, fontweight="bold", color=_hex(INK))
        axes = part.subplots(down, across, squeeze=False).ravel()
        for axis, (column, (steps, values)) in zip(axes[: len(columns)], columns.items(), strict=True):
            mean = _running_mean(values)
            axis.plot(steps, values, color=color, linewidth=1.4, alpha=1.0 if mean is None else 0.3)
            if mean is not None:
                axis.plot(steps, mean, color=color, linewidth=1.6)
            if len(steps) < 40:
                axis.plot(steps, values, ".", color=color, markersize=5)
            axis.set_title(column, fontsize=10, loc="left", color=_hex(INK))
            axis.grid(color=_hex(LINE), linewidth=0.5, alpha=0.6)
            axis.spines[["top", "right"]].set_visible(False)
            axis.spines[["left", "bottom"]].set_color(_hex(LINE))
            axis.tick_params(labelsize=8, colors=_hex(FAINT))
            axis.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
            axis.yaxis.set_major_locator(MaxNLocator(5))
            axis.set_xlabel(x, fontsize=8, color=_hex(FAINT))
        for axis in axes[len(columns) :]:
            axis.set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=suffix)
    write_atomic(Path(path), buffer.getvalue())


def _to_rgb(images: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Images (N, C, H, W) in [-1, 1] -> bytes (N, H, W, 3)."""
    images = images.detach().to("cpu", torch.float32)[:, :3].nan_to_num(nan=0.0).clamp(-1, 1)
    if images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
    elif images.shape[1] == 2:
        images = torch.cat([images, torch.full_like(images[:, :1], -1.0)], dim=1)
    pixels: np.ndarray[Any, np.dtype[np.uint8]] = (
        ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    )
    return pixels


def _to_plane(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor, str]:
    """Return real and fake as (N, 1) or (N, 2) float64 and a caption that says how."""
    real, fake = (t.detach().to("cpu", torch.float64).reshape(len(t), -1) for t in (real, fake))
    features = real.shape[1]
    if features <= 2:
        return real, fake, ""
    sample = real[real.isfinite().all(dim=1)][:PCA_POINTS]
    if not len(sample):
        sample = torch.zeros_like(real[:1])
    mean = sample.mean(dim=0)
    directions, share = _principal(sample - mean)
    caption = f"{features:,} dimensions: first two principal components of real ({share:.0%} of its variance)"
    return (real - mean) @ directions, (fake - mean) @ directions, caption


def _principal(centred: Tensor) -> tuple[Tensor, float]:
    """First two principal directions (D, 2) of centred points (N, D), and their share of the variance."""
    # from the smaller one of the two Gram matrices: several times faster than a singular value decomposition
    wide = len(centred) <= centred.shape[1]
    variance, vectors = torch.linalg.eigh(centred @ centred.T if wide else centred.T @ centred)
    first = vectors[:, -2:].flip(1)
    directions = centred.T @ first if wide else first
    if directions.shape[1] == 1:
        directions = torch.cat([directions, torch.zeros_like(directions)], dim=1)
    directions = directions / directions.norm(dim=0).clamp(min=1e-300)
    # the sign of a principal direction is arbitrary: fix it, so that two pictures agree
    largest = directions.abs().argmax(dim=0, keepdim=True)
    directions = directions * directions.gather(0, largest).sign()
    return directions, float(variance[-2:].sum() / variance.sum().clamp(min=1e-300))


def _limits(real: Tensor, fake: Tensor) -> Limits:
    real, fake = real[real.isfinite().all(dim=1)], fake[fake.isfinite().all(dim=1)]
    if not len(real):
        return (-1.0, 1.0, -1.0, 1.0)
    low, high = real.min(dim=0).values, real.max(dim=0).values
    middle, half = (low + high) / 2, float((high - low).max()) / 2 * 1.05
    half = half if half > 0 else 1.0
    half = max(half, 1e-12 * float(middle.abs().max()))  # beside large numbers less is nothing
    if len(fake):
        reach = float((fake - middle).abs().max(dim=1).values.quantile(0.98)) / half
        half *= next((factor for factor in (1.0, 1.25, 1.5) if reach <= factor), 2.0)
    x, y = float(middle[0]), float(middle[-1])
    return (x - half, x + half, y - half, y + half)


def _squared(limits: Limits) -> Limits:
    x_low, x_high, y_low, y_high = limits
    half = max(x_high - x_low, y_high - y_low) / 2
    x, y = (x_low + x_high) / 2, (y_low + y_high) / 2
    return (x - half, x + half, y - half, y + half)


def _histograms(real: Tensor, fake: Tensor, title: str, limits: Limits) -> Image.Image:
    """Both densities of 1-D samples on common bins, real filled in grey, fake as a coloured outline with a tint."""
    edges = np.linspace(limits[0], limits[1], BINS + 1)
    heights = []
    for values in (real, fake):
        values = values[values.isfinite()]
        counts, _ = np.histogram(values.numpy(), edges)
        heights.append(counts / max(1, len(values)))
    top = max(float(h.max()) for h in heights) or 1.0
    panel = _Panel((limits[0], limits[1], 0.0, top * 1.08), title, "")
    for height, color in zip(heights, (REAL, FAKE), strict=True):
        panel.bars(edges, height, color)
    panel.axes(y_labels=False)
    panel.legend(len(real), len(fake))
    panel.note(_outside_note(fake[:, None], (fake >= limits[0]) & (fake <= limits[1])))
    return panel.finish()


def _outside_note(fake: Tensor, inside: Tensor) -> str:
    finite = fake.isfinite().all(dim=1)
    outside, broken = int((finite & ~inside).sum()), int((~finite).sum())
    share = f"{outside / len(fake):.1%}" if outside >= len(fake) / 1000 else "under 0.1%"
    notes = [f"{share} of generated outside"] if outside else []
    if broken:
        notes.append(f"{broken:,} not finite")
    return ", ".join(notes)


class _Panel:
    """A square plotting area with title, axes and legend, drawn at SCALE times its size."""

    def __init__(self, limits: Limits, title: str, caption: str) -> None:
        self.limits = limits
        below = BOTTOM + (CAPTION if caption else 0)
        size = (SCALE * (LEFT + PANEL + RIGHT), SCALE * (TOP + PANEL + below))
        self.image = Image.new("RGB", size, PAPER)
        # drawing "RGBA" on an RGB image blends
        self.draw = ImageDraw.Draw(self.image, "RGBA")
        if title:
            self._text(LEFT, TOP - 42, title, INK, 19, "lm")
        if caption:
            self._text(LEFT, TOP + PANEL + 44, caption, FAINT, 13, "lm")

    def inside(self, points: Tensor) -> Tensor:
        """(N, 2) -> which of them lie on the panel; nan does not."""
        low = torch.tensor([self.limits[0], self.limits[2]], dtype=torch.float64)
        high = torch.tensor([self.limits[1], self.limits[3]], dtype=torch.float64)
        return ((points >= low) & (points <= high)).all(dim=1)

    def points(self, points: Tensor, color: Color) -> None:
        """Draw dots, more transparent the more there are."""
        points = points[:MAX_POINTS]
        radius = SCALE * (2.6 if len(points) <= 1000 else 2.0)
        alpha = max(70, min(190, round(190 * math.sqrt(500 / max(1, len(points))))))
        for x, y in zip(self._x(points[:, 0]).tolist(), self._y(points[:, 1]).tolist(), strict=True):
            self.draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(*color, alpha))

    def bars(self, edges: np.ndarray[Any, Any], heights: np.ndarray[Any, Any], color: Color) -> None:
        """Draw a filled histogram with an outline along its top."""
        x = self._x(torch.from_numpy(edges)).repeat_interleave(2)[1:-1].tolist()
        y = self._y(torch.from_numpy(heights).double()).repeat_interleave(2).tolist()
        top = list(zip(x, y, strict=True))
        floor = SCALE * (TOP + PANEL)
        self.draw.polygon([(x[0], floor), *top, (x[-1], floor)], fill=(*color, 60))
        self.draw.line(top, fill=(*color, 255), width=2 * SCALE, joint="curve")

    def axes(self, *, y_labels: bool) -> None:
        """Draw the box, ticks and their labels."""
        right, bottom = LEFT + PANEL, TOP + PANEL
        box = (SCALE * LEFT, SCALE * TOP, SCALE * right, SCALE * bottom)
        self.draw.rectangle(box, outline=LINE, width=SCALE)
        for value in _ticks(self.limits[0], self.limits[1]):
            x = float(self._x(torch.tensor(value))) / SCALE
            self._line(x, bottom, x, bottom + 5)
            self._text(x, bottom + 17, _label(value), FAINT, 14, "mm")
        if y_labels:
            for value in _ticks(self.limits[2], self.limits[3]):
                y = float(self._y(torch.tensor(value))) / SCALE
                self._line(LEFT - 5, y, LEFT, y)
                self._text(LEFT - 9, y, _label(value), FAINT, 14, "rm")

    def legend(self, real: int, fake: int) -> None:
        """Name both colours and the number of samples above the panel."""
        x = float(LEFT)
        for label, count, color in (("real", real, REAL), ("generated", fake, FAKE)):
            if not count:
                continue
            y, r = TOP - 15, 5
            self.draw.ellipse((SCALE * x, SCALE * (y - r), SCALE * (x + 2 * r), SCALE * (y + r)), fill=color)
            x = self._text(x + 16, y, f"{label} ({count:,})", INK, 15, "lm") + 22

    def note(self, text: str) -> None:
        """Write a remark at the upper right, next to the legend."""
        if text:
            self._text(LEFT + PANEL, TOP - 15, text, FAKE, 13, "rm")

    def finish(self) -> Image.Image:
        """Return the picture at its final size."""
        return self.image.reduce(SCALE)

    def _x(self, values: Tensor) -> Tensor:
        low, high, _, _ = self.limits
        return SCALE * (LEFT + PANEL * (values - low) / (high - low))

    def _y(self, values: Tensor) -> Tensor:
        _, _, low, high = self.limits
        return SCALE * (TOP + PANEL * (high - values) / (high - low))

    def _line(self, x0: float, y0: float, x1: float, y1: float) -> None:
        self.draw.line((SCALE * x0, SCALE * y0, SCALE * x1, SCALE * y1), fill=LINE, width=SCALE)

    def _text(self, x: float, y: float, text: str, color: Color, size: int, anchor: str) -> float:
        """Write text and return where it ends."""
        font = ImageFont.load_default(size=size * SCALE)
        self.draw.text((SCALE * x, SCALE * y), text, color, font, anchor=anchor)
        return x + self.draw.textlength(text, font) / SCALE


def _ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers in [low, high]."""
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough * 0.999)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _label(value: float) -> str:
    return f"{value + 0.0:.4g}"


def _columns(rows: Sequence[Mapping[str, Any]], x: str) -> dict[str, tuple[list[float], list[float]]]:
    """Columns of rows, in order of appearance, as (x values, values); rows without x are left out."""
    columns: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        if not _is_number(row.get(x)):
            continue
        for name, value in row.items():
            if name == x or isinstance(value, bool) or not isinstance(value, int | float | None):
                continue
            steps, values = columns.setdefault(name, ([], []))
            steps.append(float(row[x]))
            values.append(float(value) if _is_number(value) else math.nan)
    return {name: column for name, column in columns.items() if not all(map(math.isnan, column[1]))}


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _running_mean(values: list[float]) -> list[float] | None:
    """Mean over a window of 1/40 of a long column, None for a short one or one with gaps."""
    window = len(values) // 40
    if window < 5 or any(map(math.isnan, values)):
        return None
    sums = np.cumsum([0.0, *values])
    half = window // 2
    low = np.clip(np.arange(len(values)) - half, 0, None)
    high = np.clip(np.arange(len(values)) + half + 1, None, len(values))
    means: list[float] = ((sums[high] - sums[low]) / (high - low)).tolist()
    return means


def _cycle(count: int) -> list[str]:
    colors = ("#d62860", "#2364aa", "#2a9d6f", "#e07a1f", "#6d4fa3")
    return [colors[i % len(colors)] for i in range(count)]


def _hex(color: Color) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)
