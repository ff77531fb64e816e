"""One self-contained HTML page of one run or of several side by side: ``gankit report``. Read from the runs' own files."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from gankit import figures, plane
from gankit.config import read_toml
from gankit.errors import UsageError
from gankit.figures import Panel, Series, data_uri
from gankit.files import FAILED, step_of, write_atomic
from gankit.plane import Array
from gankit.provenance import metric_of
from gankit.rundir import RunDir
from gankit.terminal import METRICS, label, shown

MOST_RUNS = 24
MOST_FRAMES = 48  # of all runs together: what takes time
MOST_BYTES = 4_800_000  # of the page
OVERHEAD = 60_000  # of them for each run, besides its curves and samples
WIDTH = 1000  # pixels of a recorded picture
NARROWEST = 150
WITHOUT_ZERO = (
    "wasserstein",
    "relativistic",
    "relativistic_average",
)  # losses that a constant added to D does not change

Layers = list[tuple[str, str]]  # undermost first: what it is, data URI
Draw = Callable[[int], tuple[Layers, str]]  # from a step to its layers and what is to be said about them
Progress = Callable[[int, int, str], None]


@dataclass
class Frame:
    """What one run shows at one step, and what it says."""

    step: int
    layers: Layers
    alt: str
    caption: str


@dataclass
class Run:
    """One run as the page shows it."""

    name: str
    folder: Path
    status: str
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    truth: dict[str, Any]
    stats: list[dict[str, Any]]
    documents: dict[str, Any]
    plugins: dict[str, Any]
    pictures: dict[int, Path]
    frames: list[Frame] = field(default_factory=list)
    back: str = ""  # data URI of the true samples
    axes: str = ""
    scale: float = 0.0  # of the colours of D's value
    notes: list[str] = field(default_factory=list)

    @property
    def last(self) -> dict[str, Any]:
        """The metrics of the last evaluation."""
        return self.metrics[-1] if self.metrics else {}


# -- reading -------------------------------------------------------------------------------------------------------


def find(given: Sequence[str], out: str = "runs") -> tuple[list[RunDir], str]:
    """The runs that are named, and a sentence about those left out.

    given: folders, names or numbers of runs, as for :meth:`RunDir.find`; a folder that collects runs, or a benchmark's with
    its ``runs``, stands for all in it. Nothing: the newest run. UsageError for what is none, and for more than MOST_RUNS.
    """
    found: dict[Path, RunDir] = {}
    left_out = ""
    for name in given or (None,):
        members, said = ([], "") if name is None else _members(Path(name))
        left_out = left_out or said
        for run in members or [RunDir.find(name, out)]:
            found.setdefault(run.path.resolve(), run)
    if len(found) > MOST_RUNS:
        raise UsageError(f"a page holds {MOST_RUNS} runs at most, and these are {len(found)}: name fewer")
    return list(found.values()), left_out


def benchmarks(given: Sequence[str]) -> list[dict[str, Any]]:
    """The tables of those folders that are a benchmark's, as :func:`gankit.results.section` gives them."""
    files = [file for name in given if (file := Path(name) / "results.json").is_file()]
    if not files:
        return []
    from gankit import results  # scipy takes a second, and a run ends with a report that has no tables

    return [results.section(*results.load(file)) for file in files]


def _members(folder: Path) -> tuple[list[RunDir], str]:
    """The runs a folder collects, MOST_RUNS at most, and a sentence about those left out; none for a run's own folder.

    Those of the lowest seeds; where all have one seed, as runs made one by one, the newest.
    """
    if (folder / "config.toml").is_file() or not folder.is_dir():
        return [], ""
    runs = [path.parent for path in [*folder.glob("*/config.toml"), *folder.glob("runs/*/config.toml")]]
    seeds = {run: read_toml(run / "config.toml")[0].get("seed", 0) for run in runs if not run.name.startswith(".")}
    found = sorted(seeds, key=lambda run: (seeds[run], run.name))
    one_by_one = len({*seeds.values()}) == 1
    kept = found[-MOST_RUNS:] if one_by_one else found[:MOST_RUNS]
    which = "the oldest" if one_by_one else "those of the highest seeds"
    more = len(found) - len(kept)
    sentence = f"{more} more runs, {which}, are left out: a page holds {MOST_RUNS}." if more else ""
    return [RunDir(path) for path in kept], sentence


