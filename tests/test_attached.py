"""Plugins in a training loop of one's own: gradients against hand-written terms, and everything that must stay untouched."""

from __future__ import annotations

import ast
import io
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pairs
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.optim.optimizer import _global_optimizer_post_hooks as GLOBAL_HOOKS

import gankit
from gankit import UsageError, hookimpl, protocols
from gankit.attached import Attached, Optimizers, bare, innermost
from gankit.checks import spectral_norms
from gankit.gan import derive_seed
from gankit.loop import train
from gankit.plugins import available, create
from gankit.testing import SHAPES, tiny_gan

Critic = Callable[..., Tensor]
OUTPUTS = {
    "(B,)": nn.Flatten(0),
    "(B, 1)": nn.Identity(),
    "(B, 1, 1, 1)": nn.Unflatten(1, (1, 1, 1)),
}


def networks(output: str = "(B, 1)", *, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """G: (B, 2) -> (B, 3), and D with curvature; float64."""
    torch.manual_seed(seed)
    generator = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3))
    discriminator = nn.Sequential(
        nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.Softplus(), nn.Linear(8, 1), OUTPUTS[output]
    )
    return generator.double(), discriminator.double()


class Patches(nn.Module):
    """A critic of images whose logits are a map (B, 1, 3, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Conv2d(4, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layers(x)
        return logits


class Conditional(nn.Module):
    """D(x, y), y a class or a vector."""

    def __init__(self, classes: bool) -> None:
        super().__init__()
        self.embed: Any = nn.Embedding(4, 2) if classes else nn.Identity()
        self.layers = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        logits: Tensor = self.layers(torch.cat([x, self.embed(y)], 1))
        return logits


def samples(n: int = 6, *shape: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(n, *(shape or (3,)), generator=rng, dtype=torch.float64) for _ in range(2))  # type: ignore


def gradients(loss: Tensor, module: nn.Module) -> list[Tensor]:
    found = torch.autograd.grad(loss, [*module.parameters()], retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(module.parameters(), found, strict=True)]


def assert_equal(one: list[Tensor], two: list[Tensor], rtol: float = 1e-9) -> None:
    assert len(one) == len(two)
    assert any(t.abs().max() > 1e-6 for t in one)  # zeros agree with anything
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-12)


def r1_by_hand(critic: Critic, *inputs: Tensor, weight: float) -> Tensor:
    """weight/2 mean_i ||grad D(x_i)||^2, sample by sample: one backward for each."""
    total: Any = 0
    for i in range(len(inputs[0])):
        one = [t[i : i + 1].detach().clone() for t in inputs]
        floating = [t.requires_grad_() for t in one if t.is_floating_point()]
        slopes = torch.autograd.grad(critic(*one).mean(), floating, create_graph=True)
        total = total + sum(slope.square().sum() for slope in slopes)
    return weight / 2 * total / len(inputs[0])


def penalty_by_hand(critic: Critic, real: Tensor, fake: Tensor, rng: torch.Generator, weight: float) -> Tensor:
    u = torch.rand(len(real), *(1,) * (real.dim() - 1), generator=rng, dtype=real.dtype)
    total: Any = 0
    for i in range(len(real)):
        x = (u[i] * real[i] + (1 - u[i]) * fake[i])[None].detach().requires_grad_()
        (slope,) = torch.autograd.grad(critic(x).mean(), x, create_graph=True)
        total = total + (slope.square().sum().sqrt() - 1) ** 2
    return weight * total / len(real)


def own_rng(plugin: str, seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(seed, f"plugin:{plugin}"))


# -- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", [*OUTPUTS, "(B, 1, h, w)"])
def test_the_terms_of_any_output_shape_have_the_gradients_of_terms_by_hand(output: str) -> None:
    if output == "(B, 1, h, w)":
        torch.manual_seed(0)
        G, D = nn.Linear(2, 64).double(), Patches().double()
        real, fake = samples(5, 1, 8, 8)
        assert D(real).shape == (5, 1, 3, 3)
    else:
        G, D = networks(output)
        real, fake = samples()
    attached = gankit.attach(G, D, [("r1", {"weight": 3}), ("r2", {"weight": 2}), ("gradient_penalty", {"weight": 5})])
    terms = attached.d_terms(real, fake)
    by_hand = (
        r1_by_hand(D, real, weight=3)
        + r1_by_hand(D, fake, weight=2)
        + penalty_by_hand(D, real, fake, own_rng("gradient_penalty"), 5)
    )
    torch.testing.assert_close(terms, by_hand, rtol=1e-10, atol=0)
    assert_equal(gradients(terms, D), gradients(by_hand, D))
    assert set(attached.terms["d"]) == {"r1", "r2", "gradient_penalty"}
    torch.testing.assert_close(sum(attached.terms["d"].values()), terms.detach())


def test_one_backward_of_the_joined_loss_leaves_the_gradients_of_the_loss_by_hand() -> None:
    G, D = networks()
    real, _ = samples()
    fake = G(torch.randn(6, 2, dtype=torch.float64))
    attached = gankit.attach(G, D, ["r1", "r2"])
    by_hand = softplus(-D(real)).mean() + softplus(D(fake.detach())).mean()
    by_hand = by_hand + r1_by_hand(D, real, weight=10) + r1_by_hand(D, fake, weight=10)
    expected = gradients(by_hand, D)
    d_loss = softplus(-D(real)).mean() + softplus(D(fake.detach())).mean()
    d_loss = d_loss + attached.d_terms(real, fake)
    d_loss.backward()
    assert_equal([p.grad for p in D.parameters()], expected)
    assert all(p.grad is None for p in G.parameters())


def test_what_is_shown_may_be_scored_by_the_loop_or_by_the_plugins() -> None:
    _, D = networks()
    real, fake = samples()
    values = []
    for how in ("terms alone", "shown", "logits given"):
        attached = gankit.attach(nn.Identity(), D, ["r1", "lecam", "consistency"], optimizers={})
        for _ in range(2):  # lecam has no averages at first
            shown = attached.show(real, fake)
            if how == "terms alone":
                term = attached.d_terms(real, fake)
            elif how == "shown":
                term = attached.d_terms(shown)
            else:
                logits = {"real_logits": D(*shown.real), "fake_logits": D(*shown.fake)}
                term = attached.d_terms(shown, **logits)
            attached.stepped("d")
        values.append(gradients(term, D))
    assert_equal(values[0], values[1])
    assert_equal(values[0], values[2])


@pytest.mark.parametrize("classes", [True, False])
def test_a_conditional_discriminator_gets_its_labels_beside_the_samples(classes: bool) -> None:
    torch.manual_seed(0)
    D = Conditional(classes).double()
    real, fake = samples()
    labels = torch.arange(6) % 4 if classes else torch.randn(6, 2, dtype=torch.float64)
    attached = gankit.attach(nn.Identity(), D, [("r1", {"weight": 4})])
    term = attached.d_terms((real, labels), (fake, labels))
    by_hand = r1_by_hand(D, real, labels, weight=4)
    assert_equal(gradients(term, D), gradients(by_hand, D))


def test_packing_and_labels_reach_the_discriminator_as_shown() -> None:
    D = nn.Linear(2 * 5, 1).double()
    torch.nn.init.ones_(D.weight)
    real, fake = samples()
    labels = torch.randn(6, 2, dtype=torch.float64)

    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = D

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            assert x.shape == (3, 6) and y.shape == (3, 4)
            return self.layer(torch.cat([x, y], 1))

    attached = gankit.attach(nn.Identity(), Joined(), ["packing"], loss="wasserstein")
    loss = attached.d_loss((real, labels), (fake, labels))
    shown = attached.show((real, labels), (fake, labels))
    assert torch.equal(shown.real[0][0], torch.cat([real[0], real[1]]))
    by_hand = (fake.sum() - real.sum()) / 3  # the labels cancel
    torch.testing.assert_close(loss, by_hand)


def own_loop(
    names: tuple[str, ...], kind: str, d_steps: int, steps: int, **own: dict[str, Any]
) -> tuple[list[Tensor], list[Tensor]]:
    """All trained parameters after gankit's own loop, and after a loop by hand with the same plugins, data and latents.

    own: options of plugins, by name.
    """
    options = {name: pairs.OPTIONS[name] for name in names if name in pairs.OPTIONS} | own
    settings = pairs.SETTINGS.get(names[-1], {})
    theirs = tiny_gan(kind, create(names, options)[0], d_steps=d_steps, **settings)
    G = tiny_gan(kind).generator
    D = tiny_gan(kind, create([n for n in names if n in SHOWING], {})[0]).discriminator
    optimizers = {
        phase: torch.optim.Adam(module.parameters(), lr=2e-4, betas=(0.5, 0.999), fused=True)
        for phase, module in (("d", D), ("g", G))
    }
    specs = [(name, options.get(name, {})) for name in names]
    attached = gankit.attach(G, D, specs, optimizers=optimizers, steps=steps, architecture={"width": 8}, **settings)
    data, latents = (torch.Generator().manual_seed(derive_seed(0, name)) for name in ("data", "latent"))
    zeros = torch.zeros(8, *SHAPES[kind])
    attached.setup(zeros, zeros, torch.zeros(8, 4))

    def draw() -> tuple[Tensor, Tensor]:
        return torch.rand(8, *SHAPES[kind], generator=data) * 2 - 1, torch.empty(8, 4).normal_(generator=latents)

    for _ in range(steps):
        for phase in d_steps * ("d",) + ("g",):
            real, z = draw()
            loss = attached.d_loss if phase == "d" else attached.g_loss
            loss(real, G(z), z).backward(inputs=attached.parameters(phase))
            optimizers[phase].step()
            optimizers[phase].zero_grad()
    train(theirs, steps)
    assert attached.gan is not None and attached.gan.step == theirs.step
    return tuple([p for phase in "dg" for p in gan.parameters(phase)] for gan in (theirs, attached.gan))  # type: ignore


def test_a_weight_that_falls_does_so_in_a_loop_of_ones_own() -> None:
    theirs, ours = own_loop(("r1",), "vector", 1, 3, r1={"decay_to": 0.01})
    for one, other in zip(theirs, ours, strict=True):
        assert torch.equal(one, other)
    constant, _ = own_loop(("r1",), "vector", 1, 3)
    assert not torch.equal(theirs[0], constant[0])


SHOWING = ("packing", "bigan", "pairwise_gp", "veegan")  # D is built for what they show
REFUSED = {  # in a loop whose networks and optimisers are the user's
    "ttur": "the optimisers are yours",
    "stacked": "a plugin brings the generator",
    "progressive": "progressive growing",
}


@pytest.mark.parametrize("name", [name for name in pairs.IN_TREE if name in available()])
def test_every_plugin_does_in_a_loop_of_ones_own_what_it_does_in_gankits(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name in REFUSED:
            with pytest.raises(UsageError, match=REFUSED[name]):
                own_loop((name,), "image", 1, 1)
            return
        theirs, ours = own_loop((name,), "image", 1, 3)
    assert len(theirs) == len(ours)
    assert all(torch.equal(a, b) for a, b in zip(theirs, ours, strict=True))


@pytest.mark.parametrize(
    "names",
    [
        ("r1", "lecam", "spectral_norm"),
        ("packing", "pairwise_gp"),
        ("unrolled", "gradient_penalty"),
        ("consistency", "r2"),
    ],
)
def test_plugins_together_and_several_d_updates_do_what_they_do_in_gankits_loop(names: tuple[str, ...]) -> None:
    theirs, ours = own_loop(names, "vector", 3, 2)
    assert len(theirs) == len(ours)
    assert all(torch.equal(a, b) for a, b in zip(theirs, ours, strict=True))


def test_an_encoder_of_ones_own_is_used_and_trained_with_g() -> None:
    G, D = nn.Linear(2, 3).double(), nn.Linear(5, 1).double()
    E = nn.Linear(3, 2).double()

    class Joint(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = D

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            return self.layer(torch.cat([x, z], 1))

    real, _ = samples()
    z = torch.randn(6, 2, dtype=torch.float64)
    critic = Joint()
    attached = gankit.attach(G, critic, ["bigan"], encoder=E)
    by_hand = softplus(-critic(real, E(real).detach())).mean() + softplus(critic(G(z).detach(), z)).mean()
    assert_equal(gradients(attached.d_loss(real, G(z), z), D), gradients(by_hand, D))
    by_hand = softplus(critic(real, E(real))).mean() + softplus(-critic(G(z), z)).mean()
    loss = attached.g_loss(real, G(z), z)
    for module in (G, E):
        assert_equal(gradients(loss, module), gradients(by_hand, module))
    assert attached.state_dict()["players"] == {}


@pytest.mark.parametrize("stochastic", [False, True])
def test_latents_may_have_the_shape_of_dcgans(stochastic: bool) -> None:
    """nz x 1 x 1, also for an encoder that a plugin brings and for latents that one draws."""
    torch.manual_seed(0)
    G = nn.ConvTranspose2d(5, 1, 8)

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64 + 5, 1)

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            assert z.shape[1:] == (5, 1, 1)
            return self.layer(torch.cat([x.flatten(1), z.flatten(1)], 1))

    D = Pair()
    optimizers = {phase: torch.optim.Adam(m.parameters()) for phase, m in (("d", D), ("g", G))}
    plugins = [("bigan", {"stochastic": stochastic}), "mode_seeking"]
    attached = gankit.attach(G, D, plugins, optimizers=optimizers, architecture={"network": "mlp", "width": 8})
    real, z = torch.randn(4, 1, 8, 8), torch.randn(4, 5, 1, 1)
    attached.d_loss(real, G(z), z).backward()
    attached.g_loss(real, G(z), z).backward()
    assert all(p.grad is not None for p in attached.parameters("g"))
    assert len(optimizers["g"].param_groups) == 2


def test_the_latents_that_plugins_draw_are_of_the_named_prior_and_the_users_dtype() -> None:
    seen: list[Tensor] = []

    class G(nn.Linear):
        def forward(self, z: Tensor) -> Tensor:
            seen.append(z)
            return super().forward(z)

    generator = G(2, 3).double()
    z = torch.rand(500, 2, dtype=torch.float64) * 2 - 1
    attached = gankit.attach(generator, nn.Linear(3, 1), ["mode_seeking"], latent="uniform")
    attached.g_terms(torch.zeros(500, 3, dtype=torch.float64), generator(z), z)
    drawn = seen[-1]
    assert drawn.dtype == torch.float64 and drawn.abs().max() <= 1
    assert drawn.abs().mean() == pytest.approx(0.5, abs=0.05)


def test_latents_may_be_known_first_in_gs_update() -> None:
    G, D = networks()
    real, _ = samples()
    z = torch.randn(6, 2, dtype=torch.float64)
    late, early = (gankit.attach(G, D, ["r1", "mode_seeking"]) for _ in range(2))
    late.d_terms(real, G(z))
    early.d_terms(real, G(z), z)
    assert torch.equal(late.g_terms(real, G(z), z), early.g_terms(real, G(z), z))


# -- sigmoids ------------------------------------------------------------------------------------------------------


class Functional(nn.Module):
    """A discriminator whose sigmoid is no module; its last module is a sigmoid elsewhere."""

    def __init__(self, layers: nn.Module, end: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layers, self.end, self.gate = layers, end, nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.layers(x * self.gate(x)))


ENDS: dict[str, Callable[[Tensor], Tensor]] = {
    "torch": torch.sigmoid,
    "method": lambda t: t.sigmoid(),
    "view": lambda t: t.sigmoid().view(-1),
    "functional": lambda t: torch.nn.functional.sigmoid(t).squeeze(1),
    "float": lambda t: torch.special.expit(t.float()).double(),
}


@pytest.mark.parametrize("end", [*ENDS, "module"])
def test_with_probabilities_the_terms_are_those_of_the_logits(end: str) -> None:
    _, logits = networks()
    real, fake = samples()
    gate = Functional(logits, lambda t: t)  # the same without the sigmoid at the end
    D = nn.Sequential(logits, nn.Sigmoid()) if end == "module" else Functional(logits, ENDS[end])
    plugins = ["r1", "gradient_penalty"]
    expected = gankit.attach(nn.Identity(), logits if end == "module" else gate, plugins).d_terms(real, fake)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        term = gankit.attach(nn.Identity(), D, plugins, probabilities=True).d_terms(real, fake)
    rtol = 1e-5 if end == "float" else 1e-12
    assert_equal(gradients(term, logits), gradients(expected, logits), rtol)


def test_with_probabilities_a_saturated_discriminator_still_has_exact_slopes() -> None:
    layer = nn.Linear(1, 1)
    nn.init.constant_(layer.weight, 100.0)
    D = nn.Sequential(layer, nn.Sigmoid())
    x = torch.ones(4, 1)
    assert (D(x) == 1).all()  # no logit can be had from these
    attached = gankit.attach(nn.Identity(), D, [("r1", {"weight": 2})], probabilities=True)
    assert attached.d_terms(x, x).item() == pytest.approx(100.0**2)


def test_probabilities_from_something_else_than_a_sigmoid_are_turned_into_logits() -> None:
    _, D = networks()
    real, fake = samples()
    p = nn.Sequential(D, nn.Tanh())

    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (1 + p(x)) / 2  # tanh(t) = 2 sigmoid(2 t) - 1, so its logit is 2 t

    term = gankit.attach(nn.Identity(), Half(), ["r1"], probabilities=True).d_terms(real, fake)
    assert_equal(gradients(term, D), gradients(r1_by_hand(lambda x: 2 * D(x), real, weight=10), D))
    with pytest.raises(UsageError, match=r"outside 0\.\.1"):
        gankit.attach(nn.Identity(), nn.Sequential(D, nn.Hardtanh(-9, 9)), ["r1"], probabilities=True).d_terms(
            10 * real, fake
        )


def test_a_sigmoid_at_the_end_is_warned_of_once_and_one_inside_is_not() -> None:
    _, logits = networks()
    real, fake = samples()
    D: nn.Module
    for D in (nn.Sequential(logits, nn.Sigmoid()), Functional(logits, ENDS["view"])):
        attached = gankit.attach(nn.Identity(), D, ["r1"])
        with pytest.warns(UserWarning, match="logits.*probabilities=True"):
            attached.d_terms(real, fake)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            attached.d_terms(real, fake)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gankit.attach(nn.Identity(), Functional(logits, lambda t: t), ["r1"]).d_terms(real, fake)
    shown = gankit.attach(nn.Identity(), D, ["r1"]).show(real, fake)
    with pytest.warns(UserWarning, match="logits"):
        gankit.attach(nn.Identity(), D, ["r1"]).d_terms(shown, real_logits=D(*shown.real))
    attached = gankit.attach(nn.Identity(), D, ["r1"], probabilities=True)
    shown = attached.show(real, fake)
    with pytest.raises(UsageError, match=r"shown\.critic"):
        attached.d_terms(shown, real_logits=D(*shown.real))
    term = attached.d_terms(shown, real_logits=shown.critic(*shown.real))
    assert torch.isfinite(term)


# -- what is the user's stays untouched ----------------------------------------------------------------------------


def everything(*modules: nn.Module) -> list[Any]:
    """Bits, gradients, flags and modes of networks."""
    found: list[Any] = []
    for module in modules:
        found += [(name, t.detach().clone()) for name, t in module.state_dict().items()]
        found += [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in module.parameters()]
        found += [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in module.modules()]
        found += [id(p) for p in module.parameters()]
    return found


def same(one: list[Any], two: list[Any]) -> bool:
    def equal(a: Any, b: Any) -> bool:
        if isinstance(a, tuple):
            return len(a) == len(b) and all(map(equal, a, b))
        return torch.equal(a, b) if isinstance(a, Tensor) else a == b

    return len(one) == len(two) and all(map(equal, one, two))


class Still(nn.Sequential):
    """A network that nobody may move or copy to another device."""

    def to(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the devices are the user's")


def with_buffers() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    G = Still(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    hidden = (nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 8), nn.BatchNorm1d(8))
    D = Still(*hidden, nn.Tanh(), nn.Linear(8, 1))
    D[1].eval()  # a frozen statistic inside a network in training
    D[0].bias.requires_grad_(False)
    return G.double(), D.double()


@pytest.mark.parametrize("frozen", [False, True])
def test_terms_leave_networks_as_they_were(frozen: bool) -> None:
    G, D = with_buffers()
    D.requires_grad_(not frozen)
    real, _ = samples()
    z = torch.randn(6, 2, dtype=torch.float64)
    plugins = ["lecam", "consistency", "mode_seeking", "feature_matching", "historical_averaging"]
    attached = gankit.attach(G, D, plugins, optimizers={})
    if not frozen:
        D(real).sum().backward()
    fake = G(z)
    before = everything(G, D)
    for _ in range(3):
        attached.stepped("d")
        attached.stepped("g")
        attached.g_terms(real, fake, z)
        attached.g_terms(attached.show(real, fake, z, phase="g"))
        if not frozen:
            attached.d_terms(real, fake, z)
            attached.d_terms(attached.show(real, fake, z))
    assert same(before, everything(G, D))
    assert set(attached.terms["g"]) == {"mode_seeking", "feature_matching", "historical_averaging"}


def test_a_pass_for_logits_does_not_move_statistics_and_gives_those_of_training() -> None:
    torch.manual_seed(0)
    D = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)).double()
    real, fake = samples()
    attached = gankit.attach(nn.Identity(), D, ["lecam"], optimizers={})
    before = everything(D)
    for _ in range(2):
        term = attached.d_terms(real, fake)
        attached.stepped("d")
    assert same(before, everything(D))
    a_real, a_fake = D(real).mean().detach(), D(fake).mean().detach()
    by_hand = 0.3 * ((D(real) - a_fake).square().mean() + (D(fake) - a_real).square().mean())
    assert_equal(gradients(term, D), gradients(by_hand, D))


def test_terms_of_a_d_that_looks_ahead_do_not_move_statistics_either() -> None:
    G, D = with_buffers()
    real, _ = samples()
    z = torch.randn(6, 2, dtype=torch.float64)
    optimizers = {phase: torch.optim.Adam(m.parameters()) for phase, m in (("d", D), ("g", G))}
    attached = gankit.attach(G, D, [("unrolled", {"k": 1}), "feature_matching"], optimizers=optimizers)
    fake = G(z)
    before = everything(G, D)
    term = attached.g_terms(attached.show(real, fake, z, phase="g"))
    assert same(before, everything(G, D))
    assert any(g.any() for g in gradients(term, G))


def test_both_sides_are_shown_in_the_dtype_of_the_data() -> None:
    shown = gankit.attach(nn.Identity(), nn.Linear(3, 1), []).show(torch.zeros(2, 3), torch.ones(2, 3).bfloat16())
    assert shown.fake[0].dtype == torch.float32


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_unrolling_leaves_d_exactly_as_it_was_and_does_not_mind_a_frozen_d(optimizer: Any) -> None:
    found = []
    for frozen in (False, True):
        G, D = networks()
        real, _ = samples()
        z = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
        optimizers = {phase: optimizer(m.parameters(), lr=0.01) for phase, m in (("d", D), ("g", G))}
        attached = gankit.attach(G, D, [("unrolled", {"k": 2, "optimizer": "adam"})], optimizers=optimizers)
        attached.d_loss(real, G(z), z).backward()
        optimizers["d"].step()
        D.requires_grad_(not frozen)  # as loops do that toggle
        before = everything(D)
        loss = attached.g_loss(real, G(z), z)
        assert same(before, everything(D))
        loss.backward(inputs=[*G.parameters()])
        assert same(before, everything(D))
        found.append([p.grad.clone() for p in G.parameters()])  # type: ignore[union-attr]
        plain = softplus(-D(G(z))).mean()
        assert (gradients(plain, G)[0] - found[-1][0]).abs().max() > 1e-8  # it did unroll
    assert_equal(*found)


def test_unrolling_looks_ahead_as_the_optimiser_will_go() -> None:
    """One real step of SGD, then G's gradient against the D that results: the first-order part of unrolling."""
    G, D = networks()
    real, _ = samples()
    z = torch.randn(6, 2, dtype=torch.float64)
    optimizers = {phase: torch.optim.SGD(m.parameters(), lr=0.1) for phase, m in (("d", D), ("g", G))}
    plugin = ("unrolled", {"k": 1, "second_order": False, "both_sides": False})
    attached = gankit.attach(G, D, [plugin, ("r1", {"weight": 2})], optimizers=optimizers)
    ahead = gradients(attached.g_loss(real, G(z), z), G)
    d_loss = softplus(-D(real)).mean() + softplus(D(G(z).detach())).mean() + r1_by_hand(D, real, weight=2)
    d_loss.backward()
    optimizers["d"].step()
    assert_equal(ahead, gradients(softplus(-D(G(z))).mean(), G))


