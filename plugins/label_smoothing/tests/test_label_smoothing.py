from functools import partial
from itertools import permutations

import numpy as np
import pytest
import torch
from gankit_label_smoothing import LabelSmoothing, smoothed, smoothed_logistic_d
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from gankit import UsageError, losses
from gankit.plugins import create
from gankit.testing import run, tiny_gan

LOGITS = st.lists(st.floats(-50, 50), min_size=1, max_size=6)
UNIT = st.floats(0, 1)


def column(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


@settings(deadline=None)
@given(real=LOGITS, fake=LOGITS, t=UNIT, s=UNIT)
def test_it_is_the_cross_entropy_with_soft_targets(real: list[float], fake: list[float], t: float, s: float) -> None:
    r, f = column(real), column(fake)
    mine = smoothed_logistic_d(r, f, real_target=t, fake_target=s)
    theirs = binary_cross_entropy_with_logits(r, torch.full_like(r, t))
    theirs = theirs + binary_cross_entropy_with_logits(f, torch.full_like(f, s))
    # torch's softplus is linear above 20, which costs 2e-9
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-8)
    for a, b in zip(torch.autograd.grad(mine, (r, f)), torch.autograd.grad(theirs, (r, f)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-8)


@settings(deadline=None)
@given(p=st.floats(0.01, 1), q=st.floats(0.01, 1), t=st.floats(0.5, 0.95), s=st.floats(0, 0.4))
def test_the_best_discriminator_is_that_of_the_paper(p: float, q: float, t: float, s: float) -> None:
    best = (t * p + s * q) / (p + q)
    logit = column([float(np.log(best / (1 - best)))])
    loss = p * smoothed_logistic_d(logit, logit.new_zeros(1), real_target=t, fake_target=s)
    loss = loss + q * smoothed_logistic_d(logit.new_zeros(1), logit, real_target=t, fake_target=s)
    assert torch.autograd.grad(loss, logit)[0].item() == pytest.approx(0, abs=1e-12)


def test_smoothing_the_wrong_side_or_sign_is_something_else() -> None:
    r, f = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 3.0])
    mine = smoothed_logistic_d(r, f).item()
    softplus = torch.nn.functional.softplus
    expected = binary_cross_entropy_with_logits(r, torch.full((2,), 0.9)) + softplus(f).mean()
    assert mine == pytest.approx(expected.item(), rel=1e-6)
    for wrong in (0.9 * softplus(-r).mean() + softplus(f).mean(), smoothed_logistic_d(-f, -r)):
        assert wrong.item() != pytest.approx(mine, rel=1e-3)


@settings(deadline=None)
@given(a=st.floats(-2, 0), b=st.floats(0.5, 2), t=st.floats(0.6, 1), s=st.floats(0, 0.5), r=LOGITS, f=LOGITS)
def test_least_squares_has_the_gradient_of_flipped_labels(
    a: float, b: float, t: float, s: float, r: list[float], f: list[float]
) -> None:
    real, fake = column(r), column(f)
    loss = smoothed(losses.make("least_squares", a=a, b=b, c=b), real_target=t, fake_target=s)
    flipped = sum(
        weight * ((logits - target) ** 2).mean() / 2
        for logits, chance in ((real, t), (fake, s))
        for weight, target in ((chance, b), (1 - chance, a))
    )
    mine = torch.autograd.grad(loss.d(real, fake), (real, fake))
    theirs = torch.autograd.grad(flipped, (real, fake))
    for x, y in zip(mine, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)
    assert loss.real_target == pytest.approx(t * b + (1 - t) * a)


def test_ninety_percent_of_the_way_from_minus_one_to_one_is_not_0_9() -> None:
    loss = smoothed(losses.make("least_squares", a=-1, b=1, c=0))
    assert loss.d(torch.tensor([0.8]), torch.tensor([-1.0])).item() == pytest.approx(0, abs=1e-12)
    assert loss.g(torch.tensor([0.0])) == 0  # G's target is not smoothed


@pytest.mark.parametrize("name", ["wasserstein", "hinge", "relativistic", "relativistic_average"])
def test_losses_without_targets_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} has none: use --loss non_saturating, saturating or least_squares"):
        tiny_gan(plugins={"label_smoothing": LabelSmoothing()}, loss=name)


