"""Does it help to do what ``gankit diagnose`` says? Runs made ill, and its suggestions run as they are printed.

    python tests/benchmarks/advice.py [--only wasserstein] [--seeds 3] [--jobs 2] [--write]

Each of the CASES is the recipe for 2-D data with something wrong. The run is diagnosed, and the first suggestion of its
first finding is run; that run is diagnosed in turn, and so on until nothing is found, three times at most. Whether the
last run is well is told by the known centres, which the rules do not see. Results go to tests/benchmarks/advice.json,
case by case, so that an interrupted measurement continues; --write puts the table into docs/diagnose.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

from gankit.files import write_atomic

ROOT = Path(__file__).parents[2]
STORE = Path(__file__).with_suffix(".json")
PAGE = ROOT / "docs" / "diagnose.md"
MARK = re.compile(r"<!-- advice -->\n.*?<!-- end -->", re.DOTALL)
TRIES = 3
UNSEEN = 2  # rules and advice were changed by what the seeds before showed
MODES = {"ring": 8, "grid": 25}
COUNTED = {"modes": ".0f", "high_quality": ".0%"}
NORMAL = "--z-dim 2 --z normal"  # the latents of a plain GAN; the recipe's one dimension is for encoders

# What is wrong, by name: flags of `gankit run`.
CASES = {
    "no regularizer, on the ring": f"--data ring {NORMAL}",
    "no regularizer, on the grid": f"--data grid {NORMAL}",
    "a BiGAN, on the ring": "--data ring --plugin bigan",
    "a BiGAN, on the grid": "--data grid --plugin bigan",
    "both rates times ten": f"--data ring {NORMAL} --lr-g 0.02 --lr-d 0.03",
    "both rates times a hundred": f"--data ring {NORMAL} --lr-g 0.2 --lr-d 0.3",
    "both rates a hundredth": f"--data ring {NORMAL} --lr-g 2e-5 --lr-d 3e-5",
    "a D that does not train": f"--data ring {NORMAL} --lr-d 0",
    "momentum of 0.9": f"--data grid {NORMAL} --beta1 0.9",
    "the saturating loss, five updates of D for each of G": f"--data ring {NORMAL} --loss saturating --d-steps 5",
    "the Wasserstein loss without a bound": f"--data ring {NORMAL} --loss wasserstein",
    "an encoder of two dimensions that does not draw": f"--data ring --plugin pairwise_gp {NORMAL}",
}


def gankit(folder: str, *arguments: str) -> dict[str, Any]:
    """What a command prints with --json; nothing, if it fails as a run that diverges does."""
    done = subprocess.run(
        [sys.executable, "-m", "gankit", *arguments, "--json"],
        cwd=folder, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode not in (0, 1):
        raise RuntimeError(f"gankit {shlex.join(arguments)}: {done.stderr.strip()}")
    found: dict[str, Any] = json.loads(done.stdout) if done.returncode == 0 else {}
    return found


def trained(folder: str, name: str, *arguments: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What is counted of a run, the names of its findings, and the findings."""
    result = gankit(folder, "run", *arguments, "--name", name, "--no-report")
    findings = gankit(folder, "diagnose", name)["findings"]
    counted = {key: result["metrics"][key] for key in COUNTED} if result else {}
    return {**counted, "findings": {finding["name"]: finding["word"] for finding in findings}}, findings


def measure(case: str, seed: int) -> dict[str, Any]:
    """One run with something wrong, and what became of what was tried."""
    with tempfile.TemporaryDirectory() as folder:
        before, findings = trained(folder, "ill", *CASES[case].split(), "--seed", str(seed), "--threads", "1")
        row: dict[str, Any] = {"case": case, "seed": seed, "flags": CASES[case], "before": before, "tries": []}
        while findings and len(row["tries"]) < TRIES:
            program, run, *words = shlex.split(findings[0]["to_try"][0]["command"])
            assert (program, run) == ("gankit", "run")
            name = words.index("--name")
            del words[name : name + 2]
            after, findings = trained(folder, f"try-{len(row['tries'])}", *words)
            config = words.index("--config")
            row["tries"].append({"changed": shlex.join(words[:config] + words[config + 2 :]), **after})
    return row


