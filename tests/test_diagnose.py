"""Signs measured against numpy and scipy; every rule at its threshold; suggestions that can be run; rates that stay true."""

import importlib.util
import json
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from scipy import stats
from scipy.spatial import cKDTree
from scipy.spatial.distance import pdist, squareform
from torch import Tensor, nn

from gankit import GAN, Latent
from gankit.cli import main
from gankit.config import Config, read_toml
from gankit.data import from_arrays, load
from gankit.diagnose import EMPTY, MEASURED, PAIRWISE, RULES, SLOWER, Diagnosis, Finding, Record, Watch, diagnose
from gankit.gan import derive_seed
from gankit.plugins import create
from gankit.rundir import RunDir
from gankit.sampler import Sampler
from gankit.signals import Signals, anchors, variety
from gankit.testing import tiny_gan
from gankit.training import measure

ROOT = Path(__file__).parents[1]
FAST = ["--steps", "12", "--batch", "16", "--width", "8", "--eval-every", "3", "--save-every", "5", "--log-every", "3",
        "--eval-samples", "50", "--threads", "1", "--keep", "9", "--no-report"]  # fmt: skip


def gankit(*arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code == code, (result.output, result.exception)
    return result


# -- signs ------------------------------------------------------------------------------------------------------------


def test_variety_is_that_of_numpy_and_scipy() -> None:
    for shape in ((40, 3), (20, 50)):
        points = np.random.default_rng(0).normal(size=shape) * np.arange(1, shape[1] + 1)
        found = variety(torch.from_numpy(points))
        assert found["spread"] == pytest.approx(pdist(points).mean())
        eigenvalues = np.linalg.eigvalsh(np.cov(points.T))
        assert found["rank"] == pytest.approx(eigenvalues.sum() ** 2 / (eigenvalues**2).sum())
        distances = squareform(pdist(points)) + np.diag([np.inf] * len(points))
        np.testing.assert_allclose(found["nearest"], distances.min(axis=1))


def test_anchors_are_one_per_clump_or_a_choice() -> None:
    ring = load("ring").batch(torch.arange(512)).double()
    found = ring[anchors(ring)]
    modes = torch.cdist(found, load("ring").modes.centers.double()).argmin(dim=1)
    assert sorted(modes.tolist()) == list(range(8))
    even = torch.randn(512, 4, generator=torch.Generator().manual_seed(0)).double()
    assert anchors(even).tolist() == list(range(32))
    even[7] = 1000.0  # an outlier is no clump
    assert anchors(even).tolist() == list(range(32))
    assert len(anchors(torch.zeros(5, 2).double())) == 5


class Known(nn.Module):
    """Makes what it is given, whatever z."""

    def __init__(self, samples: Tensor) -> None:
        super().__init__()
        self.samples, self.weight = samples, nn.Parameter(torch.ones(()))

    def forward(self, z: Tensor) -> Tensor:
        return self.samples[torch.arange(len(z)) % len(self.samples)] * self.weight


def rows_of(
    generator: nn.Module, discriminator: nn.Module, data: Any, n: int = 512, **settings: Any
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    gan = GAN(
        generator, discriminator, data.shape, Latent(2), core={"signals": Signals(data, rows.append, n)}, **settings
    )
    gan.next_real = Sampler(data, gan.batch_size, torch.Generator().manual_seed(0))
    gan.build()
    measure(gan, truth=data)
    gan.step = 1
    measure(gan)
    return rows


def test_a_perfect_generator_and_true_samples_look_alike() -> None:
    data = load("ring")
    truth, row = rows_of(Known(data.held_out(4096)[1000:]), nn.Linear(2, 1), data)
    for found in (truth, row):
        assert found["spread"] == pytest.approx(1, abs=0.03)
        assert found["rank"] == pytest.approx(1, abs=0.03)
        assert found["duplicates"] < 0.03
        assert sum(found["cells"]) == sum(found["labels"]) == 512
        assert max(found["cells"]) < 90 and min(found["labels"]) > 40
        assert found["precision"] > 0.95
    assert (truth["step"], row["step"]) == (None, 1)
    assert row["separation"] == pytest.approx(0.5, abs=0.1)


def test_a_point_a_mode_and_what_is_not_finite() -> None:
    data = load("ring")
    point = rows_of(Known(torch.tensor([[1.0, 0.0]])), nn.Linear(2, 1), data)[1]
    assert (point["spread"], point["duplicates"], max(point["cells"])) == (0, 1, 512)
    nowhere = rows_of(Known(torch.zeros(1, 2)), nn.Linear(2, 1), data)[1]
    assert (point["precision"], nowhere["precision"]) == (1, 0)
    first = data.batch((data.labels == 3).nonzero()[:512, 0])
    mode = rows_of(Known(first), nn.Linear(2, 1), data)[1]
    assert mode["labels"] == [0, 0, 0, 512, 0, 0, 0, 0]
    assert 0.005 < mode["spread"] < 0.02
    spoilt = rows_of(Known(torch.tensor([[1.0, 0.0], [float("nan"), 0.0]])), nn.Linear(2, 1), data)[1]
    assert spoilt["finite"] == 0.5 and "spread" not in spoilt


def test_duplicates_are_nearer_than_a_tenth_of_the_median_distance_to_the_nearest_neighbour() -> None:
    x = np.random.default_rng(0).lognormal(sigma=1.5, size=(1000, 2)).astype("float32")  # sparse far out
    signals = Signals(from_arrays("x", x), lambda row: None, 201)
    real = signals.real.double().numpy()
    mean, deviation = real.mean(axis=0), real.std(axis=0)
    usual = cKDTree((real - mean) / deviation).query((real - mean) / deviation, k=2)[0][:, 1]
    median = np.median(usual)
    assert usual.mean() > 1.5 * median
    points = np.stack(np.divmod(np.arange(201.0), 15), axis=1)  # far apart from one another
    points[141:166] = points[:25] + 0.09 * np.array([median, 0])  # but 25 have a twin just inside
    points[166:201] = points[25:60] - 0.11 * np.array([0, median])  # and 35 one just outside
    nearest = cKDTree(points).query(points, k=2)[0][:, 1]
    assert (nearest < 0.1 * median).sum() == 50 and (nearest < 0.12 * median).sum() == 120
    found = signals.of(torch.from_numpy(points * deviation + mean))
    assert found["duplicates"] == pytest.approx(50 / 201, abs=1e-12)


def test_precision_is_the_share_within_the_third_neighbour_of_some_training_sample() -> None:
    x = np.random.default_rng(1).lognormal(sigma=1.5, size=(1000, 2)).astype("float32") * np.array([1, 50], "float32")
    signals = Signals(from_arrays("x", x), lambda row: None, 300)
    real = signals.real.double().numpy()
    mean, deviation = real.mean(axis=0), real.std(axis=0)
    known = (real - mean) / deviation
    radii = cKDTree(known).query(known, k=4)[0][:, 3]
    points = np.random.default_rng(2).uniform(-1, 6, size=(120, 2))
    inside = (np.linalg.norm(points[:, None] - known, axis=-1) <= radii).any(axis=1)
    assert 30 < inside.sum() < 90
    found = signals.of(torch.from_numpy(points * deviation + mean))
    assert found["precision"] == pytest.approx(inside.mean(), abs=1e-12)
    assert signals.of(signals.real)["precision"] == 1
    few = Signals(from_arrays("x", x[:3]), lambda row: None)  # of which none has three others
    assert few.of(few.real)["precision"] == 1


def test_values_that_repeat_have_neighbours_among_the_other_values() -> None:
    """Else every radius would be 0, and a G that misses whole numbers by a hundredth would make none that is plausible."""
    rng = np.random.default_rng(0)
    dice = rng.integers(1, 7, size=(2000, 2)).astype("float32")
    signals = Signals(from_arrays("dice", dice), lambda row: None)
    near, far = (rng.permutation(dice)[:512] + rng.normal(scale=s, size=(512, 2)) for s in (0.01, 100))
    assert signals.of(torch.from_numpy(near.astype("float32")))["precision"] == 1
    assert signals.of(torch.from_numpy(far.astype("float32")))["precision"] < 0.1
    assert signals.of(signals.held_out)["precision"] == 1


def test_packs_are_fewer_than_samples() -> None:
    """The error of a rate is that of the packs that D judges."""
    data = from_arrays("x", np.random.default_rng(0).normal(size=(40, 3)).astype("float32"))
    rows: list[dict[str, Any]] = []
    plugins, _ = create(["packing"], {"packing": {"m": 4}})
    measure(tiny_gan(plugins=plugins, core={"signals": Signals(data, rows.append, 16)}))
    assert rows[-1]["pack"] == 4
    alone = found(logged(change=always(memory=0.6)))
    packed = found(logged(change=always(memory=0.6, pack=4)))
    assert (list(alone), list(packed)) == (["overfitted D"], [])
    assert list(found(logged(change=always(memory=0.7, pack=4)))) == ["overfitted D"]


def test_what_d_says_is_the_area_under_the_curve_of_scipy() -> None:
    """D gives the first coordinate: its logits are known without it."""

    class First(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, 0] + 0 * super().forward(x)[:, 0]

    x = np.random.default_rng(0).normal(size=(300, 3))
    data = from_arrays("x", x.astype("float32"))
    fakes = torch.randn(512, 3, generator=torch.Generator().manual_seed(1)) + 0.5
    truth, row = rows_of(Known(fakes), First(3, 1), data, n=64, batch_size=64)
    index = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:64]
    real, fake = data.batch(index)[:, 0].numpy(), fakes[:64, 0].numpy()
    held_out = np.resize(data.held_out(64)[:, 0].numpy(), 64)  # 30 samples, gone through again
    expected = {"separation": (real, fake), "held_out_separation": (held_out, fake), "memory": (real, held_out)}
    for name, (high, low) in expected.items():
        assert row[name] == pytest.approx(stats.mannwhitneyu(high, low).statistic / 64**2)
    assert row["fake_logits"] == pytest.approx([fake.mean(), fake.std(ddof=1)], rel=1e-5)
    assert (truth["train"], truth["held_out"]) == (64, 30)


def test_a_d_that_says_the_same_of_everything_is_at_one_half() -> None:
    class Mute(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 0 * super().forward(x)

    data = load("ring")
    row = rows_of(Known(data.held_out(512)), Mute(2, 1), data)[1]
    assert (row["separation"], row["held_out_separation"], row["memory"]) == (0.5, 0.5, 0.5)
    assert (row["g_gradient"], row["d_gradient"]) == (0, 0)


def test_gradients_are_those_of_an_update() -> None:
    """With one batch of data, plain gradient descent of rate 1 moves the weights by the gradient."""
    from gankit.loop import update

    rows: list[dict[str, Any]] = []
    data = from_arrays("x", np.random.default_rng(0).normal(size=(9, 3)).astype("float32"))
    gan = tiny_gan(core={"signals": Signals(data, rows.append, 8)})
    index = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    gan.next_real = lambda: data.batch(index)
    z = gan.latent.draw(8, torch.Generator().manual_seed(0))
    gan.latent = type("Fixed", (), {"draw": lambda self, n, generator: z[:n]})()
    for phase in "gd":
        measure(gan)
        before = [p.detach().clone() for p in gan.parameters(phase)]
        gan.optimizers[phase] = torch.optim.SGD(gan.parameters(phase), lr=1.0)
        update(gan, phase, 1)
        moved = torch.cat([(a - b).flatten() for a, b in zip(before, gan.parameters(phase), strict=True)])
        assert rows[-1][f"{phase}_gradient"] == pytest.approx(moved.square().mean().sqrt().item(), rel=1e-3)
        assert rows[-1][f"{phase}_norm"] == pytest.approx(
            torch.cat([p.flatten() for p in before]).norm().item(), rel=1e-5
        )


def test_the_way_to_x_and_back_is_that_of_numpy() -> None:
    x = np.random.default_rng(0).normal([1, -2, 3], [1, 10, 0.1], size=(30, 3)).astype("float32")
    data, rows = from_arrays("x", x), []
    signals = Signals(data, rows.append)
    gan = tiny_gan(plugins=create(("bigan",), {})[0], core={"signals": signals})
    measure(gan)
    real = signals.real.double().numpy()
    with torch.no_grad():
        back = gan.generator(gan.players["encoder"].module(signals.real)).double().numpy()
    made = gan.draw(signals.n, torch.Generator().manual_seed(derive_seed(gan.seed, "evaluate")))[: len(real)].numpy()
    near, far = (np.sort((((y - real) / real.std(axis=0)) ** 2).sum(axis=1) ** 0.5) for y in (back, made))
    middle = (len(real) - 1) // 2
    assert rows[0]["reconstruction"] == pytest.approx(near[middle] / far[middle], rel=1e-5)


class Drawing(nn.Module):
    """An encoder that takes its noise from torch's global generator, as a dropout that is always on would."""

    def __init__(self, z_dim: int) -> None:
        super().__init__()
        self.layer = nn.Linear(3, z_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x + torch.randn_like(x))


def drawing(z_dim: int) -> nn.Module:
    return Drawing(z_dim)


LOOKED_AT = ["none", "packing", "spectral_norm", "bigan", "drawing", "veegan", "virtual_batch_norm", "diffaugment"]


@pytest.mark.parametrize("name", LOOKED_AT)
def test_looking_moves_nothing(name: str) -> None:
    from gankit import train

    options = {"bigan": {"encoder": f"{__file__}:drawing"}} if name == "drawing" else {}
    given = {"none": (), "drawing": ("bigan",)}.get(name, (name,))

    image = name in ("virtual_batch_norm", "diffaugment")
    shape = (40, 1, 28, 28) if image else (40, 3)
    data = from_arrays("x", np.random.default_rng(0).uniform(-1, 1, size=shape).astype("float32"))
    gans = []
    for looks in (True, False):
        rows: list[dict[str, Any]] = []
        plugins, _ = create(given, options)
        core = {"signals": Signals(data, rows.append, 16)} if looks else {}
        torch.manual_seed(0)
        gan = tiny_gan("image" if image else "vector", plugins, core)
        for step in (1, 2, 3):
            train(gan, step)
            measure(gan)
        assert len(rows) == 3 * looks
        gans.append(gan)
    one, two = gans
    for network, tensors in one.weights().items():
        assert all(torch.equal(tensor, two.weights()[network][key]) for key, tensor in tensors.items()), network
    assert one.rngs.keys() == two.rngs.keys()
    assert all(torch.equal(rng.get_state(), two.rngs[key].get_state()) for key, rng in one.rngs.items())
    assert all(module.training for player in one.players.values() for module in player.module.modules())
    assert all(p.grad is None or not p.grad.any() for p in one.parameters("d"))


# -- rules ----------------------------------------------------------------------------------------------------------

CONFIG = Config(steps=1000, batch=64, lr_g=2e-3, lr_d=3e-3, beta1=0.0)
TRUTH = {"step": None, "n": 400, "finite": 1.0, "spread": 1.0, "rank": 1.0, "duplicates": 0.0, "cells": [100] * 4,
         "labels": [100] * 4, "precision": 0.96, "train": 400, "held_out": 400}  # fmt: skip
HEALTHY = {
    "n": 400, "finite": 1.0, "spread": 1.0, "rank": 1.0, "duplicates": 0.0, "cells": [100] * 4, "cells_now": [100] * 4,
    "labels": [100] * 4, "separation": 0.7, "held_out_separation": 0.7, "memory": 0.5, "d_gradient": 0.01,
    "g_gradient": 0.01, "reconstruction": 0.02, "precision": 0.9,
}  # fmt: skip


def logged(count: int = 10, change: Callable[[int], dict[str, Any]] = lambda k: {}, **stats: Any) -> Record:
    """What a healthy run of ``count`` evaluations logs, one of them every 100 steps, changed."""
    rows = [HEALTHY | {"step": 100 * k, "d_norm": 5 + k, "g_norm": 5 + k} | change(k) for k in range(1, count + 1)]
    lines = [{"step": 100 * k, "d_loss": 1.3 + k / 100, "g_loss": 0.7 + k / 100} | stats for k in range(1, count + 1)]
    return Record(CONFIG, [TRUTH, *rows], [], lines)


def found(record: Record) -> dict[str, str]:
    return {finding.name: finding.word for finding in diagnose(record).findings}


def swap(share: float) -> Callable[[int], dict[str, Any]]:
    """Every second evaluation this share of the samples goes from the first anchor to the last."""
    return lambda k: {"cells_now": [200 - round(400 * share) * (k % 2), 100, 100, round(400 * share) * (k % 2)]}


def always(**values: Any) -> Callable[[int], dict[str, Any]]:
    return lambda k: values


def test_nothing_is_found_in_a_healthy_run() -> None:
    diagnosis = diagnose(logged())
    assert diagnosis == Diagnosis((), tuple(RULES), {})


@pytest.mark.parametrize(
    ("name", "sick", "well"),
    [
        ("not finite", always(finite=0.99), always(finite=1.0)),
        ("not finite", always(diverged="step 3: term 'adv'"), always()),
        ("collapse", always(spread=0.25), always(spread=0.26)),
        ("collapse", always(duplicates=0.65), always(duplicates=0.64)),
        ("lost modes", always(cells=[9, 191, 100, 100]), always(cells=[10, 190, 100, 100])),
        ("one class", always(labels=[40, 360, 0, 0]), always(labels=[41, 359, 0, 0])),
        ("oscillation", swap(0.3), swap(0.29)),
        ("saturated D", always(separation=1.0, held_out_separation=0.99), always(separation=1.0, held_out_separation=0.98)),
        ("overfitted D", always(memory=0.6), always(memory=0.59)),
        ("poor inverse", always(reconstruction=0.35), always(reconstruction=0.34)),
        ("frozen network", always(d_norm=5.0), lambda k: {"d_norm": 5.0 + 1e-7 * k}),
        ("frozen network", always(g_norm=5.0), lambda k: {"g_norm": 5.0 + 1e-7 * k}),
        ("frozen network", always(d_norm=5.0, g_norm=None), always(g_norm=None)),
        ("vanishing gradient", always(g_gradient=1e-6), always(g_gradient=1.1e-6)),
        ("exploding", always(g_gradient=10.0), always(g_gradient=9.0)),
        ("exploding", always(d_gradient=10.0), always(d_gradient=9.0)),
        ("poor samples", always(precision=0.48), always(precision=0.49)),
    ],
)  # fmt: skip
def test_each_rule_at_its_threshold(
    name: str, sick: Callable[[int], dict[str, Any]], well: Callable[[int], dict[str, Any]]
) -> None:
    assert list(found(logged(change=sick))) == [name]
    assert not found(logged(change=well))


def test_a_class_is_called_by_its_name() -> None:
    record = logged(change=always(labels=[400, 0, 0, 0]))
    (finding,) = diagnose(replace(record, classes=("cat", "dog", "owl", "yak"))).findings
    assert finding.seen.startswith("100% of the samples are of class cat, of which the data have 25%")


def test_rules_of_losses() -> None:
    assert found(logged(d_loss=1.3863, g_loss=0.6931)) == {"flat losses": "certain"}
    assert not found(logged(d_loss=1.3863))  # G's or D's alone may stand
    record = logged()
    moving = [{**row, "d_loss": 1.3863 + 1e-5 * (k % 2), "g_loss": 0.6931} for k, row in enumerate(record.stats)]
    assert not found(replace(record, stats=moving))
    assert found(logged(d_loss=-1000.0)) == {"exploding": "possible"}
    assert found(logged(d_loss=1e5)) == {"exploding": "certain"}
    for size in ("d_gradient", "g_gradient"):  # infinite, which JSON lacks
        assert found(logged(d_loss=1e5, change=always(**{size: None}))) == {"exploding": "certain"}
    before = logged(count=0)  # any evaluation: gradients are not measured yet, and none of 0 is shown
    lines = [{"step": step, "d_loss": 1e30, "g_loss": 2e30} for step in (50, 100)]
    (finding,) = diagnose(replace(before, stats=lines)).findings
    assert (finding.name, finding.seen) == ("exploding", "losses up to 2.0e+30, from step 50 to 100")
    assert not found(logged(d_loss=999.0))
    assert found(replace(record, stats=[*record.stats, {"step": 1001, "d_loss": None}])) == {"not finite": "certain"}


def test_the_further_beyond_the_surer() -> None:
    words = [found(logged(change=always(spread=s)))["collapse"] for s in (0.25, 0.2, 0.1)]
    assert words == ["possible", "likely", "certain"]
    both = diagnose(logged(change=always(spread=0.25, cells=[0, 0, 400, 0])))
    assert [(f.name, f.word) for f in both.findings] == [("lost modes", "certain"), ("collapse", "possible")]


def test_a_passing_state_is_no_finding() -> None:
    assert not found(logged(change=lambda k: {"spread": 0.0} if k < 9 else {}))
    assert not found(logged(change=lambda k: {"cells": [400, 0, 0, 0]} if k in (8, 10) else {}))
    early = diagnose(logged(2, always(spread=0.0)))
    assert not early.findings
    assert "too early" in early.unknown["collapse"] and "evaluations" in early.unknown["oscillation"]
    last = replace(logged(1, always(spread=0.0, step=1000)))  # of a run that evaluates at its end alone
    assert "collapse" in found(last)


def test_samples_are_judged_late_and_by_two_evaluations_of_three() -> None:
    poor = logged(change=always(precision=0.0))
    early = diagnose(replace(poor, signals=poor.signals[:8]))  # step 700 of 1,000
    assert not early.findings and "from 75% of the steps on" in early.unknown["poor samples"]
    assert found(replace(poor, config=replace(CONFIG, steps=1333))) == {"poor samples": "certain"}
    assert not found(logged(change=lambda k: {"precision": 0.6 if k > 8 else 0.0}))
    assert not found(logged(change=lambda k: {"precision": 0.0 if k == 10 else 0.6}))
    assert found(logged(change=lambda k: {"precision": 0.6 if k < 9 else 0.0})) == {"poor samples": "certain"}


def test_the_data_themselves_are_the_measure() -> None:
    """Data of one class, with twins, or with a mode that hardly exists are no fault of the generator."""
    record = logged(change=always(labels=[0, 400, 0, 0], duplicates=0.9, cells=[0, 200, 100, 100]))
    assert set(found(record)) == {"one class", "collapse", "lost modes"}
    own = TRUTH | {"labels": [0, 400, 0, 0], "duplicates": 0.9, "cells": [4, 196, 100, 100]}
    assert not found(replace(record, signals=[own, *record.signals[1:]]))
    few = TRUTH | {"held_out": 7}  # too few to tell 0.65 from chance
    record = logged(change=always(memory=0.65))
    assert "overfitted D" in found(record)
    assert not found(replace(record, signals=[few, *record.signals[1:]]))


def test_what_g_does_not_make_no_encoder_can_find() -> None:
    for cause, name in ((always(spread=0.2), "collapse"), (always(cells=[0, 0, 200, 200]), "lost modes")):
        record = logged(change=lambda k, cause=cause: {"reconstruction": 1.0} | cause(k))
        assert list(found(record)) == [name]
    assert "poor inverse" in found(logged(change=always(reconstruction=1.0, cells=[0, 133, 133, 134])))


def test_without_an_encoder_there_is_no_inverse() -> None:
    record = logged()
    rows = [{k: v for k, v in row.items() if k != "reconstruction"} for row in record.signals]
    diagnosis = diagnose(replace(record, signals=rows))
    assert not diagnosis.findings and diagnosis.unknown == {"poor inverse": "the run has no encoder"}
    assert "too early" in diagnose(logged(1)).unknown["poor inverse"]


def test_a_wasserstein_critic_may_separate() -> None:
    record = logged(change=always(separation=1.0, held_out_separation=1.0))
    assert "saturated D" in found(record)
    wasserstein = diagnose(replace(record, config=replace(CONFIG, loss="wasserstein")))
    assert not wasserstein.findings and "Wasserstein" in wasserstein.unknown["saturated D"]


def test_a_wasserstein_critic_may_drift_where_nothing_runs_away() -> None:
    """It is defined up to a constant, which is in the adversarial part of G's loss."""
    drifted = logged(g_loss=1e5)
    rows = [{**row, "g_loss/adv": 1e5} for row in drifted.stats]
    config = replace(CONFIG, loss="wasserstein")
    assert not found(replace(drifted, stats=rows, config=config))
    assert found(replace(drifted, stats=rows)) == {"exploding": "certain"}
    rows = [{**row, "g_loss/adv": 0.0} for row in drifted.stats]  # another term of G's
    assert found(replace(drifted, stats=rows, config=config)) == {"exploding": "certain"}
    assert found(replace(logged(d_loss=1e5), config=config)) == {"exploding": "certain"}


def test_runs_of_an_older_gankit_are_read_as_far_as_they_go() -> None:
    record = replace(logged(), signals=[])
    metrics = [{"step": None, "modes": 8.0}, *({"step": 100 * k, "modes": 7.0} for k in (1, 2, 3))]
    diagnosis = diagnose(replace(record, metrics=metrics))
    assert [(f.name, f.word) for f in diagnosis.findings] == [("lost modes", "likely")]
    assert "older gankit" in diagnosis.unknown["collapse"]
    assert set(diagnosis.healthy) == {"not finite", "flat losses", "exploding"}
    assert not found(replace(record, metrics=[*metrics, {"step": 400, "modes": 8.0}]))
    empty = diagnose(Record(CONFIG))
    assert not empty.findings and not empty.healthy and set(empty.unknown) == set(RULES)


def test_the_share_that_counts_as_lost() -> None:
    """EMPTY of what is due: at 100 of 400 due, below a tenth of that."""
    due = round(EMPTY * 100)
    assert "lost modes" in found(logged(change=always(cells=[due - 1, 391 - due, 5, 5])))


# -- suggestions --------------------------------------------------------------------------------------------------


def every_suggestion(config: Config, kind: str, path: str = "runs/RUN") -> dict[str, tuple[str, ...]]:
    """The commands of every rule's suggestions, by rule."""
    sick: dict[str, Record] = {
        "not finite": logged(change=always(finite=0.5)),
        "collapse": logged(change=always(spread=0.0)),
        "lost modes": logged(change=always(cells=[400, 0, 0, 0])),
        "one class": logged(change=always(labels=[400, 0, 0, 0])),
        "oscillation": logged(change=swap(0.5)),
        "saturated D": logged(change=always(separation=1.0, held_out_separation=1.0)),
        "overfitted D": logged(change=always(memory=1.0)),
        "poor inverse": logged(change=always(reconstruction=1.0)),
        "frozen network": logged(change=always(d_norm=1.0)),
        "flat losses": logged(d_loss=1.0, g_loss=1.0),
        "vanishing gradient": logged(change=always(g_gradient=0.0)),
        "exploding": logged(change=always(g_gradient=1e6)),
        "poor samples": logged(change=lambda k: {"precision": k / 100}),
    }
    assert sick.keys() == RULES.keys()
    commands = {}
    for name, record in sick.items():
        rows = [{**row, "lr_d": config.lr_d or 0.0, "lr_g": config.lr_g or 0.0} for row in record.stats]
        record = replace(record, config=config, kind=kind, path=path, stats=rows)
        findings = {finding.name: finding for finding in diagnose(record).findings}
        commands[name] = tuple(s.command for s in findings[name].to_try) if name in findings else ()
    return commands


@pytest.mark.parametrize(
    "settings",
    [
        ["--data", "p.npy"],
        [
            "--data",
            "p.npy",
            "--loss",
            "saturating",
            "--d-steps",
            "2",
            "--beta1",
            "0.5",
            "--lr-d",
            "0",
            "--name",
            "my run",
        ],
        ["--data", "p.npy", "--loss", "wasserstein", "--plugin", "weight_clipping"],
        [
            "--data",
            "p.npy",
            "--loss",
            "relativistic",
            "--plugin",
            "r1",
            "--plugin",
            "ttur",
            "-o",
            "r1.weight=0.1",
            "--batch",
            "15",
        ],
        ["--data", "x.npy", "--plugin", "spectral_norm", "--loss", "hinge"],
        ["--data", "p.npy", "--plugin", "pairwise_gp", "--z-dim", "2", "--z", "normal"],
        ["--data", "p.npy", "--plugin", "bigan", "--plugin", "r1"],
        ["--data", "p.npy", "--plugin", "bigan", "-o", "bigan.stochastic=yes"],
    ],
    ids=" ".join,
)
def test_every_suggestion_can_be_run(settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", np.random.default_rng(0).integers(0, 256, (40, 28, 28), dtype=np.uint8))
    np.save("p.npy", np.random.default_rng(0).normal(size=(40, 2)))
    gankit("run", *FAST, *settings)
    run = RunDir.find(None)
    record = Record.read(run)
    commands = {c for found in every_suggestion(record.config, record.kind, str(run.path)).values() for c in found}
    assert len(commands) > 5
    for command in sorted(commands):
        program, *arguments = shlex.split(command)
        assert program == "gankit"
        told = gankit(*arguments, "--dry-run", "--json").stdout
        config = json.loads(told)
        replaced = {"bigan"} if "pairwise_gp" in config["plugin"] else set()
        assert set(record.config.plugin) - replaced <= set(config["plugin"])
        assert config["name"] is None or config["name"] != record.config.name
    options = read_toml(run.path / "config.toml")[1]
    assert config["options"].items() >= options.items()


def test_what_is_on_or_refused_is_not_suggested() -> None:
    page = (ROOT / "docs" / "compatibility.md").read_text()
    names = re.findall(r"\*\*(\w+)\*\*", page)
    for row in re.findall(r"^\| \*\*(.+?) \|$", page, re.MULTILINE):
        on, *cells = re.split(r"\*\* \| | \| ", row)
        for kind, letter in (("vector", "v"), ("image", "i")):
            config = replace(CONFIG, plugin=(on,), loss="wasserstein" if on == "weight_clipping" else CONFIG.loss)
            commands = {c for found in every_suggestion(config, kind).values() for c in found}
            texts = " ".join(c for c in commands if f"--plugin {on} " in c)  # not those with another in its place
            added = set(re.findall(r"--plugin (\w+)", texts)) - {on}
            for name, cell in zip(names, cells, strict=True):
                own = dict(zip("vi", re.findall(r"v (\S+) i (\S+)", cell)[0], strict=True)) if "v " in cell else {}
                refused = own.get(letter, cell.strip()).isdigit()
                unfit = [c for c in cells if re.search(rf"{letter} \d", c)]  # the plugin itself is not for such data
                assert not (refused and name in added and len(unfit) < len(cells) / 2), (on, name, kind)
            assert f"--plugin {on} --plugin {on}" not in texts


def test_suggestions_begin_with_what_was_measured_best() -> None:
    outcomes = json.loads((ROOT / "tests" / "benchmarks" / "outcomes.json").read_text())
    first = every_suggestion(CONFIG, "plane")["lost modes"]
    order = [name for command in first for name in re.findall(r"--plugin (\w+)", command)]
    assert order[0] == "r1"
    modes = [
        np.mean([row["modes"] for row in outcomes if row["plugin"] == name and row["data"] == "grid"]) for name in order
    ]
    assert modes == sorted(modes, reverse=True)
    encoder = replace(CONFIG, plugin=("r2", "bigan"), z_dim=2)
    assert every_suggestion(encoder, "plane")["lost modes"][0].endswith("--plugin r2 --plugin pairwise_gp")
    for name in ("poor inverse", "poor samples"):
        one, drawn = [c for c in every_suggestion(encoder, "plane")[name] if "--steps" not in c][:2]
        assert one.endswith("--z-dim 1 --z uniform") and drawn.endswith("-o bigan.stochastic=yes")
    for yes in (True, "yes", "on"):  # as a file has it, or a command line
        drawing = replace(CONFIG, plugin=("bigan",), options={"bigan": {"stochastic": yes}})
        assert "stochastic" not in " ".join(every_suggestion(drawing, "plane")["poor inverse"])
    young = every_suggestion(CONFIG, "plane")["poor samples"]
    assert young[0].endswith("--steps 2000") and "--plugin r1" in young[1]
    poor = logged(change=lambda k: {"precision": 0.109 if k > 5 else 0.1})  # half-way is the fifth
    (ripe,) = diagnose(poor).findings
    assert not any("--steps" in suggestion.command for suggestion in ripe.to_try)
    far = every_suggestion(replace(CONFIG, lr_g=0.1), "plane")["oscillation"]
    assert far[0].endswith("--lr-g 0.002 --lr-d 0.003")
    moved = every_suggestion(CONFIG, "plane", "else where/RUN")["collapse"]
    assert all(c.startswith("gankit run --config 'else where/RUN/config.toml' --out 'else where' ") for c in moved)
    assert not any("--out" in c for c in every_suggestion(CONFIG, "plane")["collapse"])
    assert every_suggestion(replace(CONFIG, lr_d=0.0), "plane")["frozen network"][0].endswith("--lr-d 0.003")


def test_slower_rates_are_not_taken_back() -> None:
    """A run that followed the advice of a tenth of the recipe's rates is not told to go back to them, nor one near."""
    usual = "--lr-g 0.002 --lr-d 0.003"
    for g, d, told in ((1, 0.1, 0), (0.1, 0.1, 0), (4, 4, 0), (0.09, 1, 1), (1, 0.09, 1), (4.1, 1, 1), (1, 4.1, 1)):
        config = replace(CONFIG, lr_g=float(f"{0.002 * g:.3g}"), lr_d=float(f"{0.003 * d:.3g}"))
        for name in ("collapse", "exploding", "vanishing gradient"):
            commands = every_suggestion(config, "plane")[name]
            assert [c.endswith(usual) for c in commands].count(True) == told, (g, d, name)
            assert commands[0].endswith(usual) == bool(told)


def test_what_suggestions_say_was_measured_was_so() -> None:
    rows = json.loads((ROOT / "tests" / "benchmarks" / "outcomes.json").read_text())

    def mean(plugin: str, data: str, column: str) -> float:
        return float(np.mean([row[column] for row in rows if (row["plugin"], row["data"]) == (plugin, data)]))

    checked = 0
    others = {", where no plugin had": "none", ", where BiGAN had": "bigan"}
    for name, text in {**MEASURED, "none_slow": SLOWER, "pairwise_gp": PAIRWISE}.items():
        own, where, without = re.split(f"({'|'.join(others)}|$)", text, maxsplit=1)
        for number, of in re.findall(r"(\d+\.\d) of (8|25)", own):
            assert number == f"{mean(name, {'8': 'ring', '25': 'grid'}[of], 'modes'):.1f}", name
            checked += 1
        found = re.findall(r"(?:(\d+) and )?(\d+) %", own)
        for ring, grid in found:
            percents = [f"{100 * mean(name, data, 'high_quality'):.0f}" for data in ("ring", "grid")]
            assert grid == percents[1] and ring in ("", percents[0]), name
            checked += 1
        if without:
            modes, qualities = (
                [mean(others[where], data, column) for data in ("ring", "grid")] for column in ("modes", "high_quality")
            )
            expected = f" {modes[0]:.1f} and {modes[1]:.1f}, {100 * qualities[0]:.0f} and {100 * qualities[1]:.0f} %;"
            assert without.startswith(expected)
            checked += 1
    assert checked == 24  # a text that no longer states its figures is no text that states them right


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("p.npy", np.random.default_rng(0).normal(size=(40, 2)))


@pytest.mark.usefixtures("elsewhere")
def test_a_run_warns_once_and_names_the_command() -> None:
    output = gankit("run", *FAST, "--data", "p.npy", "--lr-d", "0", "--name", "r").output
    assert output.count("warning: frozen network (certain): the weights of the discriminator do not move") == 1
    assert "gankit diagnose runs/r" in output.splitlines()[-1]
    summary = json.loads(Path("runs/r/summary.json").read_text())
    assert "frozen network" in [finding["name"] for finding in summary["findings"]]
    output = gankit("diagnose", "r").output
    assert re.search(
        r"frozen network: certain\n  seen: .*--lr-d is 0\n  try 1: a rate above 0\n +gankit run --config", output
    )
    told = json.loads(gankit("diagnose", "runs/r", "--json").stdout)
    assert told["run"] == "runs/r"
    assert {"name", "seen", "sure", "word", "to_try"} == told["findings"][0].keys()
    assert {"why", "command"} == told["findings"][0]["to_try"][0].keys()
    looked = [f["name"] for f in told["findings"]] + told["nothing_seen"] + list(told["not_looked_at"])
    assert sorted(looked) == sorted(RULES)


@pytest.mark.usefixtures("elsewhere")
def test_a_record_has_the_names_of_the_classes_in_their_order() -> None:
    x = np.random.default_rng(0).normal(size=(40, 2))
    np.savez("l.npz", x=x, y=np.where(x[:, 0] > 0, "owl", "cat"))
    gankit("run", *FAST, "--data", "l.npz", "--name", "r")
    record = Record.read(RunDir(Path("runs/r")))
    assert record.classes == ("cat", "owl") and len(record.signals[0]["labels"]) == 2


@pytest.mark.usefixtures("elsewhere")
def test_a_run_that_stopped_is_diagnosed() -> None:
    Path("bad.py").write_text(
        "from gankit import hookimpl\n"
        "class Bad:\n"
        "    @hookimpl\n"
        "    def pre_d_loss(self, real_logits, step):\n"
        "        return {'bad': real_logits.mean() * (float('nan') if step == 8 else 0.0)}\n"
    )
    assert (
        "gankit diagnose runs/r"
        in gankit("run", "--plugin", "./bad.py:Bad", *FAST, "--data", "p.npy", "--name", "r", code=1).output
    )
    output = gankit("diagnose", "r").output
    assert "not finite: certain\n  seen: training stopped: step 8: term 'bad'" in output
    gankit("resume", "r", code=1)  # it goes on from step 5, and stops in the same place
    rows = RunDir(Path("runs/r")).rows("signals.jsonl")
    assert [row["step"] for row in rows if "diverged" in row] == [8]
    for name in ("signals.jsonl", "metrics.jsonl", "stats.jsonl"):  # as a kill before the first line leaves it
        Path("runs/r", name).unlink()
    assert "not looked at: not finite: nothing was logged yet" in gankit("diagnose", "r").output


@pytest.mark.usefixtures("elsewhere")
def test_a_continued_run_has_the_signs_of_one_that_never_stopped() -> None:
    gankit("run", *FAST, "--data", "p.npy", "--name", "whole")
    gankit("run", *FAST, "--data", "p.npy", "--name", "parts")
    for folder in Path("runs/parts/checkpoints").glob("step-*"):
        if int(folder.name[5:]) > 5:
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
    Path("runs/parts/summary.json").unlink()
    gankit("resume", "parts", "--no-report")
    whole, parts = (Path("runs", run, "signals.jsonl").read_text() for run in ("whole", "parts"))
    assert whole == parts
    assert [json.loads(line)["step"] for line in whole.splitlines()] == [None, 3, 6, 9, 12]


def test_only_what_is_likely_interrupts_and_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Finding] = []

    class Reporter:
        def metrics(self, step: int, found: dict[str, float]) -> None:
            assert found == {"modes": 3}

        def finding(self, finding: Finding) -> None:
            told.append(finding)

    states = [always(spread=0.25), always(spread=0.2), always(spread=0.0, cells=[400, 0, 0, 0])]
    watch = Watch(RunDir(tmp_path), Reporter())  # type: ignore[arg-type]
    for change in states:
        monkeypatch.setattr(Record, "read", lambda run, change=change: logged(change=change))
        watch(1, {"modes": 3})
    assert [(finding.name, finding.word) for finding in told] == [("collapse", "likely"), ("lost modes", "certain")]


# -- rates ----------------------------------------------------------------------------------------------------------


def benchmark(name: str = "diagnose") -> ModuleType:
    path = ROOT / "tests" / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmark_of_{name}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_rates_that_the_rules_have_on_the_stored_runs() -> None:
    suite = benchmark()
    rows = suite.load()
    assert len(rows) >= 200
    assert suite.report(rows) in (ROOT / "docs" / "diagnose.md").read_text()
    assert {row["family"] for row in rows} == set(suite.FAMILIES)


def test_the_page_has_what_became_of_the_runs_that_followed_the_advice() -> None:
    advice = benchmark("advice")
    rows = advice.load()
    assert rows == json.loads(advice.STORE.read_text())  # none of a case that is no more
    assert {row["case"] for row in rows} == set(advice.CASES)
    assert advice.table(rows) in (ROOT / "docs" / "diagnose.md").read_text()


def test_what_counts_as_well_and_what_the_table_of_advice_says() -> None:
    advice = benchmark("advice")
    case, flags = next(iter(advice.CASES.items()))

    def row(seed: int, *tries: dict[str, str], modes: float = 8.0) -> dict[str, Any]:
        after = [{"changed": "--x", "modes": modes, "high_quality": 0.9, "findings": findings} for findings in tries]
        before = {"findings": {"collapse": "certain"}} if tries else {"modes": 8.0, "high_quality": 0.5, "findings": {}}
        return {"case": case, "seed": seed, "flags": flags, "before": before, "tries": after}

    ill = {"oscillation": "possible"}
    first, third, never, well = row(0, {}), row(1, ill, ill, {}), row(2, ill, ill, ill), row(3)
    assert not advice.well(row(4, {}, modes=7.0))  # of which the rules see nothing
    assert [advice.well(r) for r in (first, third, never)] == [True, True, False]
    assert [advice.well(r, 1) for r in (first, third, never)] == [True, False, False]
    table = advice.table([first, third, never, well])
    assert f"| {case}: `{flags}` | collapse (3 of 4) | `--x` | 1, 2 of 3 | 0 -> 8 | 0% -> 90% |" in table
    assert "4 runs with something wrong, 3 of them with a finding" in table
    assert "Well after the first suggestion are 1 of the 3, after up to three 2." in table
    assert f"| {case}: `{flags}` | none on 1 seeds | - | - | - | - |" in advice.table([well])


def test_the_interval_of_a_rate_is_that_of_scipy() -> None:
    low, high = stats.binomtest(7, 9).proportion_ci(method="wilson")
    kinds = [(f"kind {i}", i < 7) for i in range(9)]
    for each in (1, 4):  # that runs of a kind end alike makes nothing surer
        assert benchmark().wilson(kinds * each) == f"{7 * each} of {9 * each}: 78% ({low:.0%} to {high:.0%})"


def test_every_rule_is_explained() -> None:
    page = (ROOT / "docs" / "diagnose.md").read_text()
    for name in RULES:
        assert re.search(rf"^\| {name} \| ", page, re.MULTILINE), name