def test_nothing_global_is_patched_and_the_global_random_numbers_are_left_alone() -> None:
    def snapshot() -> list[dict[str, Any]]:
        return [
            dict(vars(thing))
            for thing in (torch, Tensor, nn, nn.Module, torch.optim.Optimizer, torch.autograd, nn.functional)
        ]

    hooks = torch.nn.modules.module._global_forward_hooks, GLOBAL_HOOKS
    before, state = snapshot(), torch.get_rng_state()
    G, D = networks()
    torch.set_rng_state(state)
    real, fake = samples()
    optimizers = {phase: torch.optim.Adam(m.parameters()) for phase, m in (("d", D), ("g", G))}
    attached = gankit.attach(G, D, ["spectral_norm", "gradient_penalty", "lecam", "consistency"], optimizers=optimizers)
    attached.setup(real, fake)
    attached.d_terms(real, fake).backward()
    optimizers["d"].step()
    assert torch.equal(state, torch.get_rng_state())
    assert all(one.keys() == two.keys() for one, two in zip(before, snapshot(), strict=True))
    assert all(one[k] is two[k] for one, two in zip(before, snapshot(), strict=True) for k in one)
    assert not any(hooks)


def test_torch_is_the_only_import_cost() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import gankit; gankit.attach; "
        "new = {m.split('.')[0] for m in set(sys.modules) - before if not m.startswith('_')}; "
        "print(sorted(new - sys.stdlib_module_names))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = set(ast.literal_eval(done.stdout))
    assert "gankit" in found
    assert found <= {
        "gankit",
        "pluggy",
        "packaging",
    }  # small and pure Python; no click, rich, scipy, PIL, matplotlib ...


