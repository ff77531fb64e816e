"""VEEGAN against gradients derived by hand, a KL divergence known in closed form, and the traps of its signs."""

from __future__ import annotations

import math
from collections.abc import Generator
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from gankit_label_smoothing import LabelSmoothing
from gankit_unrolled import Unrolled
from gankit_veegan import VEEGAN, latent_distance
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gankit import GAN, Latent, UsageError, View, hookimpl, losses, train
from gankit.contract import watched
from gankit.joint import Joint
from gankit.loop import g_terms, total, update
from gankit.options import build
from gankit.testing import Log, run, tiny_gan


class Linear(nn.Module):
    """D(x, e) = a.x + b.e."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        return x @ self.a + e @ self.b


def reconstructor(shape: tuple[int, ...], z_dim: int) -> nn.Module:
    return nn.Linear(shape[0], z_dim, bias=False)


def linear_gan(plugin: VEEGAN) -> GAN:
    plugin.reconstructor = f"{__file__}:reconstructor"
    return tiny_gan(
        plugins={"veegan": plugin},
        z_dim=2,
        generator=lambda: nn.Linear(2, 3, bias=False),
        discriminator=lambda: Linear(),
    )


def g_update(gan: GAN) -> tuple[dict[str, Tensor], Any, View]:
    """The terms of G's loss on a fresh batch, the batch, and what D is shown."""
    batch = gan.hook.sample(gan=gan, real=gan.next_real(), z=gan.next_z(), phase="g", step=1)
    view = watched(gan.hook.view(gan=gan, batch=batch, phase="g", step=1))
    return g_terms(gan, gan.discriminator, batch, view, 1), batch, view


