"""The pictures of the start page: what the plugins do to the ring, all from seed 0.

    python tests/benchmarks/ring.py [--only bigan] [--jobs 2] [--runs runs/ring]

The flags of a run are those of outcomes.py. One process per run, one thread each; a run that is in the folder is not
repeated. Writes docs/assets/ring/NAME.png and docs/assets/ring/ring.json, the numbers of these very runs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from outcomes import FLAGS, FOR_IMAGES, ROOT, command

from gankit import data
from gankit.pictures import FAKE

SEED = 0  # chosen before the first run, the same for all
ASSETS = ROOT / "docs" / "assets" / "ring"
REACH = 1.3  # half the side of a panel; the ring has radius 1
SIDE = 2.0  # inches, at 120 dots per inch
POINTS = 1000
GREY = "#b4bac2"  # for pages in black on white and the other way round


def names() -> list[str]:
    """The plugins measured on the ring, as outcomes.py calls them; first none of them."""
    in_tree = sorted(path.parent.name for path in (ROOT / "plugins").glob("*/pyproject.toml"))
    return ["none", *(name for name in in_tree if name not in FOR_IMAGES), "r1+r2"]


def train(name: str, runs: Path) -> dict[str, object]:
    """One run and its samples in ``runs``; its numbers."""
    folder = runs / name
    numbers, samples = folder / "numbers.json", folder / "samples.npy"
    if not samples.exists():
        done = gankit(command(name, "ring", SEED, str(folder)))
        gankit(["sample", "--out", str(folder), "-n", str(POINTS), "--to", str(samples)])
        numbers.write_text(done)
    result = json.loads(numbers.read_text())
    kept = {key: result["metrics"][key] for key in ("modes", "high_quality", "reverse_kl")}
    print(name, kept, flush=True)
    return {"plugin": name, "flags": FLAGS.get(name), "seed": SEED, **kept}


def gankit(arguments: list[str]) -> str:
    """What one gankit command prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "gankit", *arguments], check=True, stdout=subprocess.PIPE, text=True, env=environment
    )
    return done.stdout


def draw(fake: np.ndarray, path: Path) -> None:
    """The eight modes in grey, and above them generated points (N, 2), on a ground that is left transparent."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Circle

    figure = Figure((SIDE, SIDE), dpi=120)
    axes = figure.add_axes((0, 0, 1, 1))
    real = data.load("ring").held_out(POINTS).numpy()
    axes.scatter(*real.T, s=130, color=GREY, linewidths=0)  # larger than they are, so that the missed ones are seen
    axes.scatter(*fake.T, s=7, color=[c / 255 for c in FAKE], linewidths=0, alpha=0.8)
    axes.add_patch(Circle((0, 0), 1, fill=False, color=GREY, linewidth=0.5, alpha=0.5, zorder=0))
    axes.set(xlim=(-REACH, REACH), ylim=(-REACH, REACH), aspect="equal")
    axes.set_axis_off()
    figure.savefig(path, transparent=True)


def main() -> None:
    """Train what is missing, then draw all and write their numbers."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="plugins, by comma; the others stay as they are")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "ring")
    options = parser.parse_args()
    store = ASSETS / "ring.json"
    wanted = options.only.split(",") if options.only else names()
    kept = [row for row in json.loads(store.read_text()) if row["plugin"] not in wanted] if options.only else []
    with ThreadPoolExecutor(options.jobs) as pool:
        rows = kept + list(pool.map(lambda name: train(name, options.runs), wanted))
    ASSETS.mkdir(parents=True, exist_ok=True)
    for name in wanted:
        draw(np.load(options.runs / name / "samples.npy"), ASSETS / f"{name}.png")
    rows.sort(key=lambda row: names().index(str(row["plugin"])))
    store.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