# -- loops of all kinds --------------------------------------------------------------------------------------------


def test_accumulated_micro_batches_are_one_batch() -> None:
    _, D = networks()
    real, fake = samples(8)
    attached = gankit.attach(nn.Identity(), D, ["r1"])
    attached.d_terms(real, fake).backward()
    whole = [p.grad.clone() for p in D.parameters() if p.grad is not None]
    D.zero_grad()
    for part in (slice(0, 4), slice(4, 8)):
        (attached.d_terms(real[part], fake[part]) / 2).backward()
    assert_equal([p.grad for p in D.parameters() if p.grad is not None], whole)


class Steps:
    """Takes note of the steps it is told."""

    def __init__(self) -> None:
        self.d: list[int] = []
        self.g: list[int] = []

    @hookimpl
    def pre_d_loss(self, step: int) -> None:
        self.d.append(step)

    @hookimpl
    def post_g_loss(self, step: int) -> None:
        self.g.append(step)


LOOPS = {  # what is done, and the steps that are counted for D's and G's batches, without and with the optimisers
    "d": ("dDdDdD", [1, 2, 3], [], [1, 2, 3], []),
    "d with g elsewhere": ("dDGdDG", [1, 2], [], [1, 2], []),
    "g": ("gGgG", [], [1, 2], [], [1, 2]),
    "both": ("dDgGdDgG", [1, 2], [1, 2], [1, 2], [1, 2]),
    "three to one": ("dDdDdDgGdDdDdDgG", [1, 2, 3, 4, 4, 4], [3, 4], [1, 1, 1, 2, 2, 2], [1, 2]),
    "one to two": ("dDgGgGdDgGgGdDgGgG", [1, 2, 3], [1, 1, 2, 2, 3, 3], [1, 2, 3], [1, 1, 2, 2, 3, 3]),
    "two of G first": ("gGgGdDgGgGdDgGgGdD", [3, 4, 5], [1, 2, 3, 3, 4, 4], [3, 4, 5], [1, 2, 3, 3, 4, 4]),
    "micro-batches": ("ddDggGddDggG", [1, 2, 3, 3], [2, 2, 3, 3], [1, 1, 2, 2], [1, 1, 2, 2]),
    "interleaved micro-batches": ("dgdgDGdgdgDG", [1, 2, 3, 4], [1, 2, 3, 4], [1, 1, 2, 2], [1, 1, 2, 2]),
}


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("name", LOOPS)
def test_steps_are_counted_in_loops_of_all_kinds(name: str, given: bool) -> None:
    acts, *expected = LOOPS[name]
    G, D = networks()
    optimizers = {phase: torch.optim.SGD(m.parameters(), lr=0.1) for phase, m in (("d", D), ("g", G))}
    if name == "d":
        del optimizers["g"]
    steps = Steps()
    attached = gankit.attach(G, D, [steps], optimizers=optimizers if given else None)
    real, fake = samples()
    for act in acts:
        if act in "dg":
            (attached.d_terms if act == "d" else attached.g_terms)(real, fake).backward()
        else:
            optimizers[act.lower()].step()
    assert [steps.d, steps.g] == (expected[2:] if given else expected[:2])


