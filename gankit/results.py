"""What a benchmark found: rows from its runs, means with intervals, paired tests, and tables as Markdown, JSON and HTML."""

from __future__ import annotations

import json
import math
import statistics
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from scipy import stats

from gankit import config as configuration
from gankit import inversion
from gankit.bench import Cell, Suite, state_of
from gankit.errors import UsageError
from gankit.files import FAILED, write_atomic
from gankit.pictures import save_png, sheet
from gankit.provenance import column, metric_of
from gankit.run import Reporter
from gankit.rundir import RunDir, to_json
from gankit.terminal import METRICS, label, shown

CONFIDENCE = 0.95
VERSIONED = ("plugins", "networks", "content")  # of a provenance: versions by name, in runs that have them
FEW = 6  # seeds; of fewer no resampling covers 95 %: both ends lie among the values, and all of 5 are above or below 1 in 16
RESAMPLES = 10_000
THUMBNAIL = 480  # pixels of a picture's width


@dataclass
class Row:
    """One run of a suite. ``provenance`` is what else its numbers depend on: rows that differ in it are not compared."""

    data: str
    method: str
    steps: int
    seed: int
    status: str
    reason: str = ""
    metrics: dict[str, float | None] = field(default_factory=dict)
    truth: dict[str, float | None] = field(default_factory=dict)
    to_target: dict[str, float] | None = None
    ms_per_step: float | None = None
    provenance: dict[str, Any] = field(default_factory=dict)


class Estimate(NamedTuple):
    """A mean over n seeds with its bootstrap interval; of fewer than :data:`FEW`, low and high are the values' own ends."""

    mean: float
    low: float
    high: float
    n: int


def collect(suite: Suite, out: Path) -> list[Row]:
    """The rows of all runs of a suite that ended, in the suite's order."""
    rows = []
    for cell in suite.cells():
        state = state_of(out / "runs" / cell.name)
        if state in ("finished", "failed"):
            rows.append(_row(suite, cell, RunDir(out / "runs" / cell.name), state))
    return rows


def _row(suite: Suite, cell: Cell, run: RunDir, state: str) -> Row:
    if state == "failed":
        asked = cell.steps or suite.config(cell).steps or 0
        return Row(cell.data, cell.method, asked, cell.seed, state, reason=run.read_json(FAILED)["reason"])
    summary = run.read_json("summary.json")
    lines = run.rows("stats.jsonl")
    env, data = run.read_json("env.json"), run.read_json("data.json")
    config = configuration.make(*configuration.read_toml(run.path / "config.toml"))
    return Row(
        data=cell.data,
        method=cell.method,
        steps=summary["steps"],
        seed=cell.seed,
        status=state,
        metrics=summary["metrics"],
        truth=summary["truth"],
        to_target=time_to_target(run.rows("metrics.jsonl")[1:], lines, suite.target_of(cell.data)),
        ms_per_step=statistics.median(line["ms/step"] for line in lines) if lines else None,
        provenance={
            "protocol": suite.protocol,
            "data": {key: data[key] for key in ("name", "shape", "count", "held_out")},
            "gankit": env["gankit"],
            "torch": env["torch"].split("+")[0],
            "device": config.device,
            "samples": config.eval_samples,
            "plugins": {name: facts["version"] for name, facts in run.read_json("plugins.json").items()},
            "networks": env.get("networks", {}),
            "content": {f"content of {data['name']}": column("", data["sketch"])[1:]} if "sketch" in data else {},
        },
    )


def time_to_target(
    metrics: Iterable[Mapping[str, Any]], lines: Sequence[Mapping[str, Any]], target: Mapping[str, float]
) -> dict[str, float] | None:
    """Step and training seconds of the first evaluation in which every metric of ``target`` is at least its value.

    None if there is none, or no target. The seconds are the sum of ``ms/step`` up to there: evaluations and checkpoints are
    left out.
    """
    for row in metrics if target else ():
        found = {metric_of(name): value for name, value in row.items()}
        if all((found.get(name) or 0.0) >= least for name, least in target.items()):
            return {"step": row["step"], "seconds": _seconds(lines, row["step"])}
    return None


