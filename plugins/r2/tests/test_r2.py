"""R2 against numpy, closed forms and finite differences; each check also meets wrong versions that it must reject."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Generator
from typing import Any

import numpy as np
import pytest
import torch
from gankit_bigan import BiGAN
from gankit_r2 import R2, r2_penalty
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gankit import Optim, UsageError, View, hookimpl
from gankit.loop import d_terms, total, update
from gankit.options import build
from gankit.testing import plugin_checks, run, tiny_gan

torch.set_num_threads(1)

SHAPES = [(3,), (1,), (), (2, 4, 5), (1, 2, 3, 2)]
Penalty = Callable[[Tensor, Tensor], Tensor]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- the function ----------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(SHAPES), st.integers(0, 99))
def test_linear_critic(shape: tuple[int, ...], seed: int) -> None:
    w, x = randn(*shape, seed=seed), randn(4, *shape).requires_grad_()
    value = r2_penalty((x * w).reshape(4, -1).sum(1), x)
    assert np.isclose(value.item(), (w.numpy() ** 2).sum() / 2)


class Tanh:
    """D(x) = v . tanh(W x + b); half the mean square of its hand-derived input gradient, in numpy."""

    def __init__(self, features: int) -> None:
        self.weights = [randn(*s, seed=i).requires_grad_() for i, s in enumerate([(5, features), (5,), (5,)])]

    def __call__(self, x: Tensor) -> Tensor:
        W, b, v = self.weights
        return torch.tanh(x.flatten(1) @ W.T + b) @ v

    def penalty(self, x: Tensor) -> float:
        W, b, v = (t.detach().numpy() for t in self.weights)
        gradient = (v * (1 - np.tanh(x.detach().flatten(1).numpy() @ W.T + b) ** 2)) @ W
        return float((gradient**2).sum() / len(x) / 2)


def check(penalty: Penalty, shape: tuple[int, ...] = (2, 2, 2)) -> None:
    critic, x = Tanh(int(np.prod(shape))), randn(6, *shape, seed=9).requires_grad_()
    value = penalty(critic(x), x)
    assert value.shape == ()
    assert np.isclose(value.item(), critic.penalty(x), rtol=1e-12)
    grads = torch.autograd.grad(value, critic.weights)
    for weight, grad in zip(critic.weights, grads, strict=True):
        for index in np.ndindex(*weight.shape):
            ends = []
            for step in (1e-6, -1e-6):
                with torch.no_grad():
                    weight[index] += step
                ends.append(critic.penalty(x))
                with torch.no_grad():
                    weight[index] -= step
            assert np.isclose(grad[index].item(), (ends[0] - ends[1]) / 2e-6, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s])
def test_against_numpy_and_finite_differences_in_the_critics_weights(shape: tuple[int, ...]) -> None:
    check(r2_penalty, shape)


def variant(reduce: Callable[[Tensor], Tensor], *, mean: bool = False, graph: bool = True) -> Penalty:
    def penalty(logits: Tensor, x: Tensor) -> Tensor:
        (g,) = torch.autograd.grad(logits.mean() if mean else logits.sum(), x, create_graph=True)
        return reduce(g) if graph else reduce(g.detach()) + 0 * logits.sum()

    return penalty


def half(g: Tensor) -> Tensor:
    return g.flatten(1).square().sum(1).mean() / 2


WRONG = {
    "without the 1/2": variant(lambda g: 2 * half(g)),
    "mean over pixels": variant(lambda g: g.square().mean() / 2),
    "norm, not squared": variant(lambda g: g.flatten(1).norm(dim=1).mean() / 2),
    "square over channels only": variant(lambda g: g.square().sum(1).square().mean() / 2),
    "gradient of the mean logit": variant(half, mean=True),
    "no second derivative": variant(half, graph=False),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_check_rejects(wrong: str) -> None:
    with pytest.raises(AssertionError):
        check(WRONG[wrong])


def test_order_and_split() -> None:
    critic, x = Tanh(3), randn(6, 3).requires_grad_()
    whole = r2_penalty(critic(x), x).item()
    shuffled = x[torch.tensor([3, 1, 5, 0, 2, 4])]
    assert np.isclose(r2_penalty(critic(shuffled), shuffled).item(), whole)
    assert np.isclose(np.mean([r2_penalty(critic(part), part).item() for part in x.split(3)]), whole)


@pytest.mark.parametrize("form", [(4,), (4, 1), (4, 1, 2, 3)])
def test_a_map_of_logits_is_averaged(form: tuple[int, ...]) -> None:
    w, x = randn(3), randn(4, 3).requires_grad_()
    logits = (x @ w).view(4, *[1] * (len(form) - 1)).expand(form)
    assert np.isclose(r2_penalty(logits, x).item(), (w.numpy() ** 2).sum() / 2)


def test_of_a_tuple_all_floating_tensors_count_and_labels_do_not() -> None:
    w, v = randn(3, seed=1), randn(2, seed=2)
    x, y, z = randn(4, 3).requires_grad_(), torch.arange(4), randn(4, 2, seed=3).requires_grad_()
    value = r2_penalty(x @ w + y + z @ v, (x, y, z))
    assert np.isclose(value.item(), ((w.numpy() ** 2).sum() + (v.numpy() ** 2).sum()) / 2)


def test_logits_that_do_not_come_from_the_inputs_are_refused() -> None:
    x = randn(4, 3)
    for logits, inputs in ((Tanh(3)(x), x), (x.sum(1), x.requires_grad_()), (Tanh(3)(x), torch.arange(4))):
        with pytest.raises(ValueError, match="require gradients"):
            r2_penalty(logits if inputs is not x else logits.detach(), inputs)


def test_batch_norm_breaks_it() -> None:
    """Why it is refused: with batch norm the penalty of a batch is not the mean of its samples' own."""
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    x = randn(8, 3).requires_grad_()
    per_sample = torch.stack([torch.autograd.grad(critic(x)[i, 0], x)[0][i].square().sum() for i in range(8)])
    assert not np.isclose(r2_penalty(critic(x), x).item(), per_sample.mean().item() / 2, rtol=0.01)


