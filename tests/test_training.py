"""The core's own hook implementations, against closed forms."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gankit import GAN, Latent, hookimpl, train
from gankit.data import load
from gankit.errors import Diverged
from gankit.rundir import RunDir
from gankit.sampler import Sampler
from gankit.testing import tiny_gan
from gankit.training import Averaging, LinearDecay, Metrics, Stats, goodness, measure, picture, true_draw


class Snapshots:
    """The generator's state after every step."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    @hookimpl
    def post_step(self, gan: GAN, phase: str) -> None:
        if phase == "g":
            self.states.append({k: v.clone() for k, v in gan.generator.state_dict().items()})


@pytest.mark.parametrize("kind", ["vector", "image"])
def test_the_average_is_the_weighted_sum_of_all_past_generators_buffers_included(kind: str) -> None:
    snapshots = Snapshots()
    gan = tiny_gan(kind, core={"averaging": Averaging(0.9), "snapshots": snapshots})
    start = {k: v.clone().double() for k, v in gan.generator.state_dict().items()}
    train(gan, 6)
    decays = [min(0.9, step / (step + 10)) for step in range(1, 7)]
    expected = start
    for decay, state in zip(decays, snapshots.states, strict=True):
        expected = {k: decay * expected[k] + (1 - decay) * state[k].double() for k in state}
    average = gan.averages["generator"].state_dict()
    for key, value in average.items():
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), expected[key], rtol=1e-5, atol=1e-7)
        else:  # a counter is copied
            assert value == snapshots.states[-1][key]
    assert not any(p.requires_grad for p in gan.averages["generator"].parameters())
    samples = gan.draw(4, torch.Generator().manual_seed(0))
    z = gan.latent.draw(4, torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(samples, gan.averages["generator"].eval()(z))
    assert gan.generator.training


def test_no_average_when_switched_off() -> None:
    gan = tiny_gan(core={"averaging": Averaging(0.0)})
    train(gan, 2)
    assert not gan.averages
    assert "generator_ema" not in gan.weights()


def test_rates_are_flat_and_then_fall_linearly_to_zero() -> None:
    rates: list[tuple[float, float]] = []

    class Records:
        @hookimpl
        def pre_d_loss(self, gan: GAN) -> None:
            rates.append(tuple(gan.optimizers[phase].param_groups[0]["lr"] for phase in "dg"))  # type: ignore[arg-type]

    from gankit import Optim

    optim = {"d": Optim(4.0), "g": Optim(2.0)}
    gan = tiny_gan(plugins={"records": Records()}, core={"decay": LinearDecay(0.5, 10)}, optim=optim)
    rates.clear()
    train(gan, 10)
    factors = [1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]  # of steps 1 to 10: full up to step 5, then (10 - (step - 1)) / 5
    assert rates == [pytest.approx((4 * f, 2 * f)) for f in factors]


def test_rates_may_keep_a_share() -> None:
    gan = tiny_gan(core={"decay": LinearDecay(0.5, 4, 0.2)})
    seen = []
    for steps in (2, 3, 4):
        train(gan, steps)
        seen.append(gan.optimizers["g"].param_groups[0]["lr"] / gan.optim["g"].lr)
    assert seen == pytest.approx([1, 0.6, 0.2])


def test_stats_are_means_since_the_last_line() -> None:
    rows: list[dict[str, Any]] = []

    class Steps:
        @hookimpl
        def pre_d_loss(self, real_logits: Tensor, step: int) -> dict[str, Tensor]:
            return {"step": real_logits.mean() * 0 + step}

    gan = tiny_gan(plugins={"steps": Steps()}, core={"stats": Stats(4, rows.append)}, d_steps=2)
    train(gan, 8)
    assert [row["d_loss/step"] for row in rows] == [2.5, 6.5]
    for row in rows:
        assert row["d_loss"] == pytest.approx(row["d_loss/adv"] + row["d_loss/step"])
        assert row["ms/step"] > 0


def test_a_term_of_every_fourth_step_counts_as_much_as_one_a_fourth_as_strong_in_every_step() -> None:
    rows: list[dict[str, Any]] = []

    class Lazy:
        @hookimpl
        def pre_d_loss(self, real_logits: Tensor, step: int) -> dict[str, Tensor] | None:
            return {"lazy": real_logits.mean() * 0 + 40} if step % 4 == 0 else None

    train(tiny_gan(plugins={"lazy": Lazy()}, core={"stats": Stats(8, rows.append)}, d_steps=2), 8)
    assert rows[0]["d_loss/lazy"] == 10
    assert rows[0]["d_loss"] == pytest.approx(rows[0]["d_loss/adv"] + 10)


@pytest.mark.parametrize("phase", ["d", "g"])
def test_the_gradients_share_of_a_term(phase: str) -> None:
    """A term c ||theta||^2 / 2 has a gradient of norm c ||theta||; adv's is measured by hand."""
    rows: list[dict[str, Any]] = []

    def decay(gan: GAN) -> dict[str, Tensor]:
        return {"decay": sum((p.square().sum() for p in gan.parameters(phase)), torch.zeros(())) / 2}

    class DecayD:
        @hookimpl
        def pre_d_loss(self, gan: GAN) -> dict[str, Tensor]:
            return decay(gan)

    class DecayG:
        @hookimpl
        def post_g_loss(self, gan: GAN) -> dict[str, Tensor]:
            return decay(gan)

    from gankit.loop import update

    plugins = {"decay": DecayD() if phase == "d" else DecayG()}
    gan, twin = tiny_gan(plugins=plugins, core={"stats": Stats(1, rows.append)}), tiny_gan()
    gan.manager.meter.on = True
    norms = []

    class Looks:
        @hookimpl
        def sample(self, gan: GAN, phase: str) -> None:  # G's weights are the same in D's update
            norms.append(math.sqrt(sum(p.square().sum().item() for p in gan.parameters(phase))))

    gan.manager.register(Looks())
    if phase == "g":
        update(twin, "d", 1)
        before_d = [p.detach().clone() for p in twin.parameters("d")]
    twin.optimizers[phase] = torch.optim.SGD(twin.parameters(phase), lr=1.0)
    before = [p.detach().clone() for p in twin.parameters(phase)]
    update(twin, phase, 1)
    adv = math.sqrt(sum((a - b).square().sum().item() for a, b in zip(before, twin.parameters(phase), strict=True)))
    train(gan, 1)
    if phase == "g":  # D was updated alike in both
        assert all(torch.equal(a, b) for a, b in zip(before_d, gan.parameters("d"), strict=True))
    norm = norms["dg".index(phase)]
    assert rows[0][f"gradient_share/{phase}/decay"] == pytest.approx(norm / (norm + adv), rel=1e-4)
    assert rows[0]["ms/decay"] > 0


def test_milliseconds_are_of_training_alone_and_a_plugins_of_its_hooks_and_its_backward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A clock that plugins and an evaluation move on: what they should cost is known."""
    now = 0.0

    def clock() -> float:
        return now

    def pass_by(seconds: float) -> None:
        nonlocal now
        now += seconds

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
            pass_by(0.007)
            return gradient

    class Term:
        @hookimpl
        def pre_d_loss(self, real_logits: Tensor) -> dict[str, Tensor]:
            pass_by(0.010)
            return {"term": Slow.apply(real_logits.mean())}  # type: ignore[no-untyped-call]

    class Evaluates:
        @hookimpl
        def post_step(self, phase: str, step: int) -> None:
            if phase == "g" and step % 10 == 0:
                pass_by(5)
                stats.pause(5)

    rows: list[dict[str, Any]] = []
    monkeypatch.setattr("gankit.training.time.perf_counter", clock)
    stats = Stats(48, rows.append)
    gan = tiny_gan(plugins={"term": Term()}, core={"stats": stats, "evaluates": Evaluates()}, d_steps=3)
    gan.manager.meter.clock, gan.manager.meter.on = clock, True  # of the first step, and by itself of the 47th
    train(gan, 48)
    assert rows[0]["ms/term"] == pytest.approx(3 * 10 + 3 * 7)
    # two of the steps are probed: their first update of D is differentiated once more
    assert rows[0]["ms/step"] == pytest.approx(3 * (10 + 7) + 2 * 7 / 48)


class Masked(nn.Module):
    """A network with a constant that is not finite, as a transformer's mask is."""

    def __init__(self, inside: nn.Module, persistent: bool) -> None:
        super().__init__()
        self.inside = inside
        self.register_buffer("mask", torch.full((3,), -math.inf), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inside(x)
        return out + torch.exp(self.mask).sum()  # type: ignore[arg-type]


@pytest.mark.parametrize("persistent", [True, False])
def test_a_constant_that_is_not_finite_is_neither_averaged_nor_taken_for_divergence(
    persistent: bool, tmp_path: Path
) -> None:
    from gankit.training import Evaluator, Saver

    data, run, stats = load("ring"), RunDir.create(tmp_path, None, "x"), Stats(1, lambda row: None)
    saver = Saver(run, Evaluator(run, data, 0, 10, stats, lambda step, found: None), 1, 10, 2, stats)
    G, D = nn.Linear(4, 3), nn.Linear(3, 1)
    gan = tiny_gan(
        core={"averaging": Averaging(0.9), "saver": saver},
        generator=Masked(G, persistent), discriminator=Masked(D, persistent),
    )  # fmt: skip
    train(gan, 2)
    assert [p.name for p in run.steps()] == ["step-000001", "step-000002"]
    assert gan.draw(5, torch.Generator().manual_seed(0)).isfinite().all()
    assert torch.equal(gan.averages["generator"].mask, torch.full((3,), -math.inf))  # type: ignore[arg-type]


def test_the_average_starts_from_what_the_last_plugin_made_of_the_generator() -> None:
    class Late:
        @hookimpl(trylast=True)
        def setup(self, gan: GAN) -> None:
            gan.generator[0] = nn.utils.parametrizations.spectral_norm(gan.generator[0])  # type: ignore[index, operator]

    gan = tiny_gan(
        plugins={"late": Late()}, core={"averaging": Averaging(0.9)},
        generator=nn.Sequential(nn.Linear(4, 3)), discriminator=nn.Linear(3, 1),
    )  # fmt: skip
    assert gan.averages["generator"].state_dict().keys() == gan.generator.state_dict().keys()


def test_a_state_holds_the_random_state_of_the_one_gpu_that_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    gan, used, state = tiny_gan(), [], torch.get_rng_state()
    assert len(gan.state_dict()["global_rngs"]) == 1
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: (used.append(device), state)[1])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda value, device: used.append(device))
    gan.device = torch.device("cuda", 1)
    rngs = {"global_rngs": gan.state_dict()["global_rngs"]}
    gan.load_state_dict({**gan.state_dict(), **rngs})
    assert len(rngs["global_rngs"]) == 2 and set(used) == {gan.device}