def by_hand(gan: GAN, batch: Any, *, weight: float, joint: bool, sign: float = -1.0) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of W in G(z) = Wz and V in F(x) = Vx, worked out on paper for the linear critic."""
    W, V = gan.generator.weight.detach().numpy(), gan.players["reconstructor"].module.weight.detach().numpy()
    a, b = gan.discriminator.a.detach().numpy(), gan.discriminator.b.detach().numpy()
    z, x = batch.z.numpy(), batch.real.numpy()
    fake = z @ W.T
    missing = z - fake @ V.T  # z - F(G(z))
    for_w = sign * np.outer(a, z.mean(0)) - weight * 2 / len(z) * V.T @ missing.T @ z
    for_v = -weight * 2 / len(z) * missing.T @ fake
    return for_w, for_v - (sign * np.outer(b, x.mean(0)) if joint else 0)


@pytest.mark.parametrize("reconstructor_loss", ["joint", "reconstruction"])
@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_the_gradients_of_g_and_f_are_those_derived_by_hand(reconstructor_loss: Any, weight: float) -> None:
    gan = linear_gan(VEEGAN(weight=weight, reconstructor_loss=reconstructor_loss))
    terms, batch, _ = g_update(gan)
    found = torch.autograd.grad(total(terms), gan.parameters("g"))
    joint = reconstructor_loss == "joint"
    for gradient, expected in zip(found, by_hand(gan, batch, weight=weight, joint=joint), strict=True):
        np.testing.assert_allclose(gradient.numpy(), expected, rtol=1e-4, atol=1e-6)
    # the paper's sign, copied without turning it, is another gradient for both; so is the other reconstructor loss
    for gradient, wrong in zip(found, by_hand(gan, batch, weight=weight, joint=joint, sign=1.0), strict=True):
        assert joint is False or not np.allclose(gradient.numpy(), wrong, rtol=1e-2)
    assert not np.allclose(found[1].numpy(), by_hand(gan, batch, weight=weight, joint=not joint)[1], rtol=1e-2)


@pytest.mark.parametrize("reconstructor_loss", ["joint", "reconstruction"])
def test_under_the_true_log_ratio_g_minimises_the_kl_divergence(reconstructor_loss: Any) -> None:
    # joint densities: fake N(mean, I), real N(0, I) over (x, z); D = log real/fake = (|v - mean|^2 - |v|^2) / 2
    gan = linear_gan(VEEGAN(reconstructor_loss=reconstructor_loss))
    mean = torch.tensor([1.0, -0.5, 0.25])
    fakes = torch.randn(200_000, 3, generator=torch.Generator().manual_seed(0)) + mean
    reals = fakes - mean
    logits = {
        "fake_logits": ((fakes - mean).square() - fakes.square()).sum(1) / 2,
        "real_logits": ((reals - mean).square() - reals.square()).sum(1) / 2,
    }
    loss = gan.loss.g(**{side: logits[side] for side in gan.loss.g_sides}).item()
    kl = mean.square().sum().item() / 2
    # joint: F's side adds KL(real, fake), for Gaussians of one covariance the same number
    assert math.isclose(loss, 2 * kl if reconstructor_loss == "joint" else kl, rel_tol=0.02)


@given(st.integers(0, 2**31), st.integers(1, 7), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_distances_against_numpy(seed: int, n: int, dim: int) -> None:
    a, b = torch.randn(2, n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x, y = a.numpy(), b.numpy()
    l2 = np.mean(np.linalg.norm(x - y, axis=1) ** 2)
    cosine = np.mean([1 - u @ v / (np.linalg.norm(u) * np.linalg.norm(v)) for u, v in zip(x, y, strict=True)])
    assert latent_distance(a, b).item() == pytest.approx(l2, rel=1e-10)
    assert latent_distance(a, b, "cosine").item() == pytest.approx(cosine, rel=1e-6, abs=1e-9)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    assert latent_distance(a[order], b[order]).item() == pytest.approx(l2, rel=1e-10)
    halves = [latent_distance(u, v).item() * len(u) for u, v in zip(a.split(2), b.split(2), strict=True)]
    assert sum(halves) / n == pytest.approx(l2, rel=1e-10)  # a mean over samples, a sum over coordinates


@pytest.mark.parametrize("shape", [(5, 8, 4, 4), (5, 6, 1, 1)])
def test_latents_with_places_are_vectors_to_the_distance(shape: tuple[int, ...]) -> None:
    a, b = torch.randn(2, *shape, dtype=torch.float64)
    x, y = a.numpy().reshape(5, -1), b.numpy().reshape(5, -1)
    assert latent_distance(a, b).item() == pytest.approx(np.mean(np.linalg.norm(x - y, axis=1) ** 2), rel=1e-10)
    cosines = (x * y).sum(1) / (np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1))
    assert latent_distance(a, b, "cosine").item() == pytest.approx(np.mean(1 - cosines), rel=1e-6)


def test_distances_of_hand_made_latents_and_what_they_refuse() -> None:
    z = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    assert latent_distance(z, torch.zeros(2, 2)).item() == 3  # (5 + 1) / 2, not the mean over coordinates, 1.5
    assert latent_distance(z, 7 * z, "cosine").item() == pytest.approx(0, abs=1e-6)
    assert latent_distance(z, -z, "cosine").item() == pytest.approx(2)
    assert latent_distance(z, z).item() == 0
    with pytest.raises(ValueError, match="shape of z"):
        latent_distance(z, torch.zeros(2, 1))  # would broadcast
    with pytest.raises(ValueError, match="'l2' or 'cosine'"):
        latent_distance(z, z, "l1")


def test_the_critic_sees_pairs_with_x_first_and_g_trains_f_on_both_sides() -> None:
    gan = tiny_gan(plugins={"veegan": VEEGAN()})
    _, batch, view = g_update(gan)
    torch.testing.assert_close(view.real[0], batch.real)
    torch.testing.assert_close(view.real[1], gan.reconstructor(batch.real))
    torch.testing.assert_close(view.fake[0], gan.generator(batch.z))
    torch.testing.assert_close(view.fake[1], batch.z)
    assert view.real[1].grad_fn is not None
    gan = tiny_gan(plugins={"veegan": VEEGAN(reconstructor_loss="reconstruction")})
    _, _, view = g_update(gan)
    assert view.real[1].grad_fn is None  # D tells F nothing


@pytest.mark.parametrize("reconstructor_loss", ["joint", "reconstruction"])
def test_noise_is_on_the_codes_that_d_sees_and_nowhere_else(reconstructor_loss: Any) -> None:
    gan = tiny_gan(plugins={"veegan": VEEGAN(noise=0.7, reconstructor_loss=reconstructor_loss)}, batch_size=4000)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    terms, batch, view = g_update(gan)
    assert torch.equal(torch.random.get_rng_state(), before)
    noise = (view.real[1] - gan.reconstructor(batch.real)).detach().double().numpy()
    assert noise.mean() == pytest.approx(0, abs=0.03)
    np.testing.assert_allclose(np.cov(noise.T), 0.49 * np.eye(noise.shape[1]), atol=0.05)
    assert view.real[1].requires_grad  # `watched`, where there is no graph to F
    assert (view.real[1].grad_fn is not None) == (reconstructor_loss == "joint")
    assert torch.equal(view.fake[1], batch.z)
    assert terms["veegan"].item() == pytest.approx(latent_distance(batch.z, gan.reconstructor(batch.fake)).item())


def test_the_plugins_distance_is_the_one_asked_for() -> None:
    gan = tiny_gan(plugins={"veegan": VEEGAN(distance="cosine", weight=2)})
    terms, batch, _ = g_update(gan)
    z, f = batch.z.numpy(), gan.reconstructor(batch.fake).detach().numpy()
    cosine = np.mean([1 - u @ v / (np.linalg.norm(u) * np.linalg.norm(v)) for u, v in zip(z, f, strict=True)])
    assert terms["veegan"].item() == pytest.approx(2 * cosine, rel=1e-5)
    assert terms["veegan"].item() != pytest.approx(2 * np.mean(((z - f) ** 2).sum(1)), rel=0.1)


def test_the_authors_reconstruction_is_the_log_likelihood_of_a_normal_distribution() -> None:
    # the notebook writes -sum_j log N(z_j; F(G(z))_j, 1): half the squared norm, and a constant
    z, f = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    likelihood = torch.distributions.Normal(f, 1).log_prob(z).sum(1).mean()
    constant = 5 / 2 * math.log(2 * math.pi)
    assert 0.5 * latent_distance(z, f).item() + constant == pytest.approx(-likelihood.item())


def test_d_is_a_logistic_classifier_and_its_update_leaves_g_and_f_alone() -> None:
    log = Log()
    gan = tiny_gan(plugins={"veegan": VEEGAN()}, core={"log": log})
    assert gan.loss.d is losses.logistic_d
    for phase, moving in (("d", {"discriminator"}), ("g", {"generator", "reconstructor"})):
        before = deepcopy(gan.weights())
        update(gan, phase, 1)
        after = gan.weights()
        moved = {name for name in after if any(not torch.equal(after[name][k], before[name][k]) for k in after[name])}
        assert moved == moving
    assert [(phase, set(terms)) for phase, _, terms in log.updates] == [("d", {"adv"}), ("g", {"adv", "veegan"})]


def test_weight_zero_leaves_the_adversarial_gradient_bit_identical() -> None:
    gradients = []
    for plugin in (VEEGAN(weight=0), VEEGAN(weight=2)):
        gan = tiny_gan(plugins={"veegan": plugin})
        terms, _, _ = g_update(gan)
        gradients.append(torch.autograd.grad(terms["adv"], gan.parameters("g")))
        if plugin.weight == 0:
            assert list(terms) == ["adv"]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(("kind", "top"), [("uniform", 1.0), ("normal", math.inf)])
def test_f_reaches_the_support_of_the_prior(kind: str, top: float) -> None:
    plugin = VEEGAN()
    gan = GAN(nn.Linear(4, 3), lambda: nn.Bilinear(3, 4, 1), (3,), Latent(4, kind), plugins={"veegan": plugin}).build()
    far = gan.reconstructor(torch.randn(8, 3) * 1e4).abs().max().item()
    assert far <= 1 if top == 1 else far > 10


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        ({}, {"loss": "wasserstein"}, "log ratio.*'wasserstein'.*non_saturating.*--allow veegan-loss"),
        ({}, {"loss": "relativistic"}, "log ratio"),
        ({"distance": "cosine"}, {"z_dim": 1}, "distance=l2"),
        ({"reconstructor": f"{__file__}:wrong_size"}, {}, r"the reconstructor gives codes of shape \(9,\)"),
        ({"reconstructor": f"{__file__}:no_module"}, {}, "reconstructor factory .* returned a int"),
    ],
)
def test_refusals(options: dict[str, Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        tiny_gan(plugins={"veegan": VEEGAN(**options)}, **settings)


def wrong_size(shape: tuple[int, ...]) -> nn.Module:
    return nn.Linear(shape[0], 9)


def no_module() -> int:
    return 3


def test_a_second_encoder_is_refused_and_an_allowed_loss_is_kept_for_d() -> None:
    with pytest.raises(UsageError, match="switch one of them off"):
        tiny_gan(plugins={"veegan": VEEGAN(), "bigan": Joint()})
    with pytest.warns(UserWarning, match="log ratio"):
        gan = tiny_gan(plugins={"veegan": VEEGAN()}, loss="hinge", allow=frozenset({"veegan-loss"}))
    assert gan.loss.d is losses.hinge_d
    assert gan.loss.g is losses.wasserstein_mirrored
    gan = tiny_gan(plugins={"veegan": VEEGAN()}, loss="saturating")
    assert gan.loss.g is losses.wasserstein_mirrored


@pytest.mark.parametrize("mode", ["joint", "reconstruction"])
def test_unrolling_keeps_the_mean_logit_in_either_order_and_has_it_on_both_sides(mode: Any) -> None:
    for order in (("veegan", "unrolled"), ("unrolled", "veegan")):
        plugins = {"veegan": VEEGAN(reconstructor_loss=mode), "unrolled": Unrolled(k=1)}
        gan = tiny_gan(plugins={name: plugins[name] for name in order})
        assert (gan.loss.g, gan.loss.g_sides) == (losses.wasserstein_mirrored, losses.BOTH_SIDES)
        plugins["unrolled"] = Unrolled(k=1, both_sides=False)
        gan = tiny_gan(plugins={name: plugins[name] for name in order})
        both = mode == "joint"
        assert gan.loss.g is (losses.wasserstein_mirrored if both else losses.wasserstein_g)
        assert gan.loss.g_sides == (losses.BOTH_SIDES if both else ("fake_logits",))


def test_smoothed_labels_make_no_log_ratio_in_either_order() -> None:
    for order in (("veegan", "smooth"), ("smooth", "veegan")):
        plugins = {"veegan": VEEGAN(), "smooth": LabelSmoothing()}
        with pytest.raises(UsageError, match=r"log ratio.*without smoothed labels.*--allow veegan-loss"):
            tiny_gan(plugins={name: plugins[name] for name in order})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -1}, "negative"),
        ({"noise": -1}, "negative"),
        ({"weight": 0, "reconstructor_loss": "reconstruction"}, "positive"),
        ({"distance": "l1"}, "l2|cosine"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(VEEGAN, options, "veegan")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": math.nan}, "negative, infinite or NaN"),
        ({"weight": math.inf}, "negative, infinite or NaN"),
        ({"noise": math.nan}, "negative, infinite or NaN"),
        ({"distance": "l1"}, "'l2' or 'cosine', not 'l1'"),
        ({"reconstructor_loss": "jiont"}, "'joint' or 'reconstruction', not 'jiont'"),
    ],
)
def test_the_object_refuses_them_too(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VEEGAN(**options)


class Pack:
    @hookimpl(wrapper=True, tryfirst=True)
    def view(self) -> Generator[None, View, View]:
        view = yield
        real, fake = (tuple(t.reshape(len(t) // 2, -1, *t.shape[2:]) for t in side) for side in view)
        return View(real, fake)


def test_packing_and_veegan_give_one_result_in_either_order() -> None:
    logs = []
    for order in (("veegan", "pack"), ("pack", "veegan")):
        plugins = {"veegan": VEEGAN(), "pack": Pack()}
        gan, log = run({name: plugins[name] for name in order}, kind="image")
        assert [tuple(t.shape) for t in gan.first_view().real] == [(4, 2, 28, 28), (4, 8)]
        logs.append(log.updates)
    assert logs[0] == logs[1]


@pytest.mark.parametrize("kind", ["vector", "image"])
@pytest.mark.parametrize(
    "options", [{}, {"noise": 1.0}, {"reconstructor_loss": "reconstruction", "distance": "cosine"}], ids=str
)
def test_trains_and_repeats(kind: str, options: dict[str, Any]) -> None:
    first, second = (run({"veegan": VEEGAN(**options)}, kind=kind, d_steps=2)[1].updates for _ in range(2))
    assert first == second
    assert all(math.isfinite(value) for _, _, terms in first for value in terms.values())


def test_a_restored_run_takes_the_same_next_step() -> None:
    gan = tiny_gan(plugins={"veegan": VEEGAN()})
    train(gan, 2)
    weights = {name: {k: v.clone() for k, v in state.items()} for name, state in gan.weights().items()}
    other = tiny_gan(plugins={"veegan": VEEGAN()})
    other.load_weights(weights)
    other.load_state_dict(deepcopy(gan.state_dict()))
    other.next_real = gan.next_real = lambda: torch.linspace(-1, 1, 24).view(8, 3)
    train(gan, 3)
    train(other, 3)
    for name, state in gan.weights().items():
        assert all(torch.equal(value, other.weights()[name][key]) for key, value in state.items())
