import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gankit.errors import UsageError
from gankit.pictures import (
    FAKE,
    PAPER,
    _principal,
    curves,
    image_grid,
    save_png,
    scatter,
    scatter_limits,
    sheet,
    side_by_side,
)

ROWS = [{"step": i, "d/adv": 1.0 + i, "d/gp": None if i < 3 else 0.5} for i in range(8)]


def pixels(image: Image.Image) -> np.ndarray[Any, Any]:
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def coloured(image: Image.Image) -> np.ndarray[Any, Any]:
    """(H, W): True where the colour of fakes shows, transparent or not."""
    p = pixels(image)
    return (p[..., 0] - p[..., 1]) > 60


def inside(image: Image.Image) -> np.ndarray[Any, Any]:
    """The plotting area without its frame, legend and labels."""
    return coloured(image)[66:582, 62:578]


def test_grid_places_and_scales_every_pixel() -> None:
    # 5 images in 2 columns; each a known ramp, so that order, orientation and range show
    values = torch.linspace(-1, 1, 5 * 6).reshape(5, 1, 2, 3)
    p = pixels(image_grid(values, columns=2))
    scale = (p.shape[1] - 2) // 2 - 2
    assert scale % 3 == 0
    scale //= 3
    assert p.shape == (2 + 3 * (2 * scale + 2), 2 + 2 * (3 * scale + 2), 3)
    expected = np.round((values.numpy() + 1) * 127.5).astype(int)
    for i in range(5):
        y0, x0 = 2 + i // 2 * (2 * scale + 2), 2 + i % 2 * (3 * scale + 2)
        tile = p[y0 : y0 + 2 * scale, x0 : x0 + 3 * scale]
        blocks = np.repeat(np.repeat(expected[i, 0], scale, 0), scale, 1)
        assert (tile == blocks[..., None]).all()
    assert (p[:2] == PAPER).all() and (p[-2:] == PAPER).all()
    assert (p[:, :2] == PAPER).all() and (p[:, -2:] == PAPER).all()
    assert (p[-2 * scale :, -3 * scale :] == PAPER).all()  # no sixth image


@pytest.mark.parametrize("side", [8, 16, 28, 32, 64])
@pytest.mark.parametrize("count", [1, 4, 9, 16, 36, 64, 100])
def test_grids_of_small_images_are_400_to_1000_wide(side: int, count: int) -> None:
    width, height = image_grid(torch.zeros(count, 1, side, side)).size
    assert width == height
    assert 400 <= width <= 1000


def test_grid_channels() -> None:
    values = torch.tensor([-1.0, 0.2, 1.0, 0.5])
    colours = [
        tuple(pixels(image_grid(values[:c].reshape(1, c, 1, 1).expand(1, c, 2, 2)))[10, 10]) for c in (1, 2, 3, 4)
    ]
    assert colours == [(0, 0, 0), (0, 153, 0), (0, 153, 255), (0, 153, 255)]


def test_grid_of_bad_values_and_shapes() -> None:
    values = torch.tensor([math.nan, math.inf, -math.inf, 5.0]).reshape(4, 1, 1, 1).expand(4, 1, 2, 2)
    p = pixels(image_grid(values, columns=4))
    step = (p.shape[1] - 2) // 4
    assert [p[5, 5 + i * step, 0] for i in range(4)] == [128, 255, 0, 255]
    for bad in (torch.zeros(0, 1, 4, 4), torch.zeros(4, 4), torch.zeros(2, 0, 4, 4)):
        with pytest.raises(UsageError, match=r"\(N, C, H, W\)"):
            image_grid(bad)
    with pytest.raises(UsageError, match="columns"):
        image_grid(torch.zeros(2, 1, 4, 4), columns=0)


def test_grid_does_not_change_or_need_grad_free_images() -> None:
    images = torch.zeros(2, 1, 4, 4, requires_grad=True)
    image_grid(images)
    assert not images.any()