def test_both_targets_of_the_plugin_arrive() -> None:
    r, f = column([2.0, -1.0, 0.3]), column([0.5, 3.0, -2.0])
    plugin = LabelSmoothing(real_target=0.8, fake_target=0.3)
    loss = tiny_gan(plugins={"label_smoothing": plugin}, loss="saturating").loss
    expected = binary_cross_entropy_with_logits(r, torch.full_like(r, 0.8))
    expected = expected + binary_cross_entropy_with_logits(f, torch.full_like(f, 0.3))
    torch.testing.assert_close(loss.d(r, f), expected)
    assert loss.real_target == 0.8
    squares = tiny_gan(plugins={"label_smoothing": plugin}, loss="least_squares").loss
    torch.testing.assert_close(squares.d(r, f), ((r - 0.8) ** 2).mean() / 2 + ((f - 0.3) ** 2).mean() / 2)


def test_targets_out_of_range_are_refused() -> None:
    for real, fake in ((1.1, 0.0), (0.9, -0.1), (0.5, 0.5), (0.2, 0.8)):
        with pytest.raises(ValueError, match="fake_target"):
            LabelSmoothing(real, fake)
        with pytest.raises(UsageError, match="fake_target"):
            smoothed(losses.make("saturating"), real_target=real, fake_target=fake)


@pytest.mark.parametrize("kind", ["vector", "image"])
@pytest.mark.parametrize("loss", ["non_saturating", "saturating", "least_squares"])
def test_it_trains_and_only_d_is_asked_for_less(kind: str, loss: str) -> None:
    gan, log = run({"label_smoothing": LabelSmoothing()}, kind=kind, loss=loss)
    plain, plain_log = run({}, kind=kind, loss=loss)
    assert gan.loss.g == plain.loss.g or gan.loss.g.keywords == plain.loss.g.keywords  # type: ignore[attr-defined]
    assert gan.loss.real_target == pytest.approx(0.9)
    assert log.updates[0] != plain_log.updates[0]
    assert all(np.isfinite(v) for *_, terms in log.updates for v in terms.values())


@pytest.mark.parametrize("loss", ["non_saturating", "saturating", "least_squares"])
def test_full_targets_change_no_bit(loss: str) -> None:
    smooth, log = run({"label_smoothing": LabelSmoothing(1.0)}, loss=loss)
    plain, plain_log = run({}, loss=loss)
    assert log.updates == plain_log.updates
    for phase in "dg":
        for mine, other in zip(smooth.parameters(phase), plain.parameters(phase), strict=True):
            assert torch.equal(mine, other)


@settings(deadline=None)
@given(scale=st.floats(1, 40))
def test_full_targets_have_the_gradient_of_the_plain_loss(scale: float) -> None:
    r, f = torch.linspace(-scale, scale, 9, requires_grad=True), torch.linspace(scale, -scale, 9, requires_grad=True)
    mine = torch.autograd.grad(smoothed_logistic_d(r, f, real_target=1.0), (r, f))
    theirs = torch.autograd.grad(losses.logistic_d(r, f), (r, f))
    assert all(map(torch.equal, mine, theirs))


@pytest.mark.parametrize("loss", ["non_saturating", "least_squares"])
def test_both_orders_with_a_joint_loss_agree(loss: str) -> None:
    seen = []
    for order in permutations(("label_smoothing", "bigan")):
        gan, log = run(create(order, {})[0], loss=loss)
        assert gan.loss.g_sides == losses.BOTH_SIDES and isinstance(gan.loss.d, partial)
        r, f = torch.randn(4), torch.randn(4)
        plain = losses.make(loss)
        assert gan.loss.g(real_logits=r, fake_logits=f) == plain.mirrored(r, f)
        assert gan.loss.d(r, f) != plain.d(r, f)
        seen.append(log.updates)
    assert seen[0] == seen[1]


@pytest.mark.parametrize("name", ["non_saturating", "saturating", "least_squares"])
@pytest.mark.parametrize("target", [0.9, 1.0])
def test_it_is_not_applied_twice(name: str, target: float) -> None:
    once = smoothed(losses.make(name), real_target=target)
    with pytest.raises(UsageError, match=f"the labels of the loss {name} are smoothed already: smooth them once"):
        smoothed(once)
