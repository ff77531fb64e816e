"""The pair-wise gradient penalty against numpy and closed forms. Every check also meets the wrong versions it rejects."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gankit_bigan import BiGAN
from gankit_gradient_penalty import GradientPenalty
from gankit_pairwise_gp import PairwiseGP, pairwise_gradient_penalty, unit_vectors
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from gankit import GAN, Batch, Player, UsageError, View, hookimpl
from gankit.gan import derive_seed
from gankit.loop import update
from gankit.options import build, options_of
from gankit.testing import Log, run, tiny_gan

torch.set_num_threads(1)

Penalty = Callable[..., Tensor]
Array = NDArray[np.float64]
README = Path(__file__).parents[1] / "README.md"


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def draw_u(batch: int, seed: int = 0) -> Array:
    """The mixing weights that a generator with this seed gives to a batch."""
    return torch.rand(batch, generator=seeded(seed), dtype=torch.float64).numpy()


def targets(real: Tensor, reconstruction: Tensor) -> Array:
    """Row i: (x_i - xhat_i) / ||x_i - xhat_i||, flat; 0 where they are equal."""
    difference = (real - reconstruction).detach().double().numpy().reshape(len(real), -1)
    norms = np.linalg.norm(difference, axis=1, keepdims=True)
    return np.divide(difference, norms, out=np.zeros_like(difference), where=norms > 0)


class Tanh:
    """D(x, e) = v . tanh(W x + U e + b), x flat, with its gradient in x, W^T (v (1 - tanh^2)), derived by hand."""

    def __init__(self, features: int, codes: int = 2, hidden: int = 5) -> None:
        self.W, self.U = randn(hidden, features, seed=7), randn(hidden, codes, seed=8)
        self.b, self.v = randn(hidden, seed=9), randn(hidden, seed=10)
        self.weights = [t.requires_grad_() for t in (self.W, self.U, self.b, self.v)]

    def __call__(self, x: Tensor, e: Tensor) -> Tensor:
        return torch.tanh(x.flatten(1) @ self.W.T + e @ self.U.T + self.b) @ self.v

    def penalty(self, real: Tensor, reconstruction: Tensor, e: Tensor, u: Array) -> float:
        W, U, b, v = (t.detach().numpy() for t in self.weights)
        pairs = zip(u, real.numpy().reshape(len(u), -1), reconstruction.numpy().reshape(len(u), -1), strict=True)
        x = np.stack([weight * r + (1 - weight) * f for weight, r, f in pairs])
        gradient = (v * (1 - np.tanh(x @ W.T + e.numpy() @ U.T + b) ** 2)) @ W
        return float(np.mean((gradient - targets(real, reconstruction)) ** 2))


# -- the wrong versions ------------------------------------------------------------------------------------------------


def over(difference: Tensor, dims: int | tuple[int, ...]) -> Tensor:
    """difference / norm, 0 where it is 0: the norm over these dimensions."""
    norm = difference.square().sum(dims, keepdim=True).sqrt()
    return torch.where(norm > 0, difference / norm.clamp_min(1e-300), 0)


def variant(
    *,
    target: Callable[[Tensor], Tensor] = lambda d: over(d, tuple(range(1, d.dim()))),
    mix: Callable[[Tensor], tuple[int, ...]] = lambda x: (len(x), *[1] * (x.dim() - 1)),
    compare: Callable[[Tensor, Tensor], Tensor] = lambda g, t: (g - t).square().mean(),
    at: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda u, real, recon: u * real + (1 - u) * recon,
    create_graph: bool = True,
    detach: bool = True,
    mix_given: bool = False,
) -> Penalty:
    """The penalty written afresh; its defaults are the right ones."""

    def penalty(
        critic: Callable[..., Tensor],
        real: Tensor,
        reconstruction: Tensor,
        *given: Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        u = torch.rand(mix(real), generator=generator, dtype=real.dtype)
        x = at(u, real, reconstruction)
        if detach:
            x, given = x.detach().requires_grad_(), tuple(e.detach() for e in given)
            real, reconstruction = real.detach(), reconstruction.detach()
        if mix_given:
            given = tuple(u.flatten()[:, None] * e for e in given)
        (g,) = torch.autograd.grad(critic(x, *given).sum(), x, create_graph=create_graph)
        return compare(g, target(real - reconstruction))

    return penalty


def batch_mean_of_norms(g: Tensor, t: Tensor) -> Tensor:
    return (g.flatten(1).norm(dim=1) - t.flatten(1).norm(dim=1)).square().mean()


RIGHT: dict[str, Penalty] = {"gankit's": pairwise_gradient_penalty, "written afresh": variant()}
WRONG: dict[str, Penalty] = {
    "norm over the last axis": variant(target=lambda d: over(d, -1)),  # the published snippet, on images
    "norm of the whole batch": variant(target=lambda d: d / d.norm()),
    "0 / 0": variant(target=lambda d: d / d.flatten(1).norm(dim=1).view(-1, *[1] * (d.dim() - 1))),
    "no unit vector": variant(target=lambda d: d),
    "points to the reconstruction": variant(target=lambda d: -over(d, tuple(range(1, d.dim())))),
    "norms compared, not directions": variant(compare=batch_mean_of_norms),
    "summed over features": variant(compare=lambda g, t: (g - t).flatten(1).square().sum(1).mean()),
    "one mixing weight per batch": variant(mix=lambda x: (1,)),
    "one mixing weight per element": variant(mix=lambda x: tuple(x.shape)),
    "at the real samples": variant(at=lambda u, real, recon: real * 1.0),
    "ends swapped": variant(at=lambda u, real, recon: (1 - u) * real + u * recon),
    "the code mixed, too": variant(mix_given=True),
    "cut off from the critic": variant(create_graph=False),
    "not cut off from E and G": variant(detach=False),
}

# -- the checks --------------------------------------------------------------------------------------------------------


def check_exact_target(penalty: Penalty) -> None:
    """All differences along one direction d, and D(x) = d . x: every gradient is its target."""
    for shape in [(3,), (2, 3, 2)]:
        d = randn(*shape)
        d = d / d.norm()
        recon = randn(5, *shape, seed=1)
        real = recon + torch.tensor([0.1, 1.0, 2.0, 7.0, 30.0], dtype=torch.float64).view(-1, *[1] * len(shape)) * d
        value = penalty(lambda x, e, d=d: (x * d).flatten(1).sum(1), real, recon, randn(5, 2), generator=seeded())
        assert abs(value.item()) < 1e-25


def check_linear(penalty: Penalty, shape: tuple[int, ...] = (2, 3, 4), seed: int = 0) -> None:
    """D(x) = w . x: the mean over samples and features of (w - t)^2, in numpy."""
    w, real, recon = randn(*shape, seed=seed + 2), randn(5, *shape, seed=seed), randn(5, *shape, seed=seed + 1)
    value = penalty(lambda x, e: (x * w).unsqueeze(1).flatten(1).sum(1), real, recon, randn(5, 2), generator=seeded())
    assert value.shape == ()
    np.testing.assert_allclose(value.item(), np.mean((w.numpy().ravel() - targets(real, recon)) ** 2), rtol=1e-12)


def check_linear_vector(penalty: Penalty) -> None:
    check_linear(penalty, (4,))


def check_numpy(penalty: Penalty) -> None:
    """A two-layer critic against the gradient derived by hand."""
    for shape in [(3,), (2, 3, 2)]:
        critic, e = Tanh(math.prod(shape)), randn(6, 2, seed=2)
        real, recon = randn(6, *shape), randn(6, *shape, seed=1) * 2
        value = penalty(critic, real, recon, e, generator=seeded(3))
        np.testing.assert_allclose(value.item(), critic.penalty(real, recon, e, draw_u(6, 3)), rtol=1e-11)


def check_equal_pairs(penalty: Penalty) -> None:
    """Where xhat = x the target is 0; value and gradients are finite, and the other samples count as ever."""
    for equal in ([0], [0, 1, 2]):
        critic, real, e = Tanh(4), randn(3, 2, 2), randn(3, 2, seed=2)
        recon = randn(3, 2, 2, seed=1)
        recon[equal] = real[equal]
        value = penalty(critic, real, recon, e, generator=seeded())
        np.testing.assert_allclose(value.item(), critic.penalty(real, recon, e, draw_u(3)), rtol=1e-12)
        assert all(g.isfinite().all() and g.any() for g in torch.autograd.grad(value, critic.weights))


def check_direction(penalty: Penalty) -> None:
    """Minimised alone it makes D larger at x than at xhat, with the slope 1 along x - xhat and 0 across."""
    recon = randn(8, 3)
    d = torch.tensor([0.6, 0.0, 0.8], dtype=torch.float64)
    real = recon + torch.linspace(0.5, 3, 8, dtype=torch.float64)[:, None] * d
    w = torch.zeros(3, dtype=torch.float64, requires_grad=True)

    def critic(x: Tensor, e: Tensor) -> Tensor:
        return x @ w

    for _ in range(60):
        (gradient,) = torch.autograd.grad(penalty(critic, real, recon, randn(8, 2), generator=seeded()), w)
        with torch.no_grad():
            w -= 0.5 * gradient
    assert (real @ w > recon @ w).all()
    np.testing.assert_allclose(w.detach().numpy(), d.numpy(), atol=1e-6)


def check_per_sample(penalty: Penalty) -> None:
    """A batch's value is the mean of its samples' own values: one stream gives both the same u."""
    critic, real, recon, e = Tanh(6), randn(5, 2, 3), randn(5, 2, 3, seed=1), randn(5, 2, seed=2)
    stream = seeded(4)
    rows = [slice(i, i + 1) for i in range(5)]
    singles = [penalty(critic, real[i], recon[i], e[i], generator=stream).item() for i in rows]
    np.testing.assert_allclose(
        penalty(critic, real, recon, e, generator=seeded(4)).item(), np.mean(singles), rtol=1e-12
    )


def check_one_u_and_a_fixed_code(penalty: Penalty) -> None:
    """What the critic sees for x = 1, xhat = 0: u, constant in a sample, new for each; and the code as it was."""
    seen: list[Tensor] = []

    def critic(x: Tensor, e: Tensor) -> Tensor:
        seen.extend((x.detach(), e.detach()))
        return x.flatten(1).square().sum(1)

    code = randn(6, 2)
    penalty(critic, torch.ones(6, 2, 3, dtype=torch.float64), torch.zeros(6, 2, 3, dtype=torch.float64), code)
    x, e = (t.numpy() for t in seen)
    assert np.array_equal(x, np.broadcast_to(x[:, :1, :1], x.shape))
    assert len(set(x[:, 0, 0].tolist())) == 6
    assert np.array_equal(e, code.numpy())


def check_stops_at_e_and_g(penalty: Penalty) -> None:
    """x, E, G and the code get no gradient: the penalty trains the critic alone."""
    critic, E, G = Tanh(4), nn.Linear(4, 2).double(), nn.Linear(2, 4).double()
    x = randn(5, 4).requires_grad_()
    code = E(x)
    code.retain_grad()
    penalty(critic, x, G(code), code, generator=seeded()).backward()
    assert x.grad is None
    assert code.grad is None
    assert all(p.grad is None for net in (E, G) for p in net.parameters())
    assert all(w.grad is not None and w.grad.any() for w in critic.weights)


def check_finite_differences(penalty: Penalty) -> None:
    """d penalty / d theta_D by autograd against central differences of the value, relative to the gradient's size."""
    critic, real, recon, e = Tanh(4), randn(5, 2, 2), randn(5, 2, 2, seed=1), randn(5, 2, seed=2)

    def value() -> Tensor:
        return penalty(critic, real, recon, e, generator=seeded(5))

    assert value().requires_grad, "no gradient reaches the critic"
    got = np.concatenate([g.numpy().ravel() for g in torch.autograd.grad(value(), critic.weights)])
    by_difference, h = [], 1e-5
    for weight in critic.weights:
        flat = weight.detach().view(-1)
        for i in range(len(flat)):
            old = flat[i].item()
            flat[i] = old + h
            up = value().item()
            flat[i] = old - h
            down = value().item()
            flat[i] = old
            by_difference.append((up - down) / (2 * h))
    assert np.abs(got - by_difference).max() <= 1e-6 * np.abs(by_difference).max()


