"""LeCam against numpy and hand-made histories; each check also meets wrong versions that it must reject."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Generator
from typing import Any

import numpy as np
import pytest
import torch
from gankit_bigan import BiGAN
from gankit_lecam import LeCam, lecam_penalty
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gankit import GAN, UsageError, hookimpl
from gankit.loop import update
from gankit.options import build
from gankit.testing import plugin_checks, run, tiny_gan

torch.set_num_threads(1)

Penalty = Callable[..., Tensor]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- the function ----------------------------------------------------------------------------------------------------


def check(penalty: Penalty, shape: tuple[int, ...] = (8, 1), one_sided: bool = False) -> None:
    """The value by numpy and the gradient by hand: 2 (r - a_F) / n, -2 (a_R - f) / n, cut off where one-sided."""
    real, fake = randn(*shape, seed=1).requires_grad_(), randn(*shape, seed=2).requires_grad_()
    a_real, a_fake = 0.7, -0.4
    up, down = real.detach().numpy() - a_fake, a_real - fake.detach().numpy()
    if one_sided:
        up, down = np.maximum(up, 0), np.maximum(down, 0)
    value = penalty(real, fake, a_real, a_fake, **({"one_sided": True} if one_sided else {}))
    assert value.shape == ()
    assert np.isclose(value.item(), (up**2).mean() + (down**2).mean())
    grads = torch.autograd.grad(value, (real, fake))
    assert np.allclose(grads[0].numpy(), 2 * up / up.size)
    assert np.allclose(grads[1].numpy(), -2 * down / down.size)


@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize("shape", [(8,), (8, 1), (4, 1, 3, 3)])
def test_against_numpy(shape: tuple[int, ...], one_sided: bool) -> None:
    check(lecam_penalty, shape, one_sided)


WRONG: dict[str, tuple[Penalty, bool]] = {
    "own averages": (lambda r, f, a_r, a_f: lecam_penalty(r, f, a_f, a_r), False),
    "squares of means": (lambda r, f, a_r, a_f: (r.mean() - a_f) ** 2 + (f.mean() - a_r) ** 2, False),
    "sum": (lambda r, f, a_r, a_f: 8 * lecam_penalty(r, f, a_r, a_f), False),
    "the code's form": (lambda r, f, a_r, a_f: lecam_penalty(r, f, a_r, a_f, one_sided=True), False),
    "mirrored relu": (
        lambda r, f, a_r, a_f, one_sided: (a_f - r).relu().square().mean() + (f - a_r).relu().square().mean(),
        True,
    ),
    "relu on one side": (
        lambda r, f, a_r, a_f, one_sided: (r - a_f).relu().square().mean() + (a_r - f).square().mean(),
        True,
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_check_rejects(wrong: str) -> None:
    penalty, one_sided = WRONG[wrong]
    with pytest.raises(AssertionError):
        check(penalty, one_sided=one_sided)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), st.floats(-3, 3), st.floats(-3, 3), st.booleans())
def test_order_and_split_for_given_averages(seed: int, a_real: float, a_fake: float, one_sided: bool) -> None:
    real, fake = randn(6, seed=seed), randn(6, seed=seed + 100)
    whole = lecam_penalty(real, fake, a_real, a_fake, one_sided=one_sided).item()
    assert np.isclose(lecam_penalty(real.flip(0), fake.flip(0), a_real, a_fake, one_sided=one_sided).item(), whole)
    parts = zip(real.split(3), fake.split(3), strict=True)
    assert np.isclose(
        np.mean([lecam_penalty(r, f, a_real, a_fake, one_sided=one_sided).item() for r, f in parts]), whole
    )


def test_the_averages_get_no_gradient() -> None:
    a = torch.tensor([0.5, -0.5], requires_grad=True)
    value = lecam_penalty(randn(4).requires_grad_(), randn(4, seed=1), *a)
    assert torch.autograd.grad(value, a, allow_unused=True) == (None,)


# -- the plugin ------------------------------------------------------------------------------------------------------


class Watch:
    """The logits of every D update, by the critic itself, and what the terms must then be."""

    def __init__(self) -> None:
        self.logits: list[tuple[Any, Any]] = []
        self.on = False

    @hookimpl(wrapper=True)
    def critic(self, phase: str) -> Generator[None, Any, Any]:
        critic = yield
        self.on = phase == "d"
        if self.on:
            self.logits.append(())

        def scored(*inputs: Tensor) -> Tensor:
            logits: Tensor = critic(*inputs)
            if self.on:
                self.logits[-1] += (logits.detach().double().numpy(),)
            return logits

        return scored

    def terms(self, decay: float, start: int, d_steps: int) -> list[float | None]:
        """By a loop written out: the penalty first, then the averages."""
        expected: list[float | None] = []
        a_real = a_fake = None
        for i, (real, fake) in enumerate(self.logits):
            step = 1 + i // d_steps
            if a_real is None or step <= start:
                expected.append(None)
                a_real, a_fake = real.mean(), fake.mean()
            else:
                expected.append(0.3 * (((real - a_fake) ** 2).mean() + ((a_real - fake) ** 2).mean()))
                a_real = decay * a_real + (1 - decay) * real.mean()
                a_fake = decay * a_fake + (1 - decay) * fake.mean()
        return expected


class Ahead:
    """Looks ahead in phase "g" as unrolling does: the discriminator's objective of another critic, twice."""

    @hookimpl(tryfirst=True)
    def critic(self, gan: GAN, phase: str, d_objective: Callable[[Any], Tensor]) -> Any:
        if phase == "g":
            for scale in (10, 100):
                d_objective(lambda *inputs, scale=scale: scale * gan.discriminator(*inputs))
        return gan.discriminator


