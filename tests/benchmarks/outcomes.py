"""What each plugin does to the ring and the grid: five seeds each, written into its README.

    python tests/benchmarks/outcomes.py [--only r1,packing] [--seeds 5] [--jobs 2] [--write]

One process per run, one thread each. Results go to tests/benchmarks/outcomes.json, run by run, so that an interrupted
measurement continues; --write puts the tables into the READMEs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

ROOT = Path(__file__).parents[2]
STORE = Path(__file__).with_suffix(".json")
MARK = re.compile(r"<!-- measured row -->(?:\n.*?<!-- end -->)?", re.DOTALL)

# Flags by plugin; everything else is the recipe for 2-D data. Plain GANs get the usual 2-D normal latent, encoders the
# one-dimensional one of the pair-wise paper.
PLANE = "--z-dim 2 --z normal"
FLAGS = {
    "none": PLANE,
    "bigan": "--plugin bigan",
    "pairwise_gp": "--plugin pairwise_gp",
    "gradient_penalty": f"--plugin gradient_penalty -o gradient_penalty.weight=1 {PLANE}",
    "weight_clipping": f"--plugin weight_clipping --loss wasserstein --d-steps 5 -o weight_clipping.c=0.1 {PLANE}",
    # Unrolling looks one step of D ahead, which at the recipe's rates leads nowhere (5 of 25 modes): the paper's are slower.
    "unrolled": f"--plugin unrolled -o unrolled.k=1 --lr-g 1e-3 --lr-d 3e-4 {PLANE}",
    "none_slow": f"--lr-g 1e-3 --lr-d 3e-4 {PLANE}",
    "veegan": f"--plugin veegan {PLANE}",
    "dragan": f"--plugin dragan -o dragan.weight=1 -o dragan.scale=0.05 {PLANE}",  # the paper's noise spans the modes
    # 100 kernels are steep beside a small MLP: no mode is found at these rates
    "minibatch_discrimination": f"--plugin minibatch_discrimination -o minibatch_discrimination.kind=stddev {PLANE}",
    "historical_averaging": "--plugin historical_averaging -o historical_averaging.weight_d=0.001 "
    f"-o historical_averaging.weight_g=0.001 {PLANE}",  # at the paper's 1 nothing moves: high quality 0.4 %
    "r1": f"--plugin r1 -o r1.weight=1 {PLANE}",
    "r2": f"--plugin r2 -o r2.weight=1 {PLANE}",
    "r1+r2": f"--plugin r1 --plugin r2 --loss relativistic -o r1.weight=0.1 -o r2.weight=0.1 {PLANE}",
}
BASELINE = {"unrolled": "none_slow"}  # the others are compared with "none", those with encoders with nothing

# Their READMEs hold rows on images.
FOR_IMAGES = ("diffaugment", "inception", "progressive", "self_attention", "stacked", "virtual_batch_norm")
NO_REGULARIZER = ("ivom", "tensorboard")


def command(name: str, data: str, seed: int, out: str) -> list[str]:
    """The `gankit run` of one cell."""
    flags = FLAGS.get(name, f"--plugin {name} {PLANE}")
    return (
        f"run --data {data} {flags} --seed {seed} --threads 1 --eval-every 0 --save-every 0 --json --out {out}".split()
    )


def measure(name: str, data: str, seed: int) -> dict[str, object]:
    """One run's last metrics, or the reason why there are none."""
    with tempfile.TemporaryDirectory() as out:
        done = subprocess.run(
            [sys.executable, "-m", "gankit", *command(name, data, seed, out)],
            capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    cell: dict[str, object] = {"plugin": name, "data": data, "seed": seed, "flags": FLAGS.get(name)}
    if done.returncode:
        return {**cell, "failed": done.stderr.strip().splitlines()[-1]}
    result = json.loads(done.stdout)
    return {**cell, **result["metrics"], "seconds": result["seconds"]}


def table(name: str, rows: list[dict[str, object]]) -> str:
    """The README's measured table of one plugin, beside no plugin at all."""
    lines = ["| data | | modes (mean, least) | high quality | reverse KL | seeds |", "|---|---|---|---|---|---|"]
    for data, of in (("ring", 8), ("grid", 25)):
        if not any(row["plugin"] == name and row["data"] == data for row in rows):
            continue
        baseline = BASELINE.get(name, "none")
        for who in (baseline, name) if PLANE in FLAGS.get(name, PLANE) else (name,):  # on the same latent
            found = [row for row in rows if row["plugin"] == who and row["data"] == data and "failed" not in row]
            if not found:
                continue
            modes = [float(str(row["modes"])) for row in found]
            quality = statistics.mean(float(str(row["high_quality"])) for row in found)
            kl = statistics.mean(float(str(row["reverse_kl"])) for row in found)
            label = "without" if who == baseline else f"with `{name}`"
            lines.append(
                f"| {data} | {label} | {statistics.mean(modes):.1f} of {of}, {min(modes):.0f} | {quality:.1%} "
                f"| {kl:.3f} | 0-{len(found) - 1} |"
            )
    same = ", without at the same rates" if name in BASELINE else ""
    flags = " ".join(command(name, "ring", 0, "runs")).replace(" --json --out runs", "")
    return "\n".join([*lines, "", f"Measured with `gankit {flags}` and so on; other seeds and data alike{same}."])


def main() -> None:
    """Measure what is missing, print a line per cell, and write tables if asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="plugins, by comma")
    parser.add_argument("--data", default="ring,grid")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    in_tree = sorted(path.parent.name for path in (ROOT / "plugins").glob("*/pyproject.toml"))
    in_tree = [name for name in in_tree if name not in FOR_IMAGES + NO_REGULARIZER]
    names = options.only.split(",") if options.only else ["none", *in_tree, "r1+r2"]
    rows: list[dict[str, object]] = json.loads(STORE.read_text()) if STORE.exists() else []
    rows = [row for row in rows if row["flags"] == FLAGS.get(str(row["plugin"]))]  # others were measured otherwise
    have = {(row["plugin"], row["data"], row["seed"]) for row in rows if "failed" not in row}
    cells = [(n, d, s) for d in options.data.split(",") for n in names for s in range(options.seeds)]
    lock = Lock()

    def work(cell: tuple[str, str, int]) -> None:
        row = measure(*cell)
        with lock:
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items() if k != "flags"}, flush=True)
            kept = [r for r in rows if (r["plugin"], r["data"], r["seed"]) != cell]
            rows[:] = [*kept, row]
            STORE.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(work, [cell for cell in cells if cell not in have]))
    if options.write:
        for name in in_tree:
            if not any(row["plugin"] == name for row in rows):
                continue
            readme = ROOT / "plugins" / name / "README.md"
            made = f"<!-- measured row -->\n{table(name, rows)}\n<!-- end -->"
            readme.write_text(MARK.sub(lambda match, made=made: made, readme.read_text(), count=1))


if __name__ == "__main__":
    main()