CHECKS: dict[str, Callable[[Penalty], None]] = {
    check.__name__.removeprefix("check_"): check
    for check in (
        check_exact_target,
        check_linear,
        check_linear_vector,
        check_numpy,
        check_equal_pairs,
        check_direction,
        check_per_sample,
        check_one_u_and_a_fixed_code,
        check_stops_at_e_and_g,
        check_finite_differences,
    )
}
MUST_REJECT = {
    "norm over the last axis": ["exact_target", "linear", "numpy"],
    "norm of the whole batch": ["exact_target", "linear", "linear_vector", "numpy", "per_sample"],
    "0 / 0": ["equal_pairs"],
    "no unit vector": ["exact_target", "linear", "numpy", "direction"],
    "points to the reconstruction": ["exact_target", "linear", "linear_vector", "numpy", "direction"],
    "norms compared, not directions": ["linear", "linear_vector", "numpy", "direction"],
    "summed over features": ["linear", "linear_vector", "numpy"],
    "one mixing weight per batch": ["numpy", "per_sample", "one_u_and_a_fixed_code"],
    "one mixing weight per element": ["numpy", "one_u_and_a_fixed_code"],
    "at the real samples": ["numpy", "one_u_and_a_fixed_code"],
    "ends swapped": ["numpy"],
    "the code mixed, too": ["numpy", "one_u_and_a_fixed_code"],
    "cut off from the critic": ["finite_differences"],
    "not cut off from E and G": ["stops_at_e_and_g"],
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("right", RIGHT)
def test_the_right_penalty_passes(right: str, check: str) -> None:
    CHECKS[check](RIGHT[right])


@pytest.mark.parametrize(("wrong", "check"), [(wrong, check) for wrong in WRONG for check in MUST_REJECT[wrong]])
def test_the_same_check_rejects_the_wrong_one(wrong: str, check: str) -> None:
    with pytest.raises(AssertionError):
        CHECKS[check](WRONG[wrong])


def test_for_vectors_the_last_axis_is_the_right_one() -> None:
    """The published snippet is right where it was published: the trap opens with images only."""
    check_linear_vector(WRONG["norm over the last axis"])


# -- the functions -----------------------------------------------------------------------------------------------------

shapes = st.lists(st.integers(1, 4), max_size=3).map(tuple)


@settings(max_examples=40, deadline=None)
@given(shape=shapes, seed=st.integers(0, 999))
def test_linear_critic_in_any_shape(shape: tuple[int, ...], seed: int) -> None:
    check_linear(pairwise_gradient_penalty, shape, seed)


@settings(max_examples=40, deadline=None)
@given(shape=shapes, scale=st.sampled_from([1e-12, 1e-3, 1.0, 1e6]), seed=st.integers(0, 99))
def test_unit_vectors(shape: tuple[int, ...], scale: float, seed: int) -> None:
    difference = randn(4, *shape, seed=seed) * scale
    difference[1] = 0
    unit = unit_vectors(difference.requires_grad_())
    assert unit.shape == difference.shape
    assert not unit.requires_grad
    np.testing.assert_allclose(unit.numpy().reshape(4, -1), targets(difference, difference * 0), rtol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(unit.numpy().reshape(4, -1), axis=1), [1, 0, 1, 1], rtol=1e-12)


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4)])
def test_sum_is_the_mean_times_the_number_of_features(shape: tuple[int, ...]) -> None:
    critic, real, recon, e = Tanh(math.prod(shape)), randn(5, *shape), randn(5, *shape, seed=1), randn(5, 2, seed=2)
    mean, total = (
        pairwise_gradient_penalty(critic, real, recon, e, reduction=reduction, generator=seeded()).item()
        for reduction in ("mean", "sum")
    )
    assert total == pytest.approx(math.prod(shape) * mean, rel=1e-12)