def _seconds(lines: Sequence[Mapping[str, Any]], step: int) -> float:
    total, last = 0.0, 0
    for line in lines:
        if last >= step:
            break
        total += line["ms/step"] / 1000 * (min(line["step"], step) - last)
        last = line["step"]
    if lines and last < step:  # as fast as up to the last line
        total += lines[-1]["ms/step"] / 1000 * (step - last)
    return total


# -- statistics ----------------------------------------------------------------------------------------------------


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of seeds' values and its 95 % interval: the bias-corrected bootstrap.

    Of fewer than :data:`FEW` values, instead of the interval, the lowest and the highest; of a single one, nothing.
    """
    mean, n = statistics.fmean(values), len(values)
    if n < FEW or len(set(values)) == 1:
        return Estimate(mean, min(values) if n > 1 else math.nan, max(values) if n > 1 else math.nan, n)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # it gives nan, and the next method is asked
        for method in ("BCa", "percentile"):
            found = stats.bootstrap(
                (np.asarray(values),), np.mean, confidence_level=CONFIDENCE, n_resamples=RESAMPLES, method=method,
                rng=np.random.default_rng(0),
            ).confidence_interval  # fmt: skip
            if math.isfinite(found.low) and math.isfinite(found.high):
                break
    return Estimate(mean, float(found.low), float(found.high), n)


def paired(values: Mapping[int, float], baseline: Mapping[int, float]) -> tuple[float, float, int] | None:
    """Mean difference to the baseline over common seeds, the two-sided p of a paired permutation test, and their number.

    The signs of the differences are exchanged, all ways up to 13 seeds (so 10 seeds can give no p below 2/1024), else
    10,000 random ones. None with fewer than :data:`FEW` common seeds, which can give no p of 0.05.
    """
    seeds = sorted(values.keys() & baseline.keys())
    if len(seeds) < FEW:
        return None
    differences = np.asarray([values[s] - baseline[s] for s in seeds])
    if not differences.any():
        return 0.0, 1.0, len(seeds)
    found = stats.permutation_test(
        (differences, np.zeros_like(differences)), lambda a, b, axis: np.mean(a - b, axis), permutation_type="samples",
        n_resamples=RESAMPLES, rng=np.random.default_rng(0),
    )  # fmt: skip
    return float(differences.mean()), float(found.pvalue), len(seeds)


# -- tables --------------------------------------------------------------------------------------------------------


@dataclass
class Line:
    """One method on one data set, over its seeds."""

    method: str
    steps: int
    seeds: list[int]
    failed: list[str]
    estimates: dict[str, Estimate]
    baseline: str | None
    against: dict[str, tuple[float, float, int] | None]
    reached: int
    to_target: dict[str, float] | None
    ms_per_step: float | None
    published: list[dict[str, Any]]


@dataclass
class Table:
    """All methods on one data set, rows of one provenance."""

    data: str
    provenance: dict[str, Any]
    truth: dict[str, float]
    metrics: list[str]
    lines: list[Line]
    baseline: str | None
    target: dict[str, float]


def tabulate(suite: Suite, rows: Sequence[Row]) -> list[Table]:
    """One table per data set, length of training and provenance; failed rows go to each table of their data set."""
    tables = []
    known = {row.data for row in rows if row.steps}
    for data, steps in dict.fromkeys((row.data, row.steps) for row in rows if row.steps or row.data not in known):
        # of 0 steps: it failed before they were known
        mine = [row for row in rows if row.data == data and row.steps in (steps, 0)]
        finished = [row for row in mine if row.status == "finished"]
        for provenance, same in _groups(finished) or [({}, [])]:
            metrics = list(dict.fromkeys(name for row in same for name in row.metrics))
            failed = [row for row in mine if row.status == "failed"]
            lines = [
                _line(suite, method, steps, [r for r in same if r.method == method], same, failed)
                for method in suite.methods
                if any(r.method == method for r in (*same, *failed))
            ]
            truth: dict[str, float] = {}
            for name, value in chain.from_iterable(row.truth.items() for row in same):
                if value is not None:
                    truth.setdefault(name, value)
            tables.append(Table(data, provenance, truth, metrics, lines, suite.baseline, suite.target_of(data)))
    return tables


def _groups(rows: Sequence[Row]) -> list[tuple[dict[str, Any], list[Row]]]:
    """Rows of one provenance each; they share no plugin, network or data of two versions."""
    groups: list[tuple[dict[str, Any], dict[str, dict[str, str]], list[Row]]] = []
    for row in rows:
        facts = {key: value for key, value in row.provenance.items() if key not in VERSIONED}
        versions = {kind: row.provenance[kind] for kind in VERSIONED if row.provenance.get(kind)}
        for provenance, seen, members in groups:
            if provenance == facts and not any(
                _clashing(seen.get(kind, {}), versions.get(kind, {})) for kind in VERSIONED
            ):
                for kind, named in versions.items():
                    seen[kind] = {**seen.get(kind, {}), **named}
                members.append(row)
                break
        else:
            groups.append((facts, versions, [row]))
    return [({**provenance, **seen}, members) for provenance, seen, members in groups]


def _clashing(mine: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """What is there in two versions."""
    return [name for name, version in mine.items() if other.get(name, version) != version]


def _line(suite: Suite, method: str, steps: int, mine: list[Row], same: list[Row], failed: list[Row]) -> Line:
    estimates, against = {}, {}
    baseline, ended = suite.baseline_of(method), len(mine) + sum(row.method == method for row in failed)
    # seeds that failed would have been the worst: a test of the others is none
    tested = not any(row.method in (method, baseline) for row in failed)
    base = [row for row in same if row.method == baseline and tested]
    for name in dict.fromkeys(name for row in mine for name in row.metrics):
        found = {row.seed: value for row in mine if (value := row.metrics.get(name)) is not None}
        if not found:
            continue
        estimates[name] = estimate([found[seed] for seed in sorted(found)])
        if base:
            against[name] = paired(found, {r.seed: v for r in base if (v := r.metrics.get(name)) is not None})
    reached = [row.to_target for row in mine if row.to_target]
    times = [row.ms_per_step for row in mine if row.ms_per_step is not None]
    data = (mine or failed)[0].data
    return Line(
        method=method,
        steps=steps,
        seeds=sorted(row.seed for row in mine),
        failed=[f"seed {row.seed}: {row.reason}" for row in failed if row.method == method],
        estimates=estimates,
        baseline=baseline,
        against=against,
        reached=len(reached),
        to_target=_typical(reached, ended),
        ms_per_step=statistics.median(times) if times else None,
        published=[p for p in suite.published if p["data"] == data and p["method"] == method],
    )


def _typical(reached: Sequence[Mapping[str, float]], ended: int) -> dict[str, float] | None:
    """Median step and seconds over all runs that ended, where those that did not reach the target took for ever."""
    never = [math.inf] * (ended - len(reached))
    found = {key: statistics.median([*(r[key] for r in reached), *never]) for key in ("step", "seconds") if ended}
    return found if found and all(map(math.isfinite, found.values())) else None


HEADLINE = (
    "modes",
    "high_quality",
    "reverse_kl",
    "kl_to_truth",
    "worst_share_ratio",
    "inception_score",
    "fid",
    "kid",
    "precision",
    "recall",
    "ivom",
    "reconstruction_error",
    "energy_distance",
    "sliced_wasserstein",
)


def chosen(table: Table) -> list[str]:
    """The columns a table shows: the metrics of :data:`HEADLINE` in its order, then those gankit does not know.

    One distance is enough where modes are known. A metric of two provenances has two columns.
    """
    known = {metric_of(name) for name in table.metrics}
    wanted = [name for name in HEADLINE if not (name == HEADLINE[-1] and "modes" in known)]
    others = [name for name in dict.fromkeys(map(metric_of, table.metrics)) if name not in METRICS]
    return [column for name in (*wanted, *others) for column in table.metrics if metric_of(column) == name]


def cells_of(table: Table, brief: bool = False) -> tuple[list[str], list[list[str]]]:
    """Header and body of a table as text; the first row is the true data's own score. brief: without intervals."""
    metrics = chosen(table)
    timed = bool(table.target)
    header = ["method", *map(label, metrics), *(["target"] if timed else []), "ms/step" if brief else "ms per step"]
    body = [["*true data*", *(shown(name, table.truth.get(name)) for name in metrics), *([""] if timed else []), ""]]
    for line in table.lines:
        trained = len(line.seeds)
        of = f"{trained} of {trained + len(line.failed)}" if line.failed else f"{trained}"
        row = [f"`{line.method}`"] if brief else [f"`{line.method}` ({of} seed{'s' * (of != '1')})"]
        for name in metrics:
            found = line.estimates.get(name)
            row.append("-" if found is None else _estimate(name, found, line, table.baseline, brief))
        if timed:
            reached = f"{line.reached} of {trained + len(line.failed)}"
            if line.to_target and not brief:
                reached += f", step {line.to_target['step']:,.0f}, {line.to_target['seconds']:.0f} s"
            row.append(reached if trained else "-")
        row.append("-" if line.ms_per_step is None else f"{line.ms_per_step:.1f}")
        body.append(row)
        for paper in line.published:
            body.append(
                [f"{paper['source']}", *(_published(name, paper) for name in metrics), *([""] if timed else []), ""]
            )
    return header, body


