import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gankit.errors import UsageError
from gankit.losses import LOSSES, Loss, make

R = np.array([1.5, -0.25, 3.0, -2.0])
F = np.array([0.5, 2.25, -1.5, -4.0])
PAIRWISE = ("relativistic", "relativistic_average")


def sp(x: np.ndarray) -> np.ndarray:
    return np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0)


# (D's loss, G's loss, mirrored) on R and F, from the papers' formulas
CLOSED = {
    "non_saturating": (
        np.mean(sp(-R)) + np.mean(sp(F)),
        np.mean(sp(-F)),
        np.mean(sp(R)) + np.mean(sp(-F)),
    ),
    "saturating": (
        np.mean(sp(-R)) + np.mean(sp(F)),
        -np.mean(sp(F)),
        -np.mean(sp(-R)) - np.mean(sp(F)),
    ),
    "least_squares": (
        0.5 * np.mean((R - 1) ** 2) + 0.5 * np.mean(F**2),
        0.5 * np.mean((F - 1) ** 2),
        0.5 * np.mean(R**2) + 0.5 * np.mean((F - 1) ** 2),
    ),
    "wasserstein": (np.mean(F) - np.mean(R), -np.mean(F), np.mean(R) - np.mean(F)),
    "hinge": (
        np.mean(np.maximum(0, 1 - R)) + np.mean(np.maximum(0, 1 + F)),
        -np.mean(F),
        np.mean(R) - np.mean(F),
    ),
    "relativistic": (np.mean(sp(-(R - F))), np.mean(sp(-(F - R))), np.mean(sp(-(F - R)))),
    "relativistic_average": (
        np.mean(sp(-(R - F.mean()))) + np.mean(sp(F - R.mean())),
        np.mean(sp(-(F - R.mean()))) + np.mean(sp(R - F.mean())),
        np.mean(sp(-(F - R.mean()))) + np.mean(sp(R - F.mean())),
    ),
}


