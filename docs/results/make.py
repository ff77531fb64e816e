"""Writes docs/results.md and the README's tables from the files beside this script and tests/benchmarks/outcomes.json.

With arguments, adds the rows of these files first:

gankit bench ring && python docs/results/make.py benches/ring/results.json

Beside a suite's tables stands what a person has to say of them, ``notes/<suite>.md``, and the pictures
``pictures/<suite>-<data>.png``, which are ``samples-<data>.png`` of the suite's folder.
"""

import json
import math
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markdown.extensions.toc import slugify

from gankit import bench, results
from gankit.errors import UsageError
from gankit.files import write_atomic
from gankit.provenance import metric_of
from gankit.rundir import to_json
from gankit.terminal import shown

HERE = Path(__file__).parent
PAGE = HERE.parent / "results.md"
README = HERE.parents[1] / "README.md"
OUTCOMES = HERE.parents[1] / "tests" / "benchmarks" / "outcomes.json"
HEAD = """# Results

Every table below is made from a committed file in [docs/results](results), which `gankit bench SUITE` wrote:
`gankit bench ring --method r3gan --seeds 1` repeats the first seed of a line, and so does its command below the table.
[Benchmarks](bench.md) says what the columns are. A suite is gankit's own recipe or repeats a paper's protocol; the line
under its title says which. The papers' figures stand where they are to be looked for, not to be compared by: networks,
lengths of training, averaging and the number of samples are others, and more samples find more modes.
"""
NOTES = HERE / "notes"
PICTURES = HERE / "pictures"
# sets whose samples the papers count within another radius, see the suite's note
COUNTED_OTHERWISE = ("gaussians1200",)
# what the first table shows, and of sets of which this does not tell all
SHOWN = ("modes", "high_quality", "reverse_kl", "worst_share_ratio")
FURTHER = {"gaussians1200": (*SHOWN, "energy_distance")}
# gankit's recipe for each suite, for the first table
RECIPES = {
    "ring": "r3gan",
    "grid": "r3gan",
    "gaussians1200": "r3gan",
    "stacked-mnist": "r3gan",
    "heavy-mode": "r3gan_products",
    "pairwise": "pairwise_gp",
}


Results = Mapping[str, tuple[bench.Suite, Sequence[results.Row]]]


def committed() -> Results:
    """The committed files: suite and rows by the suite's name."""
    return {path.stem: results.load(path) for path in sorted(HERE.glob("*.json"))}


def readme() -> str:
    """The README with its tables as the files have them."""
    text = README.read_text()
    for name, table in {"at a glance": at_a_glance(committed(), "docs/results.md"), "first commands": first()}.items():
        block, place = f"<!-- {name} -->\n\n{table}\n\n<!-- end -->", rf"<!-- {name} -->.*?<!-- end -->"
        text, count = re.subn(place, lambda _, block=block: block, text, flags=re.DOTALL)
        assert count == 1, f"{README} has {count} places for {name!r}"
    return text


