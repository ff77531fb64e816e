"""The gradient penalty against numpy and closed forms. Every check also meets the wrong versions it rejects."""

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
from gankit_gradient_penalty import GradientPenalty, gradient_penalty
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from gankit import GAN, Batch, UsageError, View, hookimpl
from gankit.gan import derive_seed
from gankit.loop import update
from gankit.options import build, options_of
from gankit.testing import Log, plugin_checks, run, tiny_gan

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


def mixed(u: Array, real: Tensor, fake: Tensor) -> Array:
    """u real + (1 - u) fake, sample by sample."""
    pairs = zip(u, real.detach().numpy(), fake.detach().numpy(), strict=True)
    return np.stack([weight * r + (1 - weight) * f for weight, r, f in pairs])


class Tanh:
    """D(x) = v . tanh(W x + b), x flat, with its input gradient W^T (v (1 - tanh^2)) derived by hand, in numpy."""

    def __init__(self, features: int, hidden: int = 5, seed: int = 7) -> None:
        self.W = randn(hidden, features, seed=seed)
        self.b, self.v = randn(hidden, seed=seed + 1), randn(hidden, seed=seed + 2)
        self.weights = [t.requires_grad_() for t in (self.W, self.b, self.v)]

    def __call__(self, x: Tensor) -> Tensor:
        return torch.tanh(x.flatten(1) @ self.W.T + self.b) @ self.v

    def input_gradient(self, x: Array) -> Array:
        W, b, v = (t.detach().numpy() for t in self.weights)
        return np.asarray((v * (1 - np.tanh(x.reshape(len(x), -1) @ W.T + b) ** 2)) @ W)

    def penalty(self, real: Tensor, fake: Tensor, u: Array, center: float = 1.0, one_sided: bool = False) -> float:
        excess = np.sqrt((self.input_gradient(mixed(u, real, fake)) ** 2).sum(1)) - center
        return float(np.mean((np.maximum(excess, 0) if one_sided else excess) ** 2))


# -- the wrong versions, as found in public code (or nearly) ---------------------------------------------------------