def g_value(loss: Loss, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    sides = {"real_logits": real_logits, "fake_logits": fake_logits}
    return loss.g(**{side: sides[side] for side in loss.g_sides})


def test_every_loss_is_checked() -> None:
    assert set(CLOSED) == set(LOSSES)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shape", [(4,), (4, 1), (2, 1, 1, 2)])
def test_closed_forms(name: str, shape: tuple[int, ...]) -> None:
    real, fake = (torch.from_numpy(v).reshape(shape) for v in (R, F))
    loss = make(name)
    assert loss.name == name
    values = (
        loss.d(real_logits=real, fake_logits=fake),
        g_value(loss, real, fake),
        loss.mirrored(real, fake),
    )
    assert [v.shape for v in values] == [()] * 3
    np.testing.assert_allclose([float(v) for v in values], CLOSED[name], rtol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_by_finite_differences(name: str) -> None:
    loss = make(name)
    real, fake = (torch.from_numpy(v).clone().requires_grad_() for v in (R, F))
    for function in (loss.d, loss.mirrored, lambda r, f: g_value(loss, r, f)):
        assert torch.autograd.gradcheck(function, (real, fake))


@pytest.mark.parametrize("name", LOSSES)
def test_larger_logits_mean_more_real(name: str) -> None:
    loss = make(name)
    real, fake = (torch.zeros(6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    d_real, d_fake = torch.autograd.grad(loss.d(real, fake), (real, fake))
    assert ((d_real < 0).all() and (d_fake > 0).all()) or name == "least_squares"
    (g_fake,) = torch.autograd.grad(g_value(loss, real, fake), fake)
    assert (g_fake < 0).all()
    m_real, m_fake = torch.autograd.grad(loss.mirrored(real, fake), (real, fake), allow_unused=True)
    assert (m_fake < 0).all() and ((m_real > 0).all() or name == "least_squares")


def test_values_at_zero_logits() -> None:
    zero = torch.zeros(3, dtype=torch.float64)
    expected = {
        "non_saturating": 2 * math.log(2),
        "saturating": 2 * math.log(2),
        "least_squares": 0.5,
        "wasserstein": 0.0,
        "hinge": 2.0,
        "relativistic": math.log(2),
        "relativistic_average": 2 * math.log(2),
    }
    assert {name: float(make(name).d(zero, zero)) for name in LOSSES} == pytest.approx(expected)


def test_optimal_d_of_equal_distributions_is_zero() -> None:
    # D sees the same sample on both sides: 2 log 2 at logits 0 is its minimum (arXiv 1406.2661, theorem 1)
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    loss = make("non_saturating")
    assert float(loss.d(logits, logits)) > 2 * math.log(2)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("r", "f"), [(1e4, -1e4), (-1e4, 1e4), (1e4, 1e4), (-1e4, -1e4)])
def test_stable_for_huge_logits(name: str, r: float, f: float) -> None:
    loss = make(name)
    real, fake = (torch.full((3,), v, requires_grad=True) for v in (r, f))
    for value in (loss.d(real, fake), g_value(loss, real, fake), loss.mirrored(real, fake)):
        grads = torch.autograd.grad(value, (real, fake), allow_unused=True)
        assert value.isfinite() and all(g is None or g.isfinite().all() for g in grads)


def test_softplus_of_huge_logits_is_linear() -> None:
    real, fake = torch.full((2,), -1e4), torch.full((2,), 1e4)
    assert float(make("non_saturating").d(real, fake)) == 2e4
    assert float(make("relativistic").d(real, fake)) == 2e4
    assert float(make("non_saturating").d(fake, real)) == 0.0


@given(st.floats(-50, 50))
def test_relativistic_losses_see_only_differences(shift: float) -> None:
    real, fake = torch.from_numpy(R), torch.from_numpy(F)
    for name in PAIRWISE:
        loss = make(name)
        for function in (loss.d, loss.g):
            assert float(function(real_logits=real + shift, fake_logits=fake + shift)) == pytest.approx(
                float(function(real_logits=real, fake_logits=fake)), rel=1e-7
            )


def test_relativistic_average_uses_means_and_relativistic_uses_pairs() -> None:
    real, fake = torch.from_numpy(R), torch.from_numpy(F)
    average, pairs = make("relativistic_average"), make("relativistic")
    assert float(average.d(real, fake.flip(0))) == pytest.approx(float(average.d(real, fake)), rel=1e-12)
    assert float(pairs.d(real, fake.flip(0))) != pytest.approx(float(pairs.d(real, fake)), rel=1e-3)
    average.d(real[:2], fake)  # sizes may differ


@pytest.mark.parametrize("shape", [(4, 1), (3,), (1,)])
def test_pairs_must_match(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="equal shape"):
        make("relativistic").d(torch.zeros(4), torch.zeros(shape))
    with pytest.raises(UsageError, match="equal shape"):
        make("relativistic").g(real_logits=torch.zeros(4), fake_logits=torch.zeros(shape))


@pytest.mark.parametrize("name", ["non_saturating", "least_squares", "wasserstein", *PAIRWISE])
def test_mirrored_is_d_with_swapped_labels(name: str) -> None:
    real, fake = torch.from_numpy(R), torch.from_numpy(F)
    loss = make(name)
    assert float(loss.mirrored(real, fake)) == pytest.approx(float(loss.d(fake, real)), rel=1e-14)


@pytest.mark.parametrize("name", LOSSES)
def test_mirrored_moves_fakes_as_g_does(name: str) -> None:
    loss = make(name)
    real, fake = torch.from_numpy(R), torch.from_numpy(F).requires_grad_()
    (plain,) = torch.autograd.grad(g_value(loss, real, fake), fake)
    (mirrored,) = torch.autograd.grad(loss.mirrored(real, fake), fake)
    torch.testing.assert_close(mirrored, plain)


@pytest.mark.parametrize("name", LOSSES)
def test_symmetric(name: str) -> None:
    real, fake = torch.from_numpy(R), torch.from_numpy(F)
    loss = make(name)
    once = loss.symmetric()
    assert once.g_sides == ("real_logits", "fake_logits")
    assert float(once.g(real_logits=real, fake_logits=fake)) == float(loss.mirrored(real, fake))
    assert (once.name, once.d, once.real_target) == (loss.name, loss.d, loss.real_target)
    assert once.symmetric() == once
    assert loss.g_sides == (("real_logits", "fake_logits") if name in PAIRWISE else ("fake_logits",))


def test_least_squares_pearson() -> None:
    loss = make("least-squares", a=-1, b=1, c=0)
    real, fake = torch.from_numpy(R), torch.from_numpy(F)
    assert float(loss.d(real, fake)) == pytest.approx(0.5 * np.mean((R - 1) ** 2) + 0.5 * np.mean((F + 1) ** 2))
    assert float(loss.g(fake_logits=fake)) == pytest.approx(0.5 * np.mean(F**2))
    assert float(loss.mirrored(real, fake)) == pytest.approx(0.5 * np.mean(F**2) + 0.5 * np.mean(R**2))
    assert loss.real_target == 1


def test_least_squares_mirror_is_a_reflection() -> None:
    # reflecting all logits at the middle of a and b swaps the sides
    loss = make("least_squares", a=-2, b=1, c=0.5)
    real, fake = torch.from_numpy(R), torch.from_numpy(F)
    middle2 = -2 + 1
    assert float(loss.mirrored(real, fake)) == pytest.approx(float(loss.mirrored(middle2 - fake, middle2 - real)))


def test_real_targets() -> None:
    targets = {name: make(name).real_target for name in LOSSES}
    ones = dict.fromkeys(("non_saturating", "saturating", "least_squares"), 1.0)
    assert targets == dict.fromkeys(LOSSES, None) | ones
    assert make("least_squares", a=-1, b=3, c=3).real_target == 3


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("hingee", {}, "did you mean 'hinge'"),
        ("non-saturate", {}, "did you mean 'non_saturating'"),
        ("qqq", {}, "choose from non_saturating"),
        ("least_squares", {"d": 1.0}, "its options are a, b, c"),
        ("hinge", {"a": 1.0}, "no options"),
        ("least_squares", {"a": 1.0, "b": 0.0}, "a < b"),
        ("least_squares", {"a": 0.0, "b": 1.0, "c": -1.0}, "a < c"),
        ("least_squares", {"a": math.nan}, "a < b"),
    ],
)
def test_errors(name: str, options: dict[str, float], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        make(name, **options)


def test_losses_can_be_copied() -> None:
    loss = copy.deepcopy(make("least_squares", c=0.5))
    assert float(loss.g(fake_logits=torch.zeros(2))) == 0.125