def test_a_lazy_penalty_comes_every_kth_step_and_k_times_as_strong() -> None:
    _, D = networks()
    real, fake = samples()
    attached = gankit.attach(nn.Identity(), D, [("r1", {"every": 4})])
    values = [attached.d_terms(real, fake).item() for _ in range(8)]
    expected = 4 * r1_by_hand(D, real, weight=10).item()
    assert values == pytest.approx([0, 0, 0, expected, 0, 0, 0, expected])
    attached.d_terms(real, fake).backward()  # a step without a term is nothing to stumble over


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_a_grad_scaler(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    G, D = (module.float() for module in networks())
    real, fake = (t.float() for t in samples(16))
    exact = gankit.attach(G, D, ["r1", "r2", "gradient_penalty"]).d_terms(real, fake)
    expected = gradients(exact, D)
    optimizers = {phase: torch.optim.Adam(m.parameters(), lr=1e-3) for phase, m in (("d", D), ("g", G))}
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    steps = []

    class Told:
        @hookimpl
        def post_step(self, phase: str) -> None:
            steps.append(phase)

    plugins = ["r1", "r2", "gradient_penalty", Told()]
    attached = gankit.attach(G, D, plugins, optimizers=optimizers)
    with torch.autocast("cpu", dtype):
        term = attached.d_terms(real, fake.to(dtype))  # as G's samples are under autocast
    plain = gradients(term, D)
    scaler.scale(term).backward()
    scaler.unscale_(optimizers["d"])
    grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in D.parameters()]
    assert_equal(plain, grads, 1e-6 if dtype == torch.bfloat16 else 0.01)  # float16 has few exponents below 1
    length = torch.cat([g.flatten() for g in expected]).norm()
    assert torch.cat([(a - b).flatten() for a, b in zip(grads, expected, strict=True)]).norm() < 0.03 * length
    scaler.step(optimizers["d"])
    scaler.update()
    assert steps == ["d"]
    scaler.scale(D(real).sum() * float("inf")).backward()
    scaler.step(optimizers["d"])  # skipped, and so nothing acts after it
    assert steps == ["d"]


