"""BiGAN against a loop written by hand, its loss by hand, and its gradients side by side."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gankit_bigan import BiGAN
from gankit_gradient_penalty import GradientPenalty
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import softplus

from gankit import GAN, Batch, Latent, UsageError, View, hookimpl, losses, networks, train
from gankit.gan import derive_seed
from gankit.options import build, options_of
from gankit.testing import run, tiny_gan

torch.set_num_threads(1)

Array = NDArray[np.float64]
README = Path(__file__).parents[1] / "README.md"
KINDS = ["vector", "image"]


def np_softplus(x: Array) -> Array:
    return np.logaddexp(0, x)


# -- against a loop by hand --------------------------------------------------------------------------------------------


def train_by_hand(gan: GAN, steps: int, seed: int = 0, *, wrong: str = "") -> None:
    """BiGAN in plain PyTorch on the networks of an untrained ``gan``; ``wrong`` names a slip to make."""
    E, G, D = (gan.players[name].module for name in ("encoder", "generator", "discriminator"))
    shape, batch = gan.shape, gan.batch_size
    data, latent = (torch.Generator().manual_seed(derive_seed(seed, name)) for name in ("data", "latent"))
    optimizers = {net: torch.optim.Adam(net.parameters(), lr=2e-4, betas=(0.5, 0.999), fused=True) for net in (E, G, D)}

    def draw() -> tuple[Tensor, Tensor]:
        return torch.rand(batch, *shape, generator=data) * 2 - 1, torch.randn(batch, gan.latent.dim, generator=latent)

    def minimise(loss: Tensor, *nets: nn.Module) -> None:
        for net in (E, G, D):
            net.zero_grad()
        loss.backward()
        for net in nets:
            optimizers[net].step()

    for _ in range(steps):
        x, z = draw()
        code, players = (E(x), (D, E)) if wrong == "E trained with D, too" else (E(x).detach(), (D,))
        d_loss = softplus(-D(x, code)).mean() + softplus(D(G(z).detach(), z)).mean()
        minimise(d_loss, *players)
        x, z = draw()
        real, fake = D(x, E(x)), D(G(z), z)
        g_loss = softplus(-fake).mean() + softplus(real).mean()
        if wrong == "G and E minimise G's half only":
            g_loss = softplus(-fake).mean()
        if wrong == "saturating":
            g_loss = -softplus(-real).mean() - softplus(fake).mean()
        if wrong == "E minimises D's side":
            g_loss = softplus(-fake).mean() + softplus(-real).mean()
        if wrong == "latents not shown":
            g_loss = softplus(-D(G(z), torch.zeros_like(z))).mean() + softplus(real).mean()
        minimise(g_loss, G, E)


def differing(a: GAN, b: GAN) -> set[str]:
    """The networks in which any weight or running statistic differs by a bit."""
    ours, theirs = a.weights(), b.weights()
    assert ours.keys() == theirs.keys() == {"generator", "encoder", "discriminator"}
    return {name for name in ours if any(not torch.equal(ours[name][k], theirs[name][k]) for k in ours[name])}


@pytest.mark.parametrize("kind", KINDS)
def test_it_equals_a_loop_written_by_hand_bit_for_bit(kind: str) -> None:
    ours, _ = run({"bigan": BiGAN()}, kind=kind, steps=5)
    twin = tiny_gan(kind, {"bigan": BiGAN()})
    assert differing(ours, twin) == {"generator", "encoder", "discriminator"}
    train_by_hand(twin, 5)
    assert differing(ours, twin) == set()


@pytest.mark.parametrize(
    "wrong",
    [
        "E trained with D, too",
        "G and E minimise G's half only",
        "saturating",
        "E minimises D's side",
        "latents not shown",
    ],
)
def test_the_comparison_sees_a_wrong_loop(wrong: str) -> None:
    ours, _ = run({"bigan": BiGAN()}, steps=5)
    twin = tiny_gan(plugins={"bigan": BiGAN()})
    train_by_hand(twin, 5, wrong=wrong)
    assert differing(ours, twin) != set()


# -- the loss and its gradients ----------------------------------------------------------------------------------------


class Scores:
    """Scores every update's pairs itself: the critic on (x, E(x)) and on (G(z), z), from raw samples."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, Array, Array]] = []

    def _add(self, phase: str, gan: GAN, critic: Callable[..., Tensor], batch: Batch, view: View) -> None:
        code, fake = gan.players["encoder"].module(batch.real), gan.generator(batch.z)
        assert torch.equal(batch.extra["code"], code) and torch.equal(batch.fake, fake)
        assert [len(side) for side in view] == [2, 2]
        logits = critic(batch.real, code), critic(fake, batch.z)
        self.seen.append((phase, *(t.detach().double().numpy() for t in logits)))

    @hookimpl
    def pre_d_loss(self, gan: GAN, critic: Callable[..., Tensor], batch: Batch, view: View) -> None:
        self._add("d", gan, critic, batch, view)

    @hookimpl
    def post_g_loss(self, gan: GAN, critic: Callable[..., Tensor], batch: Batch, view: View) -> None:
        self._add("g", gan, critic, batch, view)


