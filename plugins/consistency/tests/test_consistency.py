"""Consistency against numpy's padding, closed forms and finite differences; each check also meets wrong versions."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Generator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gankit_bigan import BiGAN
from gankit_consistency import Consistency, add_noise, consistency_penalty, shift_and_flip
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gankit import UsageError, View, hookimpl
from gankit.gan import derive_seed
from gankit.loop import update
from gankit.options import build
from gankit.testing import run, tiny_gan

torch.set_num_threads(1)

Shift = Callable[..., Tensor]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


# -- shift and flip --------------------------------------------------------------------------------------------------


def variants(image: Any, shift: int, flip: bool = True) -> dict[bytes, tuple[int, int, bool]]:
    """All shifted and mirrored forms of a (C, H, W) image, by numpy's reflection padding."""
    _, h, w = image.shape
    found = {}
    for mirrored in (False, True) if flip else (False,):
        padded = np.pad(image[:, :, ::-1] if mirrored else image, ((0, 0), (shift, shift), (shift, shift)), "reflect")
        for dy, dx in product(range(2 * shift + 1), repeat=2):
            found[padded[:, dy : dy + h, dx : dx + w].tobytes()] = (dy - shift, dx - shift, mirrored)
    return found


def check_shift(augment: Shift, shift: int = 1, batch: int = 3600) -> None:
    """Each sample is one of the 2 (2 shift + 1)^2 forms, by its own draw, and all of them are equally likely."""
    image = np.arange(2 * 5 * 6, dtype=np.float64).reshape(2, 5, 6) ** 2
    known = variants(image, shift)
    assert len(known) == 2 * (2 * shift + 1) ** 2
    x = torch.from_numpy(np.repeat(image[None], batch, 0))
    out = augment(x, seeded(), shift=shift)
    assert out.shape == x.shape
    drawn = [known.get(np.ascontiguousarray(sample).tobytes()) for sample in out.numpy()]
    assert None not in drawn
    counts = np.array([drawn.count(form) for form in known.values()])
    assert abs(counts - batch / len(known)).max() < 5 * np.sqrt(batch / len(known))


def test_shift_and_flip_against_numpys_reflection_padding() -> None:
    check_shift(shift_and_flip)
    known = variants(np.random.default_rng(0).random((3, 9, 7)), 4)
    image = np.random.default_rng(0).random((3, 9, 7))
    out = shift_and_flip(torch.from_numpy(np.repeat(image[None], 300, 0)), seeded()).numpy()
    forms = [known[np.ascontiguousarray(sample).tobytes()] for sample in out]
    assert {form[0] for form in forms} == {form[1] for form in forms} == set(range(-4, 5))


def padded(x: Tensor, generator: torch.Generator, shift: int, mode: str, low: int = 0, per: int = 1) -> Tensor:
    """The usual way, with one draw for every ``per`` samples."""
    wide = torch.nn.functional.pad(x, (shift,) * 4, mode=mode)
    out = []
    for i in range(len(x)):
        if i % per == 0:
            dy, dx = torch.randint(low, 2 * shift + 1, (2,), generator=generator).tolist()
            mirrored = torch.rand((), generator=generator) < 0.5
        sample = wide[i, :, dy : dy + x.shape[2], dx : dx + x.shape[3]]
        out.append(sample.flip(2) if mirrored else sample)
    return torch.stack(out)


WRONG_SHIFTS: dict[str, Shift] = {
    "zeros": lambda x, g, shift: padded(x, g, shift, "constant"),
    "edge repeated": lambda x, g, shift: padded(x, g, shift, "replicate"),
    "one draw per batch": lambda x, g, shift: padded(x, g, shift, "reflect", per=len(x)),
    "never the other way": lambda x, g, shift: padded(x, g, shift, "reflect", low=shift),
    "upside down": lambda x, g, shift: shift_and_flip(x.transpose(2, 3), g, shift=shift).transpose(2, 3),
    "rolled": lambda x, g, shift: torch.roll(x, (shift, shift), (2, 3)),
    "channels apart": lambda x, g, shift: shift_and_flip(x.flatten(0, 1)[:, None], g, shift=shift).view_as(x),
}


def test_the_usual_way_passes_the_same_check() -> None:
    check_shift(lambda x, g, shift: padded(x, g, shift, "reflect"))


@pytest.mark.parametrize("wrong", WRONG_SHIFTS)
def test_the_check_of_the_shift_rejects(wrong: str) -> None:
    with pytest.raises(AssertionError):
        check_shift(WRONG_SHIFTS[wrong])


def test_without_flip_nothing_is_mirrored_and_without_either_nothing_changes() -> None:
    image = np.random.default_rng(0).random((1, 5, 5))
    x = torch.from_numpy(np.repeat(image[None], 100, 0))
    known = variants(image, 2, flip=False)
    assert all(
        np.ascontiguousarray(s).tobytes() in known for s in shift_and_flip(x, seeded(), shift=2, flip=False).numpy()
    )
    assert torch.equal(shift_and_flip(x, seeded(), shift=0, flip=False), x)


def test_a_pack_moves_as_one() -> None:
    x = randn(8, 1, 6, 6).repeat(1, 3, 1, 1)
    out = shift_and_flip(x, seeded())
    assert torch.equal(out[:, 0], out[:, 1])
    assert torch.equal(out[:, 0], out[:, 2])


def test_what_cannot_be_shifted_is_refused() -> None:
    for shape, shift in (((4, 3), 1), ((2, 1, 4, 9), 4), ((2, 1, 9, 4), 4), ((2, 1, 9, 9), -1)):
        with pytest.raises(ValueError, match="shifted"):
            shift_and_flip(torch.zeros(shape), shift=shift)


@settings(max_examples=20, deadline=None)
@given(st.floats(0, 3), st.integers(0, 99))
def test_the_noise_for_vectors(std: float, seed: int) -> None:
    x = randn(400, 50) * 7
    delta = (add_noise(x, seeded(seed), std=std) - x).numpy()
    assert np.isclose(delta.std(), std, rtol=0.03, atol=1e-12)
    assert abs(delta.mean()) <= 0.04 * std + 1e-12


# -- the penalty -----------------------------------------------------------------------------------------------------


def stretch(x: Tensor, generator: torch.Generator | None) -> Tensor:
    return 1.5 * x + 0.3


class Tanh:
    def __init__(self) -> None:
        self.W, self.v = randn(5, 3, seed=1).requires_grad_(), randn(5, seed=2).requires_grad_()

    def __call__(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.W.T) @ self.v

    def penalty(self, x: Any) -> float:
        W, v = self.W.detach().numpy(), self.v.detach().numpy()
        return float(((np.tanh(x @ W.T) @ v - np.tanh((1.5 * x + 0.3) @ W.T) @ v) ** 2).mean())


def check_penalty(penalty: Callable[..., Tensor]) -> None:
    critic, x = Tanh(), randn(6, 3)
    value = penalty(critic, x, critic(x), stretch)
    assert value.shape == ()
    assert np.isclose(value.item(), critic.penalty(x.numpy()))
    weights = [critic.W, critic.v]
    for weight, grad in zip(weights, torch.autograd.grad(value, weights), strict=True):
        for index in np.ndindex(*weight.shape):
            ends = []
            for step in (1e-6, -1e-6):
                with torch.no_grad():
                    weight[index] += step
                ends.append(critic.penalty(x.numpy()))
                with torch.no_grad():
                    weight[index] -= step
            assert np.isclose(grad[index].item(), (ends[0] - ends[1]) / 2e-6, rtol=1e-5, atol=1e-7)


def test_against_numpy_and_finite_differences_in_the_critics_weights() -> None:
    check_penalty(consistency_penalty)


WRONG_PENALTIES: dict[str, Callable[..., Tensor]] = {
    "D(x) held fixed": lambda D, x, logits, T: consistency_penalty(D, x, logits.detach(), T),
    "D(T(x)) held fixed": lambda D, x, logits, T: (logits - D(T(x, None)).detach()).square().mean(),
    "sum": lambda D, x, logits, T: (logits - D(T(x, None))).square().sum(),
    "square of the mean": lambda D, x, logits, T: (logits - D(T(x, None))).mean().square(),
    "difference of probabilities": lambda D, x, logits, T: (logits.sigmoid() - D(T(x, None)).sigmoid()).square().mean(),
    "absolute": lambda D, x, logits, T: (logits - D(T(x, None))).abs().mean(),
    "T twice": lambda D, x, logits, T: consistency_penalty(D, x, D(T(x, None)), lambda x, g: T(T(x, g), g)),
}


@pytest.mark.parametrize("wrong", WRONG_PENALTIES)
def test_the_check_of_the_penalty_rejects(wrong: str) -> None:
    with pytest.raises(AssertionError):
        check_penalty(WRONG_PENALTIES[wrong])


def test_an_invariant_critic_pays_nothing() -> None:
    x = randn(4, 2, 6, 6)
    x[:, :, :, :] = x[:, :, :1, :1]  # without structure, no shift shows
    critic = nn.Sequential(nn.Flatten(), nn.Linear(72, 1)).double()
    assert consistency_penalty(critic, x, critic(x), generator=seeded()).item() < 1e-24