def variant(
    *,
    mix: Callable[[Tensor], tuple[int, ...]] = lambda x: (len(x), *[1] * (x.dim() - 1)),
    norm: Callable[[Tensor], Tensor] = lambda g: g.flatten(1).norm(dim=1),
    at: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda u, real, fake: u * real + (1 - u) * fake,
    create_graph: bool = True,
    detach: bool = True,
    inside: float = 1.0,
    squared: bool = True,
) -> Penalty:
    """A gradient penalty for one tensor a side, written afresh; its defaults are the right ones."""

    def penalty(
        critic: Callable[[Tensor], Tensor],
        real: Tensor,
        fake: Tensor,
        *,
        center: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        u = torch.rand(mix(real), generator=generator, dtype=real.dtype)
        x = at(u, real, fake)
        x = x.detach().requires_grad_() if detach else x
        logits = critic(x)
        (g,) = torch.autograd.grad(
            logits, x, inside * torch.ones_like(logits), create_graph=create_graph, retain_graph=True
        )
        excess = norm(g) - center
        return (excess.square() if squared else excess.abs()).mean()

    return penalty


RIGHT: dict[str, Penalty] = {"gankit's": gradient_penalty, "written afresh": variant()}
WRONG: dict[str, Penalty] = {
    "norm over one axis": variant(norm=lambda g: g.norm(dim=1)),
    "norm over the last axis": variant(norm=lambda g: g.norm(dim=-1)),
    "norm of the whole batch": variant(norm=lambda g: g.norm()),  # TorchGAN
    "root of the mean square": variant(norm=lambda g: g.flatten(1).square().mean(1).sqrt()),
    "one mixing weight per batch": variant(mix=lambda x: (1,)),
    "one mixing weight per element": variant(mix=lambda x: tuple(x.shape)),
    "at the real samples": variant(at=lambda u, real, fake: real * 1.0),
    "real and fake swapped": variant(at=lambda u, real, fake: (1 - u) * real + u * fake),
    "the weight inside, too": variant(inside=10.0),
    "cut off from the critic": variant(create_graph=False),
    "not cut off from the samples": variant(detach=False),
    "norm biased by a large eps": variant(norm=lambda g: (g.flatten(1).square().sum(1) + 1e-2).sqrt()),
    "not squared": variant(squared=False),
}

# -- the checks ------------------------------------------------------------------------------------------------------


def check_linear(penalty: Penalty, shape: tuple[int, ...] = (2, 3, 4), center: float = 0.7, seed: int = 0) -> None:
    """D(x) = w . x has gradient w everywhere: (||w|| - center)^2 for any samples."""
    w = randn(*shape, seed=seed + 2)
    value = penalty(
        lambda x: (w * x).flatten(1).sum(1),
        randn(5, *shape, seed=seed),
        randn(5, *shape, seed=seed + 1) * 3,
        center=center,
        generator=seeded(seed),
    )
    assert value.shape == ()
    np.testing.assert_allclose(value.item(), (np.linalg.norm(w.numpy().ravel()) - center) ** 2, rtol=1e-12)


def check_quadratic(penalty: Penalty) -> None:
    """D(x) = a/2 |x|^2 between r_i e_i and 0 has gradient norms a u_i |r_i|."""
    r = np.array([0.3, 1.0, 2.0, 5.0])
    real = torch.from_numpy(np.diag(r)).reshape(4, 2, 2)
    value = penalty(
        lambda x: 0.8 * x.square().flatten(1).sum(1) / 2, real, torch.zeros_like(real), center=1.0, generator=seeded()
    )
    np.testing.assert_allclose(value.item(), np.mean((0.8 * draw_u(4) * r - 1) ** 2), rtol=1e-12)


def check_numpy(penalty: Penalty) -> None:
    """A two-layer critic against the gradient derived by hand."""
    for shape in [(3,), (2, 3, 2)]:
        critic, real, fake = Tanh(math.prod(shape)), randn(6, *shape), randn(6, *shape, seed=1) * 2
        for center in (1.0, 0.0):
            value = penalty(critic, real, fake, center=center, generator=seeded(3))
            np.testing.assert_allclose(
                value.item(), critic.penalty(real, fake, draw_u(6, 3), center), rtol=1e-11, err_msg=str(shape)
            )


def check_per_sample(penalty: Penalty) -> None:
    """A batch's value is the mean of its samples' own values: one stream gives both the same u."""
    critic, real, fake = Tanh(6), randn(5, 2, 3), randn(5, 2, 3, seed=1)
    one_by_one = seeded(4)
    singles = [penalty(critic, real[i : i + 1], fake[i : i + 1], generator=one_by_one).item() for i in range(5)]
    assert len(set(singles)) == 5
    np.testing.assert_allclose(penalty(critic, real, fake, generator=seeded(4)).item(), np.mean(singles), rtol=1e-12)


def check_order_and_split(penalty: Penalty, shape: tuple[int, ...] = (2, 3), seed: int = 0) -> None:
    """Where real = fake, u does not matter: no order of the samples and no split of the batch changes the mean."""
    critic, x = Tanh(math.prod(shape), seed=seed), randn(6, *shape, seed=seed)
    value = penalty(critic, x, x, generator=seeded(seed)).item()
    order = torch.randperm(6, generator=seeded(seed))
    np.testing.assert_allclose(penalty(critic, x[order], x[order], generator=seeded(seed)).item(), value, rtol=1e-12)
    parts = [penalty(critic, part, part, generator=seeded(seed)).item() for part in (x[:1], x[1:3], x[3:])]
    np.testing.assert_allclose(np.average(parts, weights=[1, 2, 3]), value, rtol=1e-12)


def check_finite_differences(penalty: Penalty) -> None:
    """d penalty / d theta_D by autograd against central differences of the value, relative to the gradient's size."""
    critic, real, fake = Tanh(4), randn(5, 2, 2), randn(5, 2, 2, seed=1)

    def value() -> Tensor:
        return penalty(critic, real, fake, generator=seeded(5))

    assert value().requires_grad, "no gradient reaches the critic"
    gradients = torch.autograd.grad(value(), critic.weights, allow_unused=True)
    assert all(g is not None for g in gradients)
    got = np.concatenate([g.numpy().ravel() for g in gradients])
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


def check_stops_at_the_samples(penalty: Penalty) -> None:
    """Neither the data nor the generator gets a gradient: the penalty trains the critic alone."""
    critic, generator = Tanh(4), nn.Linear(2, 4).double()
    real = randn(5, 4).requires_grad_()
    penalty(critic, real, generator(randn(5, 2, seed=1)), generator=seeded()).backward()
    assert real.grad is None
    assert all(p.grad is None for p in generator.parameters())
    assert all(w.grad is not None and w.grad.any() for w in critic.weights)


CHECKS: dict[str, Callable[[Penalty], None]] = {
    check.__name__.removeprefix("check_"): check
    for check in (
        check_linear,
        check_quadratic,
        check_numpy,
        check_per_sample,
        check_order_and_split,
        check_finite_differences,
        check_stops_at_the_samples,
    )
}
MUST_REJECT = {
    "norm over one axis": ["linear", "quadratic", "numpy"],
    "norm over the last axis": ["linear", "quadratic", "numpy"],
    "norm of the whole batch": ["linear", "quadratic", "numpy", "per_sample", "order_and_split"],
    "root of the mean square": ["linear", "quadratic", "numpy"],
    "one mixing weight per batch": ["quadratic", "numpy", "per_sample"],
    "one mixing weight per element": ["quadratic", "numpy"],
    "at the real samples": ["quadratic", "numpy"],
    "real and fake swapped": ["quadratic", "numpy"],
    "the weight inside, too": ["linear", "quadratic", "numpy"],
    "cut off from the critic": ["finite_differences"],
    "not cut off from the samples": ["stops_at_the_samples"],
    "norm biased by a large eps": ["linear", "quadratic", "numpy"],
    "not squared": ["linear", "quadratic", "numpy"],
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("right", RIGHT)
def test_the_right_penalty_passes(right: str, check: str) -> None:
    CHECKS[check](RIGHT[right])


@pytest.mark.parametrize(("wrong", "check"), [(wrong, check) for wrong in WRONG for check in MUST_REJECT[wrong]])
def test_the_same_check_rejects_the_wrong_one(wrong: str, check: str) -> None:
    with pytest.raises(AssertionError):
        CHECKS[check](WRONG[wrong])


# -- the function ----------------------------------------------------------------------------------------------------

shapes = st.lists(st.integers(1, 4), max_size=3).map(tuple)


@settings(max_examples=40, deadline=None)
@given(shape=shapes, center=st.floats(0, 5), seed=st.integers(0, 999))
def test_linear_critic_in_any_shape(shape: tuple[int, ...], center: float, seed: int) -> None:
    w = randn(*shape, seed=seed + 2)
    value = gradient_penalty(
        lambda x: (w * x).unsqueeze(1).flatten(1).sum(1), randn(4, *shape, seed=seed), randn(4, *shape), center=center
    )
    np.testing.assert_allclose(value.item(), (np.linalg.norm(w.numpy().ravel()) - center) ** 2, rtol=1e-9, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(shape=shapes, seed=st.integers(0, 99))
def test_order_and_split_in_any_shape(shape: tuple[int, ...], seed: int) -> None:
    check_order_and_split(gradient_penalty, (*shape, 2), seed)


@pytest.mark.parametrize("form", [(5,), (5, 1), (5, 1, 3, 3)])
def test_logits_of_any_form(form: tuple[int, ...]) -> None:
    """(B,), (B, 1) and a map of equal patches say the same."""
    critic, real, fake = Tanh(4), randn(5, 4), randn(5, 4, seed=1)
    value = gradient_penalty(
        lambda x: critic(x).view(-1, *[1] * (len(form) - 1)).expand(form), real, fake, generator=seeded()
    )
    np.testing.assert_allclose(value.item(), critic.penalty(real, fake, draw_u(5)), rtol=1e-12)


def test_one_sided_leaves_norms_below_center_alone() -> None:
    w = torch.tensor([3.0, 4.0], dtype=torch.float64, requires_grad=True)
    real, fake = randn(4, 2), randn(4, 2, seed=1)

    def value(center: float, one_sided: bool) -> Tensor:
        return gradient_penalty(lambda x: x @ w, real, fake, center=center, one_sided=one_sided)

    below = value(6.0, True)
    assert below.item() == 0
    assert not torch.autograd.grad(below, w)[0].any()
    assert value(6.0, False).item() == pytest.approx(1)
    assert value(4.0, True).item() == value(4.0, False).item() == pytest.approx(1)


def test_one_sided_sample_by_sample() -> None:
    critic, real, fake, u = Tanh(3), randn(20, 3), randn(20, 3, seed=1), draw_u(20)
    one, both = critic.penalty(real, fake, u, 2.0, one_sided=True), critic.penalty(real, fake, u, 2.0)
    assert 0 < one < both  # some samples above, some below
    value = gradient_penalty(critic, real, fake, center=2.0, one_sided=True, generator=seeded())
    np.testing.assert_allclose(value.item(), one, rtol=1e-12)


def test_a_critic_without_slope_gives_a_finite_gradient() -> None:
    w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    value = gradient_penalty(lambda x: x @ w, randn(4, 3), randn(4, 3, seed=1))
    assert value.item() == 1
    assert torch.autograd.grad(value, w)[0].isfinite().all()

    def naive(x: Tensor) -> Tensor:
        (g,) = torch.autograd.grad((x @ w).sum(), x, create_graph=True)
        return (g.square().sum(1).sqrt() - 1).square().mean()

    assert torch.autograd.grad(naive(randn(4, 3).requires_grad_()), w)[0].isnan().all()


@pytest.mark.parametrize("second", [(4, 2), (4,)])
def test_a_second_floating_input_shares_u_and_the_norm(second: tuple[int, ...]) -> None:
    """D(x, y) = w.x + v.y + (w.x) (v.y): the critic sees one u, and the norm runs over x and y together."""
    w, v = randn(3, seed=5), randn(*second[1:], seed=6)
    seen: list[tuple[Tensor, Tensor]] = []

    def critic(x: Tensor, y: Tensor) -> Tensor:
        seen.append((x.detach(), y.detach()))
        a, b = x @ w, (y * v).unsqueeze(1).flatten(1).sum(1)
        return a + b + a * b

    real, fake = (randn(4, 3), randn(*second, seed=1)), (randn(4, 3, seed=2), randn(*second, seed=3))
    value = gradient_penalty(critic, real, fake, generator=seeded())
    W, V, ((x, y),) = w.numpy(), v.numpy(), seen
    X, Y = (mixed(draw_u(4), r, f) for r, f in zip(real, fake, strict=True))
    np.testing.assert_allclose(x.numpy(), X, rtol=1e-12)
    np.testing.assert_allclose(y.numpy(), Y, rtol=1e-12)
    a, b = X @ W, (Y * V).reshape(4, -1).sum(1)
    norms = np.sqrt((1 + b) ** 2 * (W**2).sum() + (1 + a) ** 2 * (V**2).sum())
    np.testing.assert_allclose(value.item(), np.mean((norms - 1) ** 2), rtol=1e-12)
    alone = np.mean((np.abs(1 + b) * np.linalg.norm(W) - 1) ** 2)  # the norm over x only is another number
    assert abs(value.item() - alone) > 1e-3


def test_labels_stay_whole_and_come_from_real() -> None:
    scale = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    w, labels, others = randn(3, seed=5), torch.tensor([0, 1, 2, 1]), torch.tensor([2, 2, 0, 0])
    value = gradient_penalty(lambda x, y: (x @ w) * scale[y], (randn(4, 3), labels), (randn(4, 3, seed=1), others))
    norm = np.linalg.norm(w.numpy())
    np.testing.assert_allclose(value.item(), np.mean((norm * scale[labels].numpy() - 1) ** 2), rtol=1e-12)


def test_gradcheck_of_both_derivatives_in_the_critics_weights() -> None:
    real, fake = randn(3, 2), randn(3, 2, seed=1)

    def value(W: Tensor, b: Tensor, v: Tensor) -> Tensor:
        return gradient_penalty(lambda x: torch.tanh(x @ W.T + b) @ v, real, fake, generator=seeded())

    weights = Tanh(2, hidden=3).weights
    assert torch.autograd.gradcheck(value, weights)
    assert torch.autograd.gradgradcheck(value, weights)  # what unrolling needs


def test_an_explicit_generator_is_all_the_chance_there_is() -> None:
    critic, real, fake, before = Tanh(3), randn(4, 3), randn(4, 3, seed=1), torch.get_rng_state()
    first, again, other = (gradient_penalty(critic, real, fake, generator=seeded(s)).item() for s in (1, 1, 2))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("real", "fake"),
    [
        (torch.zeros(4, 3), torch.zeros(4, 1)),  # would broadcast
        (torch.zeros(4, 3), torch.zeros(1, 3)),
        ((torch.zeros(4, 3), torch.zeros(4, 2)), (torch.zeros(4, 3), torch.zeros(4, 1))),
        ((torch.zeros(4, 3), torch.zeros(4, 2)), (torch.zeros(4, 3),)),
    ],
)
def test_sides_that_differ_in_shape_are_refused(real: Any, fake: Any) -> None:
    with pytest.raises(ValueError, match=r"same shapes, not \[\(4, 3\).*\] and "):
        gradient_penalty(lambda *x: x[0].sum(1), real, fake)


def test_minimised_alone_it_brings_the_slope_to_center() -> None:
    critic, real, fake = Tanh(2, hidden=16), randn(64, 2), randn(64, 2, seed=1) + 2
    optimizer, generator = torch.optim.Adam(critic.weights, lr=0.02), seeded()
    for _ in range(150):
        optimizer.zero_grad()
        gradient_penalty(critic, real, fake, center=1.5, generator=generator).backward()
        optimizer.step()
    norms = np.linalg.norm(critic.input_gradient(((real + fake) / 2).numpy()), axis=1)
    assert abs(norms.mean() - 1.5) < 0.1


def test_batch_norm_in_the_critic_breaks_it() -> None:
    """Why the plugin refuses such a critic: a sample's penalty then depends on its neighbours."""
    critic = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)).double()

    def flat(critic_: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, **options: Any) -> Tensor:
        return gradient_penalty(lambda x: critic(x.flatten(1)), real, fake, **options)

    x = randn(6, 4)
    whole = flat(critic, x, x).item()
    halves = [flat(critic, part, part).item() for part in (x[:3], x[3:])]
    assert abs(np.mean(halves) - whole) > 1e-3 * whole


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