@pytest.mark.parametrize("form", [(5,), (5, 1), (5, 1, 3, 3)])
def test_logits_of_any_form(form: tuple[int, ...]) -> None:
    critic, real, recon, e = Tanh(4), randn(5, 4), randn(5, 4, seed=1), randn(5, 2, seed=2)
    value = pairwise_gradient_penalty(
        lambda x, e: critic(x, e).view(-1, *[1] * (len(form) - 1)).expand(form), real, recon, e, generator=seeded()
    )
    np.testing.assert_allclose(value.item(), critic.penalty(real, recon, e, draw_u(5)), rtol=1e-12)


def test_only_the_field_in_x_is_asked_for() -> None:
    """However steep D is in the code, the penalty does not see it."""
    w, real, recon, e = randn(3), randn(5, 3), randn(5, 3, seed=1), randn(5, 2, seed=2)
    flat, steep = (
        pairwise_gradient_penalty(lambda x, e, k=k: x @ w + k * e.sum(1), real, recon, e, generator=seeded()).item()
        for k in (0.0, 1e3)
    )
    assert flat == steep


def test_it_needs_no_code_and_takes_several() -> None:
    w, real, recon = randn(3), randn(5, 3), randn(5, 3, seed=1)
    without = pairwise_gradient_penalty(lambda x: x @ w, real, recon)
    labels = torch.tensor([0, 1, 0, 1, 1])
    several = pairwise_gradient_penalty(lambda x, y, e: x @ w + y * e[:, 0], real, recon, labels, randn(5, 2))
    np.testing.assert_allclose([without.item(), several.item()], np.mean((w.numpy() - targets(real, recon)) ** 2))


