import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from gankit_spectral_norm import SpectralNorm, folded, layers, normalize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gankit import Player, UsageError, hookimpl
from gankit.checks import spectral_norms
from gankit.loop import train, update
from gankit.plugins import create
from gankit.testing import run, tiny_gan
from gankit.training import Averaging


def matrix(layer: nn.Module) -> np.ndarray[Any, Any]:
    """The weight as (outputs, everything else), by hand: transposed convolutions keep outputs in dimension 1."""
    weight = layer.weight.detach().double().numpy()
    if isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        weight = np.moveaxis(weight, 1, 0)
    return weight.reshape(len(weight), -1)


MAKERS: list[Callable[[], nn.Module]] = [
    lambda: nn.Linear(7, 5),
    lambda: nn.Conv1d(3, 4, 3),
    lambda: nn.Conv2d(3, 6, (2, 3)),
    lambda: nn.Conv3d(2, 3, 2),
    lambda: nn.ConvTranspose1d(3, 4, 3),
    lambda: nn.ConvTranspose2d(3, 6, (2, 3)),
    lambda: nn.ConvTranspose3d(2, 3, 2),
]


# -- the functions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: type(make()).__name__)
def test_sigma_is_the_largest_singular_value(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    layer = make().double()
    plain = matrix(layer)
    normalize(layer, power_iterations=500)
    expected = plain / np.linalg.svd(plain, compute_uv=False)[0]
    np.testing.assert_allclose(matrix(layer), expected, rtol=1e-9, atol=1e-12)
    assert np.linalg.svd(matrix(layer), compute_uv=False)[0] == pytest.approx(1, abs=1e-9)


def test_the_other_reshaping_of_a_transposed_convolution_is_another_norm() -> None:
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(3, 6, 3).double()
    wrong = np.linalg.svd(layer.weight.detach().reshape(3, -1).numpy(), compute_uv=False)[0]
    assert wrong != pytest.approx(np.linalg.svd(matrix(layer), compute_uv=False)[0], rel=1e-3)


@settings(deadline=None)
@given(scale=st.floats(1e-2, 1e2), seed=st.integers(0, 100))
def test_the_scale_of_a_weight_does_not_matter(scale: float, seed: int) -> None:
    layer = nn.Linear(4, 3, bias=False).double()
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(seed))
    bigger = copy.deepcopy(layer)
    with torch.no_grad():
        bigger.weight.mul_(scale)
    for one in (layer, bigger):
        normalize(one, generator=torch.Generator().manual_seed(seed))
    x = torch.randn(2, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(x), bigger(x), rtol=1e-9, atol=1e-9)


def test_one_training_forward_is_one_power_iteration_and_evaluation_none() -> None:
    layer = normalize(nn.Linear(6, 4).double(), generator=torch.Generator().manual_seed(3))
    chain = layer.parametrizations["weight"]  # type: ignore[union-attr, index]
    with torch.no_grad():
        chain.original.copy_(torch.randn(4, 6, generator=torch.Generator().manual_seed(5)))  # u, v are stale now
    w, u, v = (t.detach().clone().numpy() for t in (chain.original, chain[0]._u, chain[0]._v))
    layer.eval()(torch.zeros(1, 6, dtype=torch.float64))
    np.testing.assert_array_equal(chain[0]._u, u)
    layer.train()(torch.zeros(1, 6, dtype=torch.float64))
    u = w @ v / np.linalg.norm(w @ v)
    v = w.T @ u / np.linalg.norm(w.T @ u)
    np.testing.assert_allclose(chain[0]._u, u, rtol=1e-12)
    np.testing.assert_allclose(chain[0]._v, v, rtol=1e-12)
    layer.eval()
    np.testing.assert_allclose(layer.weight.detach(), w / (u @ w @ v), rtol=1e-12)


def test_the_gradient_is_that_of_equation_12() -> None:
    layer = normalize(nn.Linear(5, 4, bias=False).double(), power_iterations=500)
    x, target = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    layer(x).sub(target).square().sum().backward()
    w = layer.parametrizations["weight"].original  # type: ignore[union-attr, index]
    left, values, right = np.linalg.svd(w.detach().numpy())
    normed = w.detach().numpy() / values[0]
    outer = 2 * (x.numpy() @ normed.T - target.numpy()).T @ x.numpy()  # of the loss with respect to W_SN
    expected = (outer - (outer * normed).sum() * np.outer(left[:, 0], right[0])) / values[0]
    np.testing.assert_allclose(w.grad, expected, rtol=1e-8, atol=1e-9)
    detached = outer / values[0]  # the wrong version: sigma as a constant
    assert not np.allclose(w.grad, detached, rtol=1e-2)
    assert abs((w.grad * w).sum().item()) < 1e-8  # scale invariance