def first_term(plugins: dict[str, object], **settings: Any) -> tuple[float, list[tuple[int, ...]], float]:
    """The term of the first D update, the shapes shown, and the linear critic's slope before it."""
    log = Log()
    gan = tiny_gan(plugins=plugins, core={"log": log}, discriminator=linear, **settings)
    weights = list(gan.discriminator.weights)
    slope = math.sqrt(sum(w.detach().double().square().sum().item() for w in weights))
    update(gan, "d", 1)
    ((_, _, terms),) = log.updates
    return terms["gradient_penalty"], [tuple(w.shape) for w in weights], slope


@pytest.mark.parametrize(
    ("others", "shapes"),
    [
        ({}, [(3,)]),
        ({"packs": Packs()}, [(6,)]),
        ({"bigan": BiGAN()}, [(3,), (4,)]),
        ({"bigan": BiGAN(), "packs": Packs()}, [(6,), (8,)]),
    ],
    ids=["plain", "packed", "joint", "packed pairs"],
)
@pytest.mark.parametrize("last", [False, True])
def test_the_term_acts_on_what_the_critic_is_shown(
    others: dict[str, object], shapes: list[tuple[int, ...]], last: bool
) -> None:
    check_term(GradientPenalty, others, shapes, last)


def check_term(
    plugin: type[GradientPenalty], others: dict[str, object], shapes: list[tuple[int, ...]], last: bool = False
) -> None:
    """The weight once, the norm over all the critic's inputs."""
    own = {"gradient_penalty": plugin(weight=3.0, center=0.5)}
    term, shown, slope = first_term(others | own if last else own | others)
    assert shown == shapes
    assert term == pytest.approx(3.0 * (slope - 0.5) ** 2, rel=1e-5)


