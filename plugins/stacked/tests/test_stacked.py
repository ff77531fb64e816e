"""Stacking against numpy, a loop written by hand, and gradients that must not be there."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gankit_gradient_penalty import GradientPenalty
from gankit_packing import Packing
from gankit_spectral_norm import SpectralNorm
from gankit_stacked import Refiner, Stacked, StackedGenerator, beside, consistency_penalty, down
from gankit_unrolled import Unrolled
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import softplus

from gankit import GAN, Batch, Latent, UsageError, View, attach, hookimpl, losses, networks, train
from gankit.checks import spectral_norms
from gankit.gan import derive_seed
from gankit.inversion import ivom
from gankit.loop import update
from gankit.networks import folded
from gankit.options import build
from gankit.plugins import create
from gankit.testing import run, tiny_gan
from gankit.training import Averaging

torch.set_num_threads(1)

Array = NDArray[np.float64]


def numpy_down(x: Array) -> Array:
    b, c, h, w = x.shape
    return x.reshape(b, c, h // 2, 2, w // 2, 2).mean((3, 5))


def numpy_up(x: Array) -> Array:
    return x.repeat(2, axis=2).repeat(2, axis=3)


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


def stacked(**options: Any) -> dict[str, object]:
    return {"stacked": Stacked(**options)}


# -- the functions -----------------------------------------------------------------------------------------------------

sizes = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5))


@settings(max_examples=30, deadline=None)
@given(sizes, st.integers(0, 99))
def test_down_is_the_mean_of_blocks_of_two_by_two(size: tuple[int, int, int, int], seed: int) -> None:
    b, c, h, w = size
    x = images(b, c, 2 * h, 2 * w, seed=seed)
    np.testing.assert_allclose(down(x).numpy(), numpy_down(x.numpy()), atol=1e-12)
    if h * w > 1:
        assert not np.allclose(x[:, :, ::2, ::2].numpy(), numpy_down(x.numpy()))  # every second pixel is something else


def test_down_by_hand() -> None:
    x = torch.tensor([[[[1.0, 2, 3, 5], [3, 6, 4, 8]]]], requires_grad=True)
    assert down(x).tolist() == [[[[3.0, 5.0]]]]
    down(x)[0, 0, 0, 1].backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None and x.grad.tolist() == [[[[0, 0, 0.25, 0.25], [0, 0, 0.25, 0.25]]]]


@settings(max_examples=30, deadline=None)
@given(sizes, st.integers(1, 3))
def test_beside_puts_each_pixel_over_its_block(size: tuple[int, int, int, int], channels: int) -> None:
    b, c, h, w = size
    x, small = images(b, c, 2 * h, 2 * w), images(b, channels, h, w, seed=1)
    both = beside(x, small)
    np.testing.assert_array_equal(both[:, :c].numpy(), x.numpy())
    np.testing.assert_array_equal(both[:, c:].numpy(), numpy_up(small.numpy()))
    torch.testing.assert_close(down(both[:, c:]), small)


def test_consistency_is_the_mean_square_by_hand() -> None:
    full, small = images(3, 2, 8, 6), images(3, 2, 4, 3, seed=1)
    expected = ((numpy_down(full.numpy()) - small.numpy()) ** 2).mean()
    assert consistency_penalty(full, small).item() == pytest.approx(expected, rel=1e-12)
    assert consistency_penalty(full, down(full)).item() == 0
    assert consistency_penalty(full.requires_grad_(), small).requires_grad


def test_shapes_that_do_not_fit_are_refused() -> None:
    for wrong in (torch.zeros(2, 1, 5, 4), torch.zeros(2, 1, 4, 5), torch.zeros(2, 4)):
        with pytest.raises(ValueError, match="even sides"):
            down(wrong)
    with pytest.raises(ValueError, match="half the side"):
        beside(torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 4, 8))
    with pytest.raises(ValueError, match="half the side"):  # would broadcast
        consistency_penalty(torch.zeros(2, 3, 8, 8), torch.zeros(2, 1, 4, 4))


# -- the modules -------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """z1 (B, n) -> (B, 1, 2, 2)."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.linear = nn.Linear(n, 4).double()

    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = self.linear(z).unflatten(1, (1, 2, 2))
        return out


