"""Progressive growing against numpy, the paper's words and the formulas of the authors' code, and inside the loop."""

from __future__ import annotations

import copy
import math
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from gankit_bigan import BiGAN
from gankit_diffaugment import DiffAugment
from gankit_feature_matching import FeatureMatching
from gankit_gradient_penalty import GradientPenalty, gradient_penalty
from gankit_historical_averaging import HistoricalAveraging
from gankit_packing import Packing
from gankit_progressive import (
    GROWN_AFTER,
    Discriminator,
    Generator,
    MinibatchStddev,
    PixelNorm,
    Progressive,
    at_stage,
    doubled,
    doublings_of,
    equalize,
    halved,
    he_scale,
    minibatch_stddev,
    pixel_norm,
    schedule,
)
from gankit_r1 import R1
from gankit_spectral_norm import SpectralNorm
from gankit_unrolled import Unrolled
from gankit_weight_clipping import WeightClipping
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.signal import correlate2d
from torch import Tensor, nn

from gankit import GAN, Latent, UsageError, losses, train
from gankit.cli import main
from gankit.gan import Optim
from gankit.networks import folded
from gankit.options import build, options_of
from gankit.testing import Log, tiny_gan
from gankit.training import Averaging

torch.set_num_threads(1)

Array = NDArray[np.float64]
README = Path(__file__).parents[1] / "README.md"


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(n: int = 4, side: int = 16, channels: int = 1, seed: int = 0) -> Tensor:
    return torch.rand(n, channels, side, side, generator=stream(seed)) * 2 - 1


def growing_gan(
    plugins: dict[str, object] | None = None,
    core: dict[str, object] | None = None,
    *,
    side: int = 16,
    loss: str = "non_saturating",
    **options: Any,
) -> GAN:
    """A GAN of 16 px that is grown after 8 steps of 4 images: steps 3, 4 fade level 1 in, 7, 8 level 2."""
    fields = {name: options.pop(name) for name in ("seed", "d_steps", "optim", "allow", "device") if name in options}
    batch = options.pop("batch_size", 4)
    progressive = Progressive(**{"width": 2, "grown_after": 32, **options})
    gan = GAN(
        None, None, (1, side, side), Latent(6), losses.make(loss), {"progressive": progressive, **(plugins or {})},
        core or {}, batch_size=batch, **fields,
    )  # fmt: skip
    data = gan.stream("data")
    gan.next_real = lambda: torch.rand(batch, 1, side, side, generator=data) * 2 - 1
    return gan.build()


# -- schedule ----------------------------------------------------------------------------------------------------------


def as_the_paper_says(shown: Fraction, phase: Fraction, doublings: int) -> tuple[int, Fraction]:
    """Appendix A.1, phase by phase: 4 px for one phase; then, for each doubling, fade in for one, settle for one."""
    if shown <= phase:
        return 0, Fraction(1)
    shown -= phase
    for level in range(1, doublings + 1):
        if 0 < shown < phase:
            return level, shown / phase
        shown -= phase
        if shown <= phase:
            return level, Fraction(1)
        shown -= phase
    return doublings, Fraction(1)


@given(st.integers(0, 3000), st.integers(1, 2000), st.integers(1, 6))
@settings(max_examples=100, deadline=None)
def test_the_schedule_is_the_papers(shown: int, grown_after: int, doublings: int) -> None:
    level, alpha = schedule(shown, grown_after, doublings)
    expected, weight = as_the_paper_says(Fraction(shown), Fraction(grown_after, 2 * doublings), doublings)
    assert level == expected
    assert alpha == pytest.approx(float(weight), abs=1e-15)
    assert (alpha == 1) == (weight == 1)


def test_the_schedule_of_the_paper_in_its_own_numbers() -> None:
    phase = 800_000  # appendix A.1, to 1024 px
    assert schedule(0, 16 * phase, 8) == schedule(phase, 16 * phase, 8) == (0, 1.0)
    assert schedule(phase + 200_000, 16 * phase, 8) == (1, 0.25)
    assert schedule(2 * phase, 16 * phase, 8) == schedule(3 * phase, 16 * phase, 8) == (1, 1.0)
    assert schedule(3 * phase + 400_000, 16 * phase, 8) == (2, 0.5)
    assert schedule(16 * phase, 16 * phase, 8) == schedule(10**12, 16 * phase, 8) == (8, 1.0)
    assert schedule(16 * phase - 1, 16 * phase, 8)[1] < 1
    assert schedule(0, 0, 3) == (3, 1.0)  # not grown at all