def test_scatter_places_points() -> None:
    real = torch.tensor([[-1.0, -1.0], [1.0, 1.0]])
    image = scatter(real, torch.tensor([[1.0, -0.5]]), limits=(-2.0, 2.0, -2.0, 2.0))
    y, x = np.nonzero(inside(image))
    # panel coordinates: x 3/4 to the right, y 5/8 from the top
    assert x.mean() == pytest.approx(0.75 * 520 - 2, abs=2)
    assert y.mean() == pytest.approx(0.625 * 520 - 2, abs=2)
    assert x.max() - x.min() < 10


def test_scatter_draws_fakes_above_reals() -> None:
    points = torch.zeros(400, 2)
    limits = (-1.0, 1.0, -1.0, 1.0)
    over = pixels(scatter(points, points, limits=limits))[64 + 260, 60 + 260]
    assert np.abs(over - np.array(FAKE)).max() < 25


def test_scatter_is_deterministic_and_leaves_rng_alone() -> None:
    real, fake = torch.arange(60.0).reshape(20, 3).sin(), torch.arange(30.0).reshape(10, 3).cos()
    state = torch.get_rng_state()
    assert scatter(real, fake, title="t").tobytes() == scatter(real, fake, title="t").tobytes()
    assert torch.equal(state, torch.get_rng_state())
    assert scatter(real, fake).tobytes() != scatter(real, fake, title="step 10").tobytes()


def test_limits_come_from_real_and_are_square() -> None:
    real = torch.tensor([[0.0, 5.0], [4.0, 6.0]])
    assert scatter_limits(real) == pytest.approx((-0.1, 4.1, 3.4, 7.6))
    near = torch.tensor([[1.0, 5.0], [3.0, 7.0]])
    assert scatter_limits(real, near) == scatter_limits(real)  # frames stay comparable


def test_limits_grow_for_most_fakes_and_not_for_outliers() -> None:
    real = torch.tensor([[-1.0, -1.0], [1.0, 1.0]])
    fakes = torch.zeros(200, 2)
    fakes[0] = 1e6
    fakes[1] = math.nan
    assert scatter_limits(real, fakes)[1] == pytest.approx(1.05)
    fakes[:100] = 1.2
    assert scatter_limits(real, fakes)[1] == pytest.approx(1.05 * 1.25)
    fakes[:] = 1e6
    assert scatter_limits(real, fakes)[1] == pytest.approx(1.05 * 2)


def test_scatter_counts_what_it_does_not_draw() -> None:
    real, fake = torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), torch.zeros(100, 2)
    whole = scatter(real, fake)
    fake[0], fake[1] = 50.0, math.nan
    corner = coloured(scatter(real, fake))[40:60, 320:580]
    assert corner.any()
    assert not coloured(whole)[40:60, 320:580].any()


@pytest.mark.parametrize("value", [0.0, 7.5, -1e-9, 1e12])
def test_scatter_of_a_single_repeated_point(value: float) -> None:
    image = scatter(torch.full((5, 2), value), torch.full((5, 2), value))
    assert inside(image).any()


def test_scatter_of_a_column_that_hardly_moves_beside_its_size() -> None:
    points = torch.rand(50, 2, generator=torch.Generator().manual_seed(0))
    points[:, 0] = 1e17
    assert inside(scatter(points, points)).any()