def collect(run: RunDir, name: str) -> Run:
    """What a run recorded, without its pictures; UsageError if its configuration is missing or broken."""
    values, options = read_toml(run.path / "config.toml")
    config = values | {f"{owner}.{key}": value for owner, chosen in options.items() for key, value in chosen.items()}
    rows = run.rows("metrics.jsonl")
    stats = run.rows("stats.jsonl")
    documents = {}
    for file in ("data.json", "env.json", "provenance.json", "plugins.json", "summary.json", FAILED):
        with suppress(UsageError):
            documents[file] = run.read_json(file)
    metrics = [row for row in rows if row["step"] is not None]
    step = max([row["step"] for row in (*stats[-1:], *metrics[-1:])], default=0)
    status = _status(documents, step, config.get("steps"))
    ended = [row["diverged"] for row in run.rows("signals.jsonl") if row.get("diverged")]
    if ended and FAILED not in documents:
        status = f"diverged: {ended[-1]}"
    return Run(
        name=name,
        folder=run.path,
        status=status,
        config=config,
        metrics=metrics,
        truth=next((row for row in rows if row["step"] is None), {}),
        stats=stats,
        documents=documents,
        plugins=documents.get("plugins.json", {}),
        pictures={step_of(path): path for path in run.fakes()},
    )


def _status(documents: Mapping[str, Any], step: int, steps: int | None) -> str:
    if FAILED in documents:
        return f"failed at step {step:,}: {documents[FAILED]['reason']}"
    summary = documents.get("summary.json")
    if summary and summary["step"] >= step:
        return f"{summary['status']} after step {summary['step']:,} of {summary['steps']:,}"
    return f"at step {step:,} of {steps or 0:,}, with no end recorded: it is running, or it was stopped"


def names(runs: Sequence[RunDir]) -> list[str]:
    """A name for each run: its folder's, or the whole path where two are alike."""
    short = [run.path.resolve().name for run in runs]
    return [name if short.count(name) == 1 else str(run.path) for name, run in zip(short, runs, strict=True)]


# -- pictures over training ----------------------------------------------------------------------------------------


def spread(count: int) -> list[int]:
    """The numbers below ``count``, the last one first, then the first, then always the middle of the largest gap."""
    if count < 2:
        return list(range(count))
    order, gaps = [count - 1, 0], [(0, count - 1)]
    while gaps:
        low, high = gaps.pop(0)
        if high - low > 1:
            middle = (low + high) // 2
            order.append(middle)
            gaps += [(low, middle), (middle, high)]
            gaps.sort(key=lambda gap: gap[0] - gap[1])
    return order


def draw_frames(run: Run, most: int, room: int, tell: Callable[[], None]) -> int:
    """Fill in the run's frames, and give the bytes they take.

    Of all recorded pictures as many as fit into ``room`` bytes, spread over training; ``most`` of them, the last at least.
    """
    steps = list(run.pictures)
    chosen = [steps[i] for i in spread(len(steps))[:most]]
    files = {step: run.pictures[step].with_suffix(".npz") for step in chosen}
    recorded = {step: plane.load_frame(path) for step, path in files.items() if path.exists()}
    planes = recorded and len(recorded) == len(chosen)
    draw = _plane_frames(run, recorded) if planes else _picture_frames(run, chosen, room)
    used = 0
    for step in chosen:
        layers, said = draw(step)
        size = sum(len(data) for _, data in layers)
        tell()
        if used + size > room and run.frames:
            break
        used += size
        facts = _facts(run, step)
        alt = f"Samples of {run.name} at step {step}: {facts or 'no metrics'}"
        run.frames.append(Frame(step, layers, alt, "; ".join(filter(None, (facts, said)))))
    run.frames.sort(key=lambda frame: frame.step)
    if len(run.frames) < len(steps):
        run.notes.insert(0, f"{len(run.frames)} of {len(steps)} recorded pictures are in this page")
    return used


def _picture_frames(run: Run, steps: Sequence[int], room: int) -> Draw:
    """The function that draws one picture, as wide as that of the first of ``steps`` may be by itself in ``room`` bytes."""

    @cache  # the first is drawn to find the width
    def drawn(step: int, width: int) -> str:
        return data_uri(figures.shrunk(run.pictures[step], width))

    width = WIDTH
    while steps and width > NARROWEST and len(drawn(steps[0], width)) > room:
        width = width * 3 // 4
    return lambda step: ([("picture", drawn(step, width))], "")