def check_history(
    make: Callable[..., Any],
    decay: float = 0.9,
    start: int = 0,
    d_steps: int = 1,
    kind: str = "vector",
    simultaneous: bool = False,
    **others: object,
) -> None:
    watch = Watch()
    plugins = {"watch": watch, "lecam": make(decay=decay, start=start), **others}
    _, log = run(plugins, kind=kind, steps=4, d_steps=d_steps, simultaneous=simultaneous)
    seen = [terms.get("lecam") for phase, _, terms in log.updates if phase == "d"]
    expected = watch.terms(decay, start, d_steps)
    assert [s is None for s in seen] == [e is None for e in expected]
    assert [s for s in seen if s] == pytest.approx([e for e in expected if e], rel=1e-4, abs=1e-9)
    assert len([s for s in seen if s]) >= 2
    assert all("lecam" not in terms for phase, _, terms in log.updates if phase == "g")


@pytest.mark.parametrize("kind", ["vector", "image"])
@pytest.mark.parametrize("d_steps", [1, 3])
@pytest.mark.parametrize("start", [0, 2])
def test_the_terms_of_four_steps(start: int, d_steps: int, kind: str) -> None:
    check_history(LeCam, start=start, d_steps=d_steps, kind=kind)


@pytest.mark.parametrize("simultaneous", [False, True])
def test_looking_ahead_moves_nothing(simultaneous: bool) -> None:
    check_history(LeCam, simultaneous=simultaneous, ahead=Ahead())