def test_gradcheck_of_both_derivatives_in_the_critics_weights() -> None:
    real, recon, e = randn(3, 2), randn(3, 2, seed=1), randn(3, 2, seed=2)

    def value(W: Tensor, U: Tensor, b: Tensor, v: Tensor) -> Tensor:
        def critic(x: Tensor, e: Tensor) -> Tensor:
            return torch.tanh(x @ W.T + e @ U.T + b) @ v

        return pairwise_gradient_penalty(critic, real, recon, e, generator=seeded())

    weights = Tanh(2, hidden=3).weights
    assert torch.autograd.gradcheck(value, weights)
    assert torch.autograd.gradgradcheck(value, weights)  # what unrolling needs


def test_an_explicit_generator_is_all_the_chance_there_is() -> None:
    critic, real, recon, e = Tanh(3), randn(4, 3), randn(4, 3, seed=1), randn(4, 2)
    before = torch.get_rng_state()
    first, again, other = (
        pairwise_gradient_penalty(critic, real, recon, e, generator=seeded(s)).item() for s in (1, 1, 2)
    )
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), before)


def test_shapes_and_reductions_are_checked() -> None:
    with pytest.raises(ValueError, match=r"shape of x, \(4, 3\), not \(4, 1\)"):
        pairwise_gradient_penalty(lambda x: x.sum(1), torch.zeros(4, 3), torch.zeros(4, 1))
    with pytest.raises(ValueError, match="'mean' or 'sum', not 'max'"):
        pairwise_gradient_penalty(lambda x: x.sum(1), torch.zeros(4, 3), torch.zeros(4, 3), reduction="max")