@given(st.integers(0, 2000), st.integers(1, 300), st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_the_schedule_is_the_authors_level_of_detail(shown: int, phase: int, doublings: int) -> None:
    # lod falls from k to 0: constant for a phase, then by 1 in a phase; floor(lod) is the finer of the levels in use
    index, rest = divmod(shown, 2 * phase)
    lod = max(Fraction(doublings - index) - max(Fraction(rest - phase, phase), Fraction(0)), Fraction(0))
    level, alpha = schedule(shown, 2 * doublings * phase, doublings)
    assert level == doublings - math.floor(lod)
    assert alpha == pytest.approx(1 - float(lod - math.floor(lod)), abs=1e-15)


def test_alpha_rises_in_equal_steps_and_never_jumps() -> None:
    position = [level - 1 + alpha for level, alpha in (schedule(s, 1200, 3) for s in range(1, 1300))]
    steps = np.diff(position)
    assert (steps >= 0).all()
    assert steps.max() == pytest.approx(1 / 200, abs=1e-12)
    assert np.count_nonzero(steps) == 3 * 200


# -- images ------------------------------------------------------------------------------------------------------------


def np_halved(x: Array, times: int = 1) -> Array:
    f = 2**times
    return x.reshape(*x.shape[:2], x.shape[2] // f, f, x.shape[3] // f, f).mean((3, 5))


def np_doubled(x: Array, times: int = 1) -> Array:
    return x.repeat(2**times, 2).repeat(2**times, 3)


@given(st.integers(0, 2**31), st.integers(0, 3), st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_halving_and_doubling_against_numpy_and_undone_bit_for_bit(seed: int, times: int, channels: int) -> None:
    x = torch.randn(2, channels, 8, 8, generator=stream(seed)) * 10 ** (seed % 7 - 3)
    np.testing.assert_allclose(halved(x.double(), times).numpy(), np_halved(x.double().numpy(), times), rtol=1e-12)
    np.testing.assert_array_equal(doubled(x, times).numpy(), np_doubled(x.numpy(), times))
    assert torch.equal(halved(doubled(x, times), times), x)


@pytest.mark.parametrize("level", [0, 1, 2, 3])
@pytest.mark.parametrize("alpha", [1.0, 0.25])
def test_real_images_are_shown_as_in_the_authors_code(level: int, alpha: float) -> None:
    if level == 0 and alpha < 1:
        return
    x = images(3, 32, 2).double()
    # there: the data at the level's size, cross-faded with itself halved and doubled, then pixels repeated
    fine = np_halved(x.numpy(), 3 - level)
    lod = 1 - alpha
    if lod:
        fine = fine + (np_doubled(np_halved(fine)) - fine) * lod
    expected = np_doubled(fine, 3 - level)
    shown = at_stage(x, 3, level, alpha)
    np.testing.assert_allclose(shown.numpy(), expected, atol=1e-14)
    torch.testing.assert_close(shown.mean((2, 3)), x.mean((2, 3)))  # brightness stays
    if alpha == 1:
        assert torch.equal(at_stage(shown, 3, level), shown)
        assert level < 3 or shown is x


# -- parts -------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 6))
@settings(max_examples=20, deadline=None)
def test_pixel_norm_against_numpy(seed: int, n: int, channels: int) -> None:
    x = torch.randn(n, channels, 3, 2, generator=stream(seed), dtype=torch.float64)
    a = x.numpy()
    expected = np.empty_like(a)
    for i, y, z in np.ndindex(n, 3, 2):
        vector = a[i, :, y, z]
        expected[i, :, y, z] = vector / math.sqrt(sum(v * v for v in vector) / channels + 1e-8)
    np.testing.assert_allclose(pixel_norm(x).numpy(), expected, rtol=1e-10)
    assert torch.equal(PixelNorm()(x), pixel_norm(x))


def test_pixel_norm_of_latents_is_a_sphere_and_zero_has_a_gradient() -> None:
    z = torch.randn(50, 8, generator=stream())
    torch.testing.assert_close(pixel_norm(z).norm(dim=1), torch.full((50,), math.sqrt(8)))
    torch.testing.assert_close(pixel_norm(7 * z), pixel_norm(z))
    zero = torch.zeros(2, 4, requires_grad=True)
    pixel_norm(zero).sum().backward()
    assert zero.grad is not None
    assert zero.grad.isfinite().all()


@pytest.mark.parametrize("gain", [math.sqrt(2), 1.0])
@pytest.mark.parametrize(
    ("make", "fan_in"),
    [(lambda: nn.Linear(300, 40), 300), (lambda: nn.Conv2d(20, 30, 3), 180), (lambda: nn.Conv2d(20, 30, 1), 20)],
)
def test_an_equalized_layer_acts_with_he_weights_and_stores_unit_ones(make: Any, fan_in: int, gain: float) -> None:
    layer = equalize(make(), gain, generator=stream())
    stored = layer.parametrizations.weight.original
    assert he_scale(layer, gain) == pytest.approx(gain / math.sqrt(fan_in))
    assert torch.equal(layer.weight, he_scale(layer, gain) * stored)
    assert stored.std().item() == pytest.approx(1, abs=0.1)  # 600 numbers and more
    assert abs(stored.mean().item()) < 0.1
    assert not layer.bias.any()
    assert torch.equal(equalize(make(), gain, generator=stream()).weight, layer.weight)


@pytest.mark.parametrize("fan_in", [4, 100, 2500])
def test_under_adam_every_acting_weight_moves_by_the_same_share_of_its_scale(fan_in: int) -> None:
    def share(layer: nn.Linear) -> float:
        """Mean move of the acting weights, in units of their standard deviation."""
        before = layer.weight.detach().clone()
        optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3, eps=1e-16)
        layer(torch.randn(8, fan_in, generator=stream(1))).square().sum().backward()
        optimizer.step()
        return ((layer.weight - before).abs().mean() / (math.sqrt(2) / math.sqrt(fan_in))).item()

    torch.manual_seed(0)
    assert share(equalize(nn.Linear(fan_in, 50), generator=stream())) == pytest.approx(1e-3, rel=1e-3)
    plain = nn.Linear(fan_in, 50)
    nn.init.normal_(plain.weight, std=he_scale(plain))
    assert share(plain) == pytest.approx(1e-3 * math.sqrt(fan_in / 2), rel=1e-2)  # what it equalizes


def test_under_plain_gradient_descent_the_rate_is_scaled_by_the_square() -> None:
    layer = equalize(nn.Linear(50, 3), gain=2.0, generator=stream())
    before, x = layer.weight.detach().clone(), torch.randn(8, 50, generator=stream(1))
    layer(x).sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    gradient = x.sum(0).expand(3, 50)
    torch.testing.assert_close(layer.weight - before, -0.1 * (4 / 50) * gradient)


def test_equalize_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="not for ConvTranspose2d"):
        equalize(nn.ConvTranspose2d(2, 2, 3))
    with pytest.raises(ValueError, match="parametrized already"):
        equalize(equalize(nn.Linear(2, 2)))
    assert equalize(nn.Linear(2, 2, bias=False)).bias is None


def np_stddev(x: Array, group: int) -> Array:
    out = np.empty((len(x), 1, *x.shape[2:]))
    for start in range(0, len(x), group):
        mean, count = 0.0, 0
        for index in np.ndindex(*x.shape[1:]):
            mean += np.std([x[(i, *index)] for i in range(start, start + group)])
            count += 1
        out[start : start + group] = mean / count
    return np.concatenate([x, out], axis=1)


@given(st.integers(0, 2**31), st.sampled_from([(6, 0), (6, 2), (6, 3), (3, 4), (1, 0), (4, 4)]))
@settings(max_examples=20, deadline=None)
def test_minibatch_stddev_against_loops_in_numpy(seed: int, sizes: tuple[int, int]) -> None:
    n, group = sizes
    x = torch.randn(n, 2, 3, 2, generator=stream(seed), dtype=torch.float64)
    expected = np_stddev(x.numpy(), min(group, n) or n)
    np.testing.assert_allclose(minibatch_stddev(x, group, eps=0.0 if n > 1 else 1e-8).numpy(), expected, atol=1e-3)
    np.testing.assert_allclose(minibatch_stddev(x, group, eps=1e-16).numpy(), expected, atol=1e-7)
    assert torch.equal(MinibatchStddev(group)(x), minibatch_stddev(x, group))


def test_minibatch_stddev_of_whole_batches_groups_and_equal_samples() -> None:
    x = torch.randn(8, 3, 4, 4, generator=stream())
    order = torch.randperm(8, generator=stream(1))
    torch.testing.assert_close(minibatch_stddev(x[order]), minibatch_stddev(x)[order])
    other = x.clone()
    other[4:] = 0
    assert torch.equal(minibatch_stddev(x, 4)[:4], minibatch_stddev(other, 4)[:4])
    assert not torch.equal(minibatch_stddev(x)[:4], minibatch_stddev(other)[:4])
    same = x[:1].repeat(8, 1, 1, 1).requires_grad_()
    spread = minibatch_stddev(same)[:, 3]
    torch.testing.assert_close(spread, torch.full_like(spread, 1e-4))
    spread.sum().backward()
    assert same.grad is not None
    assert same.grad.isfinite().all()
    with pytest.raises(UsageError, match="groups of 3 samples .* do not fill a batch of 8"):
        minibatch_stddev(x, 3)
    assert minibatch_stddev(torch.randn(4, 5)).shape == (4, 6)


# -- networks ----------------------------------------------------------------------------------------------------------


def np_conv(x: Array, layer: nn.Module) -> Array:
    weight, bias = (t.detach().double().numpy() for t in (layer.weight, layer.bias))
    mode = "same" if weight.shape[2] == 3 else "valid"
    out = [
        [sum(correlate2d(c, k, mode) for c, k in zip(image, kernels, strict=True)) for kernels in weight] for image in x
    ]
    return np.array(out) + bias[:, None, None]


def np_dense(x: Array, layer: nn.Module) -> Array:
    return x @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()


def np_leaky(x: Array) -> Array:
    return np.maximum(x, 0.2 * x)


def np_norm(x: Array) -> Array:
    return x / np.sqrt((x * x).mean(1, keepdims=True) + 1e-8)


def with_biases(network: nn.Module) -> Any:
    """The network with biases that are not 0, so that one left out shows."""
    for name, p in network.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p, generator=stream(len(name)))
    return network.double()