def test_the_same_check_rejects_a_weight_that_counts_twice_and_a_look_behind_the_view() -> None:
    class Twice(GradientPenalty):
        @hookimpl
        def pre_d_loss(
            self, gan: GAN, critic: Callable[..., Tensor], view: View, step: int
        ) -> dict[str, Tensor] | None:
            terms = super().pre_d_loss(gan, critic, view, step) or {}
            return {name: self.weight * term for name, term in terms.items()}

    class FirstInputOnly(GradientPenalty):
        @hookimpl
        def pre_d_loss(
            self, gan: GAN, critic: Callable[..., Tensor], view: View, step: int
        ) -> dict[str, Tensor] | None:
            code = view.real[1]
            return {
                "gradient_penalty": self.weight
                * gradient_penalty(lambda x: critic(x, code), view.real[0], view.fake[0], center=self.center)
            }

    for wrong in (Twice, FirstInputOnly):
        with pytest.raises(AssertionError):
            check_term(wrong, {"bigan": BiGAN()}, [(3,), (4,)])


def test_the_term_is_the_function_on_the_plugins_own_stream() -> None:
    """With the shipped critic: weight times the numpy value, u from the stream called plugin:gradient_penalty."""
    expected: list[float] = []

    class Watch:
        @hookimpl
        def pre_d_loss(self, critic: Callable[..., Tensor], view: View) -> None:
            u = torch.rand(8, generator=seeded(derive_seed(0, "plugin:gradient_penalty")))[:, None]
            x = (u * view.real[0] + (1 - u) * view.fake[0]).detach().requires_grad_()
            slopes = [torch.autograd.grad(critic(x[i : i + 1]).sum(), x)[0][i] for i in range(8)]  # one by one
            norms = np.linalg.norm(torch.stack(slopes).numpy(), axis=1)
            expected.append(7 * np.mean((norms - 1) ** 2))

    _, log = run({"gradient_penalty": GradientPenalty(weight=7.0), "watch": Watch()}, steps=1)
    assert log.updates[0][2]["gradient_penalty"] == pytest.approx(expected[0], rel=1e-5)


def test_every_k_is_k_times_as_strong_and_absent_in_between() -> None:
    _, log = run({"gradient_penalty": GradientPenalty(every=3)}, steps=7, d_steps=2)
    present = [step for phase, step, terms in log.updates if "gradient_penalty" in terms and phase == "d"]
    assert present == [3, 3, 6, 6]
    assert not any("gradient_penalty" in terms for phase, _, terms in log.updates if phase == "g")

    def term(every: int) -> Tensor:
        plugin = GradientPenalty(every=every)
        gan = tiny_gan(plugins={"gradient_penalty": plugin})
        view = View((torch.linspace(-1, 1, 24).view(8, 3),), (torch.zeros(8, 3),))
        for step in range(1, every):
            assert plugin.pre_d_loss(gan, gan.discriminator, view, step) is None
        (found,) = (plugin.pre_d_loss(gan, gan.discriminator, view, every) or {}).values()
        return found

    torch.testing.assert_close(term(5), 5 * term(1))


@pytest.mark.parametrize("kind", ["vector", "image"])
def test_weight_0_changes_no_bit(kind: str) -> None:
    plain, none, some = (
        run({"gradient_penalty": GradientPenalty(weight=w)} if w is not None else {}, kind=kind)[0].weights()
        for w in (None, 0.0, 1.0)
    )
    for name, weights in plain.items():
        assert all(torch.equal(weights[key], none[name][key]) for key in weights)
    assert any(not torch.equal(w, some["discriminator"][key]) for key, w in plain["discriminator"].items())