class Told:
    """Takes note of the updates it acts after, and of their terms."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.terms: list[set[str]] = []

    @hookimpl
    def post_step(self, phase: str, terms: dict[str, Tensor]) -> None:
        self.phases.append(phase)
        self.terms.append(set(terms))


@pytest.mark.parametrize("fused", [False, True])
def test_an_update_that_a_grad_scaler_skips_is_no_step(fused: bool) -> None:
    G, D = (module.float() for module in networks())
    real, fake = (t.float() for t in samples())
    optimizers = {phase: torch.optim.Adam(m.parameters(), fused=fused) for phase, m in (("d", D), ("g", G))}
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    told = Told()
    attached = gankit.attach(G, D, ["lecam", told], optimizers=optimizers)
    for factor, expected in ((1.0, ["d"]), (float("inf"), ["d"]), (1.0, ["d", "d"])):
        before = everything(D)
        loss = softplus(-D(factor * real)).mean() + attached.d_terms(factor * real, fake)
        scaler.scale(loss).backward()
        scaler.step(optimizers["d"])
        scaler.update()
        optimizers["d"].zero_grad()
        assert same(before, everything(D)) == (factor > 1)
        assert told.phases == expected
    assert attached.gan is not None
    assert attached.gan.plugins["lecam"].averages.isfinite().all()  # type: ignore[attr-defined]


def test_what_is_told_after_a_step_are_the_terms_of_its_loss() -> None:
    G, D = networks()
    real, fake = samples()
    told = Told()
    attached = gankit.attach(G, D, ["r1", told], optimizers={})
    for loss in (attached.d_terms, attached.d_loss):
        loss(real, fake)
        attached.stepped("d")
    assert told.terms == [{"r1"}, {"adv", "r1"}]  # the loop's own loss is its own


# -- optimisers ----------------------------------------------------------------------------------------------------


def test_an_optimiser_of_other_networks_is_refused_before_anything_is_changed() -> None:
    (G, D), (_, other) = networks(), networks()
    real, fake = samples()
    of_g, of_d, of_other = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (G, D, other))
    for optimizers, words in (
        ({"d": of_g, "g": of_d}, "optimizers['d'] holds no parameter of the discriminator"),
        ({"d": of_d, "g": of_other}, "optimizers['g'] holds no parameter of the generator"),
        ({"d": of_other, "g": of_g}, "optimizers['d'] holds no parameter of the discriminator"),
    ):
        before = everything(G, D)
        attached = gankit.attach(G, D, ["spectral_norm", "lecam"], optimizers=optimizers)
        assert words in refusal(lambda attached=attached: attached.setup(real, fake))
        assert same(before, everything(G, D))
    swapped = gankit.attach(G, D, ["lecam"], optimizers={"d": of_g, "g": of_d}, allow=["optimizers"])
    with pytest.warns(UserWarning, match="holds no parameter"):  # a copy of the parameters, as some frameworks train
        swapped.setup(real, fake)


def test_optimisers_of_parameters_that_are_frozen_wrapped_rebuilt_or_an_encoders_are_the_players_own() -> None:
    real, _ = samples()
    z = torch.randn(6, 2, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for plugins in (["r1"], ["spectral_norm"], [Widened()]):
            G, D = networks()
            D.requires_grad_(False)
            optimizers = {"d": torch.optim.SGD(D.parameters()), "g": torch.optim.SGD([G[0].weight])}  # type: ignore[index]
            gankit.attach(nn.DataParallel(G), nn.DataParallel(D), plugins, optimizers=optimizers).setup(real, real, z)
        G, E, D = nn.Linear(2, 3).double(), nn.Linear(3, 2).double(), Pair(5).double()
        optimizers = {"d": torch.optim.SGD(D.parameters()), "g": torch.optim.SGD(E.parameters())}  # G is given
        gankit.attach(G, D, ["bigan"], encoder=E, optimizers=optimizers).setup(real, real, z)
        gankit.attach(nn.Identity(), D, [], optimizers={"g": optimizers["g"]}).setup(real, real)  # has no parameters


def test_a_refusal_for_want_of_optimisers_leaves_the_networks_as_they_were() -> None:
    G, D = networks()
    real, fake = samples()
    before = everything(G, D)
    for plugins in (["spectral_norm", "lecam"], ["self_attention", "lecam"]):
        attached = gankit.attach(G, D, plugins)
        assert "acts after the optimisers' steps" in refusal(lambda attached=attached: attached.setup(real, fake))
        assert same(before, everything(G, D)) and not spectral_norms(D)


def unseen(batches: int, every: int, how: str) -> list[str]:
    """What is warned of in so many batches of D, of which each ``every``-th is followed by a step that ``how`` says."""
    G, D = (module.float() for module in networks())
    real, fake = (t.float() for t in samples(2))
    plugins = [] if how == "nothing acts" else ["lecam"]
    made = [{p: torch.optim.Adam(m.parameters(), fused=True) for p, m in (("d", D), ("g", G))} for _ in range(2)]
    given: dict[str, Any] = {} if how in ("forgotten", "nothing acts", "by hand") else made[0]
    used = made[how == "made anew"]
    attached = gankit.attach(G, D, plugins, optimizers=given)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(batches):
            (softplus(-D(real)).mean() + attached.d_terms(real, fake)).backward()
            if how != "frozen" and (i + 1) % every == 0:
                used["d"].step()
                used["d"].zero_grad()
                if how == "by hand":
                    attached.stepped("d")
    return [str(w.message) for w in caught if w.filename == __file__]


@pytest.mark.parametrize(("how", "every"), [("made anew", 1), ("made anew", 30), ("forgotten", 1)])
def test_steps_that_nobody_tells_of_are_warned_of_once(how: str, every: int) -> None:
    (message,) = unseen(201, every, how)
    assert message.startswith("100 batches of phase 'd'") and "attached.stepped('d')" in message


@pytest.mark.parametrize(
    ("how", "every"),
    [("given", 1), ("given", 130), ("by hand", 1), ("by hand", 130), ("frozen", 1), ("nothing acts", 1)],
)
def test_loops_whose_steps_are_seen_or_not_needed_are_not_warned(how: str, every: int) -> None:
    assert not unseen(131, every, how)


def test_attaching_anew_warns_of_plugins_that_still_act_and_detach_ends_them() -> None:
    G, D = networks()
    real, fake = samples()
    optimizers = {phase: torch.optim.SGD(m.parameters(), lr=0.1) for phase, m in (("d", D), ("g", G))}
    told = [Told() for _ in range(3)]
    attached = gankit.attach(G, D, [told[0]], optimizers=optimizers)
    attached.detach()  # before set-up there is nothing to do
    attached.setup(real, fake)
    second = gankit.attach(G, D, [told[1]], optimizers=optimizers)
    with pytest.warns(UserWarning, match=r"told of an earlier gankit\.attach .*attached\.detach\(\)"):
        second.setup(real, fake)
    optimizers["d"].step()
    assert [t.phases for t in told] == [["d"], ["d"], []]
    for one in (attached, second, second):
        one.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gankit.attach(G, D, [told[2]], optimizers=optimizers).setup(real, fake)
        G, D = networks()
        fresh = {phase: torch.optim.SGD(m.parameters(), lr=0.1) for phase, m in (("d", D), ("g", G))}
        gankit.attach(G, D, [Told()], optimizers=fresh).setup(real, fake)
    optimizers["g"].step()
    assert [t.phases for t in told] == [["d"], ["d"], ["g"]]


def test_another_pair_of_networks_with_the_same_optimiser_is_nobody_s_successor() -> None:
    """As in a CycleGAN, whose generators share one."""
    pairs = [networks() for _ in range(2)]
    real, fake = samples()
    every = {
        phase: torch.optim.SGD([p for pair in pairs for p in pair[i].parameters()], lr=0.1)
        for i, phase in enumerate("gd")
    }
    told = [Told() for _ in pairs]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for (G, D), one in zip(pairs, told, strict=True):
            gankit.attach(G, D, [one], optimizers=every).setup(real, fake)
    every["d"].step()
    assert [one.phases for one in told] == [["d"], ["d"]]


def test_a_scheduler_that_does_not_know_a_plugin_s_parameters_is_refused() -> None:
    G, _ = networks()
    real, _ = samples()
    D = protocols.Logits(nn.Linear(real.shape[1] + 2, 1).double())
    z = torch.randn(6, 2, dtype=torch.float64)
    optimizers = {phase: torch.optim.SGD(m.parameters(), lr=0.1) for phase, m in (("d", D), ("g", G))}
    torch.optim.lr_scheduler.LambdaLR(optimizers["g"], lambda step: 0.5)
    with pytest.raises(UsageError, match=r"attached\.setup\(real, fake, z\) before you make the scheduler"):
        gankit.attach(G, D, ["bigan"], optimizers=optimizers).d_loss(real, G(z), z)
    assert len(optimizers["g"].param_groups) == 1
    optimizers["g"] = torch.optim.SGD(G.parameters(), lr=0.1)
    attached = gankit.attach(G, D, ["bigan"], optimizers=optimizers)
    attached.setup(real, G(z), z)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizers["g"], lambda step: 0.5)
    attached.g_loss(real, G(z), z).backward()
    optimizers["g"].step()
    scheduler.step()
    assert [group["lr"] for group in optimizers["g"].param_groups] == [0.05, 0.05]


def test_a_conditional_generator_is_named_where_a_plugin_calls_it_with_z_alone() -> None:
    class Conditional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = networks()[0]

        def forward(self, z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.body(z)

    G, D = Conditional(), networks()[1]
    real, _ = samples()
    z = torch.randn(6, 2, dtype=torch.float64)
    with pytest.raises(TypeError) as caught:
        gankit.attach(G, D, ["mode_seeking"]).g_terms(real, G(z, z), z)
    assert any("use the plugin's function on samples that you make" in note for note in caught.value.__notes__)


def test_a_compiled_generator_works_and_a_compiled_discriminator_is_refused_where_it_must_be() -> None:
    G, D = networks()
    real, _ = samples()
    z = torch.randn(6, 2, dtype=torch.float64)
    expected = gankit.attach(G, D, ["mode_seeking"]).g_terms(real, G(z), z)
    compiled = torch.compile(G, backend="aot_eager")
    attached = gankit.attach(compiled, D, ["r1", "mode_seeking"])
    assert_equal(gradients(attached.g_terms(real, compiled(z), z), G), gradients(expected, G))
    assert_equal(gradients(attached.d_terms(real, compiled(z)), D), gradients(r1_by_hand(D, real, weight=10), D))

    quick = torch.compile(D, backend="aot_eager")
    lazy = gankit.attach(G, quick, ["consistency", ("r1", {"every": 2})])
    assert torch.isfinite(lazy.d_terms(real, G(z)))  # the first derivative alone
    with pytest.raises(UsageError, match="r1: torch.compile cannot differentiate a discriminator twice"):
        lazy.d_terms(real, G(z))
    D = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)).double()
    quick, before = torch.compile(D, backend="aot_eager"), everything(D)
    terms = [gankit.attach(G, critic, ["consistency"]).d_terms(real, G(z)) for critic in (D, quick, quick)]
    assert_equal(gradients(terms[0], D), gradients(terms[2], D))
    assert same(before, everything(D))
    images = torch.randn(4, 1, 8, 8)
    patches = Patches()
    patches.compile(backend="aot_eager")  # in place
    with pytest.raises(UsageError, match="gradient_penalty: torch.compile"):
        gankit.attach(G, patches, ["gradient_penalty"]).d_terms(images, images / 2)


# -- set-up, state -------------------------------------------------------------------------------------------------


def test_parameters_that_plugins_bring_join_the_optimisers_and_no_others_do() -> None:
    torch.manual_seed(0)
    G, D = nn.Linear(2, 3), nn.Bilinear(3, 2, 1)
    optimizers = {"d": torch.optim.Adam([D.weight]), "g": torch.optim.Adam(G.parameters())}  # D.bias is left out
    attached = gankit.attach(G, D, ["bigan"], optimizers=optimizers, architecture={"width": 8})
    real, z = torch.randn(6, 3), torch.randn(6, 2)
    with pytest.raises(UsageError, match="known after set-up"):
        attached.parameters("g")
    attached.setup(real, real, z)
    attached.setup(real, real, z)  # twice is once
    assert [len(o.param_groups) for o in optimizers.values()] == [1, 2]
    brought = optimizers["g"].param_groups[1]["params"]
    assert {id(p) for p in brought} == {id(p) for p in attached.parameters("g")} - {id(p) for p in G.parameters()}
    before = [p.detach().clone() for p in brought]
    attached.g_loss(real, G(z), z).backward()
    optimizers["g"].step()
    assert any(not torch.equal(a, b) for a, b in zip(before, brought, strict=True))


def test_set_up_before_the_first_batch_lets_weights_be_loaded() -> None:
    def made() -> tuple[nn.Module, Attached]:
        torch.manual_seed(0)
        D = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        attached = gankit.attach(nn.Linear(2, 3), D, ["spectral_norm"], optimizers={})
        attached.setup(torch.zeros(5, 3), torch.zeros(5, 3))
        return D, attached

    D, attached = made()
    assert spectral_norms(D) == ["0", "2"]
    real = torch.randn(5, 3)
    attached.d_loss(real, real).backward()
    twin, _ = made()
    twin.load_state_dict(D.state_dict())
    assert torch.equal(twin.eval()(real), D.eval()(real))


PLAYERS = ("lecam", "gradient_penalty", "pairwise_gp", "historical_averaging")


def training(steps: int, saved: dict[str, Any] | None = None, *, early: bool = False) -> dict[str, Any]:
    """Train ``steps`` steps from the start or from ``saved``; the whole state, through a file."""
    G = tiny_gan("vector").generator
    D = tiny_gan("vector", create(["bigan"], {})[0]).discriminator
    optimizers = {phase: torch.optim.Adam(m.parameters(), lr=1e-2) for phase, m in (("d", D), ("g", G))}
    attached = gankit.attach(G, D, PLAYERS, optimizers=optimizers, architecture={"width": 8}, seed=3)
    data = torch.Generator().manual_seed(7)
    parts = {"G": G, "D": D, "d": optimizers["d"], "g": optimizers["g"], "attached": attached}
    real, z = torch.zeros(8, 3), torch.zeros(8, 4)
    if saved and early:
        attached.load_state_dict(saved["attached"])  # waits for set-up
    if saved:
        attached.setup(real, real, z)
        for name, part in parts.items():
            if not (early and name == "attached"):
                part.load_state_dict(saved[name])
        data.set_state(saved["data"])
    for _ in range(steps):
        for phase in ("d", "g"):
            real = torch.rand(8, 3, generator=data)
            z = torch.randn(8, 4, generator=data)
            (attached.d_loss if phase == "d" else attached.g_loss)(real, G(z), z).backward()
            optimizers[phase].step()
            D.zero_grad()
            for p in attached.parameters("g"):
                p.grad = None
    state = {**{name: part.state_dict() for name, part in parts.items()}, "data": data.get_state()}
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@pytest.mark.parametrize("early", [False, True])
def test_a_killed_loop_goes_on_with_the_same_bits(early: bool) -> None:
    through, resumed = training(5), training(3, training(2), early=early)
    for name in ("G", "D"):
        for key, value in through[name].items():
            assert torch.equal(value, resumed[name][key]), key
    assert through["attached"]["step"] == 5
    for key in ("rngs", "players"):
        assert through["attached"][key].keys() == resumed["attached"][key].keys() != set()
    encoder = through["attached"]["players"]["encoder"]
    assert all(torch.equal(t, resumed["attached"]["players"]["encoder"][k]) for k, t in encoder.items())
    without = training(3, {**(state := training(2)), "attached": {}})
    assert state["attached"] and any(not torch.equal(t, without["D"][k]) for k, t in through["D"].items())


def test_a_state_before_the_first_batch_is_empty_and_loads() -> None:
    G, D = networks()
    attached = gankit.attach(G, D, ["gradient_penalty"])
    assert attached.state_dict() == {}
    attached.load_state_dict({})
    real, fake = samples()
    attached.d_terms(real, fake)
    state = attached.state_dict()
    waiting = gankit.attach(G, D, ["gradient_penalty"])
    waiting.load_state_dict(state)
    assert waiting.state_dict().keys() == state.keys()  # saved again before it was used
    assert torch.equal(waiting.d_terms(real, fake), attached.d_terms(real, fake))
    assert not torch.equal(gankit.attach(G, D, ["gradient_penalty"]).d_terms(real, fake), waiting.d_terms(real, fake))
    other = gankit.attach(G, D, ["lecam"], optimizers={})
    other.d_terms(real, fake)
    with pytest.raises(UsageError, match="the state is of other plugins"):
        other.load_state_dict(state)


class Elsewhere:
    """The state of a random stream on another device, which has to be fetched."""

    def __init__(self, state: Tensor) -> None:
        self.state = state

    def cpu(self) -> Tensor:
        return self.state


def test_a_state_that_was_loaded_onto_another_device_is_fetched() -> None:
    G, D = networks()
    real, fake = samples()
    attached = gankit.attach(G, D, ["gradient_penalty"])
    attached.setup(real, fake)
    attached.d_terms(real, fake)
    state = attached.state_dict()
    expected = attached.d_terms(real, fake)
    state["rngs"] = {name: Elsewhere(value) for name, value in state["rngs"].items()}
    attached.load_state_dict(state)
    assert torch.equal(attached.d_terms(real, fake), expected)


def test_gankits_own_state_is_fetched_as_well() -> None:
    gan = tiny_gan("vector", create(["gradient_penalty"], {})[0])
    train(gan, 1)
    whole = gan.state_dict()
    expected = gan.next_z(), torch.rand(1)
    whole["rngs"] = {name: Elsewhere(value) for name, value in whole["rngs"].items()}
    whole["global_rngs"] = [Elsewhere(value) for value in whole["global_rngs"]]
    gan.load_state_dict(whole)
    assert torch.equal(gan.next_z(), expected[0]) and torch.equal(torch.rand(1), expected[1])


def test_the_optimisers_steps_are_told_once_each_or_by_hand() -> None:
    found = []
    for by_hand in (False, True):
        G, D = networks()
        real, fake = samples()
        optimizers = {phase: torch.optim.SGD(m.parameters(), lr=0.1) for phase, m in (("d", D), ("g", G))}
        attached = gankit.attach(G, D, ["lecam", ("r1", {"every": 2})], optimizers={} if by_hand else optimizers)
        values = []
        for _ in range(4):
            term = attached.d_terms(real, fake)
            term.backward()
            values.append(term.item())
            for phase, optimizer in optimizers.items():
                optimizer.step()
                optimizer.zero_grad()
                if by_hand:
                    attached.stepped(phase)
        found.append(values)
    assert found[0] == found[1]
    assert found[0][0] == 0 and all(found[0][1:])


# -- refusals ------------------------------------------------------------------------------------------------------


class Sees:
    """Asks for the adversarial part of G's loss."""

    @hookimpl
    def post_g_loss(self, g_loss: Tensor) -> dict[str, Tensor]:
        return {"sees": 0.1 * g_loss}