# -- the plugin --------------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """A critic whose slope is its weights."""

    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(shape) for shape in shapes)

    def forward(self, *inputs: Tensor) -> Tensor:
        return sum(((w * x).flatten(1).sum(1) for w, x in zip(self.weights, inputs, strict=True)), torch.zeros(()))


def linear(shapes: Sequence[tuple[int, ...]]) -> nn.Module:
    return Linear(shapes)


class Packs:
    """PacGAN with m = 2, the outermost view."""

    @hookimpl(wrapper=True, tryfirst=True)
    def view(self) -> Generator[None, View, View]:
        real, fake = yield
        return View(*(tuple(torch.cat(t.chunk(2), dim=1) for t in side) for side in (real, fake)))


class Watch:
    """Records every update's raw batch, and looks at the joint view."""

    def __init__(self) -> None:
        self.batches: list[tuple[str, Tensor, Tensor]] = []

    @hookimpl
    def pre_d_loss(self, gan: GAN, batch: Batch, view: View) -> None:
        assert not batch.extra["code"].requires_grad
        assert [t.shape for t in view.real] == [batch.real.shape, batch.z.shape]
        assert torch.equal(view.real[0], batch.real) and torch.equal(view.real[1], batch.extra["code"])
        assert torch.equal(view.fake[0], batch.fake) and torch.equal(view.fake[1], batch.z)
        self.batches.append(("d", batch.real, batch.z))

    @hookimpl
    def post_g_loss(self, batch: Batch, view: View) -> None:
        assert batch.extra["code"].requires_grad and batch.fake.requires_grad
        assert torch.equal(view.real[1], batch.extra["code"]) and torch.equal(view.fake[1], batch.z)
        self.batches.append(("g", batch.real, batch.z))


