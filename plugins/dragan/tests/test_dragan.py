"""DRAGAN's penalty against numpy and closed forms; each check also meets wrong versions that it must reject."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from gankit_bigan import BiGAN
from gankit_dragan import DRAGAN, dragan_penalty, perturb
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gankit import GAN, UsageError, View, hookimpl
from gankit.gan import derive_seed
from gankit.loop import update
from gankit.options import build
from gankit.testing import plugin_checks, run, tiny_gan

torch.set_num_threads(1)

SHAPES = [(3,), (1,), (2, 4, 5), (1, 2, 3, 2)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


# -- the noise -------------------------------------------------------------------------------------------------------

Perturb = Callable[..., tuple[Tensor, ...]]


def check_paper(perturb: Perturb) -> None:
    """Normal around x, of the population standard deviation of the whole tensor: sizes, symmetry, tails, independence."""
    x = randn(4, 50000, seed=1) * torch.tensor([[1.0], [1.0], [5.0], [5.0]], dtype=torch.float64) + 3
    (moved,) = perturb((x,), noise="paper", generator=seeded())
    delta = (moved - x).detach().numpy()
    sizes = delta.std(axis=1) / (0.5 * np.std(x.numpy()))
    assert np.allclose(sizes, 1, rtol=0.02)  # one std for all rows, though the rows differ
    assert abs(delta.mean()) < 0.02 * delta.std()
    assert np.isclose((delta**4).mean() / delta.var() ** 2, 3, rtol=0.05)  # kurtosis of the normal; uniform has 1.8
    assert abs(np.corrcoef(delta)[np.triu_indices(4, 1)]).max() < 0.02


def check_code(perturb: Perturb) -> None:
    """x + a (x' - x) with x' = x + 0.5 std(x) U: non-negative, bounded, one a for each sample."""
    x = randn(400, 300, seed=1) * 2 + 3
    (moved,) = perturb((x,), noise="code", generator=seeded())
    delta = (moved - x).detach().numpy() / (0.5 * np.std(x.numpy()))
    assert delta.min() >= 0
    a = delta.max(axis=1)  # of 300 draws of a U: a, or almost
    assert abs(np.sort(a) - np.linspace(0, 1, 400)).max() < 0.1  # itself uniform
    assert np.allclose((delta / a[:, None]).mean(), 0.5, atol=0.01)


def noisy(draw: Callable[[Tensor, torch.Generator], Tensor]) -> Perturb:
    return lambda inputs, noise, generator: tuple(x + draw(x, generator) for x in inputs)


def uniform(x: Tensor, g: torch.Generator) -> Tensor:
    return torch.rand(x.shape, generator=g, dtype=x.dtype)


def normal(x: Tensor, g: torch.Generator) -> Tensor:
    return torch.randn(x.shape, generator=g, dtype=x.dtype)


def one(x: Tensor, g: torch.Generator) -> Tensor:
    return torch.rand((len(x), 1), generator=g, dtype=x.dtype)


WRONG = {
    "paper: std of each sample": (check_paper, noisy(lambda x, g: 0.5 * x.std(1, keepdim=True) * normal(x, g))),
    "paper: uniform": (check_paper, noisy(lambda x, g: x.std() * (3**0.5) * (uniform(x, g) - 0.5))),
    "paper: variance for standard deviation": (check_paper, noisy(lambda x, g: 0.5 * x.var() * normal(x, g))),
    "paper: one draw per batch": (check_paper, noisy(lambda x, g: 0.5 * x.std() * normal(x[:1], g))),
    "code: without a": (check_code, noisy(lambda x, g: 0.5 * x.std() * uniform(x, g))),
    "code: one a per batch": (check_code, noisy(lambda x, g: 0.5 * x.std() * one(x[:1], g) * uniform(x, g))),
    "code: one U per sample": (check_code, noisy(lambda x, g: 0.5 * x.std() * one(x, g) * one(x, g))),
    "code: centred": (check_code, noisy(lambda x, g: 0.5 * x.std() * one(x, g) * (2 * uniform(x, g) - 1))),
}


@pytest.mark.parametrize("check", [check_paper, check_code])
def test_the_noise(check: Callable[[Perturb], None]) -> None:
    check(perturb)


@pytest.mark.parametrize("wrong", WRONG)
def test_the_checks_of_the_noise_reject(wrong: str) -> None:
    check, version = WRONG[wrong]
    with pytest.raises(AssertionError):
        check(version)


@pytest.mark.parametrize("noise", ["paper", "code"])
def test_std_is_the_population_one_over_all_elements_exactly(noise: str) -> None:
    x, other = randn(3, 2, seed=1), randn(3, 2, seed=2) * 7
    deltas = [(perturb((t,), noise=noise, generator=seeded())[0] - t).detach().numpy() for t in (x, other)]
    # std with n - 1 cancels in a ratio of equal sizes, so compare with another size's known draws as well
    assert np.allclose(deltas[1] / deltas[0], np.std(other.numpy()) / np.std(x.numpy()))
    (alone,) = perturb((x[:1, :1],), noise=noise, generator=seeded())
    assert torch.equal(alone, x[:1, :1])  # a single number has population std 0; with n - 1 it would be NaN
    pair = torch.tensor([[0.0, 2.0]], dtype=torch.float64)
    scaled = (perturb((pair,), noise=noise, scale=1.0, generator=seeded())[0] - pair).detach().numpy()
    if noise == "paper":
        assert np.allclose(scaled, normal(pair, seeded()).numpy())  # population std of 0 and 2 is 1, with n - 1 1.41


def test_c_is_a_variance_in_data_units() -> None:
    x = randn(50, 400) * 9
    (moved,) = perturb((x,), c=4.0, generator=seeded())
    assert np.isclose((moved - x).detach().numpy().var(), 4, rtol=0.05)


@pytest.mark.parametrize("noise", ["paper", "code"])
def test_labels_stay_and_all_floating_tensors_move_along_one_segment(noise: str) -> None:
    x, y, z = randn(300, 2, 50), torch.arange(300), randn(300, 60, seed=3) * 5
    moved, labels, code = perturb((x, y, z), noise=noise, generator=seeded())
    assert labels is y
    size_x, size_z = (
        (m - t).detach().flatten(1).numpy().max(1) / np.std(t.numpy()) for m, t in ((moved, x), (code, z))
    )
    if noise == "code":
        assert np.corrcoef(size_x, size_z)[0, 1] > 0.98  # one a for both
    assert size_z.mean() > 0.1


# -- the penalty -----------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(SHAPES), st.sampled_from(["paper", "code"]), st.floats(0, 3), st.integers(0, 99))
def test_linear_critic(shape: tuple[int, ...], noise: str, center: float, seed: int) -> None:
    w = randn(*shape, seed=seed)
    value = dragan_penalty(lambda x: (x * w).flatten(1).sum(1), randn(4, *shape), noise=noise, center=center)
    assert np.isclose(value.item(), (np.linalg.norm(w.numpy()) - center) ** 2)


class Tanh:
    """D(x) = v . tanh(W x + b) with its input gradient derived by hand."""

    def __init__(self, features: int) -> None:
        self.weights = [randn(*s, seed=7 + len(s)).requires_grad_() for s in [(5, features), (5,)]]
        self.weights.append(randn(5, seed=11).requires_grad_())

    def __call__(self, x: Tensor) -> Tensor:
        W, b, v = self.weights
        return torch.tanh(x.flatten(1) @ W.T + b) @ v

    def input_gradient(self, x: Tensor) -> Any:
        W, b, v = (t.detach().numpy() for t in self.weights)
        return (v * (1 - np.tanh(x.detach().flatten(1).numpy() @ W.T + b) ** 2)) @ W


def check_penalty(penalty: Callable[..., Tensor], shape: tuple[int, ...] = (2, 2, 2)) -> None:
    critic, x = Tanh(int(np.prod(shape))), randn(6, *shape)
    (points,) = perturb((x,), generator=seeded(5))
    norms = np.sqrt((critic.input_gradient(points) ** 2).sum(1))
    value = penalty(critic, x, generator=seeded(5))
    assert np.isclose(value.item(), ((norms - 1) ** 2).mean(), rtol=1e-12)
    grads = torch.autograd.grad(value, critic.weights)
    for weight, grad in zip(critic.weights, grads, strict=True):
        for index in np.ndindex(*weight.shape):
            ends = []
            for step in (1e-6, -1e-6):
                with torch.no_grad():
                    weight[index] += step
                ends.append(((np.sqrt((critic.input_gradient(points) ** 2).sum(1)) - 1) ** 2).mean())
                with torch.no_grad():
                    weight[index] -= step
            assert np.isclose(grad[index].item(), (ends[0] - ends[1]) / 2e-6, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_against_numpy_and_finite_differences_in_the_critics_weights(shape: tuple[int, ...]) -> None:
    check_penalty(dragan_penalty, shape)


def variant(norm: Callable[[Tensor], Tensor], *, at_real: bool = False, graph: bool = True) -> Callable[..., Tensor]:
    def penalty(critic: Tanh, x: Tensor, generator: torch.Generator) -> Tensor:
        (point,) = (x.clone().requires_grad_(),) if at_real else perturb((x,), generator=generator)
        (g,) = torch.autograd.grad(critic(point).sum(), point, create_graph=True)
        return (norm(g if graph else g.detach().requires_grad_()) - 1).square().mean()

    return penalty


@pytest.mark.parametrize(
    "wrong",
    [
        variant(lambda g: g.norm()),
        variant(lambda g: g.norm(dim=1)),
        variant(lambda g: g.flatten(1).square().sum(1)),
        variant(lambda g: g.flatten(1).norm(dim=1), at_real=True),
    ],
    ids=["norm of the batch", "norm over channels", "square for norm", "at x itself"],
)
def test_the_check_of_the_penalty_rejects(wrong: Callable[..., Tensor]) -> None:
    with pytest.raises(AssertionError):
        check_penalty(wrong)


def test_order_and_split_without_noise() -> None:
    critic, x = Tanh(3), randn(6, 3)
    whole = dragan_penalty(critic, x, c=0.0).item()
    assert np.isclose(dragan_penalty(critic, x[torch.tensor([3, 1, 5, 0, 2, 4])], c=0.0).item(), whole)
    halves = [dragan_penalty(critic, half, c=0.0).item() for half in x.split(3)]
    assert np.isclose(np.mean(halves), whole)


def test_the_graph_of_the_inputs_is_kept_for_unrolling() -> None:
    critic, x = Tanh(3), randn(4, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: dragan_penalty(critic, t * 2, c=0.1, generator=seeded()), (x,))


@pytest.mark.parametrize("noise", ["paper", "code"])
def test_the_size_of_the_noise_is_a_number_to_that_graph(noise: str) -> None:
    """Against central differences in x, the noise held where it was; were std(x) to move with x, so would it."""
    critic, x = Tanh(3), randn(4, 3)
    delta = (perturb((x,), noise=noise, scale=2.0, generator=seeded(5))[0] - x).detach()
    leaf = x.clone().requires_grad_()
    value = dragan_penalty(critic, leaf * 1, noise=noise, scale=2.0, generator=seeded(5))
    (gradient,) = torch.autograd.grad(value, leaf)

    def by_hand(x: Tensor) -> Any:
        return ((np.sqrt((critic.input_gradient(x + delta) ** 2).sum(1)) - 1) ** 2).mean()

    assert np.isclose(value.item(), by_hand(x))
    for index in np.ndindex(*x.shape):
        step = torch.zeros_like(x)
        step[index] = 1e-6
        slope = (by_hand(x + step) - by_hand(x - step)) / 2e-6
        assert np.isclose(gradient[index].item(), slope, rtol=1e-5, atol=1e-7)


def test_a_critic_without_slope_gives_a_finite_gradient() -> None:
    w = torch.zeros(3, requires_grad=True)
    value = dragan_penalty(lambda x: x @ w, torch.randn(4, 3, generator=seeded()))
    assert value.item() == 1
    assert torch.isfinite(torch.autograd.grad(value, w)[0]).all()


def test_chance_comes_from_the_generator_alone() -> None:
    critic, x = Tanh(3), randn(4, 3)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    values = [
        dragan_penalty(critic, x, noise=n, generator=seeded(s)).item() for n in ("paper", "code") for s in (1, 1, 2)
    ]
    assert torch.equal(torch.rand(3), expected)
    assert values[0] == values[1] != values[2]
    assert values[3] == values[4] != values[5]


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ValueError, match="'paper' or 'code'"):
        dragan_penalty(Tanh(3), randn(4, 3), noise="papre")
    with pytest.raises(ValueError, match="floating"):
        dragan_penalty(Tanh(3), torch.arange(4))
    with pytest.raises(ValueError, match="c is the variance of the paper's noise"):
        perturb((randn(4, 3),), noise="code", c=4.0)
    for bad in (-1.0, math.nan, math.inf):
        for option in ("c", "scale"):
            with pytest.raises(ValueError, match="scale and c must not be negative, infinite or NaN"):
                perturb((randn(4, 3),), **{option: bad})


# -- the plugin ------------------------------------------------------------------------------------------------------


class Watch:
    """Keeps what the penalty should be, computed from the view by the function on a stream of the same seed."""

    def __init__(self, **options: Any) -> None:
        self.options, self.expected, self.stream = options, [], seeded(derive_seed(0, "plugin:dragan"))

    @hookimpl
    def pre_d_loss(self, gan: GAN, critic: Callable[..., Tensor], view: View) -> None:
        self.expected.append(10 * dragan_penalty(critic, view.real, generator=self.stream, **self.options).item())


@pytest.mark.parametrize("kind", ["vector", "image"])
@pytest.mark.parametrize("noise", ["paper", "code"])
def test_three_steps_with_the_term_of_the_function_on_the_plugins_own_stream(kind: str, noise: Any) -> None:
    watch = Watch(noise=noise)
    _, log = run({"watch": watch, "dragan": DRAGAN(noise=noise)}, kind=kind)
    assert [terms["dragan"] for phase, _, terms in log.updates if phase == "d"] == pytest.approx(
        watch.expected, rel=1e-5
    )
    assert all("dragan" not in terms for phase, _, terms in log.updates if phase == "g")


@pytest.mark.parametrize("options", [{"scale": 3.0}, {"center": 0.25}], ids=str)
def test_scale_and_center_arrive(options: dict[str, Any]) -> None:
    watch, default = Watch(**options), Watch()
    _, log = run({"watch": watch, "default": default, "dragan": DRAGAN(**options)})
    terms = [terms["dragan"] for phase, _, terms in log.updates if phase == "d"]
    assert terms == pytest.approx(watch.expected, rel=1e-5)
    assert terms != pytest.approx(default.expected, rel=1e-2)


def test_pairs_of_a_joint_view() -> None:
    watch = Watch()
    _, log = run({"watch": watch, "dragan": DRAGAN(), "bigan": BiGAN()})
    assert [terms["dragan"] for phase, _, terms in log.updates if phase == "d"] == pytest.approx(
        watch.expected, rel=1e-5
    )


class Alone:
    """The penalty of weight 10 without noise, from the second step on."""

    @hookimpl
    def pre_d_loss(self, critic: Callable[..., Tensor], view: View, step: int) -> dict[str, Tensor] | None:
        return {"dragan": 10 * dragan_penalty(critic, view.real, c=0.0)} if step > 1 else None


@pytest.mark.parametrize("kind", ["vector", "image"])
def test_weight_0_changes_no_bit(kind: str) -> None:
    plain, _ = run({}, kind=kind)
    for name, weights in run({"dragan": DRAGAN(weight=0)}, kind=kind)[0].weights().items():
        assert all(torch.equal(value, plain.weights()[name][key]) for key, value in weights.items())


def test_every_k_is_k_times_as_strong_and_absent_in_between() -> None:
    terms = [t for phase, _, t in run({"dragan": DRAGAN(every=2, c=0)}, steps=3)[1].updates if phase == "d"]
    assert ["dragan" in t for t in terms] == [False, True, False]
    # the second update sees a critic that the first trained without the penalty: the same as from an unweighted run
    alone = [t for phase, _, t in run({"dragan": Alone()}, steps=3)[1].updates if phase == "d"]
    assert terms[1]["dragan"] == pytest.approx(2 * alone[1]["dragan"])


@pytest.mark.parametrize("name", ["claimed_norm", "claimed_place"])
def test_the_claims_know_of_every(name: str) -> None:
    (check,) = (check for check in plugin_checks("dragan", every=4) if str(check) == name)
    check()


def test_same_seed_same_terms_and_the_next_step_after_a_round_trip() -> None:
    first, log = run({"dragan": DRAGAN()}, steps=2)
    assert log.updates == run({"dragan": DRAGAN()}, steps=2)[1].updates
    twin = tiny_gan(plugins={"dragan": DRAGAN()})
    twin.load_weights(first.weights())
    twin.load_state_dict(copy.deepcopy(first.state_dict()))  # a checkpoint does not share memory
    for gan in (first, twin):
        gan.next_real = lambda: torch.linspace(-1, 1, 24).view(8, 3)
        update(gan, "d", 3)
    for mine, his in zip(first.discriminator.parameters(), twin.discriminator.parameters(), strict=True):
        assert torch.equal(mine, his)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -1}, "weight"),
        ({"center": -1}, "center"),
        ({"scale": -1}, "scale"),
        ({"c": -1}, "c must not"),
        ({"noise": "code", "c": 1}, "set scale"),
        ({"c": 1, "scale": 0.1}, "leave out scale"),
        ({"noise": "normal"}, "paper|code"),
        ({"every": 0}, "every"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(DRAGAN, options, "dragan")


@pytest.mark.parametrize("option", ["weight", "center", "scale", "c"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_refused_on_the_object_too(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{option}.* must not be negative, infinite or NaN"):
        DRAGAN(**{option: value})  # type: ignore[arg-type]


def test_batch_norm_is_refused() -> None:
    def normed() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

    with pytest.raises(UsageError, match=r"dragan.*batch norm"):
        tiny_gan(plugins={"dragan": DRAGAN()}, discriminator=normed)
