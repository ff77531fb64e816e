"""Folders of runs as gankit writes them, made by hand: what the report's tests read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIDE = 48
LIMITS = (-1.2, 1.2, -1.2, 1.2)


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def record(
    folder: Path,
    *,
    steps: tuple[int, ...] = (10, 20, 30),
    plugin: str = "pairwise_gp",
    seed: int = 0,
    points: bool = True,
    field: str = "",
    flat: float = 1.0,
    ended: str = "finished",
) -> Path:
    """A run whose generator has found one more mode at each of ``steps``.

    points: 2-D data with D's field; else images. field: a sentence where there is none. flat: what D is divided by.
    ended: "finished", "interrupted" or "" for a run whose end is not recorded.
    """
    samples = folder / "samples"
    samples.mkdir(parents=True)
    x, y = np.meshgrid(np.linspace(-1.2, 1.2, SIDE), np.linspace(-1.2, 1.2, SIDE))
    random = np.random.default_rng(seed)
    for number, step in enumerate(steps, 1):
        Image.fromarray(random.integers(0, 255, (40, 80), dtype=np.uint8)).save(samples / f"fakes-{step:06d}.png")
        if points:
            angle = 2 * np.pi * random.integers(0, number, 200) / 8
            fake = np.stack([np.cos(angle), np.sin(angle)], 1) + random.normal(0, 0.02, (200, 2))
            arrays: dict[str, Any] = {"why": np.array(field)} if field else {
                "values": number * (x + 2 * y).astype(np.float32) / flat,
                "joint": plugin == "bigan",
                "slopes": (number * np.stack([np.ones_like(x), 2 * np.ones_like(x)], 2) / flat).astype(np.float32),
            }  # fmt: skip
            np.savez(samples / f"fakes-{step:06d}.npz", fake=fake.astype(np.float32), limits=np.array(LIMITS), **arrays)
    if points:
        np.savez(samples / "reals.npz", real=random.normal(0, 0.5, (100, 2)).astype(np.float32))
    settings = {
        "data": "ring",
        "plugin": [plugin],
        "loss": "non_saturating",
        "steps": steps[-1],
        "seed": seed,
        "out": "runs",
    }
    toml = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    (folder / "config.toml").write_text("\n".join([*toml, "[options.loss]", "weight = 0.25"]))
    (folder / "plugins.json").write_text(json.dumps({plugin: {"distribution": f"gankit-{plugin}", "version": "0.1.0"}}))
    (folder / "env.json").write_text(
        json.dumps({"gankit": "0.1.0", "torch": "2.13.0", "arguments": ["run", folder.name]})
    )
    (folder / "data.json").write_text(json.dumps({"name": "ring", "shape": [2], "warnings": []}))
    truth = {"step": None, "modes": 8.0, "high_quality": 0.989, "sliced_wasserstein": 0.005}
    found = [
        {"step": step, "modes": float(number), "high_quality": number / 10, "sliced_wasserstein": 1 / number}
        for number, step in enumerate(steps, 1)
    ]
    (folder / "metrics.jsonl").write_text(lines([truth, *found]))
    stats = [
        {
            "step": step, "d_loss": 1.0, "g_loss": 0.7, "d_loss/adv": 0.75, f"d_loss/{plugin}": 0.25, "g_loss/adv": 0.7,
            "gradient_share/d/adv": 0.9, f"gradient_share/d/{plugin}": 0.1, f"ms/{plugin}": 2.0, "ms/step": 8.0,
        }
        for step in range(5, steps[-1] + 1, 5)
    ]  # fmt: skip
    (folder / "stats.jsonl").write_text(lines(stats))
    if ended:
        summary = {"status": ended, "step": steps[-1], "steps": steps[-1], "metrics": found[-1], "truth": truth}
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder
