"""Differentiable augmentation against numpy, its distributions, and where in the loop it has to act."""

from __future__ import annotations

from collections.abc import Generator
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from gankit_diffaugment import (
    AUGMENTATIONS,
    DiffAugment,
    colored,
    cut_out,
    diff_augment,
    random_color,
    random_cutout,
    random_translation,
    translated,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gankit import GAN, UsageError, View, hookimpl, train
from gankit.joint import Joint
from gankit.loop import update
from gankit.options import build
from gankit.testing import run, tiny_gan


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(n: int = 6, shape: tuple[int, ...] = (3, 8, 10), seed: int = 0) -> Tensor:
    return torch.rand(n, *shape, generator=stream(seed), dtype=torch.float64) * 2 - 1


@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 3), st.integers(2, 6), st.integers(2, 6))
@settings(max_examples=30, deadline=None)
def test_the_three_against_loops_in_numpy(seed: int, n: int, channels: int, height: int, width: int) -> None:
    x = images(n, (channels, height, width), seed)
    source = np.random.default_rng(seed)
    b, s, c = source.uniform(-0.5, 0.5, n), source.uniform(0, 2, n), source.uniform(0.5, 1.5, n)
    down, right = source.integers(-7, 8, n), source.integers(-7, 8, n)
    color, shifted, cut = np.empty(x.shape), np.zeros(x.shape), x.numpy().copy()
    for i, image in enumerate(x.numpy()):
        bright = image + b[i]
        tinted = bright.mean(0) + s[i] * (bright - bright.mean(0))
        color[i] = tinted.mean() + c[i] * (tinted - tinted.mean())
        for row in range(height):
            for column in range(width):
                y, z = row - down[i], column - right[i]
                if 0 <= y < height and 0 <= z < width:
                    shifted[i, :, row, column] = image[:, y, z]
                if down[i] <= row < down[i] + 3 and right[i] <= column < right[i] + 2:
                    cut[i, :, row, column] = 0
    shifts = torch.from_numpy(down), torch.from_numpy(right)
    np.testing.assert_allclose(colored(x, *map(torch.from_numpy, (b, s, c))).numpy(), color, atol=1e-12)
    np.testing.assert_array_equal(translated(x, *shifts).numpy(), shifted)
    np.testing.assert_array_equal(cut_out(x, *shifts, 3, 2).numpy(), cut)


def test_the_neutral_numbers_leave_the_image() -> None:
    x = images()
    one, zero, none = torch.ones(6), torch.zeros(6), torch.zeros(6, dtype=torch.long)
    torch.testing.assert_close(colored(x, zero, one, one), x)
    assert torch.equal(translated(x, none, none), x)
    assert torch.equal(cut_out(x, none, none, 0, 5), x)
    grey = images(6, (1, 8, 8))
    torch.testing.assert_close(colored(grey, zero, 2 * one, one), grey)  # one channel has no saturation
    assert torch.equal(diff_augment(x, ()), x)


def test_color_draws_from_the_papers_ranges_for_each_image() -> None:
    n = 4000
    # channels 1 and -1 in each half: saturation and contrast can be told apart; brightness is the image's mean
    x = torch.zeros(n, 2, 2, 2)
    x[:, 0, 0], x[:, 1, 1] = 1, 1
    out = random_color(x, stream())
    brightness = out.mean((1, 2, 3)) - x.mean((1, 2, 3))
    between = (out[:, :, 0] - out[:, :, 1]).abs().mean((1, 2))  # saturation * contrast
    grey = torch.zeros(n, 1, 2, 2)
    grey[:, :, 0] = 1
    out = random_color(grey, stream(1))
    contrast = (out[:, 0, 0] - out[:, 0, 1]).mean(1)
    for found, low, high in ((brightness, -0.5, 0.5), (contrast, 0.5, 1.5), (between, 0.0, 3.0)):
        assert low <= found.min() + 1e-6
        assert found.max() <= high + 1e-6
        assert len(found.unique()) > n // 2  # per image, not per batch
    for found, low, high in ((brightness, -0.5, 0.5), (contrast, 0.5, 1.5)):
        assert found.min() < low + 0.01
        assert found.max() > high - 0.01
        assert abs(found.mean() - (low + high) / 2) < 0.03
        assert abs(found.std() - 1 / np.sqrt(12)) < 0.02
    assert abs(between.mean() - 1) < 0.05
    assert between.max() > 2.7