class Full(nn.Module):
    """Small images and z2 (B, n) -> (B, 1, 4, 4)."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.linear = nn.Linear(4 + n, 16).double()

    def forward(self, small: Tensor, z: Tensor) -> Tensor:
        out: Tensor = self.linear(torch.cat([small.flatten(1), z], 1)).unflatten(1, (1, 4, 4))
        return out


@pytest.mark.parametrize("joint", [False, True])
def test_the_stages_by_hand(joint: bool) -> None:
    torch.manual_seed(0)
    first, second = Small(3), Full(2)
    G = StackedGenerator(first, second, 2, joint=joint)
    z = torch.randn(6, 5, dtype=torch.float64)
    small, full = G.stages(z)
    w1, b1, w2, b2 = (p.detach().numpy() for p in (*first.parameters(), *second.parameters()))
    by_hand = z[:, :3].numpy() @ w1.T + b1
    np.testing.assert_allclose(small.detach().flatten(1).numpy(), by_hand, atol=1e-12)
    by_hand = np.concatenate([by_hand, z[:, 3:].numpy()], 1) @ w2.T + b2
    np.testing.assert_allclose(full.detach().flatten(1).numpy(), by_hand, atol=1e-12)
    assert torch.equal(G(z), full)
    gradients = torch.autograd.grad(full.square().sum(), [*G.parameters()], allow_unused=True, retain_graph=True)
    assert [g is None for g in gradients] == [not joint, not joint, False, False]
    assert torch.autograd.grad(small.square().sum(), first.linear.weight)[0].any()  # its own loss always reaches it
    assert {name.split(".")[0] for name in G.state_dict()} == {"stage1", "stage2"}


@pytest.mark.parametrize("joint", [False, True])
def test_inversion_reaches_the_latent_of_both_stages(joint: bool) -> None:
    torch.manual_seed(0)
    G = StackedGenerator(Small(3), Full(2), 2, joint=joint).float()
    w1, b1, w2, b2 = (p.detach().double().numpy() for p in G.parameters())
    x = images(12, 1, 4, 4)
    a = np.concatenate([w2[:, :4] @ w1, w2[:, 4:]], 1)  # of the affine map from z to the full image
    b = w2[:, :4] @ b1 + b2
    y = x.flatten(1).numpy() - b
    residual = ((np.linalg.lstsq(a, y.T, rcond=None)[0].T @ a.T - y) ** 2).mean(1)
    found = ivom(G, x.float(), Latent(5), steps=600, restarts=1, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(found.residuals, residual, rtol=1e-3)
    assert G.training


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (2, 12, 20)])
@pytest.mark.parametrize("noise", [0, 5])
def test_the_shipped_second_stage(shape: tuple[int, int, int], noise: int) -> None:
    torch.manual_seed(0)
    refiner = Refiner(shape, noise, 8).eval()
    for p in refiner.parameters():
        p.data.mul_(5)
    small, z2 = torch.rand(4, shape[0], shape[1] // 2, shape[2] // 2) * 2 - 1, torch.randn(4, noise)
    full = refiner(small, z2)
    assert full.shape == (4, *shape) and full.abs().max() <= 1
    assert not torch.allclose(refiner(-small, z2), full)
    assert torch.allclose(refiner(small, z2 + 1), full) == (noise == 0)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(refiner(small[order], z2[order]), full[order])  # sample by sample


# -- against a loop by hand --------------------------------------------------------------------------------------------


def differing(a: GAN, b: GAN) -> set[str]:
    ours, theirs = a.weights(), b.weights()
    assert ours.keys() == theirs.keys()
    return {name for name in ours if any(not torch.equal(ours[name][k], theirs[name][k]) for k in ours[name])}


def train_by_hand(gan: GAN, steps: int, options: dict[str, Any], *, wrong: str = "") -> None:
    """Two GANs in a row in plain PyTorch, on the networks of an untrained ``gan``; ``wrong`` names a slip to make."""
    G, D, D1 = (gan.players[name].module for name in ("generator", "discriminator", "discriminator_small"))
    data, latent = (torch.Generator().manual_seed(derive_seed(0, name)) for name in ("data", "latent"))
    optimizers = {
        net: torch.optim.Adam(net.parameters(), lr=2e-4, betas=(0.5, 0.999), fused=True) for net in (G, D, D1)
    }
    paired, joint, weight = (
        options.get(name, default) for name, default in [("paired", True), ("joint", False), ("consistency", 0)]
    )
    joint = joint != (wrong == "graph between the stages")

    def mean(x: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(x, 2) if wrong != "every second pixel" else x[:, :, ::2, ::2]

    def up(x: Tensor) -> Tensor:
        return torch.nn.functional.interpolate(x, scale_factor=2)

    def draw(warm: bool) -> tuple[Tensor, ...]:
        x = torch.rand(gan.batch_size, *gan.shape, generator=data) * 2 - 1
        z = torch.randn(gan.batch_size, gan.latent.dim, generator=latent)
        small = G.stage1(z[:, :-1])
        shown = mean(x) if warm else small if joint else small.detach()
        return x, small, shown, G.stage2(shown, z[:, -1:])

    def pair(x: Tensor, small: Tensor) -> Tensor:
        return torch.cat([x, up(small)], 1) if paired else x

    def minimise(loss: Tensor, *nets: nn.Module) -> None:
        for net in optimizers:
            net.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for net in nets:
            optimizers[net].step()

    for step in range(1, steps + 1):
        warm = step <= options.get("warmup", 0)
        x, small, shown, full = (t.detach() for t in draw(warm))
        d_loss = softplus(-D(pair(x, mean(x)))).mean() + softplus(D(pair(full, shown))).mean()
        small_loss = softplus(-D1(mean(x))).mean() + softplus(D1(small)).mean()
        minimise(d_loss + small_loss * (wrong != "small critic untrained"), D, D1)
        x, small, shown, full = draw(warm)
        g_loss = softplus(-D(pair(full, shown if wrong != "own pair" else mean(full)))).mean()
        if wrong != "stage 1 untrained":
            g_loss = g_loss + softplus(-D1(small)).mean()
        minimise(g_loss + weight * (mean(full) - shown).square().mean(), G)


OPTIONS: list[dict[str, Any]] = [
    {}, {"joint": True}, {"paired": False}, {"paired": False, "joint": True, "consistency": 3.0},
    {"warmup": 2, "consistency": 3.0},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_equals_a_loop_written_by_hand_bit_for_bit(options: dict[str, Any]) -> None:
    ours, _ = run(stacked(**options), kind="image", steps=3)
    twin = tiny_gan("image", stacked(**options))
    assert differing(ours, twin) == {"generator", "discriminator", "discriminator_small"}
    train_by_hand(twin, 3, options)
    assert differing(ours, twin) == set()


@pytest.mark.parametrize(
    "wrong",
    [
        "graph between the stages", "every second pixel", "small critic untrained", "stage 1 untrained", "own pair",
    ],
)  # fmt: skip
def test_the_comparison_sees_a_wrong_loop(wrong: str) -> None:
    ours, _ = run(stacked(), kind="image", steps=2)
    twin = tiny_gan("image", stacked())
    train_by_hand(twin, 2, {}, wrong=wrong)
    assert differing(ours, twin) != set()


# -- terms and gradients -----------------------------------------------------------------------------------------------


def np_softplus(x: Array) -> Array:
    return np.logaddexp(0, x)


BY_HAND: dict[str, tuple[Callable[[Array, Array], float], Callable[[Array, Array], float]]] = {
    "non_saturating": (
        lambda r, f: np_softplus(-r).mean() + np_softplus(f).mean(),
        lambda r, f: np_softplus(-f).mean(),
    ),
    "saturating": (
        lambda r, f: np_softplus(-r).mean() + np_softplus(f).mean(),
        lambda r, f: -np_softplus(f).mean(),
    ),
    "wasserstein": (lambda r, f: f.mean() - r.mean(), lambda r, f: -f.mean()),
    "hinge": (lambda r, f: np.maximum(1 - r, 0).mean() + np.maximum(1 + f, 0).mean(), lambda r, f: -f.mean()),
    "least_squares": (
        lambda r, f: ((r - 1) ** 2).mean() / 2 + (f**2).mean() / 2,
        lambda r, f: ((f - 1) ** 2).mean() / 2,
    ),
    "relativistic": (lambda r, f: np_softplus(f - r).mean(), lambda r, f: np_softplus(r - f).mean()),
    "relativistic_average": (
        lambda r, f: np_softplus(f.mean() - r).mean() + np_softplus(f - r.mean()).mean(),
        lambda r, f: np_softplus(r.mean() - f).mean() + np_softplus(r - f.mean()).mean(),
    ),
}


class Scores:
    """Scores the small pair of every update itself, from the raw samples."""

    def __init__(self) -> None:
        self.seen: list[tuple[Array, Array]] = []

    def _add(self, gan: GAN, batch: Batch) -> None:
        critic = gan.players["discriminator_small"].module
        real = torch.from_numpy(numpy_down(batch.real.detach().double().numpy())).float()
        assert torch.equal(batch.extra["small_fake"], gan.generator.stage1(batch.z[:, :3]))
        logits = critic(real), critic(batch.extra["small_fake"])
        self.seen.append(tuple(t.detach().double().numpy() for t in logits))  # type: ignore[arg-type]

    @hookimpl
    def pre_d_loss(self, gan: GAN, batch: Batch) -> None:
        self._add(gan, batch)

    @hookimpl
    def post_g_loss(self, gan: GAN, batch: Batch) -> None:
        self._add(gan, batch)


@pytest.mark.parametrize("given_as", ["run", "small_loss"])
@pytest.mark.parametrize("loss", losses.LOSSES)
def test_both_terms_are_the_losses_written_by_hand_on_the_small_pair(loss: str, given_as: str) -> None:
    scores = Scores()
    plugins = {**stacked(small_loss=loss if given_as == "small_loss" else None), "scores": scores}
    settings: dict[str, Any] = {"allow": frozenset(["stacked-wasserstein"])} if loss == "wasserstein" else {}
    with pytest.warns(UserWarning, match="steep") if settings else _nothing():
        _, log = run(plugins, kind="image", loss=loss if given_as == "run" else "hinge", **settings)
    assert len(scores.seen) == len(log.updates) == 6
    for (real, fake), (phase, _, terms) in zip(scores.seen, log.updates, strict=True):
        assert set(terms) == {"adv", f"stacked_{phase}"}
        expected = BY_HAND[loss][phase == "g"](real, fake)
        assert terms[f"stacked_{phase}"] == pytest.approx(expected, rel=1e-4, abs=1e-6)


class _nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


class Gradients:
    """Which networks each term reaches, in both phases, by the norm of its gradient; 0 where there is no path."""

    def __init__(self) -> None:
        self.norms: dict[str, dict[str, float]] = {}

    def _add(self, gan: GAN, terms: dict[str, Tensor]) -> None:
        nets = {"stage1": gan.generator.stage1, "stage2": gan.generator.stage2}
        nets |= {name: gan.players[name].module for name in ("discriminator", "discriminator_small")}
        for name, term in terms.items():
            self.norms[name] = {}
            for net, module in nets.items():
                found = torch.autograd.grad(term, [*module.parameters()], retain_graph=True, allow_unused=True)
                self.norms[name][net] = sum(float(g.abs().sum()) for g in found if g is not None)

    @hookimpl(wrapper=True, tryfirst=True)
    def pre_d_loss(self, gan: GAN, real_logits: Tensor, fake_logits: Tensor) -> Generator[None, Any, Any]:
        added = yield
        self._add(gan, {"adv_d": gan.loss.d(real_logits, fake_logits), **{k: v for d in added for k, v in d.items()}})
        return added

    @hookimpl(wrapper=True, tryfirst=True)
    def post_g_loss(self, gan: GAN, g_loss: Tensor) -> Generator[None, Any, Any]:
        added = yield
        self._add(gan, {"adv_g": g_loss, **{k: v for d in added for k, v in d.items()}})
        return added


def reached(plugins: dict[str, object], **settings: Any) -> dict[str, set[str]]:
    gradients = Gradients()
    run({**plugins, "gradients": gradients}, kind="image", steps=1, **settings)
    return {term: {net for net, norm in norms.items() if norm} for term, norms in gradients.norms.items()}


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize(("joint", "warmup"), [(False, 0), (True, 0), (True, 1)])
def test_who_learns_from_what(paired: bool, joint: bool, warmup: int) -> None:
    found = reached(stacked(paired=paired, joint=joint, warmup=warmup, consistency=1.0))
    both = {"stage1", "stage2"} if joint and not warmup else {"stage2"}
    assert found == {
        "adv_d": {"discriminator"},
        "stacked_d": {"discriminator_small"},
        "adv_g": both | {"discriminator"},
        "stacked_g": {"stage1", "discriminator_small"},
        "stacked_consistency": both,
    }


def test_a_penalty_acts_on_the_full_size_critic() -> None:
    found = reached({**stacked(), "gp": GradientPenalty()})
    assert found["gradient_penalty"] == {"discriminator"}


def test_weight_0_is_no_term_and_changes_nothing() -> None:
    with_default, log = run(stacked(), kind="image")
    assert not differing(with_default, run(stacked(consistency=0.0), kind="image")[0])
    assert all("stacked_consistency" not in terms for *_, terms in log.updates)
    _, log = run(stacked(consistency=2.0), kind="image", steps=1)
    assert "stacked_consistency" in log.updates[1][2]


# -- sampling and view -------------------------------------------------------------------------------------------------


class Counts:
    """Counts forward passes of a module."""

    def __init__(self, module: nn.Module) -> None:
        self.n = 0
        module.register_forward_hook(self.one)

    def one(self, *_: object) -> None:
        self.n += 1


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_each_stage_runs_once_an_update(options: dict[str, Any]) -> None:
    gan = tiny_gan("image", stacked(**options))
    counts = [Counts(gan.generator.stage1), Counts(gan.generator.stage2)]
    train(gan, 3)
    assert [c.n for c in counts] == [6, 6]
    gan.draw(5, torch.Generator())
    assert [c.n for c in counts] == [7, 7]


def shown(gan: GAN, phase: str = "g", step: int = 1) -> tuple[Batch, View]:
    scene: dict[str, Any] = {"gan": gan, "phase": phase, "step": step}
    batch = gan.hook.sample(real=gan.next_real(), z=gan.next_z(), **scene)
    return batch, gan.hook.view(batch=batch, **scene)


def test_the_critic_sees_each_image_beside_its_small_one() -> None:
    gan = tiny_gan("image", stacked())
    batch, view = shown(gan)
    assert next(gan.discriminator.parameters()).shape[1] == 2
    with torch.no_grad():
        small, full = gan.generator.stages(batch.z)
    real = batch.real.double().numpy()
    np.testing.assert_allclose(view.real[0].numpy(), np.concatenate([real, numpy_up(numpy_down(real))], 1), atol=1e-6)
    np.testing.assert_allclose(view.fake[0].detach()[:, 1:].numpy(), numpy_up(small.numpy()), atol=1e-6)
    np.testing.assert_allclose(view.fake[0].detach()[:, :1].numpy(), full.numpy(), atol=1e-6)
    unpaired = tiny_gan("image", stacked(paired=False))
    batch, view = shown(unpaired)
    assert view.real[0] is batch.real and view.fake[0] is batch.fake
    assert next(unpaired.discriminator.parameters()).shape[1] == 1


def test_in_the_warm_up_stage_2_refines_true_small_images() -> None:
    gan = tiny_gan("image", stacked(warmup=3))
    seen: list[Tensor] = []
    gan.generator.stage2.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    for step in (1, 3, 4):
        batch, view = shown(gan, step=step)
        expected = down(batch.real) if step <= 3 else batch.extra["small_fake"]
        assert torch.equal(seen[-1], expected)
        assert torch.equal(down(view.fake[0][:, 1:]), expected)  # and D is shown what was refined


def test_a_batch_of_other_latents_is_shown_with_their_small_images() -> None:
    """As pairwise_gp shows reconstructions: the small images of the update's own batch would be somebody else's."""
    gan = tiny_gan("image", stacked(), z_dim=8)
    batch, _ = shown(gan)
    before = copy.deepcopy(gan.generator.state_dict())
    z = torch.randn(8, 8)
    with torch.no_grad():
        small = gan.generator.stage1(z[:, :6])
    gan.generator.load_state_dict(before)
    other = batch._replace(z=z)
    view = gan.hook.view(gan=gan, batch=other, phase="d", step=1)
    assert torch.equal(down(view.fake[0][:, 1:]), small)
    assert not torch.equal(small, batch.extra["small_fake"])
    assert all(torch.equal(a, b) for a, b in zip(before.values(), gan.generator.state_dict().values(), strict=True))


def test_noise_is_split_off_the_end_of_z() -> None:
    for noise, expected in [(None, 2), (0, 0), (7, 7)]:
        gan = tiny_gan("image", stacked(noise=noise), z_dim=8)
        assert gan.generator.noise == expected
        z = gan.next_z()
        other = z.clone()
        other[:, 8 - expected :] += 1
        with torch.no_grad():
            (small, full), (small_other, full_other) = gan.generator.eval().stages(z), gan.generator.stages(other)
        assert torch.equal(small, small_other)
        assert torch.equal(full, full_other) == (expected == 0)


@pytest.mark.parametrize("network", ["auto", "mlp", "resnet"])
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 24, 24)])
def test_other_sizes_and_families(shape: tuple[int, int, int], network: str) -> None:
    architecture = {"network": network, "width": 8}
    gan = GAN(None, None, shape, Latent(8, "uniform"), plugins=stacked(), architecture=architecture, batch_size=4)
    gan.next_real = lambda: torch.rand(4, *shape) * 2 - 1
    train(gan.build(), 1)
    small, full = gan.generator.stages(gan.next_z())
    assert small.shape == (4, shape[0], shape[1] // 2, shape[2] // 2) and full.shape == (4, *shape)
    assert small.abs().max() <= 1 and full.abs().max() <= 1


# -- networks of one's own ---------------------------------------------------------------------------------------------

FACTORIES = """
import math
import torch
from torch import nn