def test_probing_does_not_change_training() -> None:
    class Term:
        @hookimpl
        def pre_d_loss(self, real_logits: Tensor) -> dict[str, Tensor]:
            return {"term": real_logits.square().mean()}

    watched = tiny_gan(plugins={"term": Term()}, core={"stats": Stats(1, lambda row: None)})
    alone = tiny_gan(plugins={"term": Term()})
    watched.manager.meter.on = True
    for gan in (watched, alone):
        train(gan, 2)
    for name, weights in watched.weights().items():
        assert all(torch.equal(value, alone.weights()[name][key]) for key, value in weights.items())


def test_a_weight_that_is_not_finite_is_never_saved(tmp_path: Path) -> None:
    from gankit.training import Evaluator, Saver

    data, run, stats = load("ring"), RunDir.create(tmp_path, None, "x"), Stats(1, lambda row: None)
    evaluator = Evaluator(run, data, 0, 10, stats, lambda step, found: None)
    saver = Saver(run, evaluator, 1, 10, 2, stats)
    gan = tiny_gan(core={"saver": saver})
    train(gan, 1)
    assert [p.name for p in run.steps()] == ["step-000001"]
    with torch.no_grad():
        next(gan.generator.parameters())[0] = math.inf
    with pytest.raises(Diverged, match="step 1: weight .* of the generator is not finite"):
        saver.now(gan)
    assert [p.name for p in run.steps()] == ["step-000001"]