def refusal(act: Callable[[], object]) -> str:
    with pytest.raises(UsageError) as caught:
        act()
    return "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])


def test_terms_alone_are_refused_where_they_would_not_be_the_whole_method() -> None:
    real, fake = samples()
    for plugin, word in (
        ("packing", "packing acts on"),
        ("unrolled", "unrolled acts on"),
        ("label_smoothing", "changes the adv"),
    ):
        G, D = networks()
        optimizers = {phase: torch.optim.SGD(m.parameters(), lr=0.1) for phase, m in (("d", D), ("g", G))}
        attached = gankit.attach(G, D, [plugin], optimizers=optimizers)
        text = refusal(lambda attached=attached: attached.d_terms(real, fake))
        assert word in text and "attached.d_loss(real, fake, z)" in text
        attached.d_terms(attached.show(real, fake))  # who scores what is shown may have the terms alone
    G, D = networks()
    attached = gankit.attach(G, D, ["spectral_norm"], optimizers={})
    assert "attached.setup" in refusal(lambda: attached.d_terms(real, fake))
    G, D = networks()
    attached = gankit.attach(G, D, [("feature_matching", {"replace": True})])
    assert "attached.g_loss" in refusal(lambda: attached.g_terms(real, fake))
    attached.d_terms(real, fake)
    attached = gankit.attach(G, D, ["lecam"], optimizers={})
    assert "logits must be of what was shown" in refusal(lambda: attached.d_terms(real, fake, real_logits=D(real)))
    attached = gankit.attach(G, D, [Sees()])
    assert "g_loss=" in refusal(lambda: attached.g_terms(real, G(fake[:, :2])))
    term = attached.g_terms(real, G(fake[:, :2]), g_loss=softplus(-D(G(fake[:, :2]))).mean())
    assert_equal(gradients(term, G), gradients(0.1 * softplus(-D(G(fake[:, :2]))).mean(), G))


