"""Feature matching against closed forms, and against what hooks must not leave behind."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from gankit_feature_matching import FeatureMatching, feature_matching, features, last_layer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gankit import UsageError, View, hookimpl, train
from gankit.contract import watched
from gankit.loop import g_terms
from gankit.options import build
from gankit.testing import run, tiny_gan


def hooks_of(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def critic_of(features: int, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(features, 5), nn.Tanh(), nn.Linear(5, 1)).double()


@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(1, 6), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_against_numpy_with_batches_of_any_size(seed: int, n: int, m: int, dim: int) -> None:
    stream = torch.Generator().manual_seed(seed)
    real = torch.randn(n, dim, generator=stream, dtype=torch.float64)
    fake = torch.randn(m, dim, generator=stream, dtype=torch.float64)
    D = critic_of(dim, seed)
    W, b = D[0].weight.detach().numpy(), D[0].bias.detach().numpy()
    mean = [np.tanh(t.numpy() @ W.T + b).mean(0) for t in (real, fake)]
    found = feature_matching(D, D[1], real, fake)
    assert found.item() == pytest.approx(((mean[0] - mean[1]) ** 2).sum(), rel=1e-9, abs=1e-14)
    order = torch.randperm(m, generator=stream)
    assert feature_matching(D, D[1], real, fake[order]).item() == pytest.approx(found.item(), rel=1e-9, abs=1e-14)
    # the input of the layer behind is the same tensor
    assert feature_matching(D, D[2], real, fake, before=True).item() == found.item()


def test_it_is_the_squared_norm_of_the_difference_of_means_and_not_its_look_alikes() -> None:
    D = nn.Sequential(nn.Identity(), nn.Linear(2, 1))
    real, fake = torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.tensor([[4.0, 1.0], [4.0, 3.0]])
    assert feature_matching(D, D[0], real, fake).item() == 9 + 4
    assert (real - fake).square().mean(0).sum().item() != 13  # the mean of squares instead of the square of means
    assert (real.mean(0) - fake.mean(0)).square().mean().item() != 13  # averaged over features
    assert (real.mean(0) - fake.mean(0)).abs().sum().item() != 13
    # images: summed over channels and positions
    images = torch.ones(3, 2, 4, 4)
    assert feature_matching(lambda x: D[0](x), D[0], images, torch.zeros(3, 2, 4, 4)).item() == 32


def test_the_gradient_by_hand_and_by_finite_differences() -> None:
    fake = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    real = torch.randn(6, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True)
    D = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)).double()
    (gradient,) = torch.autograd.grad(feature_matching(D, D[0], real, fake), fake)
    W = D[0].weight.detach()
    expected = 2 / 4 * (W @ (fake.mean(0) - real.mean(0))).detach() @ W
    torch.testing.assert_close(gradient, expected.expand(4, 3))
    deep = critic_of(3)
    assert torch.autograd.gradcheck(lambda x: feature_matching(deep, deep[1], real.detach(), x), (fake,))


def test_the_real_side_is_a_target_without_gradient() -> None:
    D = critic_of(3)
    real = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    fake = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    to_real, to_fake = torch.autograd.grad(feature_matching(D, D[1], real, fake), (real, fake), allow_unused=True)
    assert to_real is None
    assert to_fake.abs().sum() > 0


def test_tuples_and_functional_critics() -> None:
    D = nn.Bilinear(3, 2, 1).double()
    pair = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    other = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    expected = (D(*pair).mean(0) - D(*other).mean(0)).square().sum()
    torch.testing.assert_close(feature_matching(D, D, pair, other), expected)
    D = critic_of(3)
    changed = {name: p.detach() * 2 for name, p in D.named_parameters()}

    def functional(*inputs: Tensor) -> Tensor:
        return torch.func.functional_call(D, changed, inputs)

    twin = deepcopy(D)
    twin.load_state_dict(changed)
    torch.testing.assert_close(
        feature_matching(functional, D[1], pair[0], other[0]), feature_matching(twin, twin[1], pair[0], other[0])
    )


def test_hooks_are_removed_also_after_an_error() -> None:
    D = critic_of(3)
    x = torch.randn(4, 3, dtype=torch.float64)
    feature_matching(D, D[1], x, x)
    last_layer(D, (x,))

    def broken(x: Tensor) -> Tensor:
        D(x)
        raise RuntimeError("broken")

    for before in (False, True):
        with pytest.raises(RuntimeError, match="broken"):
            features(broken, D[1], (x,), before=before)
    with pytest.raises(RuntimeError):
        last_layer(D, (x[:, :2],))
    assert hooks_of(D) == 0
    assert D.training


@pytest.mark.parametrize(
    ("critic", "module", "message"),
    [
        (lambda x: x.sum(1), nn.Identity(), "is not reached by the critic"),
        (None, nn.MaxPool1d(2, return_indices=True), "hands on a tuple"),
    ],
)
def test_what_gives_no_features(critic: Callable[..., Tensor] | None, module: nn.Module, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        features(critic or module, module, (torch.randn(2, 4),))


class Backwards(nn.Module):
    """Defines its layers in another order than it runs them."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.first, self.unused = nn.Linear(7, 1), nn.Linear(3, 7), nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh())


def test_the_default_layer_is_what_runs_last_not_what_is_defined_last() -> None:
    assert last_layer(Backwards(), (torch.randn(2, 3),)) == "last"
    plugin = FeatureMatching()
    tiny_gan(plugins={"feature_matching": plugin}, discriminator=lambda: Backwards())
    assert (plugin.looks_at, plugin.before) == ("last", True)
    for kind, name in (("vector", "layers.out"), ("image", "out")):
        tiny_gan(kind, {"feature_matching": plugin})
        assert plugin.looks_at == name


def terms_of(plugin: FeatureMatching, **settings: Any) -> tuple[Any, dict[str, Tensor], View]:
    gan = tiny_gan(plugins={"feature_matching": plugin}, **settings)
    batch = gan.hook.sample(gan=gan, real=gan.next_real(), z=gan.next_z(), phase="g", step=1)
    view = watched(gan.hook.view(gan=gan, batch=batch, phase="g", step=1))
    return gan, g_terms(gan, gan.discriminator, batch, view, 1), view


def test_the_plugin_adds_the_function_and_names_a_layer() -> None:
    gan, terms, view = terms_of(FeatureMatching(weight=3, layer="layers.activation1"))
    module = gan.discriminator.get_submodule("layers.activation1")
    torch.testing.assert_close(terms["feature_matching"], 3 * feature_matching(gan.discriminator, module, *view))
    assert set(terms) == {"adv", "feature_matching"}
    assert terms["adv"].item() > 0


@pytest.mark.parametrize("loss", ["non_saturating", "relativistic"])
def test_replace_trains_g_on_the_term_alone(loss: str) -> None:
    gan, terms, _ = terms_of(FeatureMatching(replace=True), loss=loss)
    assert terms["adv"].item() == 0
    parameters = gan.parameters("g")
    alone = torch.autograd.grad(terms["feature_matching"], parameters, retain_graph=True)
    both = torch.autograd.grad(sum(terms.values()), parameters)
    assert all(torch.equal(a, b) for a, b in zip(alone, both, strict=True))
    assert gan.loss.d is tiny_gan(loss=loss).loss.d  # D plays on


def test_weight_zero_leaves_g_bit_identical() -> None:
    without, _ = run({"noise": Noise()})
    with_zero, log = run({"noise": Noise(), "feature_matching": FeatureMatching(weight=0)})
    for key, value in without.generator.state_dict().items():
        assert torch.equal(value, with_zero.generator.state_dict()[key])
    assert all("feature_matching" not in terms for _, _, terms in log.updates)