def _estimate(name: str, found: Estimate, line: Line, usual: str | None, brief: bool) -> str:
    text = shown(name, found.mean) if metric_of(name) != "modes" else f"{found.mean:.1f}"
    if brief:
        return text
    if found.n > 1 and found.low == found.high:
        text += " on each"
    elif found.n > 1:
        low, high = (f"{v:.1f}" if metric_of(name) == "modes" else shown(name, v) for v in found[1:3])
        text += f" [{low}, {high}]" if found.n >= FEW else f" ({low} to {high})"
    if found.n < len(line.seeds):
        text += f" of {found.n}"
    test = line.against.get(name)
    if test:
        text += f", p = {test[1]:.2g}" + (f" against `{line.baseline}`" if line.baseline != usual else "")
    return text


def _published(name: str, paper: Mapping[str, Any]) -> str:
    value = paper.get(metric_of(name))
    if value is None:
        return "-"
    return f"{value:g}" if metric_of(name) == "modes" else shown(name, value)


def markdown(suite: Suite, rows: Sequence[Row], pictures: Mapping[str, str] | None = None) -> str:
    """The whole of a suite's results as a Markdown section. pictures: address of a picture of samples by data set."""
    parts = [f"## {suite.title}", f"Protocol: {suite.protocol}." + (f" {suite.about.strip()}" if suite.about else "")]
    tables = tabulate(suite, rows)
    for table in tables:
        header, body = cells_of(table)
        steps = table.lines[0].steps if table.lines else 0
        parts.append(f"### {table.data}, {steps:,} steps")
        if alone := apart(table, tables):
            parts.append(alone)
        parts.append("\n".join([_md(header), _md(["---"] * len(header)), *map(_md, body)]))
        parts += [f"`{line.method}` failed: {'; '.join(line.failed)}." for line in table.lines if line.failed]
    parts.append(legend(suite))
    parts.append(repeating(suite, rows))
    for data, address in (pictures or {}).items():
        parts.append(f"What the first seed of each method makes on {data} in the end:")
        parts.append(f"![samples of each method on {data}]({address})")
    return "\n\n".join(parts) + "\n"