def test_the_generator_against_numpy() -> None:
    g = with_biases(Generator((2, 8, 8), 5, width=3))
    z = torch.randn(3, 5, generator=stream(), dtype=torch.float64)
    b0, b1 = g.blocks
    x = np_norm(np_leaky(np_dense(np_norm(z.numpy()), b0.dense).reshape(3, 6, 4, 4)))
    x = np_norm(np_leaky(np_conv(x, b0.conv2)))
    low = np_doubled(np_conv(x, g.to_image[0]))
    y = np_norm(np_leaky(np_conv(np_doubled(x), b1.conv1)))
    high = np_conv(np_norm(np_leaky(np_conv(y, b1.conv2))), g.to_image[1])
    for alpha in (0.3, 1.0):
        made = g.render(z, 1, alpha).detach().numpy()
        np.testing.assert_allclose(made, alpha * high + (1 - alpha) * low, atol=1e-10)
    np.testing.assert_allclose(g.render(z, 0).detach().numpy(), low, atol=1e-10)


@pytest.mark.parametrize("further", [(), ((5,), (2, 2))])
def test_the_discriminator_against_numpy(further: tuple[tuple[int, ...], ...]) -> None:
    d = with_biases(Discriminator([(2, 8, 8), *further], width=3))
    x = images(3, 8, 2).double()
    others = [torch.randn(3, *shape, generator=stream(i), dtype=torch.float64) for i, shape in enumerate(further)]

    def logits(features: Array) -> Array:
        h = np_leaky(np_conv(np_stddev(features, 3), d.blocks[0].conv))
        h = np.concatenate([h.reshape(3, -1), *(t.numpy().reshape(3, -1) for t in others)], axis=1)
        return np_dense(np_leaky(np_dense(h, d.hidden)), d.out)[:, 0]

    low = np_leaky(np_conv(np_halved(x.numpy()), d.from_image[0].conv))
    h = np_leaky(np_conv(np_leaky(np_conv(x.numpy(), d.from_image[1].conv)), d.blocks[1].conv1))
    high = np_halved(np_leaky(np_conv(h, d.blocks[1].conv2)))
    for alpha in (0.3, 1.0):
        found = d.score((x, *others), 1, alpha).detach().numpy()
        np.testing.assert_allclose(found, logits(alpha * high + (1 - alpha) * low), atol=1e-7)
    np.testing.assert_allclose(d.score((x, *others), 0).detach().numpy(), logits(low), atol=1e-7)


