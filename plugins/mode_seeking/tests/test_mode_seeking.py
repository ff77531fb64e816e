"""Mode seeking against numpy, closed forms of a linear generator, and finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from gankit_mode_seeking import ModeSeeking, mode_seeking
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gankit import Latent, UsageError, hookimpl, train
from gankit.loop import g_terms
from gankit.options import build
from gankit.testing import run, tiny_gan


@given(st.integers(0, 2**31), st.integers(1, 6), st.sampled_from([(3,), (2, 4, 4)]), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_against_numpy(seed: int, n: int, shape: tuple[int, ...], dim: int) -> None:
    stream = torch.Generator().manual_seed(seed)
    fake1, fake2 = torch.randn(2, n, *shape, generator=stream, dtype=torch.float64)
    z1, z2 = torch.randn(2, n, dim, generator=stream, dtype=torch.float64)
    samples = np.array([np.abs(a - b).mean() for a, b in zip(fake1.numpy(), fake2.numpy(), strict=True)])
    latents = np.array([np.abs(a - b).mean() for a, b in zip(z1.numpy(), z2.numpy(), strict=True)])
    inverse = mode_seeking(fake1, fake2, z1, z2).item()
    ratio = mode_seeking(fake1, fake2, z1, z2, form="ratio").item()
    assert inverse == pytest.approx(1 / (samples.mean() / latents.mean() + 1e-5), rel=1e-9)
    assert ratio == pytest.approx(-(samples / (latents + 1e-5)).mean(), rel=1e-9)
    order = torch.randperm(n, generator=stream)
    for form, value in (("inverse", inverse), ("ratio", ratio)):
        permuted = mode_seeking(fake1[order], fake2[order], z1[order], z2[order], form=form)
        swapped = mode_seeking(fake2, fake1, z2, z1, form=form)
        assert permuted.item() == pytest.approx(value, rel=1e-9)
        assert swapped.item() == pytest.approx(value, rel=1e-12)
    parts = [mode_seeking(*(t[i : i + 1] for t in (fake1, fake2, z1, z2)), form="ratio").item() for i in range(n)]
    assert np.mean(parts) == pytest.approx(ratio, rel=1e-9)  # a mean of pairs; the inverse form is one of batch means


def test_a_scaling_generator_has_its_scale_as_ratio_and_a_collapsed_one_pays_most() -> None:
    z1, z2 = torch.randn(2, 64, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for scale in (0.5, 1.0, 4.0):
        assert mode_seeking(scale * z1, scale * z2, z1, z2, eps=1e-12).item() == pytest.approx(1 / scale)
        assert mode_seeking(scale * z1, scale * z2, z1, z2, form="ratio", eps=1e-12).item() == pytest.approx(-scale)
        # the size of the sample does not matter: each coordinate four times
        wide = [(scale * z).repeat(1, 4) for z in (z1, z2)]
        assert mode_seeking(*wide, z1, z2, eps=1e-12).item() == pytest.approx(1 / scale)
    assert mode_seeking(0 * z1, 0 * z2, z1, z2).item() == pytest.approx(1e5)
    assert mode_seeking(0 * z1, 0 * z2, z1, z2, form="ratio").item() == 0


@pytest.mark.parametrize("form", ["inverse", "ratio"])
def test_the_gradient_drives_samples_apart_and_agrees_with_finite_differences(form: str) -> None:
    stream = torch.Generator().manual_seed(3)
    z1, z2 = torch.randn(2, 5, 2, dtype=torch.float64, generator=stream)
    W = torch.randn(3, 2, dtype=torch.float64, generator=stream, requires_grad=True)

    def term(W: torch.Tensor) -> torch.Tensor:
        return mode_seeking(z1 @ W.T, z2 @ W.T, z1, z2, form=form)

    assert torch.autograd.gradcheck(term, (W,))
    (gradient,) = torch.autograd.grad(term(W), W)
    with torch.no_grad():
        assert term(W - 1e-3 * gradient) < term(W)
        assert (z1 @ (W - 1e-3 * gradient).T - z2 @ (W - 1e-3 * gradient).T).abs().mean() > (
            z1 @ W.T - z2 @ W.T
        ).abs().mean()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((4, 3), (4, 1), (4, 2), (4, 2)), "equal shapes"),  # would broadcast
        (((4, 3), (4, 3), (4, 2), (4, 1)), "equal shapes"),
        (((4, 3), (4, 3), (1, 2), (1, 2)), "equal shapes"),
    ],
)
def test_what_does_not_match_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mode_seeking(*map(torch.ones, arguments))
    with pytest.raises(ValueError, match="'inverse' or 'ratio'"):
        mode_seeking(*map(torch.ones, [(2, 1)] * 4), form="paper")


def terms_of(plugin: ModeSeeking, **settings: Any) -> Any:
    gan = tiny_gan(plugins={"mode_seeking": plugin}, **settings)
    batch = gan.hook.sample(gan=gan, real=gan.next_real(), z=gan.next_z(), phase="g", step=1)
    view = gan.hook.view(gan=gan, batch=batch, phase="g", step=1)
    return gan, batch, g_terms(gan, gan.discriminator, batch, view, 1)


def test_the_plugin_compares_the_batch_with_latents_of_its_own_stream() -> None:
    gan, batch, terms = terms_of(ModeSeeking(weight=3, form="ratio"))
    stream = torch.Generator().manual_seed(0)
    stream.set_state(tiny_gan(plugins={"mode_seeking": (same := ModeSeeking())}).rng(same).get_state())
    z = Latent(4).draw(8, stream)
    assert not torch.equal(z, batch.z)
    expected = 3 * mode_seeking(batch.fake, gan.generator(z), batch.z, z, form="ratio")
    torch.testing.assert_close(terms["mode_seeking"], expected)
    for ours, theirs in zip(
        torch.autograd.grad(terms["mode_seeking"], gan.parameters("g"), retain_graph=True),
        torch.autograd.grad(expected, gan.parameters("g"), retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("form", ["inverse", "ratio"])
def test_eps_arrives(form: Any) -> None:
    gan, batch, terms = terms_of(ModeSeeking(eps=0.5, form=form))
    stream = torch.Generator().manual_seed(0)
    stream.set_state(tiny_gan(plugins={"mode_seeking": (same := ModeSeeking())}).rng(same).get_state())
    z = Latent(4).draw(8, stream)
    samples, latents = (
        np.abs((a - b).detach().numpy()).mean(1) for a, b in ((batch.fake, gan.generator(z)), (batch.z, z))
    )

    def by_hand(eps: float) -> Any:
        if form == "inverse":
            return 1 / (samples.mean() / latents.mean() + eps)
        return -(samples / (latents + eps)).mean()

    assert terms["mode_seeking"].item() == pytest.approx(by_hand(0.5), rel=1e-5)
    assert by_hand(0.5) != pytest.approx(by_hand(1e-5), rel=0.1)


def test_batch_norm_of_g_counts_one_batch_per_update() -> None:
    counts = []
    for plugins in ({"mode_seeking": ModeSeeking()}, {"other": Other()}):
        gan, _ = run(plugins, kind="image")
        counts.append([m.num_batches_tracked.item() for m in gan.generator.modules() if isinstance(m, nn.BatchNorm2d)])
    assert counts[0] == counts[1]
    assert counts[0]


class Other:
    @hookimpl
    def post_step(self) -> None:
        pass


def test_weight_zero_is_bit_identical_and_draws_nothing() -> None:
    off, _ = run({"mode_seeking": ModeSeeking(weight=0), "other": Other()})
    without, _ = run({"other": Other()})
    for name, state in off.weights().items():
        assert all(torch.equal(value, without.weights()[name][key]) for key, value in state.items())
    assert "plugin:mode_seeking" not in off.rngs


@pytest.mark.parametrize(("options", "message"), [({"weight": -1}, "negative"), ({"eps": 0}, "positive")])
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(ModeSeeking, options, "mode_seeking")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": math.nan}, "negative, infinite or NaN"),
        ({"weight": math.inf}, "negative, infinite or NaN"),
        ({"eps": math.nan}, "positive"),
        ({"form": "paper"}, "'inverse' or 'ratio', not 'paper'"),
    ],
)
def test_the_object_refuses_them_too(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModeSeeking(**options)


@pytest.mark.parametrize("kind", ["vector", "image"])
@pytest.mark.parametrize("form", ["inverse", "ratio"])
def test_trains_and_repeats(kind: str, form: Any) -> None:
    first, second = (run({"mode_seeking": ModeSeeking(form=form)}, kind=kind)[1].updates for _ in range(2))
    assert first == second
    sign: Callable[[float], bool] = (lambda v: v > 0) if form == "inverse" else (lambda v: v < 0)
    assert all(sign(terms["mode_seeking"]) for phase, _, terms in first if phase == "g")
    assert all(set(terms) == {"adv"} for phase, _, terms in first if phase == "d")


def test_a_restored_run_takes_the_same_next_step() -> None:
    gan, other = (tiny_gan(plugins={"mode_seeking": ModeSeeking()}) for _ in range(2))
    train(gan, 2)
    other.load_weights(deepcopy(gan.weights()))
    other.load_state_dict(deepcopy(gan.state_dict()))
    other.next_real = gan.next_real = lambda: torch.linspace(-1, 1, 24).view(8, 3)
    train(gan, 3)
    train(other, 3)
    for name, state in gan.weights().items():
        assert all(torch.equal(value, other.weights()[name][key]) for key, value in state.items())