def repeating(suite: Suite, rows: Sequence[Row]) -> str:
    """The ``gankit run`` of the first seed of each line."""
    there = {(row.data, row.method) for row in rows}
    first = [cell for cell in suite.cells() if cell.seed == suite.first_seed and (cell.data, cell.method) in there]
    names = [", ".join([c.data, c.method, *([f"{c.steps:,} steps"] if c.steps else [])]) for c in first]
    commands = "\n".join(f"# {name}\n{suite.command(cell)}" for name, cell in zip(names, first, strict=True))
    return (
        '<details markdown="1">\n<summary>The command that trains the first seed of each line by itself</summary>\n\n'
        f"```\n{commands}\n```\n\n</details>"
    )


def apart(table: Table, tables: Sequence[Table]) -> str:
    """Why a table stands apart from others of its data: a sentence, with what of its provenance differs in one of them."""
    mine = table.provenance
    others = [other.provenance for other in tables if other.data == table.data]
    found = [
        f"{key} {json.dumps(value) if isinstance(value, dict) else value}"
        for key, value in mine.items()
        if key not in VERSIONED and any(other.get(key) != value for other in others)
    ]
    for kind in VERSIONED:
        clashing = chain.from_iterable(_clashing(mine.get(kind, {}), other.get(kind, {})) for other in others)
        found += [f"{name} {mine[kind][name]}" for name in dict.fromkeys(clashing)]
    return f"Only comparable within this table: {', '.join(found)}." if found else ""