@pytest.mark.parametrize("level", [1, 2, 3])
def test_a_fade_in_begins_and_ends_bit_for_bit_in_the_settled_levels(level: int) -> None:
    g, d = Generator((1, 32, 32), 6, width=2), Discriminator([(1, 32, 32)], width=2)
    z, x = torch.randn(4, 6, generator=stream()), images(4, 32)
    assert torch.equal(torch.lerp(torch.zeros(3), torch.ones(3), 1.0), torch.ones(3))
    one = np.nextafter(1.0, 0.0)  # still a fade-in: the weight as float32 is 1
    assert torch.equal(g.render(z, level, one), g.render(z, level))
    assert torch.equal(g.render(z, level, 0.0), g.render(z, level - 1))
    assert torch.equal(d.score((x,), level, one), d.score((x,), level))
    assert torch.equal(d.score((x,), level, 0.0), d.score((x,), level - 1))
    low, high = g.render(z, level, 0.0), g.render(z, level)
    torch.testing.assert_close(g.render(z, level, 0.25), 0.75 * low + 0.25 * high)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_below_the_last_level_there_is_no_detail(level: int) -> None:
    g, d = Generator((1, 32, 32), 6, width=2), Discriminator([(1, 32, 32)], width=2)
    z, x = torch.randn(4, 6, generator=stream()), images(4, 32)
    made = g.render(z, level)
    assert made.shape == (4, 1, 32, 32)
    assert torch.equal(at_stage(made, 3, level), made)
    assert not torch.equal(at_stage(g.render(z, level + 1, 0.5), 3, level), g.render(z, level + 1, 0.5))
    # D sees the mean of each square, and nothing else
    seen = d.score((x,), level)
    assert torch.equal(d.score((at_stage(x, 3, level),), level), seen)
    pattern = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(16, 16)
    torch.testing.assert_close(d.score((x + pattern,), level), seen)
    assert (d.score((x + pattern,), 3) - d.score((x,), 3)).abs().max() > 1e-3


@pytest.mark.parametrize(("shown", "stage"), [(0, (0, 1)), (12, (1, 0.5)), (20, (1, 1)), (28, (2, 0.5)), (32, (2, 1))])
def test_only_the_layers_of_the_stage_get_gradients(shown: int, stage: tuple[int, float]) -> None:
    g, d = Generator((1, 16, 16), 6, width=2, grown_after=32), Discriminator([(1, 16, 16)], width=2, grown_after=32)
    g.grow(shown)
    d.grow(shown)
    assert g.stage() == d.stage() == stage
    level, alpha = stage
    torch.autograd.backward(d(g(torch.randn(4, 6))).sum(), inputs=[*g.parameters(), *d.parameters()])
    images_in_use = {level, level - 1} if alpha < 1 else {level}
    for network, ends in ((g, "to_image"), (d, "from_image")):
        trained = {".".join(name.split(".")[:2]) for name, p in network.named_parameters() if p.grad is not None}
        blocks = {f"blocks.{i}" for i in range(level + 1)} | {f"{ends}.{i}" for i in images_in_use}
        assert {name for name in trained if name.startswith(("blocks", ends))} == blocks
        optimizer = torch.optim.Adam(network.parameters(), fused=True)
        before = {name: p.detach().clone() for name, p in network.named_parameters()}
        optimizer.step()
        moved = {name for name, p in network.named_parameters() if not torch.equal(p, before[name])}
        assert {".".join(name.split(".")[:2]) for name in moved} <= trained