def test_the_best_has_more_modes_then_more_quality_then_less_distance() -> None:
    scores = [
        {"modes": 7, "high_quality": 0.99, "sliced_wasserstein": 0.1},
        {"modes": 8, "high_quality": 0.50, "sliced_wasserstein": 0.3},
        {"modes": 8, "high_quality": 0.60, "sliced_wasserstein": 0.4},
        {"modes": 8, "high_quality": 0.60, "sliced_wasserstein": 0.2},
    ]
    assert sorted(scores[::-1], key=goodness) == scores
    assert goodness({"sliced_wasserstein": 0.1}) > goodness({"sliced_wasserstein": 0.2})
    unequal = {"modes": 11.0, "high_quality": 0.99, "kl_to_truth": 0.1, "sliced_wasserstein": 0.1}
    assert goodness({**unequal, "high_quality": 0.9, "kl_to_truth": 0.01}) > goodness(unequal)
    assert goodness({**unequal, "modes": 10.0, "kl_to_truth": 0.01}) < goodness(unequal)
    grown, coarse = ({"resolution": side, "sliced_wasserstein": w} for side, w in ((32, 0.2), (8, 0.1)))
    assert goodness(grown) > goodness(coarse)


def test_metrics_of_true_data_are_near_perfect_and_repeatable() -> None:
    metrics = Metrics(load("ring"), 2500)
    draw = true_draw(metrics.data)
    truth = metrics.of(draw(2500))
    assert truth["modes"] == 8
    assert truth["high_quality"] == pytest.approx(1 - math.exp(-4.5), abs=0.01)
    assert truth["sliced_wasserstein"] < 0.03
    assert metrics.of(draw(2500)) == truth
    assert metrics.of(torch.zeros(2500, 2))["sliced_wasserstein"] > 0.4