def test_translation_takes_all_shifts_of_an_eighth_per_image_and_no_other() -> None:
    x = torch.zeros(2000, 1, 28, 16)
    x[:, :, 14, 8] = 1
    rows, columns = np.nonzero(random_translation(x, stream()).numpy()[:, 0])[1:]
    assert set(rows - 14) == set(range(-4, 5))  # 28 / 8 = 3.5, rounded half up
    assert set(columns - 8) == set(range(-2, 3))
    counts = np.bincount(rows - 10)
    assert counts.min() > 2000 / 9 * 0.75
    assert abs(np.corrcoef(rows, columns)[0, 1]) < 0.08


@pytest.mark.parametrize("side", [28, 26])  # an even square and an odd one
def test_cutout_is_a_square_of_half_the_side_centred_anywhere(side: int) -> None:
    size = int(side / 2 + 0.5)
    holes = (random_cutout(torch.ones(3000, 2, side, side), stream()) == 0).numpy()
    assert (holes[:, 0] == holes[:, 1]).all()
    heights, widths = holes[:, 0].any(2).sum(1), holes[:, 0].any(1).sum(1)
    assert (holes[:, 0].sum((1, 2)) == heights * widths).all()  # one rectangle
    assert heights.max() == widths.max() == size
    assert heights.min() == size - size // 2  # centred on the border, the rest of it outside
    tops = holes[:, 0].any(2).argmax(1)
    assert set(tops) == set(range(side - size % 2 - size // 2 + 1))
    whole = (heights == size).mean()
    assert abs(whole - (side - size + 1) / (side + 1 - size % 2)) < 0.04


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_each_image_has_its_own_draw_and_the_batch_does_not_mix(name: str) -> None:
    one = images(1, (3, 16, 16))
    x = one.expand(8, -1, -1, -1)
    out = AUGMENTATIONS[name](x, stream())
    assert len(out.flatten(1).unique(dim=0)) > 4
    other = x.clone()
    other[3:] = 0
    assert torch.equal(AUGMENTATIONS[name](other, stream())[:3], out[:3])


def test_gradients_flow_and_can_be_taken_twice() -> None:
    x = images(2, (2, 4, 4)).requires_grad_()

    def f(x: Tensor) -> Tensor:
        return diff_augment(x, generator=stream(3))

    assert torch.autograd.gradcheck(f, (x,))
    assert torch.autograd.gradgradcheck(lambda x: f(x).square(), (x,))


def test_the_seed_decides_and_the_global_generator_is_left_alone() -> None:
    x = images()
    before = torch.get_rng_state()
    assert torch.equal(diff_augment(x, generator=stream(1)), diff_augment(x, generator=stream(1)))
    assert not torch.equal(diff_augment(x, generator=stream(1)), diff_augment(x, generator=stream(2)))
    assert torch.equal(torch.get_rng_state(), before)
    assert diff_augment(x.float(), generator=stream()).dtype == torch.float32
    kept = x.clone()
    diff_augment(x)
    assert torch.equal(x, kept)  # nothing in place


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"images .* not for tensors of shape \(4, 3\)"):
        diff_augment(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="no augmentation 'flip'.*color, translation, cutout"):
        diff_augment(images(), ("flip",))
    with pytest.raises(UsageError, match="no augmentation 'colour'"):
        build(DiffAugment, {"policy": "colour,cutout"}, "diffaugment")
    with pytest.raises(ValueError, match="list of names"):
        DiffAugment(policy="color")  # type: ignore[arg-type]
    assert build(DiffAugment, {"policy": "cutout, color"}, "diffaugment").policy == ("cutout", "color")
    with pytest.raises(UsageError, match=r"these are data of shape \(3,\): leave it out"):
        tiny_gan("vector", {"diffaugment": DiffAugment()})


class Watch:
    """Keeps what the critic was shown and what was drawn, by phase."""

    def __init__(self) -> None:
        self.seen: dict[str, tuple[Any, View]] = {}

    @hookimpl
    def critic(self, batch: Any, view: View, phase: str) -> None:
        self.seen[phase] = batch, view


def test_both_sides_are_augmented_in_both_phases_and_g_learns_through_it() -> None:
    watch = Watch()
    gan, _ = run({"diffaugment": DiffAugment(), "watch": watch}, kind="image")
    for batch, view in watch.seen.values():
        for raw, shown in ((batch.real, view.real), (batch.fake, view.fake)):
            assert not torch.allclose(raw, shown[0])
            assert shown[0].requires_grad  # penalties differentiate at the augmented samples
    _, view = watch.seen["g"]
    assert view.fake[0].grad_fn is not None
    assert watch.seen["d"][1].fake[0].grad_fn is None
    gan = tiny_gan("image", {"diffaugment": DiffAugment()})
    before = deepcopy(gan.generator.state_dict())
    update(gan, "g", 1)
    after = gan.generator.state_dict()
    assert any(not torch.equal(after[key], before[key]) for key in after)


def test_real_and_fake_get_draws_of_their_own() -> None:
    class Same:
        @hookimpl
        def view(self, batch: Any) -> View:
            return View((batch.real,), (batch.real,))

    gan = tiny_gan("image", {"diffaugment": DiffAugment(), "same": Same()})
    batch = gan.hook.sample(gan=gan, real=gan.next_real(), z=gan.next_z(), phase="d", step=1)
    view = gan.hook.view(gan=gan, batch=batch, phase="d", step=1)
    assert not torch.allclose(view.real[0], view.fake[0])


def test_of_a_joint_view_only_the_data_are_augmented() -> None:
    for order in (("diffaugment", "bigan"), ("bigan", "diffaugment")):
        plugins = {"diffaugment": DiffAugment(), "bigan": Joint()}
        gan = tiny_gan("image", {name: plugins[name] for name in order})
        batch = gan.hook.sample(gan=gan, real=gan.next_real(), z=gan.next_z(), phase="g", step=1)
        view = gan.hook.view(gan=gan, batch=batch, phase="g", step=1)
        assert torch.equal(view.fake[1], batch.z)
        assert torch.equal(view.real[1], batch.extra["code"])
        assert not torch.allclose(view.real[0], batch.real)


class Pack:
    @hookimpl(wrapper=True, tryfirst=True)
    def view(self) -> Generator[None, View, View]:
        view = yield
        real, fake = (tuple(t.reshape(len(t) // 2, -1, *t.shape[2:]) for t in side) for side in view)
        return View(real, fake)


def test_images_are_augmented_one_by_one_before_they_are_packed_in_either_order() -> None:
    for order in (("diffaugment", "pack"), ("pack", "diffaugment")):
        plugins = {"diffaugment": DiffAugment(), "pack": Pack()}
        gan = tiny_gan("image", {name: plugins[name] for name in order})
        batch = gan.hook.sample(gan=gan, real=gan.next_real(), z=gan.next_z(), phase="d", step=1)
        rng = gan.rng(plugins["diffaugment"])
        state = rng.get_state()
        view = gan.hook.view(gan=gan, batch=batch, phase="d", step=1)
        rng.set_state(state)
        singles = diff_augment(batch.real, generator=rng)
        assert torch.equal(view.real[0].reshape(8, 1, 28, 28), singles)
        rng.set_state(state)  # the wrong order: one shift for the whole pack
        assert not torch.equal(view.real[0], diff_augment(batch.real.reshape(4, 2, 28, 28), generator=rng))


class Other:
    @hookimpl
    def post_step(self) -> None:
        pass


def test_an_empty_policy_is_bit_identical() -> None:
    off, _ = run({"diffaugment": DiffAugment(policy=()), "other": Other()}, kind="image")
    without, _ = run({"other": Other()}, kind="image")
    for name, state in off.weights().items():
        assert all(torch.equal(value, without.weights()[name][key]) for key, value in state.items())


def test_the_same_seed_gives_the_same_terms_and_a_restored_run_the_same_next_step() -> None:
    assert run({"a": DiffAugment()}, kind="image")[1].updates == run({"a": DiffAugment()}, kind="image")[1].updates
    gan, other = (tiny_gan("image", {"diffaugment": DiffAugment()}) for _ in range(2))
    train(gan, 2)
    other.load_weights(deepcopy(gan.weights()))
    other.load_state_dict(deepcopy(gan.state_dict()))

    def next_real() -> Tensor:
        return torch.linspace(-1, 1, 8 * 784).view(8, 1, 28, 28)

    other.next_real = gan.next_real = next_real
    for each in (gan, other):
        train(each, 3)
    for name, state in gan.weights().items():
        assert all(torch.equal(value, other.weights()[name][key]) for key, value in state.items())


def test_samples_are_not_augmented() -> None:
    gan: GAN = tiny_gan("image", {"diffaugment": DiffAugment()})
    plain: GAN = tiny_gan("image", {"other": Other()})
    assert torch.equal(gan.draw(4, stream()), plain.draw(4, stream()))