def test_the_gradient_penalty_and_the_drift_have_the_gradient_of_their_value_in_a_fade_in() -> None:
    torch.manual_seed(1)
    d = Discriminator([(1, 16, 16)], width=2, grown_after=32).double()
    d.grow(28)
    assert d.stage() == (2, 0.5)
    real, fake = images(4).double(), images(4, seed=1).double()

    def loss() -> Tensor:
        return gradient_penalty(d, real, fake, generator=stream()) + d(real).square().mean()

    parameters = [p for p in d.parameters()]
    gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
    directions = [torch.randn(p.shape, generator=stream(i), dtype=torch.float64) for i, p in enumerate(parameters)]
    pairs = zip(gradients, directions, strict=True)
    slope = sum((g * v).sum().item() for g, v in pairs if g is not None)

    def moved(step: float) -> float:
        with torch.no_grad():
            for p, v in zip(parameters, directions, strict=True):
                p += step * v
        value = loss().item()
        with torch.no_grad():
            for p, v in zip(parameters, directions, strict=True):
                p -= step * v
        return value

    h = 1e-6
    assert abs(slope) > 1e-2
    assert (moved(h) - moved(-h)) / (2 * h) == pytest.approx(slope, rel=1e-4)


def test_without_the_parts_the_networks_are_plain() -> None:
    torch.manual_seed(0)
    equal = Generator((3, 16, 16), 6, width=2)
    torch.manual_seed(0)
    plain = Generator((3, 16, 16), 6, width=2, equalized=False)
    z = torch.randn(4, 6)
    # the same distribution at the start: He's; and the same names once folded
    assert folded(equal).state_dict().keys() == plain.state_dict().keys()
    for key, weight in folded(equal).state_dict().items():
        if weight.dim() > 1 and weight.numel() > 200:
            assert weight.std().item() == pytest.approx(plain.state_dict()[key].std().item(), rel=0.2)
    plain.load_state_dict(folded(equal).state_dict())
    assert torch.equal(plain(z), equal(z))
    assert not any(isinstance(m, PixelNorm) for m in Generator((3, 16, 16), 1, pixel_norm=False).modules())
    d = Discriminator([(3, 16, 16)], width=2, stddev_group=1, equalized=False)
    x = images(4, 16, 3)
    torch.testing.assert_close(d(x)[:2], d(x[:2]))  # no logit depends on another sample


def test_output_layers_have_gain_1_and_all_others_hes() -> None:
    networks = Generator((3, 16, 16), 6, width=2), Discriminator([(3, 16, 16), (6,)], width=2)
    layers = [
        (n, m) for network in networks for n, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)
    ]
    assert len(layers) == 1 + 5 + 3 + 3 + 5 + 2
    for name, layer in layers:
        gain = 1 if name.startswith(("to_image", "out")) else math.sqrt(2)
        fan_in = np.prod(layer.weight.shape[1:])
        torch.testing.assert_close(layer.weight, gain / math.sqrt(fan_in) * layer.parametrizations.weight.original)


def test_with_a_quarter_of_the_first_gain_as_in_the_authors_code_it_begins_with_the_same_images() -> None:
    g, z = Generator((3, 16, 16), 6, width=2).double(), torch.randn(4, 6, generator=stream(), dtype=torch.float64)
    images = g(z)
    dense = g.blocks[0].dense
    with torch.no_grad():
        dense.parametrizations.weight.original /= 4
        torch.testing.assert_close(g(z), images, rtol=1e-5, atol=1e-6)
        dense.bias += 0.1  # for which alone it is another network
    assert (g(z) - images).abs().max() > 1e-2


def test_widths_double_towards_4_px_up_to_8_times() -> None:
    g = Generator((3, 128, 128), 6, width=2)
    assert [layer.in_channels for layer in g.to_image] == [16, 16, 16, 8, 4, 2]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 28, 28), "8, 16, 32, 64, ... pixels, not 28 x 28: resize them, --image-size 32"),
        ((3, 4, 4), "not 4 x 4: resize them, --image-size 8"),
        ((3, 32, 64), "not 32 x 64: resize them, --image-size 64"),
        ((2,), "for images (channels, height, width), not for data of shape (2,)"),
    ],
)
def test_shapes_that_cannot_grow_are_refused(shape: tuple[int, ...], message: str) -> None:
    for make in (doublings_of, lambda s: Generator(s, 6), lambda s: Discriminator([s])):
        with pytest.raises(UsageError, match=re.escape(message)):
            make(shape)


def test_bad_arguments_of_the_networks_are_one_sentence() -> None:
    with pytest.raises(UsageError, match="latent of one dimension"):
        Generator((1, 8, 8), 1)
    with pytest.raises(UsageError, match="width must be 1 or more"):
        Generator((1, 8, 8), 4, width=0)
    with pytest.raises(UsageError, match="built for 1 inputs, not for 2"):
        Discriminator([(1, 8, 8)], width=2)(images(2, 8), torch.zeros(2, 3))


# -- plugin ------------------------------------------------------------------------------------------------------------


