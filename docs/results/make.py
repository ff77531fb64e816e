"""Writes docs/results.md from the result files beside this script.

gankit bench ring && cp benches/ring/results.json docs/results/ring.json && python docs/results/make.py
"""

from pathlib import Path

from gankit import results

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


if __name__ == "__main__":
    PAGE.write_text(page())