# -- the table ------------------------------------------------------------------------------------------------------


def well(row: dict[str, Any], tries: int = TRIES) -> bool:
    """Whether after so many tries a run has all modes, and nothing is found in it."""
    modes = MODES[row["flags"].split()[1]]
    return any(not tried["findings"] and tried.get("modes") == modes for tried in row["tries"][:tries])


def table(rows: list[dict[str, Any]]) -> str:
    """The page's block: case by case, and how many are well in all."""
    lines = [
        "| what was wrong | first finding | tried first | well after one, up to three | modes | high quality |",
        "|---|---|---|---|---|---|",
    ]
    for case in CASES:
        mine = [row for row in rows if row["case"] == case]
        ill = [row for row in mine if row["before"]["findings"]]
        names = Counter(next(iter(row["before"]["findings"])) for row in ill)
        first = Counter(row["tries"][0]["changed"] for row in ill)
        cells = [
            f"{case}: `{CASES[case]}`",
            ", ".join(f"{name} ({count} of {len(mine)})" for name, count in names.most_common()),
            ", ".join(f"`{changed}`" for changed, _ in first.most_common()),
            f"{sum(well(row, 1) for row in ill)}, {sum(map(well, ill))} of {len(ill)}",
            *(f"{_ends(ill, name, form, 0)} -> {_ends(ill, name, form, -1)}" for name, form in COUNTED.items()),
        ]
        if mine:
            lines.append(f"| {' | '.join(cells if ill else [cells[0], f'none on {len(mine)} seeds', *['-'] * 4])} |")
    parts = ["\n".join(lines), _count(rows)]
    if unseen := [row for row in rows if row["seed"] >= UNSEEN]:
        parts.append(f"Of seeds from {UNSEEN} on, on which nothing was chosen: {_count(unseen)}")
    return "\n\n".join(parts)


def _count(rows: list[dict[str, Any]]) -> str:
    ill = [row for row in rows if row["before"]["findings"]]
    one, three = sum(well(row, 1) for row in ill), sum(map(well, ill))
    return (
        f"{len(rows)} runs with something wrong, {len(ill)} of them with a finding. Well after the first suggestion are "
        f"{one} of the {len(ill)}, after up to three {three}."
    )


def _ends(rows: list[dict[str, Any]], name: str, form: str, which: int) -> str:
    """The lowest and the highest of a metric, before (0) or after the last try (-1)."""
    values = [[row["before"], *row["tries"]][which].get(name, 0.0) for row in rows]  # a run that diverged has none
    return " to ".join(dict.fromkeys(format(value, form) for value in (min(values), max(values)))) if values else "-"


def load() -> list[dict[str, Any]]:
    """What was measured with the cases as they are."""
    rows: list[dict[str, Any]] = json.loads(STORE.read_text()) if STORE.exists() else []
    return [row for row in rows if CASES.get(row["case"]) == row["flags"]]


def main() -> None:
    """Measure what is missing, print the table, and write it into the page if asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="cases whose name or flags have this")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    rows, lock = load(), Lock()
    have = {(row["case"], row["seed"]) for row in rows}
    cells = [(case, seed) for seed in range(options.seeds) for case in CASES if options.only in f"{case} {CASES[case]}"]

    def work(cell: tuple[str, int]) -> None:
        row = measure(*cell)
        with lock:
            print(json.dumps(row), flush=True)
            rows.append(row)
            write_atomic(STORE, json.dumps(rows, indent=1) + "\n")

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(work, [cell for cell in cells if cell not in have]))
    print(table(rows))
    if options.write:
        made = f"<!-- advice -->\n{table(rows)}\n<!-- end -->"
        PAGE.write_text(MARK.sub(lambda match: made, PAGE.read_text(), count=1))


if __name__ == "__main__":
    main()
