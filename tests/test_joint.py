"""The joint setting's stochastic encoder: its distribution, its gradient, its seed, and what the critic is shown."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from gankit import GAN, Latent, UsageError, train
from gankit.joint import Joint, reconstruct, reconstruction_error, reparametrise
from gankit.loop import update
from gankit.options import build
from gankit.testing import run, tiny_gan


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def statistics(mean: list[float], variance: list[float], n: int) -> Tensor:
    return torch.tensor([*mean, *(math.log(v) for v in variance)], dtype=torch.float64).repeat(n, 1)


def test_draws_have_the_mean_and_the_variance_that_were_given() -> None:
    n, mean, variance = 100_000, [0.0, -3.0, 2.0], [1.0, 0.25, 9.0]
    z = reparametrise(statistics(mean, variance, n), generator=stream()).numpy()
    deviation = np.sqrt(variance)
    assert np.abs((z.mean(0) - mean) / deviation).max() < 4 / math.sqrt(n)
    assert np.abs(z.var(0) / variance - 1).max() < 4 * math.sqrt(2 / n)  # exp(log_variance) as deviation: 9 -> 81
    assert np.abs(np.corrcoef(z.T) - np.eye(3)).max() < 4 / math.sqrt(n)
    for k in range(3):
        assert stats.kstest(z[:, k], "norm", args=(mean[k], deviation[k])).pvalue > 1e-3


def test_for_a_uniform_prior_the_draw_is_squashed_into_its_support() -> None:
    n = 50_000
    z = reparametrise(statistics([0.5], [4.0], n), tanh=True, generator=stream())
    assert z.abs().max() <= 1
    assert stats.kstest(z.atanh().clamp(-30, 30).numpy()[:, 0], "norm", args=(0.5, 2)).pvalue > 1e-3
    plain = reparametrise(statistics([0.5], [4.0], n), generator=stream())
    torch.testing.assert_close(z, plain.tanh())


@pytest.mark.parametrize("tanh", [False, True])
def test_the_gradient_through_the_draw_is_that_of_finite_differences_and_by_hand(tanh: bool) -> None:
    given = torch.randn(4, 6, generator=stream(1), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: reparametrise(s, tanh=tanh, generator=stream(2)), (given,))
    if not tanh:
        noise = torch.empty(4, 3, dtype=torch.float64).normal_(generator=stream(2))
        (gradient,) = torch.autograd.grad(reparametrise(given, generator=stream(2)).sum(), given)
        torch.testing.assert_close(gradient[:, :3], torch.ones(4, 3, dtype=torch.float64))
        torch.testing.assert_close(gradient[:, 3:], noise * (given[:, 3:] / 2).exp() / 2)


def test_the_seed_decides_and_the_global_generator_is_left_alone() -> None:
    given = torch.zeros(4, 6)
    before = torch.get_rng_state()
    first = reparametrise(given, generator=stream(1))
    assert torch.equal(first, reparametrise(given, generator=stream(1)))
    assert not torch.equal(first, reparametrise(given, generator=stream(2)))
    assert torch.equal(torch.get_rng_state(), before)
    assert len(first.unique()) == 12  # one draw per sample and coordinate
    for wrong in (torch.zeros(4, 5), torch.zeros(4), torch.zeros(4, 2, 2)):
        with pytest.raises(ValueError, match=r"shape \(B, 2 z_dim\)"):
            reparametrise(wrong)


@pytest.mark.parametrize("prior", ["normal", "uniform"])
@pytest.mark.parametrize(("shape", "network"), [((3,), "mlp"), ((1, 16, 16), "dcgan"), ((1, 16, 16), "resnet")])
def test_the_network_has_two_linear_outputs_per_coordinate_and_the_code_one(
    prior: str, shape: tuple[int, ...], network: str
) -> None:
    class Score(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slope = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            return self.slope * (x.flatten(1).sum(1) + z.sum(1))

    def make_generator() -> nn.Module:
        return nn.Sequential(nn.Linear(4, math.prod(shape)), nn.Unflatten(1, shape))

    joint = Joint(stochastic=True)
    gan = GAN(make_generator, Score(), shape, Latent(4, prior), plugins={"joint": joint}, batch_size=64,
              architecture={"network": network, "width": 8}).build()  # fmt: skip
    x = torch.randn(64, *shape)
    batch = gan.hook.sample(gan=gan, real=x, z=gan.next_z(), phase="g", step=1)
    view = gan.hook.view(gan=gan, batch=batch, phase="g", step=1)
    assert gan.encoder(x).shape == (64, 8)
    assert batch.extra["code"].shape == (64, 4)
    assert view.real[1] is batch.extra["code"]  # the draw itself is shown
    assert (batch.extra["code"].abs() <= 1).all() == (prior == "uniform")
    assert gan.encoder.eval()(1e5 * x).abs().max() > 1  # no tanh; batch norm would undo the scale in training


def test_codes_are_drawn_anew_from_the_plugins_own_stream() -> None:
    joint = Joint(stochastic=True)
    gan = tiny_gan(plugins={"joint": joint})
    real, z = gan.next_real(), gan.next_z()
    state = gan.rng(joint).get_state()
    codes = [gan.hook.sample(gan=gan, real=real, z=z, phase="g", step=1).extra["code"] for _ in range(2)]
    assert not torch.equal(*codes)
    expected = reparametrise(gan.encoder(real), generator=torch.Generator().set_state(state))
    torch.testing.assert_close(codes[0], expected)


def test_g_trains_mean_and_variance_through_the_draw() -> None:
    gan = tiny_gan(plugins={"joint": Joint(stochastic=True)})
    before = deepcopy(gan.encoder.state_dict())
    update(gan, "d", 1)
    assert all(torch.equal(value, before[key]) for key, value in gan.encoder.state_dict().items())
    update(gan, "g", 1)
    moved = (gan.encoder.layers.out.weight - before["layers.out.weight"]).abs().sum(1)
    assert moved.shape == (8,)
    assert (moved > 0).all()


def test_pairwise_gp_takes_the_draw_the_critic_saw_as_e(monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip(
        "gankit_pairwise_gp", reason="gankit-pairwise-gp is not installed; it is in gankit[all]"
    )
    seen = []

    def spy(critic: Any, real: Tensor, reconstruction: Tensor, *given: Tensor, **options: Any) -> Tensor:
        seen.append((reconstruction, given[0]))
        return original(critic, real, reconstruction, *given, **options)

    original = module.pairwise_gradient_penalty
    monkeypatch.setattr(module, "pairwise_gradient_penalty", spy)
    gan = tiny_gan(plugins={"pairwise_gp": module.PairwiseGP(stochastic=True)})
    with torch.no_grad():
        batch = gan.hook.sample(gan=gan, real=gan.next_real(), z=gan.next_z(), phase="d", step=1)
        view = gan.hook.view(gan=gan, batch=batch, phase="d", step=1)
    logits = {"real_logits": gan.discriminator(*view.real), "fake_logits": gan.discriminator(*view.fake)}
    gan.hook.pre_d_loss(gan=gan, critic=gan.discriminator, batch=batch, view=view, step=1, ahead=False, **logits)
    ((reconstruction, e),) = seen
    assert torch.equal(e, view.real[1])
    torch.testing.assert_close(reconstruction, gan.generator(e))


def small(shape: tuple[int, ...], z_dim: int, latent: str) -> nn.Module:
    assert (z_dim, latent) == (8, "normal")
    return nn.Linear(shape[0], z_dim)


def half(shape: tuple[int, ...]) -> nn.Module:
    return nn.Linear(shape[0], 4)


def test_a_factory_of_the_users_is_asked_for_twice_the_size() -> None:
    gan = tiny_gan(plugins={"joint": Joint(encoder=f"{__file__}:small", stochastic=True)})
    assert gan.encoder.out_features == 8
    with pytest.raises(UsageError, match=r"stochastic encoder gives codes of shape \(4,\), the latent is \(8,\)"):
        tiny_gan(plugins={"joint": Joint(encoder=f"{__file__}:half", stochastic=True)})


@pytest.mark.parametrize("kind", ["vector", "image"])
def test_trains_and_repeats_and_off_is_off(kind: str) -> None:
    def updates(**options: Any) -> Any:
        return run({"joint": build(Joint, options, "joint")}, kind=kind)[1].updates

    assert updates(stochastic="yes") == updates(stochastic="yes")
    assert updates(stochastic="no") == updates() != updates(stochastic="yes")
    gan, _ = run({"joint": Joint()}, kind=kind)
    assert not gan.rngs.keys() & {"plugin:joint"}  # nothing is drawn without the option


def test_a_restored_run_takes_the_same_next_step() -> None:
    gan, other = (tiny_gan(plugins={"joint": Joint(stochastic=True)}) for _ in range(2))
    train(gan, 2)
    other.load_weights(deepcopy(gan.weights()))
    other.load_state_dict(deepcopy(gan.state_dict()))
    other.next_real = gan.next_real = lambda: torch.linspace(-1, 1, 24).view(8, 3)
    train(gan, 3)
    train(other, 3)
    for name, state in gan.weights().items():
        assert all(torch.equal(value, other.weights()[name][key]) for key, value in state.items())


# -- reconstruction --------------------------------------------------------------------------------------------------


def test_reconstruction_is_the_generator_after_the_encoder() -> None:
    gan = tiny_gan(plugins={"joint": Joint()})
    x = torch.randn(9, 3, generator=stream(3))
    expected = gan.generator(gan.players["encoder"].module(x))
    np.testing.assert_allclose(reconstruct(gan, x), expected.detach(), rtol=1e-5)
    np.testing.assert_allclose(reconstruction_error(gan, x), (expected - x).detach().square().mean(1), rtol=1e-5)
    average = deepcopy(gan.generator)
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.mul_(0.5)
    gan.averages["generator"] = average  # the one that makes samples
    np.testing.assert_allclose(reconstruct(gan, x), average(gan.players["encoder"].module(x)).detach(), rtol=1e-5)


def test_a_stochastic_encoder_gives_its_mean() -> None:
    gan = tiny_gan(plugins={"joint": Joint(stochastic=True)})
    x = torch.randn(9, 3, generator=stream(3))
    mean = gan.players["encoder"].module(x)[:, : gan.latent.dim]
    np.testing.assert_allclose(reconstruct(gan, x), gan.generator(mean).detach(), rtol=1e-5)


def test_without_an_encoder_there_is_none() -> None:
    with pytest.raises(UsageError, match="has no encoder"):
        reconstruct(tiny_gan(), torch.zeros(2, 3))