def _plane_frames(run: Run, recorded: Mapping[int, plane.Frame]) -> Draw:
    """Prepare what all frames of 2-D data share (axes, true samples, scales), and give the function that draws one."""
    limits = recorded[max(recorded)].limits
    fields = {step: frame.field for step, frame in recorded.items() if isinstance(frame.field, plane.Field)}
    whys = {frame.field for frame in recorded.values() if isinstance(frame.field, str)}
    values = {step: _centred(found.values, run.config.get("loss", "")) for step, found in fields.items()}
    slopes = {step: _finite(found.slopes) for step, found in fields.items()}
    steep = {step: np.linalg.norm(found, axis=-1) for step, found in slopes.items()}
    if any(found.joint for found in fields.values()):
        run.notes.append(
            "D is shown more than x here: the rest is that of a real sample, z = E(x), and the gradient keeps it"
        )
    if fields:
        run.scale = _extent(np.abs(v) for v in values.values())
        longest = _extent(steep.values())
    run.axes = figures.plane_axes(limits)
    run.notes += sorted(whys)
    if (reals := run.folder / "samples" / "reals.npz").exists():
        run.back = data_uri(figures.points(plane.load_reals(reals), limits, figures.REAL))

    def draw(step: int) -> tuple[Layers, str]:
        fake = ("fake", data_uri(figures.points(recorded[step].fake, limits, figures.FAKE)))
        if step not in fields:
            return [fake], ""
        layers = [
            ("colors", data_uri(figures.colors(values[step], run.scale))),
            ("contours", data_uri(figures.contours(values[step], limits, run.scale))),
            ("arrows", data_uri(figures.arrows(slopes[step], limits, longest))),
        ]
        low, high = fields[step].values.min(), fields[step].values.max()
        middle, steepest = np.quantile(steep[step], (0.5, 0.99))
        slope = f"its slope {middle:.3g} (median), {steepest:.3g} (steepest 1%)"
        return [*layers, fake], f"D from {low:.3g} to {high:.3g}, {slope}"

    return draw


def _centred(values: Array, loss: str) -> Array:
    """D's values, less their median where the loss leaves D's zero open."""
    finite = _finite(values)
    return finite - np.median(finite) if loss in WITHOUT_ZERO else finite


def _finite(values: Array) -> Array:
    """What is not finite is 0: there are no colours for it, and no directions."""
    return np.nan_to_num(values, posinf=0.0, neginf=0.0)


def _extent(parts: Iterable[Array]) -> float:
    """What 98 % of all numbers are below; 1 if they are 0."""
    return float(np.quantile(np.concatenate([part.ravel() for part in parts]), 0.98)) or 1.0


def _facts(run: Run, step: int) -> str:
    """The metrics at a step that say most."""
    row = next((row for row in run.metrics if row["step"] == step), {})
    known = {metric_of(name): name for name in row if row[name] is not None}
    for wanted in (("modes", "high_quality"), ("fid",), ("sliced_wasserstein",)):
        if chosen := [known[name] for name in wanted if name in known]:
            return ", ".join(f"{label(metric_of(name))} {shown(name, row[name])}" for name in chosen)
    return ""


# -- curves and tables ---------------------------------------------------------------------------------------------


def metric_names(runs: Sequence[Run]) -> list[str]:
    """All metrics of all runs, those people know first."""
    every = dict.fromkeys(name for run in runs for row in run.metrics for name in row if name != "step")
    known = list(METRICS)
    return sorted(every, key=lambda name: known.index(m) if (m := metric_of(name)) in known else len(known))


def metric_panel(runs: Sequence[Run], name: str, steps: tuple[float, float]) -> Panel:
    """A curve of a metric per run, and dashed what true data score."""
    series = [Series(*_column(run.metrics, name), color) for color, run in enumerate(runs)]
    for value in sorted({run.truth[name] for run in runs if run.truth.get(name) is not None}):
        series.append(Series(steps, (value, value), -1, dashed=True))
    return figures.curves(series, steps, percent="%" in METRICS.get(metric_of(name), ("", ""))[1])


def term_names(runs: Sequence[Run], phase: str) -> list[str]:
    """The terms of one player's loss in any of the runs, in order of appearance."""
    start = f"{phase}_loss/"
    keys = dict.fromkeys(key for run in runs for row in run.stats for key in row if key.startswith(start))
    return [key.removeprefix(start) for key in keys]


def term_panels(run: Run, phase: str, terms: Sequence[str], steps: tuple[float, float]) -> list[tuple[str, Panel]]:
    """One player's terms: values; and, if the run has several, shares of the loss and of the gradient.

    terms: of all runs; a term's place there is its colour.
    """
    color = {term: number for number, term in enumerate(terms)}
    own = term_names([run], phase)
    shares = []
    for row in run.stats:
        sizes = {term: abs(row.get(f"{phase}_loss/{term}") or 0.0) for term in own}
        total = sum(sizes.values()) or math.nan
        shares.append({"step": row["step"], **{term: size / total for term, size in sizes.items()}})
    groups = [
        ("value", run.stats, f"{phase}_loss/", False),
        ("share of the loss", shares, "", True),
        ("share of the gradient", run.stats, f"gradient_share/{phase}/", True),
    ]
    found = []
    for title, rows, start, percent in groups[: 3 if len(own) > 1 else len(own)]:
        series = [Series(*_column(rows, start + term), color[term]) for term in own]
        found.append((title, figures.curves(series, steps, percent=percent)))
    return found