BY_HAND: dict[str, tuple[Callable[[Array, Array], float], Callable[[Array, Array], float]]] = {
    "non_saturating": (
        lambda r, f: np_softplus(-r).mean() + np_softplus(f).mean(),
        lambda r, f: np_softplus(r).mean() + np_softplus(-f).mean(),
    ),
    "saturating": (
        lambda r, f: np_softplus(-r).mean() + np_softplus(f).mean(),
        lambda r, f: -np_softplus(-r).mean() - np_softplus(f).mean(),
    ),
    "wasserstein": (lambda r, f: f.mean() - r.mean(), lambda r, f: r.mean() - f.mean()),
    "hinge": (
        lambda r, f: np.maximum(1 - r, 0).mean() + np.maximum(1 + f, 0).mean(),
        lambda r, f: r.mean() - f.mean(),
    ),
    "least_squares": (
        lambda r, f: ((r - 1) ** 2).mean() / 2 + (f**2).mean() / 2,
        lambda r, f: (r**2).mean() / 2 + ((f - 1) ** 2).mean() / 2,
    ),
    "relativistic": (lambda r, f: np_softplus(f - r).mean(), lambda r, f: np_softplus(r - f).mean()),
    "relativistic_average": (
        lambda r, f: np_softplus(f.mean() - r).mean() + np_softplus(f - r.mean()).mean(),
        lambda r, f: np_softplus(r.mean() - f).mean() + np_softplus(r - f.mean()).mean(),
    ),
}


def test_every_loss_has_its_form_below() -> None:
    assert BY_HAND.keys() == losses.LOSSES.keys()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", BY_HAND)
def test_both_losses_are_those_written_by_hand(loss: str, kind: str) -> None:
    """For the default: D softplus(-D(x, E(x))) + softplus(D(G(z), z)), G and E the same with the signs swapped."""
    scores = Scores()
    gan, log = run({"bigan": BiGAN(), "scores": scores}, kind=kind, loss=loss)
    assert len(scores.seen) == len(log.updates) == 6
    for (phase, real, fake), (logged, _, terms) in zip(scores.seen, log.updates, strict=True):
        assert phase == logged
        assert set(terms) == {"adv"}
        d, g = (form(real, fake) for form in BY_HAND[loss])
        assert terms["adv"] == pytest.approx(d if phase == "d" else g, rel=1e-5, abs=1e-6)
    assert all(w.isfinite().all() for weights in gan.weights().values() for w in weights.values())
    assert differing(gan, tiny_gan(kind, {"bigan": BiGAN()}, loss=loss)) == {"generator", "encoder", "discriminator"}