def test_order_and_split_for_a_t_without_chance() -> None:
    critic, x = Tanh(), randn(6, 3)
    whole = consistency_penalty(critic, x, critic(x), stretch).item()
    assert np.isclose(consistency_penalty(critic, x.flip(0), critic(x.flip(0)), stretch).item(), whole)
    assert np.isclose(np.mean([consistency_penalty(critic, h, critic(h), stretch).item() for h in x.split(3)]), whole)


def test_only_the_first_of_several_inputs_is_augmented() -> None:
    x, y, z = randn(4, 3), torch.arange(4), randn(4, 2)
    shown = []

    def critic(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        shown.append((x, y, z))
        return x.sum(1) + y + z.sum(1)

    value = consistency_penalty(critic, (x, y, z), critic(x, y, z), lambda x, g: x + 1)
    assert value.item() == pytest.approx(9)
    assert shown[1][1] is y
    assert shown[1][2] is z


@pytest.mark.parametrize("augment", [shift_and_flip, add_noise])
def test_differentiable_to_the_samples_for_unrolling(augment: Any) -> None:
    w = randn(2, 5, 5, seed=3)

    def value(x: Tensor) -> Tensor:
        def critic(x: Tensor) -> Tensor:
            return torch.tanh(x * w).sum((1, 2, 3))

        return consistency_penalty(critic, x, critic(x), augment, seeded())

    x = randn(3, 2, 5, 5).requires_grad_()
    assert torch.autograd.gradcheck(value, (x,))
    assert torch.autograd.gradgradcheck(value, (x,))


def test_chance_comes_from_the_generator_alone() -> None:
    critic, x = nn.Sequential(nn.Flatten(), nn.Linear(36, 1)).double(), randn(4, 1, 6, 6)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    for augment in (shift_and_flip, add_noise):
        one, again, other = (consistency_penalty(critic, x, critic(x), augment, seeded(s)).item() for s in (1, 1, 2))
        assert one == again != other
    assert torch.equal(torch.rand(3), expected)


def test_a_t_that_changes_the_shape_is_refused() -> None:
    critic, x = Tanh(), randn(6, 3)
    with pytest.raises(ValueError, match="keeps the shape"):
        consistency_penalty(critic, x, critic(x), lambda x, g: x[:1])


# -- the plugin ------------------------------------------------------------------------------------------------------

T = {"vector": add_noise, "image": shift_and_flip}


class Watch:
    """What the terms should be, by the function on a stream of the same seed: the real side, then the fake one."""

    def __init__(self, augment: Any, fake: float = 0) -> None:
        self.augment, self.fake, self.expected = augment, fake, []
        self.stream = seeded(derive_seed(0, "plugin:consistency"))

    @hookimpl
    def pre_d_loss(self, critic: Callable[..., Tensor], view: View) -> None:
        terms = {}
        for name, weight, inputs in (("real", 10, view.real), ("fake", self.fake, view.fake)):
            if weight:
                shown = self.augment(inputs[0], self.stream), *inputs[1:]
                terms[f"consistency_{name}"] = weight * (critic(*inputs) - critic(*shown)).square().mean().item()
        self.expected.append(terms)


class Pairs:
    """A packing of two, written out."""

    @hookimpl(wrapper=True, tryfirst=True)
    def view(self) -> Generator[None, View, View]:
        view = yield
        real, fake = (tuple(t.reshape(len(t) // 2, 2 * t.shape[1], *t.shape[2:]) for t in side) for side in view)
        return View(real, fake)


@pytest.mark.parametrize("kind", ["vector", "image"])
@pytest.mark.parametrize("fake_weight", [0, 10])
@pytest.mark.parametrize("others", [{}, {"bigan": BiGAN()}, {"pairs": Pairs()}], ids=["plain", "joint", "packs"])
def test_three_steps(kind: str, fake_weight: float, others: dict[str, object]) -> None:
    watch = Watch(T[kind], fake_weight)
    _, log = run({"watch": watch, "consistency": Consistency(fake_weight=fake_weight), **others}, kind=kind)
    for phase, _, terms in log.updates:
        terms.pop("adv")
        if phase == "d":
            assert terms == pytest.approx(watch.expected.pop(0), rel=1e-4, abs=1e-12)
            assert len(terms) == 1 + bool(fake_weight)
        else:
            assert not terms


@pytest.mark.parametrize(("weight", "fake_weight", "forwards"), [(0, 0, 3), (10, 0, 4), (0, 10, 4), (10, 10, 5)])
def test_each_side_costs_one_forward(weight: float, fake_weight: float, forwards: int) -> None:
    calls = []

    class Count:
        @hookimpl(wrapper=True)
        def critic(self) -> Generator[None, Callable[..., Tensor], Callable[..., Tensor]]:
            critic = yield
            return lambda *inputs: (calls.append(1), critic(*inputs))[1]

    run({"count": Count(), "consistency": Consistency(weight, fake_weight)}, steps=1)
    assert len(calls) == forwards


def test_unrolling_can_differentiate_through_the_fake_side() -> None:
    slopes = []

    class Ask:
        @hookimpl
        def critic(self, phase: str, d_objective: Any, view: View, gan: Any) -> Any:
            if phase == "g":
                logits = gan.discriminator(*view.real), gan.discriminator(*view.fake)
                term = d_objective(gan.discriminator) - gan.loss.d(*logits)
                slope = torch.autograd.grad(term, next(gan.generator.parameters()), retain_graph=True)[0]
                slopes.append(slope.abs().max().item())
            return gan.discriminator

    # noise alone moves a piecewise linear critic's logits by the same amount wherever it is: use images
    run({"consistency": Consistency(fake_weight=1e3), "ask": Ask()}, kind="image", steps=2)
    run({"consistency": Consistency(fake_weight=0), "ask": Ask()}, kind="image", steps=1)
    assert min(slopes[:2]) > 1e-5 > slopes[2]


@pytest.mark.parametrize("kind", ["vector", "image"])
def test_weight_0_changes_no_bit(kind: str) -> None:
    plain, _ = run({}, kind=kind)
    for name, weights in run({"consistency": Consistency(weight=0)}, kind=kind)[0].weights().items():
        assert all(torch.equal(value, plain.weights()[name][key]) for key, value in weights.items())


def test_options_of_t_arrive() -> None:
    def first(kind: str, **options: Any) -> float:
        _, log = run({"consistency": Consistency(**options)}, kind=kind, steps=1)
        return log.updates[0][2]["consistency_real"]

    assert first("image", shift=0, flip=False) == 0
    assert first("image", shift=0) != first("image", flip=False) != first("image")
    assert first("vector", noise=0) == 0
    assert first("vector", noise=0.02) == pytest.approx(4 * first("vector"), rel=0.1)  # locally linear


def test_ones_own_t(tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(
        "import torch\ndef halve(x, generator):\n    assert generator is not None\n    return x / 2\nnumber = 3\n"
    )
    watch = Watch(lambda x, g: x / 2)
    _, log = run({"watch": watch, "consistency": Consistency(augmentation=f"{mine}:halve")}, kind="image")
    got = [terms["consistency_real"] for phase, _, terms in log.updates if phase == "d"]
    assert got == pytest.approx([e["consistency_real"] for e in watch.expected], rel=1e-4)
    with pytest.raises(UsageError, match="callable"):
        tiny_gan(plugins={"consistency": Consistency(augmentation=f"{mine}:number")})
    with pytest.raises(UsageError, match="no 'halv' .did you mean 'halve'"):
        tiny_gan(plugins={"consistency": Consistency(augmentation=f"{mine}:halv")})


def test_same_seed_same_terms_and_the_next_step_after_a_round_trip() -> None:
    def make() -> Consistency:
        return Consistency(fake_weight=1e4, noise=1.0)

    first, log = run({"consistency": make()}, steps=2)
    assert log.updates == run({"consistency": make()}, steps=2)[1].updates
    twin = tiny_gan(plugins={"consistency": make()})
    twin.load_weights(first.weights())
    twin.load_state_dict(copy.deepcopy(first.state_dict()))
    for gan in (first, twin):
        gan.next_real = lambda: torch.linspace(-1, 1, 24).view(8, 3)
        update(gan, "d", 3)
    for mine, his in zip(first.discriminator.parameters(), twin.discriminator.parameters(), strict=True):
        assert torch.equal(mine, his)


@pytest.mark.parametrize("name", ["weight", "fake_weight", "shift", "noise"])
def test_bad_options(name: str) -> None:
    with pytest.raises(UsageError, match=name):
        build(Consistency, {name: -1}, "consistency")


@pytest.mark.parametrize("name", ["weight", "fake_weight", "noise"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_refused_on_the_object_too(name: str, value: float) -> None:
    with pytest.raises(ValueError, match="must not be negative, infinite or NaN"):
        Consistency(**{name: value})  # type: ignore[arg-type]


def test_a_shift_beyond_the_image_is_refused_before_training() -> None:
    with pytest.raises(UsageError, match=r"shift must be below .* 28"):
        tiny_gan("image", {"consistency": Consistency(shift=28)})