@pytest.mark.parametrize("kind", ["vector", "image"])
def test_bigan_and_pairwise_gp_see_the_same_batches_and_latents(kind: str) -> None:
    ours, base = Watch(), Watch()
    run({"pairwise_gp": PairwiseGP(), "watch": ours}, kind=kind, d_steps=2)
    run({"bigan": BiGAN(), "watch": base}, kind=kind, d_steps=2)
    assert [phase for phase, _, _ in ours.batches] == ["d", "d", "g"] * 3
    for mine, theirs in zip(ours.batches, base.batches, strict=True):
        assert mine[0] == theirs[0]
        assert torch.equal(mine[1], theirs[1]) and torch.equal(mine[2], theirs[2])
    assert not torch.equal(ours.batches[0][1], ours.batches[1][1])
    other = Watch()
    run({"bigan": BiGAN(), "watch": other}, kind=kind, steps=1, seed=1)
    assert not torch.equal(other.batches[0][1], base.batches[0][1])


@pytest.mark.parametrize("kind", ["vector", "image"])
def test_bigan_and_pairwise_gp_start_from_the_same_networks(kind: str) -> None:
    ours, base = (tiny_gan(kind, {"m": plugin}).weights() for plugin in (PairwiseGP(), BiGAN()))
    assert ours.keys() == base.keys() == {"generator", "encoder", "discriminator"}
    assert all(torch.equal(ours[name][key], base[name][key]) for name in ours for key in ours[name])


@pytest.mark.parametrize("kind", ["vector", "image"])
def test_weight_0_is_bigan_bit_for_bit_running_statistics_included(kind: str) -> None:
    base = run({"bigan": BiGAN()}, kind=kind)[0].weights()
    none = run({"pairwise_gp": PairwiseGP(weight=0.0)}, kind=kind)[0].weights()
    some = run({"pairwise_gp": PairwiseGP(weight=1.0)}, kind=kind)[0].weights()
    assert all(torch.equal(base[name][key], none[name][key]) for name in base for key in base[name])
    for name in base:
        assert any(not torch.equal(base[name][key], some[name][key]) for key in base[name])


@pytest.mark.parametrize("kind", ["vector", "image"])
def test_the_encoder_is_trained_in_phase_g_only(kind: str) -> None:
    gan = tiny_gan(kind, {"pairwise_gp": PairwiseGP(weight=100.0)})

    def parameters() -> dict[str, Tensor]:
        return {
            name: torch.cat([p.detach().flatten() for p in player.module.parameters()])
            for name, player in gan.players.items()
        }

    start = parameters()
    update(gan, "d", 1)
    after_d = parameters()
    update(gan, "g", 1)
    after_g = parameters()
    assert {name: torch.equal(start[name], after_d[name]) for name in start} == {
        "generator": True,
        "encoder": True,
        "discriminator": False,
    }
    assert {name: torch.equal(after_d[name], after_g[name]) for name in start} == {
        "generator": False,
        "encoder": False,
        "discriminator": True,
    }