def test_growth_is_counted_in_real_images_in_all_networks() -> None:
    gan = growing_gan(core={"averaging": Averaging(0.9)}, d_steps=2, grown_after=64)
    assert [gan.networks()[n].growth.tolist() for n in ("generator", "discriminator", "generator_ema")] == 3 * [[0, 64]]
    for step in range(1, 10):
        train(gan, step)
        growths = {tuple(network.growth.tolist()) for network in gan.networks().values()}
        assert growths == {(8 * step, 64)}  # 2 updates of D with 4 images each
    assert {network.stage() for network in gan.networks().values()} == {(2, 1.0)}


def test_growing_networks_of_ones_own_are_grown() -> None:
    g, d = Generator((1, 16, 16), 6, width=3, grown_after=32), Discriminator([(1, 16, 16)], width=2)
    gan = GAN(g, d, (1, 16, 16), Latent(6), plugins={"progressive": Progressive()}, batch_size=4)
    gan.next_real = images
    train(gan.build(), 3)
    assert gan.generator is g
    assert gan.discriminator is d
    assert g.growth.tolist() == d.growth.tolist() == [12, 32]  # G's own schedule, for both


def test_an_average_that_copies_no_buffers_is_in_the_same_stage() -> None:
    gan = growing_gan()
    gan.averages["generator"] = copy.deepcopy(gan.generator)
    train(gan, 3)
    assert gan.averages["generator"].growth.tolist() == gan.generator.growth.tolist() == [12, 32]


def test_the_stage_follows_the_buffer_wherever_it_changes() -> None:
    g = Generator((1, 16, 16), 6, width=2, grown_after=32)
    g.grow(12)
    loaded = Generator((1, 16, 16), 6, width=2, grown_after=64)
    loaded.load_state_dict(g.state_dict())
    for network in (g, loaded, copy.deepcopy(loaded)):
        assert (network.growth.tolist(), network.stage()) == ([12, 32], schedule(12, 32, 2))


def test_real_samples_lose_the_detail_g_cannot_make_yet_before_anybody_else_sees_them() -> None:
    seen: list[Any] = []

    class Watch(BiGAN):
        pass

    gan = growing_gan({"bigan": Watch()})
    gan.encoder.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    gan.hook.sample(gan=gan, real=images(4), z=torch.randn(4, 6), phase="d", step=1)
    assert torch.equal(seen[0], at_stage(images(4), 2, 0))  # a wrapper of another plugin, whatever the order
    gan.generator.grow(12)
    batch = gan.hook.sample(gan=gan, real=images(4), z=torch.randn(4, 6), phase="g", step=1)
    assert torch.equal(batch.real, at_stage(images(4), 2, 1, 0.5))
    gan.generator.grow(20)
    x = images(4)
    assert gan.hook.sample(gan=gan, real=x, z=torch.randn(4, 6), phase="g", step=1).real is x


def test_pixel_norm_can_be_switched_off() -> None:
    gan, z = growing_gan(pixel_norm=False), torch.randn(4, 6, generator=stream())
    assert not any(isinstance(module, PixelNorm) for module in gan.generator.modules())
    without, normed = (Generator((1, 16, 16), 6, width=2, grown_after=32, pixel_norm=on) for on in (False, True))
    for network in (without, normed):
        network.load_state_dict(gan.generator.state_dict())  # pixel norm has no parameters
    for level in range(3):
        assert torch.equal(gan.generator.render(z, level), without.render(z, level))
        assert not torch.allclose(gan.generator.render(z, level), normed.render(z, level))


@pytest.mark.parametrize(("loss", "drift", "weight"), [("wasserstein", None, 1e-3), ("wasserstein", 0.0, 0.0),
                                                       ("hinge", None, 0.0), ("hinge", 0.5, 0.5)])  # fmt: skip
def test_the_drift_term(loss: str, drift: float | None, weight: float) -> None:
    gan = growing_gan(loss=loss, drift=drift)
    logits = torch.tensor([1.0, -2.0, 4.0], requires_grad=True)
    (found,) = gan.hook.pre_d_loss(gan=gan, critic=None, batch=None, view=None, real_logits=logits,
                                   fake_logits=10 * logits, step=1, ahead=False) or [{}]  # fmt: skip
    assert {name: term.item() for name, term in found.items()} == (
        {"progressive_drift": pytest.approx(weight * 7)} if weight else {}  # (1 + 4 + 16) / 3, of real samples alone
    )


def test_reset_adam_forgets_the_moments_where_layers_come_or_go() -> None:
    counts: dict[str, list[int]] = {"d": [], "g": []}
    gan = growing_gan(reset_adam=True)
    for step in range(1, 11):
        train(gan, step)
        for phase, found in counts.items():
            state = gan.optimizers[phase].state
            found.append(int(max((s["step"].item() for s in state.values()), default=0)))
    # after step 2 (8 images) nothing has changed yet, after step 3 level 1 is being faded in, after 4 it is settled, ...
    assert counts["d"] == [1, 2, 0, 0, 1, 2, 0, 0, 1, 2]
    assert counts["g"] == [1, 2, 1, 1, 2, 3, 1, 1, 2, 3]  # its own update of the step comes after D's


def test_adam_keeps_its_moments_otherwise() -> None:
    gan = growing_gan()
    train(gan, 10)
    assert max(s["step"].item() for s in gan.optimizers["d"].state.values()) == 10