def _md(row: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"


def legend(suite: Suite) -> str:
    """What the numbers of a table are."""
    text = (
        f"Mean over seeds and its nominal 95 % bootstrap interval; of fewer than {FEW}, which give none, the lowest and the "
        'highest in parentheses; "on each": all seeds have this value.'
    )
    if suite.baseline:
        text += (
            f" p: paired permutation test against `{suite.baseline}` on the same {FEW} seeds or more, not corrected for "
            "many methods."
        )
    goals = {data: target for data in suite.data if (target := suite.target_of(data))}
    if goals:
        each = "; ".join(
            ", ".join(f"{label(name)} at least {shown(name, value)}" for name, value in target.items()) + f" on {data}"
            for data, target in goals.items()
        )
        text += (
            f" Target: runs with an evaluation of {each}; step and training seconds of the first, as a median over all "
            "runs, so where more than half of them have one."
        )
    if suite.published:
        text += " Rows without seeds are the papers' own figures."
    return text


def plain(suite: Suite, rows: Sequence[Row]) -> dict[str, Any]:
    """Everything in plain containers: what the tables are made of."""
    return {
        "suite": {**asdict(suite), "steps": list(suite.steps)},
        "rows": [asdict(row) for row in rows],
        "tables": [asdict(table) for table in tabulate(suite, rows)],
    }


def write(suite: Suite, out: Path, reporter: Reporter) -> list[Row]:
    """Read the runs of a suite and write ``results.json``, ``results.md`` and, with ``gankit[report]``, ``results.html``.

    Beside them ``samples-<data>.png`` of each data set, see :func:`sheets`, which ``results.md`` shows. The HTML page has
    each method's samples, too, and what lies between its latents.
    """
    rows = collect(suite, out)
    write_atomic(out / "results.json", to_json(plain(suite, rows)))
    names = {data: f"samples-{data}.png" for data in suite.data}
    drawn = sheets(suite, out / "runs")
    for data, image in drawn.items():
        save_png(image, out / names[data])
    write_atomic(out / "results.md", markdown(suite, rows, {data: names[data] for data in drawn}))
    if find_spec("jinja2"):
        write_atomic(out / "results.html", html([(suite, rows)], gallery(suite, out / "runs", reporter)))
    return rows


def sheets(suite: Suite, runs: Path) -> dict[str, Image.Image]:
    """By data set, one picture of what each method's first finished seed makes in the end, under its first two figures.

    runs: the folder of the suite's runs.
    """
    found: dict[str, dict[str, Image.Image]] = {}
    for cell in _first(suite, runs):
        run = RunDir(runs / cell.name)
        summary, fakes = run.read_json("summary.json"), run.fakes()
        if not fakes:
            continue
        known = {metric_of(name): value for name, value in summary["metrics"].items()}
        figures = [f"{shown(name, known[name])} {label(name)}" for name in HEADLINE if name in known][:2]
        of = cell.method if cell.steps is None else f"{cell.method}, {cell.steps:,} steps"
        with Image.open(fakes[-1]) as picture:
            found.setdefault(cell.data, {})[f"{of}\n{', '.join(figures)}"] = picture.copy()
    return {data: sheet(pictures) for data, pictures in found.items()}


def _first(suite: Suite, runs: Path) -> list[Cell]:
    """The first finished seed of each method, of each length of training, on each data set."""
    first: dict[tuple[str, int | None, str], Cell] = {}
    for cell in suite.cells():
        if state_of(runs / cell.name) == "finished":
            first.setdefault((cell.data, cell.steps, cell.method), cell)
    return list(first.values())


@dataclass
class Shown:
    """One run in the page of a benchmark; pictures: data URIs by what they show."""

    data: str
    steps: int
    method: str
    seed: int
    pictures: dict[str, str]


def gallery(suite: Suite, runs: Path, reporter: Reporter) -> list[Shown]:
    """The last samples of the first finished seed of each method, and what lies between its latents.

    runs: the folder of the suite's runs. One without a picture of its interpolation is loaded and gets it, as by
    ``gankit interpolate --checkpoint latest``. Needs ``gankit[report]``.
    """
    from gankit import figures

    found, first = [], _first(suite, runs)
    for done, cell in enumerate(first):
        run = RunDir(runs / cell.name)
        between = run.path / "interpolation-latest.png"
        if not between.exists():
            reporter.loading(done, len(first), "drawing")
            with suppress(UsageError):  # of a checkpoint or a plugin that is gone; the tables need neither
                inversion.interpolate(run, reporter, to=str(between), checkpoint="latest")
        pictures = {"samples": [between, *run.fakes()][-1], "between latents": between}
        uris = {
            what: figures.data_uri(figures.shrunk(path, THUMBNAIL)) for what, path in pictures.items() if path.exists()
        }
        found.append(Shown(cell.data, run.read_json("summary.json")["steps"], cell.method, cell.seed, uris))
    return found


def load(path: Path) -> tuple[Suite, list[Row]]:
    """Suite and rows of a ``results.json``; UsageError if it is none."""
    try:
        content = json.loads(path.read_text())
        suite = Suite(**{**content["suite"], "steps": tuple(content["suite"]["steps"])})
        known = {f.name for f in fields(Row)}  # older versions had more
        return suite, [Row(**{key: value for key, value in row.items() if key in known}) for row in content["rows"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} holds no results of gankit bench: {error}") from None


def html(results: Sequence[tuple[Suite, Sequence[Row]]], shown: Sequence[Shown] = ()) -> str:
    """A page of all tables of some suites, with pictures; ImportError without jinja2."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("gankit", "template"), autoescape=True)
    template = environment.get_template("bench.html")
    page: str = template.render(sections=[section(*result) for result in results], shown=shown)
    return page


def section(suite: Suite, rows: Sequence[Row]) -> dict[str, Any]:
    """What the template of tables shows of one suite."""
    tables = tabulate(suite, rows)
    shown = [
        (table, *cells_of(table), apart(table, tables), {(line.method, s) for line in table.lines for s in line.seeds})
        for table in tables
    ]
    return {"suite": suite, "tables": shown, "legend": legend(suite)}