@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_the_gradient_of_d_gains_weight_times_that_of_the_penalty(weight: float) -> None:
    def gradient(plugins: dict[str, object]) -> Tensor:
        gan = tiny_gan(plugins=plugins, discriminator=linear)
        gan.optimizers["d"] = torch.optim.SGD(gan.parameters("d"), lr=1.0)
        before = gan.discriminator.weights[0].detach().clone()
        update(gan, "d", 1)
        return before - gan.discriminator.weights[0].detach()

    w = tiny_gan(discriminator=linear).discriminator.weights[0].detach()
    plain, added = gradient({}), gradient({"gradient_penalty": GradientPenalty(weight=weight)})
    if weight == 0:
        assert torch.equal(added, plain)
    torch.testing.assert_close(added, plain + weight * 2 * (w.norm() - 1) * w / w.norm())


@pytest.mark.parametrize("kind", ["vector", "image"])
@pytest.mark.parametrize("loss", ["non_saturating", "wasserstein"])
def test_three_steps_of_the_real_loop(kind: str, loss: str) -> None:
    gan, log = run({"gradient_penalty": GradientPenalty()}, kind=kind, loss=loss)
    assert [sorted(terms) for _, _, terms in log.updates] == [["adv", "gradient_penalty"], ["adv"]] * 3
    assert all(math.isfinite(value) for _, _, terms in log.updates for value in terms.values())
    assert all(w.isfinite().all() for weights in gan.weights().values() for w in weights.values())