def test_true_data_take_the_generators_place_for_every_plugin() -> None:
    data = load("ring")
    shown: list[tuple[Tensor, int | None]] = []

    class Mean:
        @hookimpl
        def evaluate(self, gan: GAN, draw: Callable[[int], Tensor], step: int | None) -> dict[str, float]:
            shown.append((draw(100), step))
            return {"mean": shown[-1][0].mean().item()}

    gan = tiny_gan(plugins={"mean": Mean()})
    gan.manager.meter.on = True
    assert measure(gan) == measure(gan) != measure(gan, truth=data) == measure(gan, truth=data)
    assert [step for _, step in shown] == [0, 0, None, None]
    assert shown[0][0].shape == (100, 3) and shown[2][0].shape == (100, 2)
    training = {tuple(row) for row in data.batch(torch.arange(len(data))).tolist()}
    assert {tuple(row) for row in shown[2][0].tolist()} <= training
    assert len(true_draw(data)(10**9)) == len(data)
    assert gan.manager.meter.on and not gan.manager.meter.seconds  # evaluation is no part of a step's cost


def test_the_best_is_found_by_metrics_whatever_their_provenance() -> None:
    more = {"modes@digits,n=26000,0a1b2c3d": 700, "sliced_wasserstein": 0.5}
    fewer = {"modes@digits,n=26000,0a1b2c3d": 600, "sliced_wasserstein": 0.1}
    assert goodness(more) > goodness(fewer)


def test_pictures_of_vectors_and_images(tmp_path: Path) -> None:
    from PIL import Image

    ring = load("ring")
    gan = GAN(nn.Linear(2, 2), nn.Linear(2, 1), shape=(2,), latent=Latent(2)).build()
    picture(gan, ring, tmp_path / "a.png")
    before = gan.stream("latent").get_state()
    picture(gan, ring, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert torch.equal(gan.stream("latent").get_state(), before)
    with Image.open(tmp_path / "a.png") as image:
        assert image.size[0] > 400


class TestSampler:
    def test_every_sample_once_per_epoch_in_a_new_order_each_time(self) -> None:
        data = load("ring")
        sampler = Sampler(data, 1000, torch.Generator().manual_seed(0))
        epochs = [torch.cat([sampler() for _ in range(100)]) for _ in range(2)]
        true = data.batch(torch.arange(len(data)))
        for epoch in epochs:
            assert torch.equal(epoch.sort(0).values, true.sort(0).values)
        assert not torch.equal(*epochs)

    def test_what_is_left_over_is_dropped_and_small_data_is_repeated(self, tmp_path: Path) -> None:
        import numpy as np

        np.save(tmp_path / "x.npy", np.arange(40.0).reshape(20, 2))
        data = load(str(tmp_path / "x.npy"))
        assert len(data) == 18
        sampler = Sampler(data, 8, torch.Generator().manual_seed(0))
        first = torch.cat([sampler(), sampler()])
        assert len(first.unique(dim=0)) == 16
        assert Sampler(data, 50, torch.Generator())().shape == (50, 2)

    @pytest.mark.parametrize("drawn", [0, 1, 3, 99, 100, 101, 250])
    def test_it_continues_where_it_stopped(self, drawn: int) -> None:
        data = load("ring")
        one = Sampler(data, 1000, torch.Generator().manual_seed(0))
        for _ in range(drawn):
            one()
        two = Sampler(data, 1000, torch.Generator().manual_seed(7))
        two.load_state_dict(one.state_dict())
        for _ in range(120):
            assert torch.equal(one(), two())