class Two(nn.Module):
    """A discriminator that returns its features, too."""

    def __init__(self, D: nn.Module) -> None:
        super().__init__()
        self.layers = D

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layers(x), x


class Fails:
    """Has a slip that has nothing to do with z."""

    @hookimpl
    def pre_d_loss(self, real_logits: Tensor) -> dict[str, Tensor]:
        raise RuntimeError("dimension 0 of 10 is out of range [-1, 0]")


def test_what_cannot_work_is_refused_with_what_to_do() -> None:
    G, D = networks()
    real, fake = samples()

    def attach(*plugins: Any, **settings: Any) -> Attached:
        return gankit.attach(G, D, plugins, **settings)

    batch_norm = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)).double()
    for act, words in (
        (lambda: gankit.attach(G, D, "r1"), ["plugins are a list"]),
        (lambda: attach("r3"), ["no plugin called 'r3'"]),
        (lambda: attach(("r1", {"wieght": 1})), ["wieght", "weight"]),
        (lambda: attach("r1", "r1"), ["'r1' is given twice"]),
        (lambda: attach(Sees), ["give an object, Sees()"]),
        (lambda: attach(("r1",)), ["(name, {"]),
        (lambda: attach("r1", optimizers={"D": torch.optim.SGD(D.parameters())}), ["not 'D'"]),
        (lambda: attach("r1", optimizers={"d": D}), ["not a Sequential"]),
        (lambda: attach("r1").d_terms(real), ["give real and fake"]),
        (lambda: attach("r1").d_terms(real, fake[:3]), ["same shapes", "(6, 3)", "(3, 3)"]),
        (lambda: attach("r1").d_terms(real, fake, fake[:2]), ["same shapes", "z (2, 3)"]),
        (lambda: attach("r1").show(real, fake, phase="D"), ["not 'D'"]),
        (lambda: attach("r1").g_terms(attach("r1").show(real, fake)), ['phase="g"']),
        (lambda: attach("lecam").d_terms(real, fake), ["lecam acts after", "optimizers={"]),
        (lambda: attach("lecam", optimizers={"d": torch.optim.SGD(D.parameters())}).d_terms(real, fake), ["lecam acts"]),
        (lambda: attach("bigan").d_loss(real, fake, fake[:, :2]), ["brings parameters", "optimizers={"]),
        (lambda: attach("unrolled").g_loss(real, fake), ["reads the optimiser of phase 'd'"]),
        (lambda: attach("ttur").d_terms(real, fake), ["the optimisers are yours"]),
        (lambda: attach("bigan", encoder=nn.Linear(3, 2).double()).d_loss(real, fake), ["no z was given"]),
        (lambda: gankit.attach(G, Two(D), ["consistency"]).d_terms(real, fake), ["one tensor of logits", "a tuple"]),
        (lambda: gankit.attach(G, Two(D), ["r1"]).d_loss(real, fake), ["one tensor of logits"]),
        (lambda: gankit.attach(G, Two(D), [], probabilities=True).d_loss(real, fake), ["one tensor of logits"]),
        (lambda: gankit.attach(G, batch_norm, ["r1"]).d_terms(real, fake), ["batch norm", "allow=['batch-norm']"]),
    ):  # fmt: skip
        text = refusal(act)
        assert all(word in text for word in words), text
    with pytest.warns(UserWarning, match="batch norm"):
        gankit.attach(G, batch_norm, ["r1"], allow=["batch-norm"]).d_terms(real, fake)
    attached = attach("mode_seeking")
    with pytest.raises(RuntimeError) as caught:
        attached.g_terms(real, G(fake[:, :2]))
    assert any("no z was given" in note for note in caught.value.__notes__)
    with pytest.raises(RuntimeError, match="dimension 0") as caught:
        attach(Fails()).d_terms(real, fake)
    assert not any("no z was given" in note for note in caught.value.__notes__)


def test_looking_ahead_at_a_d_that_was_frozen_before_set_up_is_refused_in_a_sentence() -> None:
    G, D = networks()
    real, _ = samples()
    z = torch.randn(6, 2, dtype=torch.float64)
    optimizers = {phase: torch.optim.Adam(m.parameters()) for phase, m in (("d", D), ("g", G))}
    D.requires_grad_(False)
    attached = gankit.attach(G, D, ["unrolled"], optimizers=optimizers)
    text = refusal(lambda: attached.g_loss(real, G(z), z))
    assert "unrolled looks ahead" in text and "attached.setup(real, fake, z)" in text
    gankit.attach(G, D, ["feature_matching"]).g_loss(real, G(z), z)  # nothing looks ahead
    D.requires_grad_(True)
    attached.d_loss(real, G(z), z)
    D.requires_grad_(False)
    assert attached.g_loss(real, G(z), z).isfinite()


def test_wrappers_are_looked_through() -> None:
    module = nn.Linear(2, 2)
    assert bare(module) is module
    assert bare(nn.DataParallel(module)) is module
    attached = gankit.attach(module, module, [])
    attached.discriminator = nn.Sequential(module)
    with pytest.raises(UsageError, match="no wrapper around"):
        attached.discriminator = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(module.parameters())

    class Wrapper:
        def __init__(self, optimizer: Any) -> None:
            self.optimizer = optimizer

    assert innermost(Wrapper(Wrapper(optimizer))) is optimizer
    with pytest.raises(UsageError, match="reads the optimiser"):
        Optimizers()["g"]


# -- several processes ---------------------------------------------------------------------------------------------


class Widened:
    """Brings a layer at the end of D: parameters of its own."""

    @hookimpl
    def setup(self, gan: gankit.GAN) -> None:
        with gan.initialising(self):
            gan.discriminator.add_module("added", nn.Linear(1, 1, dtype=torch.float64))


class Drawing:
    """Draws random numbers at set-up and later."""

    @hookimpl
    def setup(self, gan: gankit.GAN) -> None:
        self.drawn = [torch.rand(3, generator=gan.rng(self))]

    @hookimpl
    def pre_d_loss(self, gan: gankit.GAN) -> None:
        self.drawn.append(torch.rand(3, generator=gan.rng(self)))


def wrapped(module: nn.Module, several: bool, **settings: Any) -> nn.Module:
    return (
        nn.parallel.DistributedDataParallel(module, **{"broadcast_buffers": False, **settings}) if several else module
    )


SHARED: dict[str, list[Any]] = {  # what agrees; D and G are deterministic functions of the joined batch
    "r1": [("r1", {"weight": 3})],
    "r1, r2": ["r1", "r2"],
    "spectral_norm": [("r1", {"weight": 1}), "spectral_norm"],
    "historical_averaging": ["historical_averaging"],
    "packing": ["packing", "r1"],
    "bigan": ["bigan"],
    "a layer that a plugin brings": [Widened(), "r1"],
}