def test_u_and_v_come_from_the_generator_alone() -> None:
    def sigma_vectors(seed: int) -> Tensor:
        layer = nn.Linear(50, 50)
        nn.init.orthogonal_(layer.weight, generator=torch.Generator().manual_seed(0))  # keeps any first u
        normalize(layer, generator=torch.Generator().manual_seed(seed))
        return layer.parametrizations["weight"][0]._u  # type: ignore[union-attr, index]

    before = torch.get_rng_state()
    first = sigma_vectors(1)
    torch.set_rng_state(before)
    nn.Linear(50, 50)  # moves the global stream
    assert torch.equal(first, sigma_vectors(1)) and not torch.equal(first, sigma_vectors(2))
    layer, before = nn.Linear(2, 2), torch.get_rng_state()
    normalize(layer, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), before)


def test_what_cannot_be_normalised_is_refused() -> None:
    with pytest.raises(ValueError, match="no linear or convolutional"):
        normalize(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match="'1' already has a spectral norm"):
        normalize(nn.Sequential(nn.Linear(2, 2), nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2))))
    with pytest.raises(ValueError, match="already has"):
        normalize(nn.Sequential(nn.utils.spectral_norm(nn.Linear(2, 2))))
    tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="share one weight"):
        normalize(tied)


def test_folded_weights_give_the_same_outputs_under_ordinary_names() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 2, 3), nn.Flatten())
    plain_keys = set(network.state_dict())
    normalize(network)
    for _ in range(3):
        network(torch.randn(4, 1, 5, 5))
    network[1].eval()  # a mode of its own
    before = {k: v.clone() for k, v in network.state_dict().items()}
    flat = folded(network)
    assert [m.training for m in flat.modules() if not list(m.children())][1] is False and flat.training
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())  # untouched
    x = torch.randn(2, 1, 5, 5)
    assert torch.equal(flat.eval()(x), network.eval()(x))
    assert set(flat.state_dict()) == plain_keys and not spectral_norms(flat)
    fresh = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 2, 3), nn.Flatten())
    fresh.load_state_dict(flat.state_dict())
    assert torch.equal(fresh.eval()(x), network(x))


def test_a_second_derivative_matches_finite_differences() -> None:
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    normalize(critic).eval()
    x = torch.randn(5, 3, dtype=torch.float64)

    def penalty() -> Tensor:
        inner = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(critic(inner).sum(), inner, create_graph=True)
        return (slope.norm(dim=1) - 1).square().mean()

    weight = critic[0].parametrizations["weight"].original  # type: ignore[union-attr, index]
    (gradient,) = torch.autograd.grad(penalty(), weight)
    for i, j in [(0, 0), (2, 1), (3, 2)]:
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[i, j] += sign * 1e-6
            values.append(penalty().item())
            with torch.no_grad():
                weight[i, j] -= sign * 1e-6
        assert gradient[i, j].item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5, abs=1e-9)


# -- the plugin ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vector", "image"])
@pytest.mark.parametrize("on", ["d", "g", "both"])
def test_it_trains_and_normalises_what_it_is_told(kind: str, on: str) -> None:
    gan, log = run({"spectral_norm": SpectralNorm(on=on)}, kind=kind)  # type: ignore[arg-type]
    for network, chosen in ((gan.discriminator, on != "g"), (gan.generator, on != "d")):
        assert len(spectral_norms(network)) == (len(layers(network)) if chosen else 0)
    assert all(np.isfinite(v) for *_, terms in log.updates for v in terms.values())
    assert all(any(p is q for q in gan.parameters("d")) for p in gan.discriminator.parameters())


def test_further_players_of_the_phase_are_normalised_too() -> None:
    class Second:
        @hookimpl
        def players(self) -> dict[str, Player]:
            return {"second": Player(nn.Linear(3, 1), "d"), "helper": Player(nn.Linear(3, 1), "g")}

    gan = tiny_gan(plugins={"second": Second(), "spectral_norm": SpectralNorm()})
    assert spectral_norms(gan.players["second"].module) and not spectral_norms(gan.players["helper"].module)
    encoder = tiny_gan(plugins={**create(["bigan"], {})[0], "spectral_norm": SpectralNorm(on="g")})
    assert spectral_norms(encoder.players["encoder"].module)


def test_lazy_layers_have_their_shapes_by_then() -> None:
    gan = tiny_gan(plugins={"spectral_norm": SpectralNorm()}, discriminator=nn.Sequential(nn.LazyLinear(1)))
    assert gan.discriminator[0].weight.shape == (1, 3) and spectral_norms(gan.discriminator)


def test_what_it_refuses() -> None:
    twice = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 1)), nn.Flatten(0))
    with pytest.raises(UsageError, match="on the discriminator: layer '0' already has"):
        tiny_gan(plugins={"spectral_norm": SpectralNorm()}, discriminator=twice)
    with pytest.raises(ValueError, match="at least 1"):
        SpectralNorm(power_iterations=0)
    for eps in (0, math.nan):
        with pytest.raises(ValueError, match="positive"):
            SpectralNorm(eps=eps)
    with pytest.raises(ValueError, match="on is 'd', 'g' or 'both', not 'discriminator'"):
        SpectralNorm(on="discriminator")  # type: ignore[arg-type]


def test_same_seed_same_terms_and_the_global_stream_is_left_alone() -> None:
    before = torch.get_rng_state()
    first = run({"spectral_norm": SpectralNorm()})[1].updates
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert run({"spectral_norm": SpectralNorm()})[1].updates == first