def test_g_learns_nothing_from_it() -> None:
    """G's first step is the same with and without the penalty when D stands still."""
    after = []
    for plugins in ({}, {"gradient_penalty": GradientPenalty(weight=100.0)}):
        gan = tiny_gan(plugins=plugins)
        gan.optimizers["d"] = torch.optim.SGD(gan.parameters("d"), lr=0.0)
        for phase in "dg":
            update(gan, phase, 1)
        after.append(gan.weights()["generator"])
    assert all(torch.equal(after[0][key], after[1][key]) for key in after[0])


def test_a_batch_whose_sides_differ_is_refused_by_name() -> None:
    class Short:
        @hookimpl(wrapper=True)
        def sample(self) -> Generator[None, Batch, Batch]:
            batch = yield
            return batch._replace(fake=batch.fake[:, :1])

    with pytest.raises(UsageError, match="'short'"):
        run({"short": Short(), "gradient_penalty": GradientPenalty()})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": "-1"}, "gradient_penalty: weight and center must not be negative"),
        ({"center": -0.5}, "gradient_penalty: weight and center must not be negative"),
        ({"every": 0}, "gradient_penalty: every must be at least 1"),
        ({"weight": "much"}, "gradient_penalty.weight must be number"),
        ({"weigth": 1}, "did you mean 'weight'"),
    ],
)
def test_bad_options_are_refused_in_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        build(GradientPenalty, options, "gradient_penalty")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("option", ["weight", "center"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_refused_on_the_object_too(option: str, value: float) -> None:
    with pytest.raises(ValueError, match="weight and center must not be negative, infinite or NaN"):
        GradientPenalty(**{option: value})  # type: ignore[arg-type]


def test_options_arrive() -> None:
    made = build(GradientPenalty, {"weight": "5", "center": "0", "one_sided": "yes", "every": "4"}, "gradient_penalty")
    assert (made.weight, made.center, made.one_sided, made.every) == (5.0, 0.0, True, 4)
    default = GradientPenalty()
    assert (default.weight, default.center, default.one_sided, default.every) == (10.0, 1.0, False, 1)  # the paper's
    w = tiny_gan(discriminator=linear).discriminator.weights[0].norm().item()
    term, _, _ = first_term({"gradient_penalty": GradientPenalty(weight=2.0, center=w + 1, one_sided=True)})
    assert term == 0


@pytest.mark.parametrize("options", [{"one_sided": True}, {"every": 4}, {"one_sided": True, "every": 2}], ids=str)
@pytest.mark.parametrize("name", ["claimed_norm", "claimed_place"])
def test_the_claims_know_the_options(name: str, options: dict[str, Any]) -> None:
    (check,) = (check for check in plugin_checks("gradient_penalty", **options) if str(check) == name)
    check()


def test_a_critic_with_batch_norm_is_refused() -> None:
    def critic(shapes: Sequence[tuple[int, ...]]) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))

    with pytest.raises(UsageError, match="gradient_penalty needs the gradient of each sample.*'1'"):
        tiny_gan(plugins={"gradient_penalty": GradientPenalty()}, discriminator=critic)


# -- the README --------------------------------------------------------------------------------------------------------


def test_the_readmes_code_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, str(README), "exec"), {})


def test_the_readmes_table_is_the_options() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \| (.+?) \|$", README.read_text(), re.MULTILINE)
    assert rows == [(o.name, str(o.default).lower(), o.help) for o in options_of(GradientPenalty).values()]