def state_of(gan: GAN) -> dict[str, Any]:
    return copy.deepcopy({"weights": gan.weights(), "state": gan.state_dict()})


@pytest.mark.parametrize("reset_adam", [False, True])
@pytest.mark.parametrize("stop", [3, 5, 7])
def test_a_gan_stopped_in_the_middle_of_a_fade_in_continues_bit_for_bit(stop: int, reset_adam: bool) -> None:
    def fresh() -> GAN:
        plugins: dict[str, object] = {"gradient_penalty": GradientPenalty(), "spectral_norm": SpectralNorm(on="both")}
        return growing_gan(plugins, {"averaging": Averaging(0.9)}, loss="wasserstein", reset_adam=reset_adam)

    whole = fresh()
    train(whole, stop)
    assert whole.generator.stage()[1] == (1 if stop == 5 else 0.5)
    saved = state_of(whole)
    train(whole, 10)
    parts = fresh()
    parts.load_weights(saved["weights"])
    parts.load_state_dict(saved["state"])
    train(parts, 10)
    ours, theirs = whole.weights(), parts.weights()
    assert ours.keys() == {"generator", "discriminator", "generator_ema"}
    assert [(n, k) for n in ours for k in ours[n] if not torch.equal(ours[n][k], theirs[n][k])] == []
    latent = torch.Generator().manual_seed(0)
    assert torch.equal(whole.draw(4, latent), parts.draw(4, torch.Generator().manual_seed(0)))


COMBINED: list[dict[str, object]] = [
    {},
    {"gradient_penalty": GradientPenalty()},
    {"r1": R1()},
    {"spectral_norm": SpectralNorm()},
    {"spectral_norm": SpectralNorm(on="both"), "r1": R1()},
    {"packing": Packing(2)},
    {"bigan": BiGAN()},
    {"packing": Packing(2), "bigan": BiGAN(), "gradient_penalty": GradientPenalty()},
    {"unrolled": Unrolled(k=1), "r1": R1()},
    {"historical_averaging": HistoricalAveraging()},
    {"feature_matching": FeatureMatching()},
    {"diffaugment": DiffAugment()},
]


@pytest.mark.parametrize("plugins", COMBINED, ids=lambda p: "+".join(p) or "alone")
def test_growing_beside_other_plugins(plugins: dict[str, object]) -> None:
    log = Log()
    gan = growing_gan(copy.deepcopy(plugins), {"averaging": Averaging(0.9), "log": log}, stddev_group=2)
    stages, start = set(), state_of(gan)["weights"]
    for step in range(1, 11):
        train(gan, step)
        stages.add(gan.generator.stage())
    assert stages == {(0, 1.0), (1, 0.5), (1, 1.0), (2, 0.5), (2, 1.0)}
    assert all(math.isfinite(v) for _, _, terms in log.updates for v in terms.values())
    names = set(plugins) & {"gradient_penalty", "r1", "feature_matching", "historical_averaging"}
    assert names <= {name for _, _, terms in log.updates for name in terms}
    moved = {name for name, p in gan.discriminator.named_parameters()
             if not torch.equal(p, start["discriminator"][name])}  # fmt: skip
    assert moved == {name for name, _ in gan.discriminator.named_parameters()}
    assert gan.draw(3, stream()).shape == (3, 1, 16, 16)


def test_historical_averaging_leaves_layers_that_are_not_in_use_alone() -> None:
    gan = growing_gan({"historical_averaging": HistoricalAveraging()})
    start = state_of(gan)["weights"]["generator"]
    train(gan, 2)
    assert all(torch.equal(p, start[k]) for k, p in gan.generator.state_dict().items() if k.startswith("blocks.2"))


def test_weight_clipping_is_refused_with_the_reason() -> None:
    with pytest.raises(UsageError, match="weight_clipping clips stored weights, but the discriminator computes"):
        growing_gan({"weight_clipping": WeightClipping()}, loss="wasserstein")
    train(growing_gan({"weight_clipping": WeightClipping()}, loss="wasserstein", equalized=False), 9)


def test_what_the_plugin_brings_and_what_it_refuses() -> None:
    gan = growing_gan({"packing": Packing(2), "bigan": BiGAN()})
    assert isinstance(gan.generator, Generator)
    assert isinstance(gan.discriminator, Discriminator)
    assert gan.discriminator.from_image[0].conv.in_channels == 2  # packs of two grey images
    assert gan.discriminator.hidden.in_features == 16 * 8 + 12  # and of two latents
    with pytest.raises(UsageError, match="not 28 x 28: resize them, --image-size 32"):
        tiny_gan("image", {"progressive": Progressive()})
    with pytest.raises(UsageError, match="for images"):
        tiny_gan("vector", {"progressive": Progressive()})
    with pytest.raises(UsageError, match="groups of 3 samples"):
        growing_gan(stddev_group=3)
    with pytest.raises(UsageError, match="a plugin brings the generator, and so do you"):
        GAN(nn.Identity(), None, (1, 8, 8), Latent(4), plugins={"p": Progressive()}).build()
    for name, value in (("network", "dcgan"), ("depth", 3)):
        with pytest.raises(UsageError, match=f"{name} {value} does not apply: leave --{name} out"):
            GAN(None, None, (1, 8, 8), Latent(4), plugins={"p": Progressive()}, architecture={name: value}).build()
    for bad in ({"grown_after": -1}, {"stddev_group": -1}, {"width": 0}, {"drift": -1.0}, {"drift": math.nan}):
        with pytest.raises(ValueError, match="must"):
            Progressive(**bad)