def first() -> str:
    """What `gankit run` gives on the ring and the grid with `--plugin pairwise_gp` and `--plugin bigan`, seed by seed."""
    rows = json.loads(OUTCOMES.read_text())
    lines = [
        "| `gankit run ...` | modes, seed by seed | all | high quality, mean (least) | reverse KL, mean |",
        "|---|---|---|---|---|",
    ]
    for data, of in (("ring", 8), ("grid", 25)):
        for plugin in ("pairwise_gp", "bigan"):
            mine = [row for row in rows if (row["plugin"], row["data"]) == (plugin, data)]
            mine.sort(key=lambda row: int(row["seed"]))
            modes = [round(row["modes"]) for row in mine]
            quality, kl = ([row[name] for row in mine] for name in ("high_quality", "reverse_kl"))
            cells = [
                f"`--data {data} --plugin {plugin}`", " ".join(map(str, modes)), f"{modes.count(of)} of {len(mine)}",
                f"{statistics.fmean(quality):.1%} ({min(quality):.1%})", f"{statistics.fmean(kl):.4f}",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def page() -> str:
    """The whole page."""
    known = committed()
    parts = [HEAD, "\n\n".join(["## At a glance", at_a_glance(known), LEGEND]) + "\n"]
    for name, (suite, rows) in known.items():
        drawn = {data: PICTURES / f"{name}-{data}.png" for data in suite.data}
        pictures = {data: f"results/pictures/{path.name}" for data, path in drawn.items() if path.exists()}
        note = NOTES / f"{name}.md"
        parts.append(
            results.markdown(suite, rows, pictures) + (f"\n{note.read_text().strip()}\n" if note.exists() else "")
        )
    return "\n".join(parts)


def at_a_glance(known: Results, address: str = "") -> str:
    """A table of gankit's recipes: each beside its baseline, a published row of the data set, and the true data.

    address: of the page with the suites' sections, from where the table is.
    """
    lines = ["| data | baseline | gankit | real data | papers, of other networks |", "| --- | --- | --- | --- | --- |"]
    for name, recipe in RECIPES.items():
        suite, rows = known[name]
        tables = results.tabulate(suite, rows)
        for data in suite.data:
            lines_of = [(table, line) for table in tables if table.data == data for line in table.lines]
            found = {line.method: (table, line) for table, line in lines_of}
            if len(found) < len(lines_of):
                raise UsageError(f"{name}: a method stands in two tables of {data}, and this one has place for one")
            table, line = found[recipe]
            names = FURTHER.get(data, SHOWN)
            base = _means(*found[suite.baseline], line.steps, names) if suite.baseline in found else "-"
            papers = [row for other, _ in known.values() for row in other.published if row["data"] == data]
            best = min(papers, key=lambda row: (row.get("reverse_kl", math.inf), -row["modes"]), default=None)
            unfit = best is None or name != data or data in COUNTED_OTHERWISE
            paper = "-" if unfit else f"{best['source']}: {_values(best)}"
            link = f"[{data}{'' if name == data else f', suite {name}'}]({address}#{slugify(suite.title, '-')})"
            cells = [link, base, _means(table, line, line.steps, names), _values(table.truth, names), paper]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


LEGEND = """Modes captured, samples of high quality, reverse KL to equal shares of the modes (heavy-mode: how many times the
worst share is off), as means over seeds. A baseline has the recipe's networks (heavy-mode's has another D) and, on
points, its rates, which were chosen for the recipe: at slower rates or with other networks a GAN without a regularizer can
find more modes, as the sections say. Of the papers' rows in the
suites it is the one of the lowest KL, or of the most modes where none is stated. The sections have intervals, tests, and
the other methods."""
WORDS = {
    "modes": "{} modes",
    "high_quality": "{}",
    "reverse_kl": "KL {}",
    "worst_share_ratio": "{} times off",
    "energy_distance": "energy distance {}",
}


def _means(table: results.Table, line: results.Line, steps: int, names: Sequence[str]) -> str:
    found = {name: line.estimates[name].mean for name in results.chosen(table) if name in line.estimates}
    length = "" if line.steps == steps else f", {line.steps:,} steps"
    seeds = len(line.seeds)
    return f"`{line.method}`, {seeds} seed{'s' * (seeds != 1)}{length}: {_values(found, names)}"


def _values(found: Mapping[str, Any], names: Sequence[str] = SHOWN) -> str:
    known = {metric_of(name): value for name, value in found.items() if value is not None}
    words = {
        name: f"{known[name]:.4g}" if name == "modes" else shown(name, known[name]) for name in names if name in known
    }
    text = ", ".join(WORDS[name].format(word) for name, word in words.items())
    return text.replace("1 modes", "1 mode") if known.get("modes") == 1 else text


def merged(*paths: Path) -> tuple[bench.Suite, list[results.Row]]:
    """Suite and rows of several files of one suite; of a run that is in more than one, the last counts.

    UsageError for results of another suite than the shipped one: other settings, or a length that it does not train for.
    """
    found = [results.load(path) for path in paths]
    shipped = bench.read(found[0][0].name)
    rows: dict[bench.Cell, results.Row] = {}
    for path, (suite, some) in zip(paths, found, strict=True):
        for cell in suite.cells():
            known = suite.name == shipped.name and cell.data in shipped.data and cell.method in shipped.methods
            if not known or suite.steps != shipped.steps or suite.config(cell) != shipped.config(cell):
                raise UsageError(f"{path} is not of the suite {shipped.name} as it is now: see {cell.name}")
        rows |= {bench.Cell(row.data, row.method, row.steps, row.seed): row for row in some}
    methods = [name for name in shipped.methods if any(row.method == name for row in rows.values())]
    data = [name for name in shipped.data if any(row.data == name for row in rows.values())]
    seeds = range(1 + max(row.seed for row in rows.values()))
    suite = bench.narrowed(shipped, seeds=seeds, methods=methods, data=data, steps=None)
    order = [(cell.seed, cell.data, cell.method) for cell in suite.cells()]
    return suite, sorted(rows.values(), key=lambda row: (order.index((row.seed, row.data, row.method)), row.steps))


def add(path: Path, folder: Path = HERE) -> None:
    """Add the rows of a ``results.json`` to the file of its suite in ``folder``."""
    known = folder / f"{results.load(path)[0].name}.json"
    suite, rows = merged(*([known] if known.exists() else []), path)
    write_atomic(known, to_json(results.plain(suite, rows)))


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        add(Path(argument))
    write_atomic(PAGE, page())
    write_atomic(README, readme())
