"""IvOM as a metric: against numpy's least squares, against the command, and a run that it leaves as it is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from gankit_ivom import Ivom

import gankit
from gankit import UsageError
from gankit.cli import main
from gankit.data import load
from gankit.gan import derive_seed
from gankit.inversion import ivom
from gankit.provenance import metric_of
from gankit.training import measure

SHORT = ["--steps", "4", "--batch", "8", "--width", "8", "--eval-samples", "20", "--threads", "1", "--eval-every", "2",
         "--no-report"]  # fmt: skip
FEW = ["--plugin", "ivom", "-o", "ivom.n=9", "-o", "ivom.steps=5"]


def linear_gan(**options: int) -> gankit.GAN:
    g, d = torch.nn.Linear(1, 2), torch.nn.Linear(2, 1)
    with torch.no_grad():
        g.weight.copy_(torch.tensor([[2.0], [1.0]]))
        g.bias.copy_(torch.tensor([0.5, -0.5]))
    gan = gankit.GAN(g, d, (2,), gankit.Latent(1), plugins={"ivom": Ivom(**options)})
    gan.data = load("ring")
    return gan.build()


def test_a_line_leaves_the_mean_square_distance_from_it() -> None:
    gan = linear_gan(n=50, steps=300)
    x = load("ring").held_out(50).double().numpy()
    off = x - np.array([0.5, -0.5])
    along = np.array([2.0, 1.0]) / np.sqrt(5)
    distance = off - (off @ along)[:, None] * along
    (name,) = (name for name in measure(gan) if metric_of(name) == "ivom")
    assert measure(gan)[name] == pytest.approx((distance**2).mean(), rel=1e-3)
    assert gan.provenance[name]["n"] == 50 and gan.provenance[name]["restarts"] == 3


def test_the_number_of_restarts_arrives() -> None:
    x, values = load("ring").held_out(20), []
    for restarts in (1, 2, 6):
        gan = linear_gan(n=20, steps=2, restarts=restarts)
        ((name, value),) = ((n, v) for n, v in measure(gan).items() if metric_of(n) == "ivom")
        starts = torch.Generator().manual_seed(derive_seed(0, "invert"))
        expected = ivom(gan.generator, x, gan.latent, steps=2, restarts=restarts, generator=starts).residuals.mean()
        assert value == pytest.approx(expected.item(), rel=1e-6)
        assert gan.provenance[name]["restarts"] == restarts
        values.append(value)
    assert values[0] > values[1] > values[2]  # the first starts are the same: more of them can only be nearer


def test_true_data_have_no_value() -> None:
    gan = linear_gan(n=5, steps=5)
    assert not [name for name in measure(gan, truth=gan.data) if metric_of(name) == "ivom"]


def test_with_an_encoder_the_reconstruction_counts_too(tmp_path: Path) -> None:
    invoke = CliRunner().invoke
    run = ["run", "--plugin", "bigan", *FEW, *SHORT, "--out", str(tmp_path), "--json"]
    found = json.loads(invoke(main, run).stdout)["metrics"]
    folder = next(tmp_path.iterdir())
    inverted = json.loads(invoke(main, ["invert", str(folder), "-n", "9", "--steps", "5", "--json"]).stdout)["metrics"]
    assert {metric_of(name) for name in inverted} == {"ivom", "reconstruction_error"}
    assert {name: found[name] for name in inverted} == pytest.approx(inverted, rel=1e-6)


def test_it_changes_nothing_of_a_run(tmp_path: Path) -> None:
    weights = []
    for name, plugin in (("without", []), ("with", FEW)):
        out = tmp_path / name
        done = CliRunner().invoke(main, ["run", *SHORT, *plugin, "--name", "r", "--out", str(out)])
        assert done.exit_code == 0, done.output
        weights.append(sorted((p.name, p.read_bytes()) for p in out.glob("r/checkpoints/step-*/*.safetensors")))
    assert weights[0] and weights[0] == weights[1]


def test_what_is_missing_is_said() -> None:
    with pytest.raises(UsageError, match=r"set gan\.data"):
        gan = linear_gan(n=5)
        gan.data = None
        measure(gan)
    with pytest.raises(ValueError, match="at least 1"):
        Ivom(restarts=0)