def gradients(gan: GAN, loss: Tensor) -> dict[str, Tensor | None]:
    """d loss of each network's first parameter; None where the graph does not lead there."""
    names = list(gan.players)
    first = [next(gan.players[name].module.parameters()) for name in names]
    return dict(zip(names, torch.autograd.grad(loss, first, retain_graph=True, allow_unused=True), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_e_learns_from_the_real_side_only_and_g_from_the_fake_one(kind: str) -> None:
    gan = tiny_gan(kind, {"bigan": BiGAN()})
    batch = gan.hook.sample(gan=gan, real=gan.next_real(), z=gan.next_z(), phase="g", step=1)
    view = gan.hook.view(gan=gan, batch=batch, phase="g", step=1)
    real_logits, fake_logits = gan.discriminator(*view.real), gan.discriminator(*view.fake)
    whole = gradients(gan, gan.loss.g(real_logits=real_logits, fake_logits=fake_logits))
    real, fake = gradients(gan, softplus(real_logits).mean()), gradients(gan, softplus(-fake_logits).mean())
    assert real["generator"] is None
    assert fake["encoder"] is None
    assert real["encoder"] is not None and real["encoder"].any()
    assert fake["generator"] is not None and fake["generator"].any()
    torch.testing.assert_close(whole["encoder"], real["encoder"])
    torch.testing.assert_close(whole["generator"], fake["generator"])


def test_in_ds_update_nothing_leads_to_e_or_g() -> None:
    class Graph:
        @hookimpl
        def pre_d_loss(self, gan: GAN, real_logits: Tensor, fake_logits: Tensor, batch: Batch) -> None:
            assert not batch.extra["code"].requires_grad and not batch.fake.requires_grad
            found = gradients(gan, real_logits.sum() + fake_logits.sum())
            assert {name for name, gradient in found.items() if gradient is not None} == {"discriminator"}

    run({"bigan": BiGAN(), "graph": Graph()}, steps=1)


def test_e_learns_to_invert_g() -> None:
    """On data that G makes itself at the start, training brings E(G(z)) to z: sign and sides are right."""
    stream = torch.Generator().manual_seed(0)
    gan = tiny_gan(
        plugins={"bigan": BiGAN()},
        z_dim=1,
        batch_size=128,
        generator=lambda shape: Line(),
        discriminator=lambda shapes: networks.discriminator(shapes, width=32),
        architecture={"width": 32},
    )
    for optim in gan.optimizers.values():
        optim.param_groups[0]["lr"] = 3e-3
    gan.next_real = lambda: Line()(torch.randn(128, 1, generator=stream)).detach()
    z = torch.linspace(-1.5, 1.5, 50)[:, None]

    def error() -> float:
        with torch.no_grad():
            return float((gan.players["encoder"].module(Line()(z)) - z).abs().mean())

    before = error()
    train(gan, 250)
    assert before > 0.5
    assert error() < 0.25


class Line(nn.Module):
    """z (B, 1) -> (B, 3), the curve (z, 2 z, -z); its one parameter adds a constant that is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(3))

    def forward(self, z: Tensor) -> Tensor:
        return z * torch.tensor([1.0, 2.0, -1.0]) + self.shift


# -- the encoder -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3,), (1, 28, 28)])
@pytest.mark.parametrize("prior", ["normal", "uniform"])
def test_the_encoder_ends_in_the_priors_range(shape: tuple[int, ...], prior: str) -> None:
    gan = GAN(
        generator=networks.generator(shape, 4, width=8),
        discriminator=networks.discriminator([shape, (4,)], width=8),
        shape=shape,
        latent=Latent(4, prior),
        plugins={"bigan": BiGAN()},
        architecture={"width": 8},
        batch_size=16,
    ).build()
    with torch.no_grad():
        for parameter in gan.players["encoder"].module.parameters():
            parameter *= 20
        codes = gan.players["encoder"].module(torch.randn(16, *shape, generator=torch.Generator().manual_seed(0)) * 100)
    assert codes.shape == (16, 4)
    if prior == "uniform":
        assert codes.abs().max() <= 1
        assert codes.abs().max() > 0.99  # and reaches to the edge
    else:
        assert codes.abs().max() > 10


def test_the_encoder_takes_the_architecture_of_the_run() -> None:
    gan = tiny_gan(plugins={"bigan": BiGAN()}, architecture={"width": 5, "depth": 2})
    sizes = [p.shape[0] for p in gan.players["encoder"].module.parameters() if p.dim() == 2]
    assert sizes == [5, 5, 4]


FACTORIES = """
import torch
from torch import nn

class Mine(nn.Module):
    def __init__(self, features, z_dim):
        super().__init__()
        self.linear = nn.Linear(features, z_dim)

    def forward(self, x):
        return self.linear(x.flatten(1))

def factory(shape, z_dim):
    return Mine(torch.Size(shape).numel(), z_dim)

def by_latent(latent, z_dim):
    assert latent == "normal"
    return Mine(3, z_dim)

def too_long(shape, z_dim):
    return Mine(torch.Size(shape).numel(), z_dim + 1)

def one_number(shape, z_dim):
    return nn.Sequential(Mine(torch.Size(shape).numel(), 1), nn.Flatten(0))

def function(shape, z_dim):
    return lambda x: x
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(FACTORIES)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_an_encoder_of_ones_own(file: Path, kind: str) -> None:
    before = torch.get_rng_state()
    plugin = build(BiGAN, {"encoder": f"{file}:factory"}, "bigan")
    gan, _ = run({"bigan": plugin}, kind=kind)
    untrained, other = (tiny_gan(kind, {"bigan": BiGAN(encoder=f"{file}:factory")}, seed=seed) for seed in (0, 1))
    assert type(gan.players["encoder"].module).__name__ == "Mine"
    assert differing(gan, untrained) == {"generator", "encoder", "discriminator"}  # it is trained
    assert "encoder" in differing(untrained, other)  # and initialised from the seed
    again = tiny_gan(kind, {"bigan": BiGAN(encoder=f"{file}:factory")})
    assert differing(untrained, again) == set()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_factory_asks_for_what_it_needs(file: Path) -> None:
    gan = tiny_gan(plugins={"bigan": BiGAN(encoder=f"{file}:by_latent")})
    assert gan.players["encoder"].module.linear.weight.shape == (4, 3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("too_long", r"the encoder gives codes of shape \(5,\), the latent is \(4,\)"),
        ("one_number", r"the encoder gives codes of shape \(\), the latent is \(4,\)"),
        ("function", "the encoder factory '.*mine.py:function' returned a function, not a torch Module"),
        ("factroy", "has no 'factroy' \\(did you mean 'factory'\\?\\)"),
    ],
)
def test_a_wrong_encoder_is_refused_in_one_sentence(file: Path, name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        tiny_gan(plugins={"bigan": BiGAN(encoder=f"{file}:{name}")})
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused() -> None:
    with pytest.raises(UsageError, match="nowhere.py is no file"):
        tiny_gan(plugins={"bigan": BiGAN(encoder="nowhere.py:factory")})


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(UsageError, match="did you mean 'encoder'"):
        build(BiGAN, {"encode": "x"}, "bigan")


# -- in company --------------------------------------------------------------------------------------------------------


def test_symmetric_twice_is_symmetric_once() -> None:
    for name in losses.LOSSES:
        once = losses.make(name).symmetric()
        assert once == once.symmetric()
        assert once.g_sides == ("real_logits", "fake_logits")


@pytest.mark.parametrize("kind", KINDS)
def test_more_d_steps_and_a_penalty_beside_it(kind: str) -> None:
    gan, log = run({"bigan": BiGAN(), "gradient_penalty": GradientPenalty()}, kind=kind, d_steps=2, loss="wasserstein")
    both = ["adv", "gradient_penalty"]
    assert [sorted(terms) for _, _, terms in log.updates] == [both, both, ["adv"]] * 3
    assert all(math.isfinite(value) for _, _, terms in log.updates for value in terms.values())
    assert {p.phase for name, p in gan.players.items() if name != "discriminator"} == {"g"}


def test_a_saved_run_goes_on_bit_for_bit() -> None:
    whole = tiny_gan(plugins={"bigan": BiGAN()})
    train(whole, 2)
    weights, state = copy.deepcopy((whole.weights(), whole.state_dict()))
    reals = [whole.next_real() for _ in range(4)]
    whole.next_real = iter(reals).__next__
    train(whole, 4)
    resumed = tiny_gan(plugins={"bigan": BiGAN()}, seed=5)
    resumed.load_weights(weights)
    resumed.load_state_dict(state)
    resumed.next_real = iter(reals).__next__
    train(resumed, 4)
    assert differing(whole, resumed) == set()


# -- the README --------------------------------------------------------------------------------------------------------


def test_the_readmes_code_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, str(README), "exec"), {})


def test_the_readmes_table_is_the_options() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \| (.+?) \|$", README.read_text(), re.MULTILINE)
    assert rows == [(o.name, str(o.default).lower(), o.help) for o in options_of(BiGAN).values()]
