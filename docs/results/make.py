"""Writes docs/results.md from the result files beside this script; with arguments, adds the rows of these files first.

gankit bench ring && python docs/results/make.py benches/ring/results.json
"""

import sys
from pathlib import Path

from gankit import bench, results
from gankit.errors import UsageError
from gankit.files import write_atomic
from gankit.rundir import to_json

HERE = Path(__file__).parent
PAGE = HERE.parent / "results.md"
HEAD = """# Results

Every table below is made from a committed file in [docs/results](results), which `gankit bench SUITE` wrote:
`gankit bench ring` repeats it. [Benchmarks](bench.md) says what the columns are. A suite is gankit's own recipe or repeats
a paper's protocol; the line under its title says which, and rows of different protocols are not comparable.
"""
NOTES = HERE / "notes"


def page() -> str:
    """The whole page; what a person has to say of a suite's results comes from ``notes/<suite>.md``."""
    parts = [HEAD]
    for path in sorted(HERE.glob("*.json")):
        suite, rows = results.load(path)
        note = NOTES / f"{path.stem}.md"
        parts.append(results.markdown(suite, rows) + (f"\n{note.read_text().strip()}\n" if note.exists() else ""))
    return "\n".join(parts)


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