@pytest.mark.parametrize("kind", ["vector", "image"])
def test_the_term_is_the_equation(kind: str) -> None:
    """Weight times mean (g - t)^2 written out: x, E(x), G(E(x)) of this very update, u from the plugin's stream."""
    expected: list[float] = []

    class Stranger:
        @hookimpl
        def pre_d_loss(self, gan: GAN, critic: Callable[..., Tensor], batch: Batch) -> None:
            with torch.no_grad():
                code = gan.players["encoder"].module(batch.real)
                recon = gan.generator(code)
            u = torch.rand(8, generator=seeded(derive_seed(0, "plugin:pairwise_gp"))).view(-1, *[1] * (recon.dim() - 1))
            x = (u * batch.real + (1 - u) * recon).requires_grad_()
            slopes = [torch.autograd.grad(critic(x[i : i + 1], code[i : i + 1]).sum(), x)[0][i] for i in range(8)]
            g = torch.stack(slopes).double().numpy().reshape(8, -1)
            expected.append(3 * np.mean((g - targets(batch.real, recon)) ** 2))

    # the stranger reads the code after the core did, in training mode: same batch, same batch norm
    _, log = run({"pairwise_gp": PairwiseGP(weight=3.0), "stranger": Stranger()}, kind=kind, steps=1)
    assert log.updates[0][2]["pairwise_gp"] == pytest.approx(expected[0], rel=1e-4)
    assert "pairwise_gp" not in log.updates[1][2]


def check_linear_term(plugin: object, others: dict[str, object], reduction: str, factor: float) -> None:
    """With D(x, e) = w . x + v . e: factor times the mean or sum over features of (w - t)^2, per pack if packed."""
    expected: list[float] = []

    class Stranger:
        @hookimpl
        def pre_d_loss(self, gan: GAN, batch: Batch) -> None:
            with torch.no_grad():
                recon = gan.generator(gan.players["encoder"].module(batch.real))
            w = gan.discriminator.weights[0].detach().double().numpy()
            pairs = [torch.cat(t.chunk(2), 1) if others else t for t in (batch.real, recon)]
            squares = (w - targets(*pairs)) ** 2
            expected.append(factor * float(squares.mean() if reduction == "mean" else squares.sum(1).mean()))

    log = Log()
    gan = tiny_gan(
        plugins={"pairwise_gp": plugin, "stranger": Stranger(), **others}, core={"log": log}, discriminator=linear
    )
    update(gan, "d", 1)
    ((_, _, terms),) = log.updates
    assert terms["pairwise_gp"] == pytest.approx(expected[0], rel=1e-5)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_term_on_a_linear_critic(packed: bool, reduction: Any) -> None:
    others: dict[str, object] = {"packs": Packs()} if packed else {}
    check_linear_term(PairwiseGP(weight=2.5, reduction=reduction), others, reduction, 2.5)


def test_the_same_check_rejects_the_weight_squared_and_the_fake_in_place_of_the_reconstruction() -> None:
    class Twice(PairwiseGP):
        @hookimpl
        def pre_d_loss(
            self, gan: GAN, critic: Callable[..., Tensor], batch: Batch, step: int
        ) -> dict[str, Tensor] | None:
            terms = super().pre_d_loss(gan, critic, batch, step) or {}
            return {name: self.weight * term for name, term in terms.items()}

    class Unpaired(PairwiseGP):
        @hookimpl
        def pre_d_loss(self, critic: Callable[..., Tensor], batch: Batch) -> dict[str, Tensor] | None:
            code = batch.extra["code"]
            return {"pairwise_gp": self.weight * pairwise_gradient_penalty(critic, batch.real, batch.fake, code)}

    for wrong in (Twice, Unpaired):
        with pytest.raises(AssertionError):
            check_linear_term(wrong(weight=2.5), {}, "mean", 2.5)


def test_every_k_is_k_times_as_strong_and_absent_in_between() -> None:
    _, log = run({"pairwise_gp": PairwiseGP(every=3)}, steps=7, d_steps=2)
    assert [step for _, step, terms in log.updates if "pairwise_gp" in terms] == [3, 3, 6, 6]

    def term(every: int) -> Tensor:
        plugin = PairwiseGP(every=every)
        gan = tiny_gan(plugins={"pairwise_gp": plugin})
        real, z = torch.linspace(-1, 1, 24).view(8, 3), torch.linspace(-1, 1, 32).view(8, 4)
        with torch.no_grad():
            batch = gan.hook.sample(gan=gan, real=real, z=z, phase="d", step=every)
        for step in range(1, every):
            assert plugin.pre_d_loss(gan, gan.discriminator, batch, step) is None
        (found,) = (plugin.pre_d_loss(gan, gan.discriminator, batch, every) or {}).values()
        return found

    torch.testing.assert_close(term(5), 5 * term(1))