FITTED: dict[str, dict[str, Any]] = {
    "minibatch_discrimination": {"calibrate": "scale"},
    "virtual_batch_norm": {"on": "d"},
}
APART = ["gradient_penalty", "consistency", "lecam", "unrolled", "mode_seeking", "feature_matching"]  # and what cannot


class Pair(nn.Module):
    """D(x, z)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, *inputs: Tensor) -> Tensor:
        logits: Tensor = self.layers(torch.cat(inputs, 1))
        return logits


def shared_training(name: str, part: slice, several: bool) -> list[Tensor]:
    """Three steps on this process's part of every batch; the parameters of G, D and E."""
    torch.manual_seed(0)
    G = networks()[0]
    D: nn.Module = Pair({"packing": 6, "bigan": 5}.get(name, 3)).double()
    changes = name in ("spectral_norm", "a layer that a plugin brings")
    if changes:
        D = nn.Sequential(D)
    E = nn.Linear(3, 2).double()
    modules = [G, D, *([E] if name == "bigan" else [])]
    optimizers = {
        "d": torch.optim.Adam(D.parameters(), lr=1e-2),
        "g": torch.optim.Adam([*G.parameters(), *E.parameters()], lr=1e-2),
    }
    joint = {"encoder": wrapped(E, several)} if name == "bigan" else {}
    zeros = torch.zeros(part.stop - part.start, 3, dtype=torch.float64)
    if changes:  # D itself, before it is wrapped
        attached = gankit.attach(G, D, SHARED[name], optimizers=optimizers)
        attached.setup(zeros, zeros)
        shared_G, shared_D = wrapped(G, several), wrapped(D, several)
        attached.discriminator = shared_D
    else:
        shared_G, shared_D = wrapped(G, several), wrapped(D, several)
        attached = gankit.attach(shared_G, shared_D, SHARED[name], optimizers=optimizers, **joint)
    rng = torch.Generator().manual_seed(1)
    for _ in range(3):
        for phase in "dg":
            real, z = (torch.randn(8, n, generator=rng, dtype=torch.float64)[part] for n in (3, 2))
            terms = attached.d_terms if phase == "d" else attached.g_terms
            fake = shared_G(z)
            if name in ("packing", "bigan") or changes:
                loss = (attached.d_loss if phase == "d" else attached.g_loss)(real, fake, z)
            elif phase == "d":
                shown = attached.show(real, fake)
                logits = shared_D(*shown.real), shared_D(*shown.fake)
                loss = softplus(-logits[0]).mean() + softplus(logits[1]).mean()
                loss = loss + attached.d_terms(shown, real_logits=logits[0])
            else:
                loss = softplus(-shared_D(fake)).mean() + terms(real, fake, z)
            loss.backward()
            optimizers[phase].step()
            for module in (G, D, E):
                module.zero_grad()
    return [p.detach().clone() for module in modules for p in module.parameters()]


def worker(rank: int, folder: Path) -> None:
    """One of two processes: every scenario, and what is refused; results go to a file."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2)
    part = slice(4 * rank, 4 * rank + 4)
    found: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found |= {name: shared_training(name, part, True) for name in SHARED}
    real, fake = samples(8)
    real, fake = real[part], fake[part]

    def error(act: Callable[[], object]) -> str:
        try:
            act()
        except (UsageError, RuntimeError, UserWarning) as caught:
            return str(caught)
        return ""

    G, D = networks()
    shared_G, shared_D = wrapped(G, True), wrapped(D, True)
    optimizers = {"d": torch.optim.Adam(D.parameters()), "g": torch.optim.Adam(G.parameters())}
    attached = gankit.attach(shared_G, shared_D, APART, optimizers=optimizers)
    for _ in range(3):
        for phase, z in (("d", real[:, :2]), ("g", fake[:, :2])):
            (attached.d_loss if phase == "d" else attached.g_loss)(real, shared_G(z), z).backward()
            optimizers[phase].step()
            for optimizer in optimizers.values():
                optimizer.zero_grad()
    found["apart"] = [p.detach().clone() for module in (G, D) for p in module.parameters()]

    joint = Pair(5).double()
    bigan = gankit.attach(G, joint, ["bigan"], optimizers={**optimizers, "d": torch.optim.Adam(joint.parameters())})
    found["brought"] = error(lambda: bigan.setup(real, fake, real[:, :2]))
    normalised = gankit.attach(shared_G, shared_D, ["spectral_norm"], optimizers=optimizers)
    found["inserted"] = error(lambda: normalised.setup(real, fake))
    G, D = networks()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found["bare"] = error(lambda: gankit.attach(G, D, ["r1"]).d_loss(real, fake))
    drawing = Drawing()
    gankit.attach(G, wrapped(D, True), [drawing]).d_terms(real, fake)
    found["drawn"] = drawing.drawn

    found["fitted"] = []
    for name, options in FITTED.items():
        G = networks()[0]
        middle = nn.BatchNorm1d(8) if name == "virtual_batch_norm" else nn.Tanh()
        D = nn.Sequential(nn.Linear(3, 8), middle, nn.Tanh(), nn.Linear(8, 1)).double()
        attached = gankit.attach(G, D, [(name, options)], optimizers={})
        attached.setup(real, fake)
        attached.discriminator = wrapped(D, True)
        attached.d_loss(real, fake)
        found["fitted"] += [t.detach().clone() for t in (*D.parameters(), *D.buffers())]

    # pytorch#47562: the last bias takes no part in the penalty
    D = networks()[1]
    shared = wrapped(D, True)
    terms = gankit.attach(G, shared, ["r1"])
    (softplus(-shared(real)).mean() + terms.d_terms(real, fake)).backward()
    found["joined"] = [p.grad.clone() for p in D.parameters() if p.grad is not None]
    D.zero_grad()
    terms.d_terms(real, fake).backward()  # by itself
    found["alone"] = [p.grad.clone() for p in D.parameters() if p.grad is not None]

    # pytorch#175024: two forwards, one backward, batch norm
    D = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    shared = wrapped(D, True)
    attached = gankit.attach(G, shared, ["consistency"])
    loss = softplus(-shared(real)).mean() + softplus(shared(fake)).mean() + attached.d_terms(real, fake)
    loss.backward()
    found["batch norm"] = [p.grad.clone() for p in D.parameters() if p.grad is not None]
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("gloo")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, __file__]
    running = [
        subprocess.Popen([*command, str(rank), str(folder)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", SHARED)
def test_two_processes_train_as_one_with_the_joined_batch(name: str, two_processes: list[dict[str, Any]]) -> None:
    one, two = (found[name] for found in two_processes)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    alone = shared_training(name, slice(0, 8), False)
    assert len(alone) == len(one)
    for a, b in zip(alone, one, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("backward", ["joined", "alone"])
def test_a_bias_that_takes_no_part_in_the_penalty_leaves_the_gradients_right(
    backward: str, two_processes: list[dict[str, Any]]
) -> None:
    """pytorch#47562: DistributedDataParallel averages nothing while a parameter has no gradient."""
    _, D = networks()
    real, _ = samples(8)
    loss = r1_by_hand(D, real, weight=10)
    if backward == "joined":
        loss = loss + softplus(-D(real)).mean()
    for found in two_processes:
        assert_equal(found[backward], gradients(loss, D), 1e-8)


def test_what_several_processes_cannot_have_is_refused(two_processes: list[dict[str, Any]]) -> None:
    one, two = two_processes
    for found in two_processes:
        assert "attach(..., encoder=...)" in found["brought"]
        assert "attached.setup(...) first, then wrap it" in found["inserted"]
        assert "attached.discriminator = the wrapped one" in found["bare"]
        assert_equal(found["batch norm"], one["batch norm"])
    assert all(torch.equal(a, b) for a, b in zip(one["apart"], two["apart"], strict=True))  # gradients are averaged
    assert torch.equal(one["drawn"][0], two["drawn"][0])  # set-up is the same everywhere
    assert not torch.equal(one["drawn"][1], two["drawn"][1])  # afterwards each process has numbers of its own


def test_what_is_fitted_to_the_first_batch_is_the_same_in_all_processes(two_processes: list[dict[str, Any]]) -> None:
    """Each process has its own rows, and gradients of different functions would be averaged."""
    one, two = (found["fitted"] for found in two_processes)
    assert len(one) > 8 and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


if __name__ == "__main__":
    worker(int(sys.argv[1]), Path(sys.argv[2]))