class First(nn.Module):
    def __init__(self, z_dim, shape):
        super().__init__()
        self.shape = shape
        self.linear = nn.Linear(z_dim, math.prod(shape))

    def forward(self, z):
        return self.linear(z).unflatten(1, self.shape).tanh()

class Second(nn.Module):
    def __init__(self, z_dim, shape):
        super().__init__()
        self.shape = shape
        self.linear = nn.Linear(z_dim + math.prod(shape) // 4, math.prod(shape))

    def forward(self, small, z):
        return self.linear(torch.cat([small.flatten(1), z], 1)).unflatten(1, self.shape).tanh()

class Whole(First):
    def __init__(self, shape, z_dim):
        super().__init__(z_dim, (shape[0], 28, 28))

def critic(shapes):
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shapes[0]), 1))

def by_latent(shape, z_dim, latent):
    assert (latent, z_dim, shape) == ("normal", 3, (1, 14, 14))
    return First(z_dim, shape)

def function(shape, z_dim):
    return lambda z: z
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(FACTORIES)
    return path


def test_stages_and_critic_of_ones_own(file: Path) -> None:
    before = torch.get_rng_state()
    options = {"stage1": f"{file}:First", "stage2": f"{file}:Second", "discriminator_small": f"{file}:critic"}
    gan, _ = run({"stacked": build(Stacked, options, "stacked")}, kind="image")
    assert [type(m).__name__ for m in (gan.generator.stage1, gan.generator.stage2)] == ["First", "Second"]
    untrained, other = (tiny_gan("image", stacked(**options), seed=seed) for seed in (0, 1))
    for twin in (untrained, other):
        assert differing(gan, twin) == {"generator", "discriminator", "discriminator_small"}
    assert differing(untrained, other) == {"generator", "discriminator", "discriminator_small"}
    assert not differing(untrained, tiny_gan("image", stacked(**options)))
    assert torch.equal(torch.get_rng_state(), before)
    tiny_gan("image", stacked(stage1=f"{file}:by_latent"))