@pytest.mark.parametrize("shape", [(1,), (2,), (3,), (1200,), (1, 4, 4)])
def test_scatter_of_any_shape(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(300, *shape, generator=generator)
    image = scatter(real, torch.randn(50, *shape, generator=generator) * 0.5)
    assert inside(image).any()
    plane = shape in ((1,), (2,))
    assert (image.height == scatter(torch.zeros(2, 2), torch.zeros(2, 2)).height) == plane  # room for the caption


def test_principal_components_against_numpy() -> None:
    generator = torch.Generator().manual_seed(0)
    for n, d in ((30, 7), (5, 40)):  # either Gram matrix
        x = torch.randn(n, d, generator=generator, dtype=torch.float64)
        x -= x.mean(dim=0)
        directions, share = _principal(x)
        _, s, v = np.linalg.svd(x.numpy(), full_matrices=False)
        np.testing.assert_allclose(np.abs(np.sum(directions.numpy() * v[:2].T, axis=0)), 1, rtol=1e-9)
        assert share == pytest.approx((s[:2] ** 2).sum() / (s**2).sum())
        assert (directions.max(dim=0).values == directions.abs().max(dim=0).values).all()


def test_principal_components_keep_the_plane_of_the_data() -> None:
    # real data in a plane of 5 dimensions, longest along the second axis: the picture shows those two axes
    generator = torch.Generator().manual_seed(0)
    real = torch.zeros(500, 5)
    real[:, 1] = torch.randn(500, generator=generator) * 10
    real[:, 3] = torch.randn(500, generator=generator)
    low, high, bottom, top = scatter_limits(real)
    span = float(real[:, 1].max() - real[:, 1].min())
    assert high - low == pytest.approx(1.05 * span, rel=0.01)
    assert high - low == pytest.approx(top - bottom)
    a = scatter(real, real[:100])
    b = scatter(real + 1000, real[:100] + 1000)  # centred: an offset changes nothing
    assert (np.abs(pixels(a) - pixels(b)) > 40).mean() < 0.01


def test_histograms_show_both_densities() -> None:
    real, fake = torch.linspace(-1, 0, 500)[:, None], torch.linspace(0.5, 1, 500)[:, None]
    area = inside(scatter(torch.cat([real, real + 1]), fake, limits=(-1.0, 1.0, 0.0, 0.0)))
    line = area[:-4]  # without the floor
    assert not line[:, : 516 // 2].any()
    right = line[:, int(516 * 0.76) :]
    # all fakes are in a quarter of the range, so their bins are the highest, at 1 / 1.08 of the panel
    assert right.any(axis=0).mean() > 0.9
    assert np.nonzero(right)[0].min() == pytest.approx((1 - 1 / 1.08) * 520, abs=6)


def test_scatter_errors() -> None:
    for real, fake in ((torch.zeros(3, 2), torch.zeros(3, 3)), (torch.zeros(0, 2), torch.zeros(1, 2))):
        with pytest.raises(UsageError, match="equal shape"):
            scatter(real, fake)


def test_scatter_without_a_finite_sample() -> None:
    nothing = torch.full((4, 2), math.nan)
    assert not inside(scatter(torch.zeros(4, 2), nothing)).any()
    assert not inside(scatter(nothing, nothing)).any()
    assert not inside(scatter(nothing.repeat(1, 3), nothing.repeat(1, 3))).any()
    scatter(torch.zeros(1, 3), nothing.repeat(1, 2)[:, :3])


def test_side_by_side() -> None:
    left, right = Image.new("RGB", (50, 30), (0, 0, 255)), Image.new("RGB", (20, 60), (0, 255, 0))
    p = pixels(side_by_side(left, right))
    assert (p == (0, 0, 255)).all(axis=2).sum() == 50 * 30
    assert (p == (0, 255, 0)).all(axis=2).sum() == 20 * 60
    columns = [np.nonzero((p == colour).all(axis=2).any(axis=0))[0] for colour in ((0, 0, 255), (0, 255, 0))]
    assert columns[0].max() < columns[1].min()
    other = pixels(side_by_side(left, right, labels=("step 1", "step 2")))
    assert other.shape == p.shape and (other != p).any()


def test_a_sheet_has_every_picture_under_its_label_in_rows_of_four() -> None:
    colours = [(250 - 40 * i, 40 * i, 0) for i in range(6)]
    images = {f"method {i}\n{i} modes": Image.new("RGB", (600, 620), colour) for i, colour in enumerate(colours)}
    p = pixels(sheet(images))
    places = [np.nonzero((p == colour).all(axis=2)) for colour in colours]
    boxes = [(int(x.min()), int(y.min()), int(x.max()), int(y.max())) for y, x in places]
    assert len({(right - left, low - top) for left, top, right, low in boxes}) == 1
    assert [left for left, *_ in boxes] == [8, 318, 628, 938, 8, 318]
    assert len({top for _, top, *_ in boxes[:4]}) == len({top for _, top, *_ in boxes[4:]}) == 1
    assert boxes[4][1] > boxes[0][3] + 40
    for left, top, right, _ in boxes:  # words above each
        assert (p[top - 40 : top - 4, left:right] != PAPER).any()
    wide = sheet({"a": Image.new("RGB", (900, 400)), "b": Image.new("RGB", (900, 400))})
    assert wide.width == 1240
    assert sheet({"a": Image.new("RGB", (600, 620))}).width == 310  # no larger than beside others
    with pytest.raises(UsageError, match="needs a picture"):
        sheet({})


def test_save_png(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_text("old")
    save_png(Image.new("RGB", (3, 2), (1, 2, 3)), path)
    with Image.open(path) as image:
        assert (image.format, image.size, image.getpixel((2, 1))) == ("PNG", (3, 2), (1, 2, 3))
    assert os.listdir(tmp_path) == ["a.png"]
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode  # readable to whom other files are


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    path.write_text("old")

    def broken(self: Image.Image, file: Any, **_: Any) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        save_png(Image.new("RGB", (3, 2)), path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.png"]


@pytest.mark.parametrize(("suffix", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_curves(tmp_path: Path, suffix: str, magic: bytes) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed; it is in gankit[plot]")
    path = tmp_path / f"curves.{suffix}"
    curves({"losses": ROWS, "metrics": [{"step": 4, "modes": 3, "note": "x", "flag": True}], "none": []}, path)
    content = path.read_bytes()
    assert content.startswith(magic)
    assert os.listdir(tmp_path) == [path.name]


def test_curves_draw_each_column_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure_module = pytest.importorskip(
        "matplotlib.figure", reason="matplotlib is not installed; it is in gankit[plot]"
    )
    figures = []
    plain = figure_module.Figure.savefig

    def savefig(self: Any, *args: Any, **kwargs: Any) -> None:
        figures.append(self)
        plain(self, *args, **kwargs)

    monkeypatch.setattr(figure_module.Figure, "savefig", savefig)
    metrics = [{"step": 4, "modes": 3, "note": "x", "flag": True}, {"step": None, "modes": 8}, {"modes": 8}]
    long = [{"step": i, "noisy": (-1) ** i} for i in range(400)]
    curves({"losses": ROWS, "metrics": metrics, "long": long}, tmp_path / "c.png")
    axes = [axis for axis in figures[0].axes if axis.get_visible()]
    assert [axis.get_title(loc="left") for axis in axes] == ["d/adv", "d/gp", "modes", "noisy"]
    assert axes[0].lines[0].get_xydata().tolist() == [[i, 1.0 + i] for i in range(8)]
    values = axes[1].lines[0].get_ydata()
    assert np.isnan(values[:3]).all() and (values[3:] == 0.5).all()  # a gap where there is no value
    assert axes[2].lines[0].get_xydata().tolist() == [[4, 3]]
    raw, mean = (line.get_ydata() for line in axes[3].lines)
    assert len(raw) == len(mean) == 400
    assert np.abs(mean).max() <= 0.2
    np.testing.assert_allclose(mean[200], np.mean(raw[195:206]))


def test_curves_leave_pyplot_alone(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed; it is in gankit[plot]")
    code = (
        "import sys; from gankit.pictures import curves; assert 'matplotlib' not in sys.modules;"
        f"curves({{'a': [{{'step': 1, 'b': 2}}]}}, {str(tmp_path / 'c.png')!r});"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_curves_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed; it is in gankit[plot]")
    with pytest.raises(UsageError, match="nothing to draw"):
        curves({"losses": [{"step": 1, "text": "x"}], "metrics": []}, tmp_path / "c.png")
    with pytest.raises(UsageError, match="nothing to draw"):
        curves({"losses": ROWS}, tmp_path / "c.png", x="epoch")
    with pytest.raises(UsageError, match=r"\.png, \.svg or \.pdf"):
        curves({"losses": ROWS}, tmp_path / "c.txt")
    assert not os.listdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match=r'pip install "gankit\[plot\]"'):
        curves({"losses": ROWS}, tmp_path / "c.png")