class Noise:
    """Draws random numbers in `view`: looking for the layer must not shift them."""

    @hookimpl(wrapper=True)
    def view(self, gan: Any) -> Generator[None, View, View]:
        view = yield
        real, fake = (tuple(t + torch.empty_like(t).normal_(generator=gan.rng(self)) for t in side) for side in view)
        return View(real, fake)


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        ({"layer": "layers.hiden0"}, {}, "no layer 'layers.hiden0'.*choose from layers, layers.hidden0, layers.activ"),
        ({}, {"discriminator": lambda: Norm()}, "no linear or convolutional layer.*one of inner"),
    ],
)
def test_refusals(options: dict[str, Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        tiny_gan(plugins={"feature_matching": FeatureMatching(**options)}, **settings)
    with pytest.raises(UsageError, match="negative"):
        build(FeatureMatching, {"weight": -1}, "feature_matching")
    for weight in (math.nan, math.inf):
        with pytest.raises(ValueError, match="negative, infinite or NaN"):
            FeatureMatching(weight=weight)
    with pytest.raises(UsageError, match="positive"):
        build(FeatureMatching, {"weight": 0, "replace": True}, "feature_matching")


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Bilinear(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x)


class Pack:
    @hookimpl(wrapper=True, tryfirst=True)
    def view(self) -> Generator[None, View, View]:
        view = yield
        real, fake = (tuple(t.reshape(len(t) // 2, -1, *t.shape[2:]) for t in side) for side in view)
        return View(real, fake)


class Functional:
    """A critic like the unrolled one: D's own weights, moved, through a functional call."""

    @hookimpl
    def critic(self, gan: Any, phase: str) -> Callable[..., Tensor] | None:
        if phase == "d":
            return None
        moved = {name: p - 0.1 for name, p in gan.discriminator.named_parameters()}
        return lambda *inputs: torch.func.functional_call(gan.discriminator, moved, inputs)


def test_the_features_are_those_of_this_updates_critic() -> None:
    gan = tiny_gan(plugins={"feature_matching": FeatureMatching(layer="layers.activation0"), "moved": Functional()})
    batch = gan.hook.sample(gan=gan, real=gan.next_real(), z=gan.next_z(), phase="g", step=1)
    view = watched(gan.hook.view(gan=gan, batch=batch, phase="g", step=1))
    critic = gan.hook.critic(gan=gan, batch=batch, view=view, phase="g", d_objective=None, step=1)
    term = g_terms(gan, critic, batch, view, 1)["feature_matching"].item()
    W, b = (p.detach().numpy() - 0.1 for p in gan.discriminator.layers.hidden0.parameters())
    hidden = [t[0].detach().numpy() @ W.T + b for t in view]
    slope = getattr(gan.discriminator.layers.activation0, "negative_slope", 0.0)
    means = [np.where(h > 0, h, slope * h).mean(0) for h in hidden]
    assert term == pytest.approx(((means[0] - means[1]) ** 2).sum(), rel=1e-4)


@pytest.mark.parametrize("kind", ["vector", "image"])
@pytest.mark.parametrize("options", [{}, {"replace": True}], ids=str)
def test_trains_with_packs_and_a_functional_critic_and_repeats(kind: str, options: dict[str, Any]) -> None:
    results = []
    for _ in range(2):
        plugins = {"feature_matching": FeatureMatching(**options), "pack": Pack(), "functional": Functional()}
        gan, log = run(plugins, kind=kind)
        assert hooks_of(gan.discriminator) == 0
        assert all(math.isfinite(value) for _, _, terms in log.updates for value in terms.values())
        results.append(log.updates)
    assert results[0] == results[1]


def test_a_restored_run_takes_the_same_next_step() -> None:
    gan, other = (tiny_gan(plugins={"feature_matching": FeatureMatching()}) for _ in range(2))
    train(gan, 2)
    other.load_weights(deepcopy(gan.weights()))
    other.load_state_dict(deepcopy(gan.state_dict()))
    other.next_real = gan.next_real = lambda: torch.linspace(-1, 1, 24).view(8, 3)
    train(gan, 3)
    train(other, 3)
    for name, state in gan.weights().items():
        assert all(torch.equal(value, other.weights()[name][key]) for key, value in state.items())