@pytest.mark.parametrize(("names", "forwards"), [([], 2), (["gradient_penalty"], 3)])
def test_every_forward_of_an_update_advances_u(names: list[str], forwards: int) -> None:
    gan = tiny_gan(plugins={**create(names, {})[0], "spectral_norm": SpectralNorm()})
    layer = gan.discriminator.layers.hidden0.parametrizations.weight
    w, v = layer.original.detach().double().numpy(), layer[0]._v.double().numpy()
    for _ in range(forwards):
        u = w @ v / np.linalg.norm(w @ v)
        v = w.T @ u / np.linalg.norm(w.T @ u)
    update(gan, "d", 1)
    np.testing.assert_allclose(layer[0]._v, v, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "iterations", "eps"), [({"power_iterations": 3}, 3, 1e-12), ({"eps": 0.5}, 1, 0.5)]
)
def test_power_iterations_and_eps_arrive(options: dict[str, Any], iterations: int, eps: float) -> None:
    gan = tiny_gan(plugins={"spectral_norm": SpectralNorm(**options)})
    layer = gan.discriminator.layers.hidden0.parametrizations.weight
    stream = torch.Generator().manual_seed(5)
    with torch.no_grad():  # another weight, so that u and v are stale, and so small that 0.5 is above its lengths
        layer.original.copy_(0.05 * torch.randn(layer.original.shape, generator=stream))
        for vector in (layer[0]._u, layer[0]._v):
            vector.copy_(nn.functional.normalize(torch.randn(vector.shape, generator=stream), dim=0))
    w, v = layer.original.detach().double().numpy(), layer[0]._v.double().numpy()
    for _ in range(iterations):
        u = w @ v / max(np.linalg.norm(w @ v), eps)
        v = w.T @ u / max(np.linalg.norm(w.T @ u), eps)
    assert (np.linalg.norm(u) < 0.8) == (eps == 0.5)
    gan.discriminator.train()(torch.zeros(2, 3))
    np.testing.assert_allclose(layer[0]._u, u, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(layer[0]._v, v, rtol=1e-4, atol=1e-6)


def test_u_and_v_are_saved_and_a_continued_run_takes_the_same_next_step() -> None:
    first, _ = run({"spectral_norm": SpectralNorm(on="both")}, steps=2)
    assert any(key.endswith("0._u") for key in first.weights()["discriminator"])
    second = tiny_gan(plugins={"spectral_norm": SpectralNorm(on="both")})
    second.load_weights(first.weights())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for gan in (first, second):
        gan.next_real = lambda: torch.full((8, 3), 0.5)
        train(gan, 3)
    for network in ("discriminator", "generator"):
        for mine, other in zip(first.weights()[network].values(), second.weights()[network].values(), strict=True):
            assert torch.equal(mine, other)


def test_an_averaged_generator_is_normalised_by_its_own_singular_values() -> None:
    plugin = SpectralNorm(on="g")
    gan, _ = run({"spectral_norm": plugin, "averaging": Averaging(0.9)}, steps=30, d_steps=1)
    average = gan.averages["generator"]
    assert not any(p.requires_grad for p in average.parameters())
    for layer in layers(average.eval()):
        assert np.linalg.svd(matrix(layer), compute_uv=False)[0] == pytest.approx(1, abs=0.05)
        u = layer.parametrizations["weight"][0]._u  # type: ignore[union-attr, index]
        assert u.norm().item() == pytest.approx(1, abs=1e-5)
    assert torch.equal(folded(average).eval()(torch.ones(2, 4)), average(torch.ones(2, 4)))


def test_post_step_finds_the_singular_values_of_averages_however_far_they_went() -> None:
    plugin = SpectralNorm(on="g")
    gan = tiny_gan(plugins={"spectral_norm": plugin}, core={"averaging": Averaging(0.9)})
    average, stream = gan.averages["generator"], torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in layers(average):
            original = layer.parametrizations["weight"].original  # type: ignore[index, union-attr]
            original.copy_(3 * torch.randn(original.shape, generator=stream))

    def largest() -> list[float]:
        return [np.linalg.svd(matrix(layer), compute_uv=False)[0] for layer in layers(average.eval())]

    stale = largest()
    assert len(stale) > 1 and all(abs(value - 1) > 0.05 for value in stale)
    plugin.post_step(gan, "d")
    assert largest() == stale  # D's update moves no average
    for _ in range(200):
        plugin.post_step(gan, "g")
    assert largest() == pytest.approx([1] * len(stale), abs=1e-3)


def test_layers_whose_weights_are_computed_are_not_taken_for_shared_ones() -> None:
    network = nn.Sequential(*(nn.utils.parametrizations.orthogonal(nn.Linear(3, 3)) for _ in range(20)))
    with torch.no_grad():
        for layer in network:
            layer.parametrizations.weight.original.mul_(2)
    normalize(network, power_iterations=20)
    assert np.linalg.svd(network[7].weight.detach().numpy())[1][0] == pytest.approx(1, abs=1e-4)