def test_it_is_a_bigan_and_two_of_them_are_refused() -> None:
    with pytest.raises(UsageError, match="'encoder' is already used by 'bigan'"):
        tiny_gan(plugins={"bigan": BiGAN(), "pairwise_gp": PairwiseGP()})


@pytest.mark.parametrize("kind", ["vector", "image"])
@pytest.mark.parametrize("first", ["pairwise_gp", "gradient_penalty"])
def test_it_combines_with_the_gradient_penalty_in_either_order(kind: str, first: str) -> None:
    plugins = {"pairwise_gp": PairwiseGP(), "gradient_penalty": GradientPenalty()}
    ordered = {first: plugins[first], **plugins}
    gan, log = run(ordered, kind=kind)
    assert [set(terms) for _, _, terms in log.updates] == [{"adv", "pairwise_gp", "gradient_penalty"}, {"adv"}] * 3
    assert all(math.isfinite(value) for _, _, terms in log.updates for value in terms.values())
    assert all(w.isfinite().all() for weights in gan.weights().values() for w in weights.values())


def test_a_perfect_reconstruction_trains_on() -> None:
    """E and G that invert each other exactly: xhat = x in every sample, and nothing becomes NaN."""

    class Identity(nn.Module):
        def __init__(self, z_dim: int) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    class Inverse(PairwiseGP):
        @hookimpl
        def players(self, gan: GAN) -> dict[str, Player]:
            return {"encoder": Player(Identity(gan.latent.dim), "g")}

    class Exact:
        @hookimpl
        def pre_d_loss(self, gan: GAN, batch: Batch, step: int) -> None:
            assert step > 1 or torch.equal(gan.generator(batch.extra["code"]), batch.real)

    gan, log = run({"pairwise_gp": Inverse(), "exact": Exact()}, generator=Identity, z_dim=3)
    assert log.updates[0][2]["pairwise_gp"] > 0
    assert all(math.isfinite(value) for _, _, terms in log.updates for value in terms.values())
    assert all(p.isfinite().all() for p in gan.discriminator.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": "-1"}, "pairwise_gp: weight must not be negative"),
        ({"every": 0}, "pairwise_gp: every must be at least 1"),
        ({"reduction": "max"}, r"pairwise_gp.reduction must be mean\|sum, not 'max'"),
        ({"weigth": 1}, "did you mean 'weight'"),
    ],
)
def test_bad_options_are_refused_in_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        build(PairwiseGP, options, "pairwise_gp")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [{"weight": math.nan}, {"weight": math.inf}, {"reduction": "max"}])
def test_the_object_refuses_them_too_and_not_only_in_its_first_update(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="weight must not be|reduction is 'mean' or 'sum', not 'max'"):
        PairwiseGP(**bad)


def test_options_arrive() -> None:
    made = build(PairwiseGP, {"weight": "5", "reduction": "sum", "every": "4", "encoder": "a:b"}, "pairwise_gp")
    assert (made.weight, made.reduction, made.every, made.encoder) == (5.0, "sum", 4, "a:b")
    default = PairwiseGP()
    assert (default.weight, default.reduction, default.every) == (1.0, "mean", 1)  # the paper's


def test_a_critic_with_batch_norm_is_refused() -> None:
    class Joined(nn.Sequential):
        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            logits: Tensor = super().forward(torch.cat([x, z], 1))
            return logits

    def critic(shapes: Sequence[tuple[int, ...]]) -> nn.Module:
        return Joined(nn.Linear(7, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))

    with pytest.raises(UsageError, match="pairwise_gp needs the gradient of each sample.*'1'"):
        tiny_gan(plugins={"pairwise_gp": PairwiseGP()}, discriminator=critic)


# -- the README --------------------------------------------------------------------------------------------------------


def test_the_readmes_code_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, str(README), "exec"), {})


def test_the_readmes_table_is_the_options() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \| (.+?) \|$", README.read_text(), re.MULTILINE)
    assert rows == [(o.name, str(o.default).lower(), o.help) for o in options_of(PairwiseGP).values()]