# -- the plugin ------------------------------------------------------------------------------------------------------


class Watch:
    """What the term should be: the gradient of the critic at the generated side, one sample after the other."""

    def __init__(self) -> None:
        self.expected: list[float] = []

    @hookimpl
    def pre_d_loss(self, critic: Callable[..., Tensor], view: View) -> None:
        total = 0.0
        for i in range(len(view.fake[0])):
            one = [t[i : i + 1].detach().requires_grad_() for t in view.fake]
            total += sum(g.square().sum().item() for g in torch.autograd.grad(critic(*one).sum(), one))
        self.expected.append(10 / 2 * total / len(view.fake[0]))


class Pairs:
    """A packing of two, written out."""

    @hookimpl(wrapper=True, tryfirst=True)
    def view(self) -> Generator[None, View, View]:
        view = yield
        real, fake = (tuple(t.reshape(len(t) // 2, -1) for t in side) for side in view)
        return View(real, fake)


@pytest.mark.parametrize(
    ("kind", "others"),
    [
        ("vector", {}),
        ("image", {}),
        ("vector", {"bigan": BiGAN()}),
        ("image", {"bigan": BiGAN()}),
        ("vector", {"pairs": Pairs()}),
    ],
    ids=["vectors", "images", "joint vectors", "joint images", "packs"],
)
def test_three_steps_with_the_term_of_what_the_critic_is_shown(kind: str, others: dict[str, object]) -> None:
    watch = Watch()
    _, log = run({"watch": watch, "r2": R2(), **others}, kind=kind)
    assert [terms["r2"] for phase, _, terms in log.updates if phase == "d"] == pytest.approx(watch.expected, rel=1e-4)
    assert all("r2" not in terms for phase, _, terms in log.updates if phase == "g")


def test_the_other_side_is_left_alone() -> None:
    """The fake and the real samples of one batch differ, so this meets a plugin that takes the wrong side."""

    class Other(R2):
        @hookimpl
        def pre_d_loss(self, view: View, real_logits: Tensor) -> dict[str, Tensor]:
            return {"r2": self.weight * r2_penalty(real_logits, view.real)}

    watch = Watch()
    _, log = run({"watch": watch, "r2": Other()})
    assert [terms["r2"] for phase, _, terms in log.updates if phase == "d"] != pytest.approx(watch.expected, rel=1e-4)


def test_no_critic_forward_is_added() -> None:
    calls = []

    class Count:
        @hookimpl(wrapper=True)
        def critic(self) -> Generator[None, Callable[..., Tensor], Callable[..., Tensor]]:
            critic = yield
            return lambda *inputs: (calls.append(1), critic(*inputs))[1]

    run({"count": Count(), "r2": R2()}, steps=1)
    assert len(calls) == 3  # real and fake of the D update, fake of G's


def test_unrolling_can_differentiate_through_it() -> None:
    """In phase "g" the fakes carry G's graph: the term must keep it where it depends on them, and not fail."""
    slopes: list[tuple[float, float]] = []

    def smooth() -> nn.Module:  # a leaky ReLU's slope is constant almost everywhere, and so is the penalty
        return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

    class Ask:
        @hookimpl
        def critic(self, phase: str, d_objective: Any, batch: Any, view: View, gan: Any) -> Any:
            if phase == "g":
                logits = gan.discriminator(*view.real), gan.discriminator(*view.fake)
                term = d_objective(gan.discriminator) - gan.loss.d(*logits)
                slope = torch.autograd.grad(term, next(gan.generator.parameters()), retain_graph=True)[0]
                critic, generator = Tanh(3), copy.deepcopy(gan.generator).double()
                first, _, last = gan.discriminator
                critic.weights = [t.detach().double() for t in (first.weight, first.bias, last.weight[0])]
                weight = next(generator.parameters())
                for index in slope.abs().flatten().topk(4).indices:
                    ends = []
                    for step in (1e-6, -1e-6):
                        with torch.no_grad():
                            weight.view(-1)[index] += step
                            ends.append(10 * critic.penalty(generator(batch.z.double())))
                            weight.view(-1)[index] -= step
                    slopes.append((slope.flatten()[index].item(), (ends[0] - ends[1]) / 2e-6))
            return gan.discriminator

    run({"r2": R2(), "ask": Ask()}, steps=2, discriminator=smooth)
    assert len(slopes) == 2 * 4
    for slope, by_differences in slopes:
        assert slope == pytest.approx(by_differences, rel=1e-3)
        assert abs(slope) > 1e-5


@pytest.mark.parametrize("kind", ["vector", "image"])
def test_weight_0_changes_no_bit(kind: str) -> None:
    plain, _ = run({}, kind=kind)
    for name, weights in run({"r2": R2(weight=0)}, kind=kind)[0].weights().items():
        assert all(torch.equal(value, plain.weights()[name][key]) for key, value in weights.items())


def test_every_k_is_k_times_as_strong_and_absent_in_between() -> None:
    gan = tiny_gan(plugins={"r2": R2(every=2)})
    batch = gan.hook.sample(gan=gan, real=gan.next_real(), z=gan.next_z(), phase="d", step=1)
    view = View((batch.real.requires_grad_(),), (batch.fake.detach().requires_grad_(),))
    terms = [d_terms(gan, gan.discriminator, batch, view, step) for step in (1, 2)]
    single = r2_penalty(gan.discriminator(*view.fake), view.fake)
    assert "r2" not in terms[0]
    assert terms[1]["r2"].item() == pytest.approx(2 * 10 * single.item())
    assert total(terms[1]).item() == pytest.approx(terms[1]["adv"].item() + 20 * single.item())


def test_the_weight_falls_by_the_same_factor_every_step() -> None:
    """With constant weights of the networks (no rate), the terms of a run of four steps differ by the factor alone."""
    still: dict[str, Any] = {"optim": {phase: Optim(lr=0.0) for phase in ("d", "g")}, "steps": 4}
    constant, falling = (
        [terms["r2"] for phase, _, terms in run({"r2": R2(decay_to=to)}, **still)[1].updates if phase == "d"]
        for to in (1.0, 0.0016)
    )
    shares = [later / first for later, first in zip(falling, constant, strict=True)]
    assert shares == pytest.approx([0.2, 0.04, 0.008, 0.0016])


@pytest.mark.parametrize("name", ["claimed_norm", "claimed_place", "weight_is_a_factor", "every", "resumes"])
def test_conformance_of_a_weight_that_falls(name: str) -> None:
    (check,) = (check for check in plugin_checks("r2", decay_to=0.01) if str(check) == name)
    check()


@pytest.mark.parametrize("options", [{"every": 4}, {"every": 4, "decay_to": 0.01}], ids=str)
@pytest.mark.parametrize("name", ["claimed_norm", "claimed_place"])
def test_the_claims_know_of_every(name: str, options: dict[str, Any]) -> None:
    (check,) = (check for check in plugin_checks("r2", **options) if str(check) == name)
    check()


def test_a_weight_that_falls_needs_to_know_how_far_there_is_to_go() -> None:
    gan = tiny_gan(plugins={"r2": R2(decay_to=0.5)})
    with pytest.raises(UsageError, match="how many steps"):
        update(gan, "d", 1)


def test_same_seed_same_terms_and_the_next_step_after_a_round_trip() -> None:
    first, log = run({"r2": R2()}, steps=2)
    assert log.updates == run({"r2": R2()}, steps=2)[1].updates
    twin = tiny_gan(plugins={"r2": R2()})
    twin.load_weights(first.weights())
    twin.load_state_dict(copy.deepcopy(first.state_dict()))  # a checkpoint does not share memory
    for gan in (first, twin):
        gan.next_real = lambda: torch.linspace(-1, 1, 24).view(8, 3)
        update(gan, "d", 3)
    for mine, his in zip(first.discriminator.parameters(), twin.discriminator.parameters(), strict=True):
        assert torch.equal(mine, his)


@pytest.mark.parametrize(
    ("options", "message"), [({"weight": -1}, "weight"), ({"every": 0}, "every"), ({"decay_to": 0}, "decay_to")]
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(R2, options, "r2")


@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_refused_on_the_object_too(weight: float) -> None:
    with pytest.raises(ValueError, match="weight must not be negative, infinite or NaN"):
        R2(weight=weight)


def test_batch_norm_is_refused() -> None:
    def normed() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

    with pytest.raises(UsageError, match=r"r2.*batch norm"):
        tiny_gan(plugins={"r2": R2()}, discriminator=normed)