def test_an_update_of_several_batches_counts_all_and_none_that_overflowed() -> None:
    plugin = LeCam(decay=0.5)
    for shift in (0.0, 1.0):
        plugin.pre_d_loss(torch.tensor([1.0 + shift, 3.0]), torch.tensor([-1.0, -shift]), 1, False)
    with torch.no_grad():  # to look at, not to train
        plugin.pre_d_loss(torch.tensor([100.0]), torch.tensor([100.0]), 1, False)
    plugin.post_step("g", 1)
    assert plugin.averages is None
    plugin.post_step("d", 1)
    assert torch.equal(plugin.averages, torch.tensor([2.25, -0.75]))
    plugin.pre_d_loss(torch.tensor([math.inf]), torch.tensor([4.0]), 2, False)
    plugin.post_step("d", 2)
    assert torch.equal(plugin.averages, torch.tensor([2.25, 1.625]))
    plugin.pre_d_loss(torch.tensor([math.nan]), torch.tensor([0.0]), 3, False)
    plugin.pre_d_loss(torch.tensor([4.25]), torch.tensor([1.25]), 3, False)
    plugin.post_step("d", 3)
    assert torch.equal(plugin.averages, torch.tensor([3.25, 1.125]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_averages_move_under_autocast(dtype: torch.dtype) -> None:
    """A hundredth of a small change is below the spacing of halves, in which an average would never move."""
    plugin = LeCam()
    for real, count in ((1.5, 1), (1.625, 500)):
        for step in range(count):
            plugin.pre_d_loss(
                torch.full((4,), real, dtype=dtype), torch.full((4,), -real, dtype=dtype), step + 1, False
            )
            plugin.post_step("d", step + 1)
    assert plugin.averages is not None and plugin.averages.dtype == torch.float32
    expected = 1.625 - 0.125 * 0.99**500
    torch.testing.assert_close(plugin.averages, torch.tensor([expected, -expected]), rtol=1e-5, atol=0)


def test_pairs_of_a_joint_view() -> None:
    check_history(LeCam, bigan=BiGAN())


class EagerlyUpdated(LeCam):
    """Moves the averages before the penalty, as the official code."""

    @hookimpl
    def pre_d_loss(self, real_logits: Tensor, fake_logits: Tensor, step: int, ahead: bool) -> dict[str, Tensor] | None:
        super().pre_d_loss(real_logits, fake_logits, step, ahead)
        super().post_step("d", step)
        return super().pre_d_loss(real_logits, fake_logits, step, ahead)

    @hookimpl
    def post_step(self, phase: str) -> None:
        pass


class Remembers(LeCam):
    """Takes what is looked ahead at for its own."""

    @hookimpl
    def pre_d_loss(self, real_logits: Tensor, fake_logits: Tensor, step: int) -> dict[str, Tensor] | None:
        return super().pre_d_loss(real_logits, fake_logits, step, ahead=False)


class MovedOncePerStep(LeCam):
    @hookimpl
    def post_step(self, phase: str, step: int) -> None:
        super().post_step("d" if phase == "g" else "g", step)


class FromZero(LeCam):
    def __post_init__(self) -> None:
        super().__post_init__()
        self.averages = torch.zeros(2)


@pytest.mark.parametrize(
    ("wrong", "others"),
    [
        (EagerlyUpdated, {}),
        (Remembers, {"ahead": Ahead(), "simultaneous": True}),
        (MovedOncePerStep, {"d_steps": 3}),
        (FromZero, {}),
    ],
)
def test_the_history_rejects(wrong: Any, others: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        check_history(wrong, **others)


@pytest.mark.parametrize("kind", ["vector", "image"])
def test_weight_0_changes_no_bit(kind: str) -> None:
    plain, _ = run({}, kind=kind)
    for name, weights in run({"lecam": LeCam(weight=0)}, kind=kind)[0].weights().items():
        assert all(torch.equal(value, plain.weights()[name][key]) for key, value in weights.items())


def test_one_sided_arrives() -> None:
    terms = [run({"lecam": LeCam(one_sided=o)}, steps=2)[1].updates[2][2]["lecam"] for o in (False, True)]
    assert 0 <= terms[1] < terms[0]


@pytest.mark.parametrize("one_sided", [False, True])
def test_the_claim_knows_of_one_sided(one_sided: bool) -> None:
    (check,) = (check for check in plugin_checks("lecam", one_sided=one_sided) if str(check) == "claimed_logits")
    check()


def test_state_survives_and_gives_the_same_next_step() -> None:
    assert LeCam().state_dict() == {}

    def options() -> LeCam:
        return LeCam(weight=100, decay=0.6)

    watch, plugin = Watch(), options()
    first, log = run({"watch": watch, "lecam": plugin}, steps=2)
    assert log.updates == run({"lecam": options()}, steps=2)[1].updates
    state, weights = copy.deepcopy((first.state_dict(), first.weights()))
    twins: list[LeCam] = []

    def resumed(with_averages: bool) -> GAN:
        twins.append(options())
        twin = tiny_gan(plugins={"lecam": twins[-1]})
        saved = copy.deepcopy(state)
        assert saved["plugins"]["lecam"]["averages"].shape == (2,)
        if not with_averages:
            saved["plugins"]["lecam"] = {}
        twin.load_weights(weights)
        twin.load_state_dict(saved)
        return twin

    one, without = resumed(True), resumed(False)
    for gan in (first, one, without):  # the first is the uninterrupted run
        gan.next_real = lambda: torch.linspace(-1, 1, 24).view(8, 3)
        update(gan, "d", 3)
    for a, b in zip(first.discriminator.parameters(), one.discriminator.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(*(next(g.discriminator.parameters()) for g in (one, without)))
    means = [np.array([real.mean(), fake.mean()]) for real, fake in watch.logits]
    expected = means[0]
    for mean in means[1:]:
        expected = 0.6 * expected + 0.4 * mean
    assert len(means) == 3
    for averages in (plugin.averages, twins[0].averages):
        np.testing.assert_allclose(averages, expected, rtol=1e-5, atol=1e-7)


def test_batch_norm_is_no_hindrance() -> None:
    def normed() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

    _, log = run({"lecam": LeCam()}, discriminator=normed, steps=2)
    assert log.updates[2][2]["lecam"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -1}, "weight"),
        ({"decay": 1}, "decay"),
        ({"decay": -0.1}, "decay"),
        ({"start": -1}, "start"),
        ({"averages": 1}, "no option"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(LeCam, options, "lecam")