def test_the_width_is_the_plugins_or_the_runs_or_the_default() -> None:
    def width(own: int | None, **architecture: Any) -> int:
        plugin = Progressive(width=own)
        gan = GAN(None, None, (1, 8, 8), Latent(4), plugins={"p": plugin}, architecture=architecture, batch_size=2)
        return int(gan.build().generator.to_image[1].in_channels)

    assert [width(3, width=5), width(None, width=5), width(None, width=None, network="auto"), width(None)] == [
        3,
        5,
        16,
        16,
    ]


def test_the_same_seed_gives_the_same_run_and_growing_less_is_another() -> None:
    def after(**options: Any) -> Tensor:
        gan = growing_gan(**options)
        train(gan, 4)
        return gan.draw(2, stream())

    assert torch.equal(after(), after())
    assert not torch.equal(after(), after(seed=1))
    assert not torch.equal(after(), after(grown_after=0))
    fast = after(optim={phase: Optim(1e-3, (0.0, 0.99)) for phase in "dg"})
    assert fast.isfinite().all()


# -- runs --------------------------------------------------------------------------------------------------------------


def gankit(*arguments: str) -> str:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def test_a_run_killed_in_a_fade_in_is_resumed_sampled_and_exported(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", np.random.default_rng(0).integers(0, 256, (40, 16, 16), dtype=np.uint8))
    settings = ["--data", "x.npy", "--plugin", "progressive", "--plugin", "gradient_penalty", "--loss", "wasserstein",
                "--steps", "10", "--batch", "4", "--width", "2", "--z-dim", "6", "--threads", "1", "--eval-every", "5",
                "--eval-samples", "8", "--save-every", "3", "--keep", "9", "-o", "progressive.grown_after=32"]  # fmt: skip
    for name in ("whole", "parts"):
        gankit("run", *settings, "--no-report", "--name", name)
    for folder in Path("runs/parts/checkpoints").glob("step-*"):  # as if killed after step 3: level 1, alpha 0.5
        if int(folder.name[5:]) > 3:
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
    Path("runs/parts/summary.json").unlink()
    gankit("resume", "parts", "--no-report")
    states = [
        torch.load(f"runs/{name}/checkpoints/step-000010/state.pt", weights_only=True) for name in ("whole", "parts")
    ]
    moments = [[t for s in state["optimizers"]["d"]["state"].values() for t in s.values()] for state in states]
    assert len(moments[0]) == len(moments[1]) > 20
    assert all(torch.equal(a, b) for a, b in zip(*moments, strict=True))
    for network in ("generator", "generator_ema", "discriminator"):
        one, two = (
            safetensors.torch.load_file(f"runs/{name}/checkpoints/step-000010/{network}.safetensors")
            for name in ("whole", "parts")
        )
        assert one["growth"].tolist() == [40, 32]
        assert all(torch.equal(one[key], two[key]) for key in one)
    metrics = [Path(f"runs/{name}/metrics.jsonl").read_text() for name in ("whole", "parts")]
    assert metrics[0] == metrics[1]
    assert re.findall(r'"resolution": [0-9.]+, "fade_in": [0-9.]+', metrics[0]) == [  # and none of the true data
        '"resolution": 8.0, "fade_in": 1.0',
        '"resolution": 16.0, "fade_in": 1.0',
    ]

    # samples know the stage of their checkpoint: in the third step nothing finer than 8 px
    gankit("sample", "whole", "-n", "5", "--checkpoint", "3", "--to", "x3.npy")
    gankit("sample", "whole", "-n", "5", "--checkpoint", "latest", "--to", "x10.npy")
    early, late = (torch.from_numpy(np.load(name)) for name in ("x3.npy", "x10.npy"))
    torch.testing.assert_close(at_stage(early, 2, 1), early)
    assert (at_stage(late, 2, 1) - late).abs().max() > 1e-3

    # exported weights are ordinary, and the network made of them is the one that was sampled
    gankit("export", "whole", "--checkpoint", "3", "--to", "out")
    bare = Generator((1, 16, 16), 6, width=2, equalized=False)
    bare.load_state_dict(safetensors.torch.load_file("out/generator_ema.safetensors"))
    assert bare.stage() == (1, 0.5)
    from gankit.gan import derive_seed

    z = Latent(6).draw(5, torch.Generator().manual_seed(derive_seed(0, "sample")))
    assert torch.equal(bare(z), early)


# -- the page ----------------------------------------------------------------------------------------------------------


def test_the_page_lists_the_options() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| `?([^|`]*)`? \|", README.read_text(), re.MULTILINE))
    shown = {name: str(o.default).lower() for name, o in options_of(Progressive).items()}
    assert rows == shown
    assert build(Progressive, {"grown_after": "4800000", "drift": "none"}, "progressive").grown_after == 4_800_000
    assert GROWN_AFTER == 0.6 * 2000 * 64
