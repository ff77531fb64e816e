"""The report's page from recorded runs: what it says, that nothing in it is taken for markup, and what it draws where."""

import base64
import io
import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from recorded import LIMITS, SIDE, record

from gankit import UsageError, figures, report
from gankit.cli import main
from gankit.rundir import RunDir


def gankit(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code == code, (result.output, result.exception)
    return result


def page(*folders: Path) -> str:
    return report.render([RunDir(folder) for folder in folders])


class Parsed(HTMLParser):
    """Elements with their attributes, tables as rows of texts, and all text but that of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.rows: list[list[str]] = []
        self.text, self.inside, self.cell = "", "", False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        self.inside = tag if tag in ("script", "style") else ""
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.cell = True

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""
        self.cell = self.cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if not self.inside:
            self.text += data
            if self.cell:
                self.rows[-1][-1] += data.strip()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("runs")
    steps = (10, 20, 40)
    return page(record(folder / "one"), record(folder / "two", plugin="r1", steps=steps, seed=1, ended="", flat=9))


def test_the_headline_has_how_each_run_ended_and_its_metrics_beside_the_truth(two: str) -> None:
    rows = {row[0]: row[1:] for row in Parsed(two).rows if row}
    assert rows["how it ended"][0] == "finished after step 30 of 30"
    assert "at step 40 of 40, with no end recorded" in rows["how it ended"][1]
    assert rows["modes captured"] == ["3", "3", "8"]
    assert rows["high quality"] == ["30.0%", "30.0%", "98.9%"]


def test_costs_and_what_differs_are_tables(two: str) -> None:
    parsed = Parsed(two)
    assert ["", "pairwise_gp", "2.00", "25%"] in parsed.rows
    start = two.index('id="differences"')
    rows = {row[0]: row[1:] for row in Parsed(two[start - 10 : two.index("</table>", start)]).rows}
    assert rows["plugin"] == ["pairwise_gp", "r1"]
    assert rows["seed"] == ["0", "1"]
    assert rows["version of r1"] == ["-", "0.1.0"]
    assert not {"data", "loss", "loss.weight", "torch", "arguments", "out"} & rows.keys()
    assert parsed.text.index("In what the runs differ") < parsed.text.index("configuration")
    assert ["loss.weight", "0.25"] in parsed.rows  # of the whole configuration


def test_the_page_is_whole_small_and_asks_for_nothing(two: str) -> None:
    parsed = Parsed(two)
    links = [
        value
        for _, attrs in parsed.elements
        for key, value in attrs.items()
        if key in ("src", "href", "xlink:href", "action")
    ]
    assert len(links) > 20
    assert all(link.startswith(("data:", "#")) for link in links)
    assert "default-src 'none'" in next(attrs["content"] for tag, attrs in parsed.elements if "http-equiv" in attrs)
    assert "url(" not in re.sub(r"url\(#", "", two)
    assert len(two) < 1_500_000
    ids = [
        attrs["id"]
        for tag, attrs in parsed.elements
        if "id" in attrs and tag in ("div", "input", "button", "table", "output", "h2")
    ]
    assert len(ids) == len(set(ids))


def test_every_picture_says_in_words_what_it_shows(two: str) -> None:
    alts = [attrs["alt"] for tag, attrs in Parsed(two).elements if tag == "img"]
    assert "Samples of two at step 40: modes captured 3, high quality 30.0%" in alts
    assert sum(map(bool, alts)) == 6  # one per run and step; layers below it say nothing
    assert all(attrs.get("aria-label") for tag, attrs in Parsed(two).elements if attrs.get("role") == "img")


NASTY = "<script>alert(1)<b>&'\"{{7*7}}$x_1$"


def test_names_are_never_markup(tmp_path: Path) -> None:
    text = page(record(tmp_path / f"_{NASTY}", plugin=NASTY, field=NASTY), record(tmp_path / "other"))
    parsed = Parsed(text)
    assert not [tag for tag, _ in parsed.elements if tag == "b"]
    assert [tag for tag, _ in parsed.elements].count("script") == 1
    assert parsed.text.count(NASTY) > 10


def decoded(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGBA")).astype(int)


def layer(text: str, kind: str) -> np.ndarray:
    return decoded(re.findall(rf'<img class="{kind}" src="([^"]+)"', text)[-1])


def test_layers_show_things_where_they_are(two: str, tmp_path: Path) -> None:
    point = np.array([[0.6, -0.9]], dtype=np.float32)
    pixels = np.asarray(Image.open(io.BytesIO(figures.points(point, LIMITS, figures.FAKE))).convert("RGBA"))
    rows, columns = np.nonzero(pixels[..., 3])
    left, bottom, width, height = figures.MARGIN
    expected = figures.SIDE * (left + width * 1.8 / 2.4), figures.SIDE * (1 - bottom - height * 0.3 / 2.4)
    assert (columns.mean() + 0.5, rows.mean() + 0.5) == pytest.approx(expected, abs=1)
    assert tuple(pixels[rows[0], columns[0], :3]) == (0xEE, 0x2A, 0x70)
    colors = layer(two, "colors")  # of x + 2 y: blue at the upper right, amber at the lower left, nothing between
    assert colors.shape == (SIDE, SIDE, 4)
    upper, lower = colors[1, -2], colors[-2, 1]
    assert upper[2] > upper[0]
    assert lower[0] > lower[2]
    assert colors[SIDE // 2, SIDE // 2, 3] < 30 < 200 < upper[3]
    assert layer(two, "arrows")[..., 3].any()
    assert layer(two, "contours")[..., 3].any()


def test_an_arrow_points_along_the_gradient() -> None:
    slopes = np.zeros((SIDE, SIDE, 2), dtype=np.float32)
    slopes[25, 25] = 1.0, 2.0
    pixels = np.asarray(Image.open(io.BytesIO(figures.arrows(slopes, LIMITS, 1.0))).convert("RGBA"))
    left, bottom, width, height = figures.MARGIN
    x, y = figures.SIDE * (left + width * 25 / 47), figures.SIDE * (1 - bottom - height * 25 / 47)
    rows, columns = np.nonzero(pixels[..., 3])
    along = np.stack([columns + 0.5 - x, y - rows - 0.5], 1)  # of the arrow's middle, upwards positive
    along = along[np.abs(along).max(1) < figures.SIDE * width / SIDE * figures.ARROWS * 0.6]
    assert len(along) > 20
    _, axes = np.linalg.eigh(np.cov(along.T))
    assert axes[1, 1] / axes[0, 1] == pytest.approx(2, rel=0.15)
    assert (along @ np.array([1.0, 2.0])).mean() > 1  # the head is the heavier end


def test_a_wasserstein_critic_has_no_zero() -> None:
    values = np.array([[5.0, 6.0], [7.0, np.nan]], dtype=np.float32)
    assert report._centred(values, "wasserstein").tolist() == [[-0.5, 0.5], [1.5, -5.5]]
    assert report._centred(values, "hinge").tolist() == [[5, 6], [7, 0]]


def test_without_a_field_the_page_says_why(tmp_path: Path) -> None:
    text = page(record(tmp_path / "a", field="D is shown packs"))
    assert "D is shown packs." in Parsed(text).text
    assert 'class="arrows"' not in text
    assert 'class="fake"' in text


def test_images_are_the_recorded_pictures(tmp_path: Path) -> None:
    folder = record(tmp_path / "a", points=False)
    shown = layer(page(folder), "picture")
    recorded = np.asarray(Image.open(folder / "samples" / "fakes-000030.png").convert("RGB")).astype(int)
    assert shown.shape[:2] == recorded.shape[:2]
    assert np.corrcoef(shown[..., 1].ravel(), recorded[..., 1].ravel())[0, 1] > 0.8
    assert "checkbox" not in page(folder).split("<script>")[0].split("<body>")[1]


def test_what_is_not_finite_leaves_a_page(tmp_path: Path) -> None:
    folder = record(tmp_path / "a")
    path = folder / "samples" / "fakes-000030.npz"
    arrays = dict(np.load(path))
    arrays["values"][3], arrays["slopes"][4], arrays["fake"][0] = np.nan, np.inf, np.nan
    np.savez(path, **arrays)
    with (folder / "stats.jsonl").open("a") as file:
        file.write('{"step": 31, "d_loss/adv": null, "d_loss/pairwise_gp": 0.1}\n{"step": 32, "d_lo')
    assert "finished" not in Parsed(page(folder)).rows[2][1]  # the last line came after the end that is recorded


def test_a_run_that_failed_or_has_recorded_nothing(tmp_path: Path) -> None:
    folder = record(tmp_path / "a", ended="")
    (folder / "failed.json").write_text(json.dumps({"exit_code": 1, "reason": "term 'adv' is nan"}))
    assert "failed at step 30: term 'adv' is nan" in Parsed(page(folder)).text
    for name in ("metrics.jsonl", "stats.jsonl"):
        (folder / name).unlink()
    with pytest.raises(UsageError, match="recorded nothing yet"):
        page(folder)


def test_a_run_that_diverged_says_so(tmp_path: Path) -> None:
    folder = record(tmp_path / "a", ended="")
    with (folder / "signals.jsonl").open("a") as file:
        file.write('{"step": 31, "diverged": "step 31: term \'adv\' is nan"}\n')
    assert "diverged: step 31: term 'adv' is nan" in Parsed(page(folder)).text


def test_many_large_pictures_are_thinned_until_they_fit(tmp_path: Path) -> None:
    folder = record(tmp_path / "a", steps=tuple(range(10, 510, 10)), points=False)
    random = np.random.default_rng(0)
    noise = Image.fromarray(random.integers(0, 255, (900, 1100, 3), dtype=np.uint8))
    noise.save(folder / "samples" / "fakes-000500.png")
    for path in folder.glob("samples/*.png"):
        if path.name != "fakes-000500.png":
            path.unlink()
            path.symlink_to("fakes-000500.png")
    text = page(folder)
    assert len(text) < 5_000_000
    steps = [int(step) for step in re.findall(r'<div class="frame" data-step="(\d+)"', text)]
    assert steps[0] == 10
    assert steps[-1] == 500
    assert 2 < len(steps) < 30
    assert f"{len(steps)} of 50 recorded pictures are in this page" in text


def test_many_runs_with_large_pictures_fit_into_a_page(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    noise = Image.fromarray(random.integers(0, 255, (1000, 1000, 3), dtype=np.uint8))
    for number in range(report.MOST_RUNS):
        folder = record(tmp_path / "runs" / f"{number:05d}-a", steps=(10, 20), points=False)
        noise.save(folder / "samples" / "fakes-000020.png")
    text = page(*sorted((tmp_path / "runs").iterdir()))
    assert 1_000_000 < len(text) < 5_000_000
    assert len(re.findall(r'<div class="frame" data-step="20"', text)) == report.MOST_RUNS


@given(st.integers(0, 300))
def test_frames_are_spread_over_training(count: int) -> None:
    order = report.spread(count)
    assert sorted(order) == list(range(count))
    for n in range(2, count + 1, 7):
        gaps = np.diff(sorted(order[:n]))
        assert gaps.max() <= 2 * gaps.min() + 1


@given(st.integers(1, 2000))
def test_thinned_curves_keep_their_mean(count: int) -> None:
    y = np.random.default_rng(count).normal(size=count)
    x, thin = figures.thinned(list(range(count)), y.tolist())
    assert len(x) == len(thin) <= figures.POINTS
    every = -(-count // figures.POINTS)
    whole = count // every
    np.testing.assert_allclose(thin[:whole], y[: whole * every].reshape(whole, every).mean(1))


def test_which_runs_are_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bench = tmp_path / "benches" / "ring"
    for seed in range(3):
        for method in ("a", "b"):
            record(bench / "runs" / f"ring-{method}-s{seed}", steps=(10,), seed=seed)
    one = record(tmp_path / "runs" / "00000-ring")

    def found(*given: str) -> list[str]:
        return [run.path.name for run in report.find(given)[0]]

    assert found() == found("0") == found("runs/00000-ring") == found("runs", str(one)) == ["00000-ring"]
    assert found(str(bench)) == [f"ring-{method}-s{seed}" for seed in range(3) for method in "ab"]
    assert found("0", str(bench / "runs"))[:2] == ["00000-ring", "ring-a-s0"]
    monkeypatch.setattr(report, "MOST_RUNS", 4)
    runs, note = report.find([str(bench)])
    assert [run.path.name for run in runs] == ["ring-a-s0", "ring-b-s0", "ring-a-s1", "ring-b-s1"]
    assert note == "2 more runs, those of the highest seeds, are left out: a page holds 4."
    part = bench / "runs" / ".ring-a-s3.part"  # a cluster's run that is being unpacked
    record(part, steps=(10,), seed=3)
    assert report.find([str(bench)])[1] == note
    for number in range(1, 6):
        record(tmp_path / "runs" / f"{number:05d}-ring", steps=(10,))
    assert found("runs") == [f"{number:05d}-ring" for number in range(2, 6)]  # all of seed 0
    assert report.find(["runs"])[1] == "2 more runs, the oldest, are left out: a page holds 4."
    shutil.copytree(part, tmp_path / "runs" / ".00009-ring.part")
    (tmp_path / "runs" / ".00009-ring.part" / "config.toml").touch()
    assert RunDir.find(None).path.name != ".00009-ring.part"
    with pytest.raises(UsageError, match="these are 5: name fewer"):
        report.find([str(bench), "0"])
    with pytest.raises(UsageError, match="no run nowhere found"):
        report.find(["nowhere"])
    assert report.names([RunDir(one), RunDir(bench / "runs" / "ring-a-s0")]) == ["00000-ring", "ring-a-s0"]
    assert report.names([RunDir(one), RunDir(one)]) == [str(one)] * 2


@pytest.mark.parametrize("missing", ["jinja2", "matplotlib"])
def test_a_missing_library_is_one_sentence(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    said = gankit("report", str(record(tmp_path / "a")), code=2).output
    assert 'pip install "gankit[report]"' in said
    assert not (tmp_path / "a" / "report.html").exists()


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    record(tmp_path / "runs" / "00000-a")
    record(tmp_path / "runs" / "00001-b")
    assert gankit("report", "0").output == "report: runs/00000-a/report.html\n"
    assert gankit("report", "0", "1").output == "report: report.html\n"
    assert "00001-b" in (tmp_path / "report.html").read_text()
    assert gankit("report", "0", "--to", "mine.html").output == "report: mine.html\n"
    assert "goes to an .html file" in gankit("report", "0", "--to", "a.pdf", code=2).output
    assert not list(tmp_path.glob(".*.part"))


@pytest.mark.parametrize("missing", [None, "jinja2"])
def test_a_run_ends_by_naming_its_report(missing: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if missing:
        monkeypatch.setitem(sys.modules, missing, None)
    said = gankit(
        "run", "--steps", "4", "--eval-every", "2", "--eval-samples", "50", "--width", "8", "--plugin", "bigan"
    ).output
    folder = "runs/00000-ring-bigan"
    if missing:
        assert f"report: gankit report {folder}" in said
        assert not Path(folder, "report.html").exists()
        return
    assert f"report: {folder}/report.html" in said
    text = Path(folder, "report.html").read_text()
    for kind in ("colors", "contours", "arrows", "fake"):
        assert text.count(f'<img class="{kind}"') == 2
    assert '<img class="real"' in text
    assert "z = E(x)" in text