def _column(rows: Iterable[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of a column where it is there; what was not finite is a gap."""
    found = [(row["step"], row[name]) for row in rows if name in row]
    return [float(step) for step, _ in found], [math.nan if value is None else float(value) for _, value in found]


def costs(run: Run) -> tuple[float | None, list[tuple[str, float, float]]]:
    """Milliseconds per step (median of the lines), and of each plugin with their share of it."""
    every = [row["ms/step"] for row in run.stats if row.get("ms/step")]
    if not every:
        return None, []
    step = float(np.median(every))
    last = run.stats[-1]
    plugins = [(name, last[f"ms/{name}"]) for name in run.plugins if last.get(f"ms/{name}") is not None]
    return step, [(name, ms, ms / step) for name, ms in plugins]


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Settings, plugin versions and environment in which runs differ: name, and each run's value or "-"."""
    tables: list[dict[str, Any]] = []
    for run in runs:
        versions = {f"version of {name}": facts.get("version") for name, facts in run.plugins.items()}
        env = run.documents.get("env.json", {})
        tables.append(run.config | versions | {key: value for key, value in env.items() if key != "arguments"})
    keys = dict.fromkeys(key for table in tables for key in table if key not in ("name", "out"))
    rows = [(key, [plain(table[key]) if key in table else "-" for table in tables]) for key in keys]
    return [(key, cells) for key, cells in rows if len(set(cells)) > 1]


def plain(value: Any) -> str:
    """A setting as a person reads it."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain, value)) or "none"
    return value if isinstance(value, str) else json.dumps(value)


# -- the page ------------------------------------------------------------------------------------------------------


def render(
    found: Sequence[RunDir],
    note: str = "",
    progress: Progress = lambda done, total, what: None,
    tables: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The page as text. note: a sentence at its top. progress: called with (done, total, what) while it is drawn.

    tables: of benchmarks, see :func:`benchmarks`.

    UsageError without matplotlib or jinja2, and for runs that have recorded nothing yet.
    """
    try:
        import matplotlib  # noqa: F401
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise UsageError('a report needs matplotlib and jinja2: pip install "gankit[report]"') from error
    runs = [collect(run, name) for run, name in zip(found, names(found), strict=True)]
    every = [float(row["step"]) for run in runs for row in (*run.metrics, *run.stats)]
    if not every:
        raise UsageError(f"{runs[0].folder} has recorded nothing yet: a first line comes after --log-every steps")
    steps = (min(every), max(every))
    most = max(2, MOST_FRAMES // len(runs))
    known = metric_names(runs)
    total = len(known) + 2 * len(runs) + sum(min(len(run.pictures), most) for run in runs)
    done = itertools.count(1)

    def tell() -> None:
        progress(next(done), total, "drawing")

    metrics = []
    for name in known:
        metrics.append((name, metric_panel(runs, name, steps)))
        tell()
    losses = []
    for phase, player in (("d", "discriminator"), ("g", "generator")):
        terms = term_names(runs, phase)
        by_run = []
        for run in runs:
            by_run.append((run, term_panels(run, phase, terms, steps)))
            tell()
        losses.append((player, terms, by_run))
    drawn = [panel for _, panel in metrics] + [
        panel for *_, by_run in losses for _, some in by_run for _, panel in some
    ]
    written = sum(len(panel.svg) for panel in drawn) + sum(2 * len(json.dumps(run.documents)) for run in runs)
    room = MOST_BYTES - written - OVERHEAD * len(runs)
    for left, run in zip(range(len(runs), 0, -1), runs, strict=True):
        room -= draw_frames(run, most, room // left, tell)
    truth = runs[0].truth if all(run.truth == runs[0].truth for run in runs) else None
    context = {
        "runs": runs, "note": note, "sections": tables, "metrics": metrics, "losses": losses, "truth": truth,
        "steps": sorted({frame.step for run in runs for frame in run.frames}),
        "costs": [(run, *costs(run)) for run in runs],
        "differences": differences(runs) if len(runs) > 1 else [],
        "layered": any(run.scale for run in runs),
        "points": any(run.axes for run in runs),
        "centred": any(run.scale and run.config.get("loss") in WITHOUT_ZERO for run in runs),
        "label": label, "shown": shown, "plain": plain, "figures": figures, "ramp": figures.ramp(),
    }  # fmt: skip
    environment = Environment(
        loader=PackageLoader("gankit", "template"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    return environment.get_template("report.html").render(context)


def write(
    found: Sequence[RunDir],
    path: Path,
    note: str = "",
    progress: Progress = lambda done, total, what: None,
    tables: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Render the page and write it, whole or not at all."""
    write_atomic(path, render(found, note, progress, tables))