@pytest.mark.parametrize("joint", [False, True])
def test_stage_1_and_its_critic_do_not_know_which_stage_2_follows(file: Path, joint: bool) -> None:
    """Unless the stages are joint: bit for bit, over steps of both optimisers."""
    one, other = (run(stacked(joint=joint, **kw), kind="image")[0] for kw in ({}, {"stage2": f"{file}:Second"}))
    for net in ("generator", "discriminator_small"):
        ours, theirs = one.weights()[net], other.weights()[net]
        keys = [key for key in ours if not key.startswith("stage2")]
        assert len(keys) > 3 and all(torch.equal(ours[key], theirs[key]) for key in keys) != joint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"stage1": "Whole"},
            r"stage1 of stacked makes images of shape \(1, 28, 28\), half the data's side is \(1, 14, 14\)",
        ),
        ({"stage2": "function"}, "the stage2 factory '.*mine.py:function' returned a function, not a torch Module"),
        ({"stage1": "Frist"}, r"no 'Frist' \(did you mean 'First'\?\)"),
    ],
)
def test_wrong_networks_are_refused_in_one_sentence(file: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        tiny_gan("image", stacked(**{name: f"{file}:{factory}" for name, factory in options.items()}))


def build_shape(shape: tuple[int, ...], z_dim: int = 4, **options: Any) -> GAN:
    return GAN(None, None, shape, Latent(z_dim), plugins=stacked(**options), architecture={"width": 8}).build()


def test_what_cannot_be_stacked_is_refused() -> None:
    with pytest.raises(UsageError, match=r"data of shape \(2,\): leave it out"):
        build_shape((2,))
    with pytest.raises(UsageError, match="27 x 28 is odd"):
        build_shape((1, 27, 28))
    with pytest.raises(UsageError, match=r"the stage1 of stacked, \(1, 4, 4\): .* not 4 x 4"):
        build_shape((1, 8, 8))
    with pytest.raises(UsageError, match="all 4 are stage 2's"):
        build_shape((1, 28, 28), noise=4)
    with pytest.raises(UsageError, match="all 1 are stage 2's"):
        build_shape((1, 28, 28), z_dim=1)
    with pytest.raises(UsageError, match="a plugin brings the generator, and so do you"):
        tiny_gan("image", stacked(), generator=networks.generator((1, 28, 28), 4, width=8))
    with pytest.raises(UsageError, match=r"cannot score what it is shown, tensors of shape \(8, 2, 28, 28\)"):
        tiny_gan("image", stacked(), discriminator=networks.discriminator([(1, 28, 28)], width=8))
    tiny_gan("image", stacked(paired=False), discriminator=networks.discriminator([(1, 28, 28)], width=8))
    with pytest.raises(UsageError, match="brings the generator, and so do you"):
        G, D = networks.generator((1, 28, 28), 4, width=8), networks.discriminator([(1, 28, 28)], width=8)
        attach(G, D, ["stacked"]).show(torch.zeros(2, 1, 28, 28), torch.zeros(2, 1, 28, 28), torch.zeros(2, 4))
    for options in ({"noise": -1}, {"warmup": -1}, {"consistency": -1.0}):
        with pytest.raises(ValueError, match="negative"):
            Stacked(**options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no loss 'hing'"):
        Stacked(small_loss="hing")


def test_a_plugin_that_draws_the_samples_itself_is_refused() -> None:
    class Own:
        @hookimpl(tryfirst=True)
        def sample(self, gan: GAN, real: Tensor, z: Tensor) -> Batch:
            return Batch(real, gan.generator(z), z)

    for paired in (True, False):
        with pytest.raises(UsageError, match="another plugin draws them itself"):
            tiny_gan("image", {**stacked(paired=paired), "own": Own()})


def test_the_wasserstein_loss_needs_a_bound_on_the_small_critic() -> None:
    for plugins in (stacked(), {**stacked(), "gp": GradientPenalty()}, stacked(small_loss="wasserstein")):
        loss = "hinge" if len(plugins) == 1 and plugins["stacked"].small_loss else "wasserstein"  # type: ignore[attr-defined]
        with pytest.raises(UsageError, match="small_loss=hinge.*--allow stacked-wasserstein"):
            tiny_gan("image", plugins, loss=loss)
    for order in (("stacked", "sn"), ("sn", "stacked")):
        named = {**stacked(), "sn": SpectralNorm()}
        tiny_gan("image", {name: named[name] for name in order}, loss="wasserstein")
    tiny_gan("image", {**stacked(small_loss="hinge"), "gp": GradientPenalty()}, loss="wasserstein")


@pytest.mark.parametrize("name", ["bigan", "veegan"])
def test_no_warm_up_where_somebody_learns_from_latents(name: str) -> None:
    learner = {"bigan": "encoder", "veegan": "reconstructor"}[name]
    for names in ((name, "stacked"), ("stacked", name)):
        with pytest.raises(UsageError, match=f"the {learner} learns from samples beside their latents"):
            tiny_gan("image", create(names, {"stacked": {"warmup": 1}})[0])
        run(create(names, {})[0], kind="image", steps=1)


# -- in company --------------------------------------------------------------------------------------------------------

COMPANIES: list[list[str]] = [
    [], ["gradient_penalty"], ["spectral_norm"], ["packing"], ["r1", "packing", "spectral_norm", "bigan"],
    ["pairwise_gp"], ["unrolled"], ["diffaugment", "consistency"],
]  # fmt: skip


@pytest.mark.parametrize("others", COMPANIES, ids="-".join)
def test_a_continued_run_equals_one_that_never_stopped(others: list[str]) -> None:
    def fresh() -> GAN:
        options = {"stacked": {"warmup": 0 if {"bigan", "pairwise_gp"} & {*others} else 3, "joint": True}}
        options |= {"unrolled": {"k": 1}} if "unrolled" in others else {}
        plugins = create(["stacked", *others], options)[0]
        return tiny_gan("image", plugins, {"averaging": Averaging(0.9)})

    whole, first, second = fresh(), fresh(), fresh()
    train(whole, 5)
    train(first, 2)
    second.load_weights(copy.deepcopy(first.weights()))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.next_real = first.next_real
    train(second, 5)
    assert differing(whole, second) == set()
    assert "generator_ema" in whole.weights() and "discriminator_small" in whole.weights()
    assert all(t.isfinite().all() for net in whole.weights().values() for t in net.values())


def test_an_averaged_generator_has_both_stages_and_is_what_is_drawn() -> None:
    gan, _ = run({**stacked(), "averaging": Averaging(0.5)}, kind="image", steps=4)
    average = gan.averages["generator"].eval()
    z = gan.latent.draw(5, torch.Generator().manual_seed(3))
    with torch.no_grad():
        small, full = average.stages(z)
    assert small.shape == (5, 1, 14, 14)
    assert torch.equal(gan.draw(5, torch.Generator().manual_seed(3)), full)
    assert not torch.equal(gan.generator.eval()(z), full)


@pytest.mark.parametrize("order", [("stacked", "packing"), ("packing", "stacked")])
def test_packs_are_of_pairs_and_the_small_critic_sees_single_images(order: tuple[str, str]) -> None:
    named: dict[str, object] = {**stacked(), "packing": Packing(2)}
    gan = tiny_gan("image", {name: named[name] for name in order})
    batch, view = shown(gan)
    assert view.real[0].shape == (4, 4, 28, 28)
    small = batch.extra["small_fake"].detach().double().numpy()
    np.testing.assert_allclose(view.fake[0].detach()[1, 3].numpy(), numpy_up(small)[3, 0], atol=1e-6)
    assert gan.players["discriminator_small"].module[1].trunk.layers.down0.weight.shape[1] == 1
    scores = Scores()
    _, log = run({**{name: named[name] for name in order}, "scores": scores}, kind="image", steps=1)
    assert [len(real) for real, _ in scores.seen] == [8, 8]
    assert log.updates[0][2]["stacked_d"] == pytest.approx(BY_HAND["non_saturating"][0](*scores.seen[0]), rel=1e-4)


@pytest.mark.parametrize("order", [("stacked", "bigan"), ("bigan", "stacked")])
def test_the_encoder_reads_the_full_image_and_the_latent_comes_last(order: tuple[str, str]) -> None:
    gan = tiny_gan("image", create(order, {})[0])
    batch, view = shown(gan)
    assert [tuple(t.shape) for t in view.real] == [(8, 2, 28, 28), (8, 4)]
    assert view.fake[1] is batch.z and view.real[1] is batch.extra["code"]
    _, log = run(create(order, {})[0], kind="image")
    assert all(np.isfinite(v) for *_, terms in log.updates for v in terms.values())


def test_augmentation_treats_the_pair_as_one_image() -> None:
    for order in (("stacked", "diffaugment"), ("diffaugment", "stacked")):
        gan = tiny_gan("image", create(order, {"diffaugment": {"policy": ["translation"]}})[0])
        _, view = shown(gan)
        for both in (view.real[0], view.fake[0]):
            uncovered = [(image == 0).all(3).sum(2) for image in (both[:, :1], both[:, 1:])]
            assert torch.equal(*uncovered) and uncovered[0].any()  # the same shift uncovered as many rows in both


def test_spectral_norm_reaches_both_critics_and_both_stages() -> None:
    gan, _ = run({**stacked(), "sn": SpectralNorm(on="both")}, kind="image")
    for module in (
        gan.discriminator,
        gan.players["discriminator_small"].module,
        gan.generator.stage1,
        gan.generator.stage2,
    ):
        assert spectral_norms(module)
    plain = folded(gan.generator)
    z = gan.next_z()
    assert torch.equal(plain.eval()(z), gan.generator.eval()(z))
    twin = tiny_gan("image", stacked()).generator
    twin.load_state_dict(plain.state_dict())  # exported files load into the bare networks
    assert torch.equal(twin.eval()(z), gan.generator(z))


def test_unrolling_leaves_both_critics_as_they_were() -> None:
    """The small critic's loss is part of the objective that is looked ahead on; it must not move, buffers included."""
    gan = tiny_gan("image", {**stacked(), "sn": SpectralNorm(), "unrolled": Unrolled(k=2)})
    for net in ("discriminator", "discriminator_small"):
        gan.players[
            net
        ].module.eval()  # G's own scoring moves spectral norm's vectors in training mode, unrolled or not
    train_state = copy.deepcopy(gan.weights())
    gan.players["discriminator_small"].module.train()
    calls = Counts(gan.players["discriminator_small"].module)
    u = [b.clone() for b in gan.players["discriminator_small"].module.buffers()]
    seen: list[list[Tensor]] = []

    class Before:
        @hookimpl(tryfirst=True)
        def post_g_loss(self) -> None:
            seen.append([b.clone() for b in gan.players["discriminator_small"].module.buffers()])

    gan.manager.register(Before(), "before")
    update(gan, "g", 1)
    assert calls.n == 4 + 2  # both sides in each look ahead, and both in G's loss
    assert all(torch.equal(a, b) for a, b in zip(u, seen[0], strict=True))
    assert all(p.grad is None or not p.grad.any() for p in gan.parameters("d"))
    after = gan.weights()
    for key, value in train_state["discriminator"].items():
        assert torch.equal(value, after["discriminator"][key])


def test_unrolling_leaves_stage_1s_own_gradient_alone() -> None:
    """Of two stages not joint, stage 1 learns from the small pair only, looked ahead or not."""

    class Stage1:
        grads: list[Tensor]

        @hookimpl(wrapper=True)
        def post_g_loss(self, gan: GAN, g_loss: Tensor) -> Generator[None, Any, Any]:
            added = yield
            term = next(d["stacked_g"] for d in added if "stacked_g" in d)
            both = g_loss + term
            self.grads = [*torch.autograd.grad(both, [*gan.generator.stage1.parameters()], retain_graph=True)]
            return added

    watchers = Stage1(), Stage1()
    for watcher, k in zip(watchers, (0, 3), strict=True):
        gan = tiny_gan("image", {**stacked(), "unrolled": Unrolled(k=k), "watcher": watcher})
        update(gan, "g", 1)
    assert any(g.any() for g in watchers[0].grads)
    for a, b in zip(watchers[0].grads, watchers[1].grads, strict=True):
        torch.testing.assert_close(a, b)


def test_same_seed_same_run_and_no_network_depends_on_another_plugin() -> None:
    before = torch.get_rng_state()
    first, log = run(stacked(), kind="image")
    torch.manual_seed(99)
    second, again = run(stacked(), kind="image")
    assert not differing(first, second) and log.updates == again.updates
    torch.set_rng_state(before)
    alone = tiny_gan("image", stacked(paired=False)).weights()
    together = tiny_gan("image", create(["bigan", "stacked"], {})[0]).weights()
    for name in ("generator", "discriminator_small"):
        assert all(torch.equal(alone[name][key], together[name][key]) for key in alone[name])
