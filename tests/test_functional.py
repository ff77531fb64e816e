"""The shared mathematics, against numpy and closed forms; each check is shown to reject the usual wrong version."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gankit.functional import (
    extra_pass,
    input_gradients,
    interpolate,
    logit_per_sample,
    mixing_weights,
    norm_per_sample,
    squared_gradient_norm,
    squared_norm_per_sample,
)

Interpolate = Callable[..., tuple[Tensor, ...]]
SHAPES = [(), (1,), (3,), (2, 4, 5), (1, 2, 3, 2)]
shapes = st.lists(st.integers(1, 4), max_size=4).map(tuple)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


# -- interpolate ---------------------------------------------------------------------------------------------------


def check_one_u_per_sample(mix: Interpolate, shape: tuple[int, ...] = (2, 3), batch: int = 6) -> None:
    """With real = 1 and fake = 0 the result *is* u: constant within a sample and its tensors, new for each sample."""
    real = torch.ones(batch, *shape, dtype=torch.float64), torch.ones(batch, 5, dtype=torch.float64)
    x, z = mix(real, [torch.zeros_like(t) for t in real], seeded())
    u = z[:, 0].detach().numpy()
    assert np.array_equal(z.detach().numpy(), np.repeat(u[:, None], 5, axis=1))
    assert np.array_equal(x.detach().numpy().reshape(batch, -1), np.repeat(u[:, None], math.prod(shape), axis=1))
    assert len(set(u.tolist())) == batch
    assert np.all((u >= 0) & (u < 1))


def mix_with(draw: Callable[[Tensor, torch.Generator], Tensor]) -> Interpolate:
    """Interpolation as it is often written: ``draw`` gives each tensor its weights."""

    def mix(real: Sequence[Tensor], fake: Sequence[Tensor], generator: torch.Generator) -> tuple[Tensor, ...]:
        weights = [draw(r, generator).to(r.dtype) for r in real]
        return tuple(u * r + (1 - u) * f for u, r, f in zip(weights, real, fake, strict=True))

    return mix


WRONG_MIXES = {
    "one u per batch": mix_with(lambda r, g: torch.rand((), generator=g.manual_seed(0))),
    "one u per element": mix_with(lambda r, g: torch.rand(r.shape, generator=g)),
    "one u per tensor of a sample": mix_with(lambda r, g: torch.rand((len(r), *[1] * (r.dim() - 1)), generator=g)),
    "normal instead of uniform": mix_with(
        lambda r, g: torch.randn((len(r), *[1] * (r.dim() - 1)), generator=g.manual_seed(0))
    ),
}


@settings(max_examples=40, deadline=None)
@given(shape=shapes, batch=st.integers(1, 7))
def test_one_u_per_sample_and_the_same_for_all_of_its_tensors(shape: tuple[int, ...], batch: int) -> None:
    check_one_u_per_sample(interpolate, shape, batch)


def test_the_check_accepts_the_right_mixture_written_the_other_way() -> None:
    check_one_u_per_sample(
        mix_with(lambda r, g: torch.rand((len(r), *[1] * (r.dim() - 1)), generator=g.manual_seed(0)))
    )


@pytest.mark.parametrize("wrong", WRONG_MIXES)
def test_the_usual_wrong_mixtures_are_told_apart(wrong: str) -> None:
    with pytest.raises(AssertionError):
        check_one_u_per_sample(WRONG_MIXES[wrong])


@settings(max_examples=40, deadline=None)
@given(shape=shapes, seed=st.integers(0, 99))
def test_points_lie_on_the_segment_and_u_belongs_to_real(shape: tuple[int, ...], seed: int) -> None:
    real, fake = randn(5, *shape, seed=seed), randn(5, *shape, seed=seed + 1000)
    (x,) = interpolate((real,), (fake,), seeded(seed))
    u = torch.rand(5, generator=seeded(seed), dtype=torch.float64).numpy().reshape(-1, *[1] * len(shape))
    np.testing.assert_allclose(x.detach().numpy(), fake.numpy() + u * (real - fake).numpy(), rtol=1e-12, atol=1e-14)
    with pytest.raises(AssertionError):  # the roles of real and fake swapped
        np.testing.assert_allclose(x.detach().numpy(), real.numpy() + u * (fake - real).numpy(), rtol=1e-6)


def test_u_is_uniform_on_0_1() -> None:
    u = mixing_weights(torch.zeros(20_000, 3), seeded()).flatten().sort().values
    expected = (torch.arange(20_000) + 0.5) / 20_000
    assert (u - expected).abs().max() < 1.63 / math.sqrt(20_000)  # Kolmogorov-Smirnov at 1 %


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weights_have_the_shape_and_dtype_of_what_they_mix(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    like = torch.zeros((4, *shape), dtype=dtype)
    u = mixing_weights(like, seeded())
    assert u.shape == (4, *[1] * len(shape))
    assert u.dtype == dtype
    (x,) = interpolate((like,), (like,), seeded())
    assert (x.shape, x.dtype) == (like.shape, dtype)


def test_tensors_that_are_not_floating_are_taken_from_real() -> None:
    labels, others = torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5])
    flags = torch.tensor([True, False, True])
    x, y, b = interpolate((randn(3, 2), labels, flags), (randn(3, 2, seed=1), others, ~flags), seeded())
    assert x.requires_grad
    assert torch.equal(y, labels) and torch.equal(b, flags)
    assert (y.dtype, b.dtype) == (torch.int64, torch.bool)


def test_a_label_in_front_does_not_decide_the_dtype_of_u() -> None:
    y, x = interpolate((torch.tensor([0, 1]), torch.ones(2, 3)), (torch.tensor([0, 1]), torch.zeros(2, 3)), seeded())
    assert y.dtype == torch.int64
    assert ((x > 0) & (x < 1)).all()


def test_labels_alone_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one floating tensor"):
        interpolate((torch.tensor([0]),), (torch.tensor([1]),))


def test_sides_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError):
        interpolate((randn(2, 3), randn(2, 3)), (randn(2, 3),))


def test_the_result_is_a_leaf_of_its_own_that_requires_gradients() -> None:
    real, fake = randn(4, 3).requires_grad_(), randn(4, 3, seed=1).requires_grad_() * 2
    (x,) = interpolate((real,), (fake,), seeded())
    assert x.is_leaf and x.requires_grad
    x.square().sum().backward()
    assert real.grad is None
    assert x.grad is not None
    before = real.detach().clone(), fake.detach().clone()
    with torch.no_grad():
        x.zero_()
    assert torch.equal(real, before[0]) and torch.equal(fake, before[1])


def test_without_detaching_the_points_keep_their_graph() -> None:
    """d x~ / d fake = 1 - u and d x~ / d real = u, the values being the same; without a graph x~ is a leaf as ever."""
    real, source = randn(4, 3).requires_grad_(), randn(4, 3, seed=1).requires_grad_()
    (kept,) = interpolate((real,), (source * 2,), seeded(), detach=False)
    assert torch.equal(kept, interpolate((real,), (source * 2,), seeded())[0])
    by_real, by_source = torch.autograd.grad(kept.sum(), (real, source))
    u = torch.rand(4, 1, generator=seeded(), dtype=torch.float64).numpy()
    np.testing.assert_allclose(by_real.numpy(), np.repeat(u, 3, 1), rtol=1e-12)
    np.testing.assert_allclose(by_source.numpy(), np.repeat(2 * (1 - u), 3, 1), rtol=1e-12)
    (leaf,) = interpolate((randn(4, 3),), (randn(4, 3),), seeded(), detach=False)
    assert leaf.is_leaf and leaf.requires_grad


def test_an_explicit_generator_is_deterministic_and_leaves_the_global_one_alone() -> None:
    real, fake = (randn(4, 3),), (randn(4, 3, seed=1),)
    before = torch.get_rng_state()
    first, again, other = (interpolate(real, fake, seeded(s))[0] for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng(devices=[]):
        interpolate(real, fake)  # without one, the global generator is what moves
        assert not torch.equal(torch.get_rng_state(), before)


# -- input_gradients -----------------------------------------------------------------------------------------------


def check_gradients(gradients: Callable[[Tensor, Sequence[Tensor]], tuple[Tensor, ...]]) -> None:
    """D(x, z) = a/2 |x|^2 + (c.x) (v.z): dx = a x + c (v.z), dz = v (c.x), for logits of (B,), (B, 1), (B, 1, 2, 3)."""
    x, z = randn(4, 3).requires_grad_(), randn(4, 2, seed=1).requires_grad_()
    c, v = randn(3, seed=2), randn(2, seed=3)
    logits = 0.5 * 1.7 * x.square().sum(1) + (x @ c) * (z @ v)
    X, Z, C, V = (t.detach().numpy() for t in (x, z, c, v))
    dx, dz = 1.7 * X + C * (Z @ V)[:, None], V * (X @ C)[:, None]
    weights = torch.arange(6.0, dtype=torch.float64).view(1, 1, 2, 3)  # a patch critic whose patches differ; mean 2.5
    for shown, factor in [(logits, 1), (logits[:, None], 1), (logits.view(-1, 1, 1, 1) * weights, 2.5)]:
        got = gradients(shown, (x, z))
        assert all(g.requires_grad for g in got)
        np.testing.assert_allclose(got[0].detach().numpy(), factor * dx, rtol=1e-12)
        np.testing.assert_allclose(got[1].detach().numpy(), factor * dz, rtol=1e-12)


def test_gradients_of_every_sample_in_closed_form() -> None:
    check_gradients(input_gradients)


WRONG_GRADIENTS: dict[str, Callable[[Tensor, Sequence[Tensor]], tuple[Tensor, ...]]] = {
    "of the batch's mean": lambda logits, x: torch.autograd.grad(logits.mean(), x, create_graph=True),
    "of the sum over patches": lambda logits, x: torch.autograd.grad(logits.sum(), x, create_graph=True),
    "without a graph": lambda logits, x: torch.autograd.grad(
        (logits.flatten(1).mean(1) if logits.dim() > 1 else logits).sum(), x, retain_graph=True
    ),
}


@pytest.mark.parametrize("wrong", WRONG_GRADIENTS)
def test_the_usual_wrong_gradients_are_told_apart(wrong: str) -> None:
    with pytest.raises(AssertionError):
        check_gradients(WRONG_GRADIENTS[wrong])


def test_gradients_leave_labels_out_and_write_nothing() -> None:
    x, y = randn(4, 3).requires_grad_(), torch.tensor([0, 1, 2, 1])
    w = randn(3, seed=1).requires_grad_()
    scale = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    gradients = input_gradients((x @ w) * scale[y], (x, y))
    assert len(gradients) == 1
    torch.testing.assert_close(gradients[0], w * scale[y][:, None])
    assert x.grad is None and w.grad is None


@settings(max_examples=30, deadline=None)
@given(shape=shapes, seed=st.integers(0, 99))
def test_the_graph_reaches_the_weights(shape: tuple[int, ...], seed: int) -> None:
    """D(x) = w.x^3: dx = 3 w x^2, and d/dw of sum(dx) = 3 x^2 summed over the batch."""
    x, w = randn(3, *shape, seed=seed).requires_grad_(), randn(*shape, seed=seed + 1).requires_grad_()
    (dx,) = input_gradients((w * x**3).unsqueeze(1).flatten(1).sum(1), (x,))
    np.testing.assert_allclose(dx.detach().numpy(), 3 * (w * x**2).detach().numpy(), rtol=1e-12)
    (dw,) = torch.autograd.grad(dx.sum(), w)
    np.testing.assert_allclose(dw.numpy(), 3 * x.detach().square().sum(0).numpy(), rtol=1e-12)


def test_a_bare_tensor_is_the_only_input() -> None:
    x = randn(4, 3).requires_grad_()
    logits = x.pow(3).sum(1)
    torch.testing.assert_close(input_gradients(logits, x), (3 * x.square(),))
    torch.testing.assert_close(squared_gradient_norm(logits, x), 9 * x.pow(4).sum(1))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1), (2, 3), (1, 2, 2)])
def test_a_sample_s_logit_is_the_mean_of_its_own(shape: tuple[int, ...]) -> None:
    logits = randn(5, *shape)
    expected = [np.mean(row) for row in logits.numpy()]
    np.testing.assert_allclose(logit_per_sample(logits).numpy(), expected, rtol=1e-12)


def test_the_mean_over_the_batch_is_no_logit_of_a_sample() -> None:
    x = randn(4, 3).requires_grad_()
    for refuses in (logit_per_sample, lambda mean: input_gradients(mean, x)):
        with pytest.raises(ValueError, match="one logit per sample"):
            refuses(x.sum(1).mean())


# -- norm_per_sample -----------------------------------------------------------------------------------------------


def check_norms(norm: Callable[..., Tensor], sizes: list[tuple[int, ...]], batch: int = 3) -> None:
    tensors = [randn(batch, *shape, seed=i) for i, shape in enumerate(sizes)]
    flat = np.concatenate([t.numpy().reshape(batch, -1) for t in tensors], axis=1)
    got = norm(tensors).numpy()
    assert got.shape == (batch,)
    np.testing.assert_allclose(got, np.linalg.norm(flat, axis=1), rtol=1e-12)


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(shapes, min_size=1, max_size=3), batch=st.integers(1, 4))
def test_norm_is_numpys_over_everything_but_the_batch(sizes: list[tuple[int, ...]], batch: int) -> None:
    check_norms(norm_per_sample, sizes, batch)


WRONG_NORMS: dict[str, Callable[..., Tensor]] = {
    "of the last axis": lambda tensors: tensors[0].norm(dim=-1),
    "of the last axis, averaged": lambda tensors: tensors[0].norm(dim=-1).flatten(1).mean(1),
    "of the whole batch": lambda tensors: torch.cat([t.flatten(1) for t in tensors], 1).norm().expand(3),
    "summed over tensors": lambda tensors: sum(t.flatten(1).norm(dim=1) for t in tensors),
    "squared": lambda tensors: norm_per_sample(tensors).square(),
}


@pytest.mark.parametrize("wrong", WRONG_NORMS)
def test_the_usual_wrong_norms_are_told_apart(wrong: str) -> None:
    with pytest.raises(AssertionError):
        check_norms(WRONG_NORMS[wrong], [(2, 3, 4), (5,)])


def check_zero(norm: Callable[[tuple[Tensor, ...]], Tensor]) -> None:
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=torch.float64, requires_grad=True)
    value = norm((x,))
    (gradient,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    assert value.tolist() == [0.0, 5.0]
    np.testing.assert_allclose(gradient.detach().numpy(), [[0, 0], [0.6, 0.8]], rtol=1e-12)
    (second,) = torch.autograd.grad(gradient[1, 0], x)  # d/dx of x / |x|: (1 / |x|) (1 - x^2 / |x|^2)
    np.testing.assert_allclose(second.numpy(), [[0, 0], [(1 - 0.36) / 5, -0.48 / 5]], rtol=1e-12)


def test_at_zero_the_gradient_is_0_and_not_nan() -> None:
    check_zero(norm_per_sample)
    with pytest.raises(AssertionError):
        check_zero(lambda tensors: tensors[0].square().sum(1).sqrt())  # the naive root: NaN
    with pytest.raises(AssertionError):
        check_zero(lambda tensors: norm_per_sample(tensors, eps=1e-3))  # an eps that shows: biased


def test_eps_stands_inside_the_root() -> None:
    x = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    value = norm_per_sample((x,), eps=1e-4)
    np.testing.assert_allclose(value.detach().numpy(), 1e-2, rtol=1e-12)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    assert not gradient.any()
    np.testing.assert_allclose(norm_per_sample((torch.ones(1, 4),), eps=5.0).numpy(), 3.0, rtol=1e-6)


def test_first_and_second_derivatives_of_the_norm() -> None:
    x, y = randn(3, 2, 2).requires_grad_(), randn(3, 4, seed=1).requires_grad_()

    def norm(*tensors: Tensor) -> Tensor:
        return norm_per_sample(tensors)

    assert torch.autograd.gradcheck(norm, (x, y))
    assert torch.autograd.gradgradcheck(norm, (x, y))


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(shapes, min_size=1, max_size=3), batch=st.integers(1, 4))
def test_squared_norm_is_numpys_squared(sizes: list[tuple[int, ...]], batch: int) -> None:
    check_norms(lambda tensors: squared_norm_per_sample(tensors).sqrt(), sizes, batch)


def test_squared_gradient_norm_in_closed_form() -> None:
    """D(x, z) = (w.x) (v.z): |w|^2 (v.z)^2 + |v|^2 (w.x)^2 per sample, with a graph to w; labels are left out."""
    x, z, y = randn(4, 3).requires_grad_(), randn(4, 2, seed=1).requires_grad_(), torch.arange(4)
    w, v = randn(3, seed=2).requires_grad_(), randn(2, seed=3)
    got = squared_gradient_norm(((x @ w) * (z @ v))[:, None], (x, y, z))
    X, Z, W, V = (t.detach().numpy() for t in (x, z, w, v))
    expected = (W**2).sum() * (Z @ V) ** 2 + (V**2).sum() * (X @ W) ** 2
    np.testing.assert_allclose(got.detach().numpy(), expected, rtol=1e-12)
    (dw,) = torch.autograd.grad(got.sum(), w)
    np.testing.assert_allclose(dw.numpy(), 2 * W * ((Z @ V) ** 2).sum() + 2 * (V**2).sum() * (X @ W) @ X, rtol=1e-12)


def test_a_slope_that_is_not_there_is_refused() -> None:
    x = randn(4, 3).requires_grad_()
    for logits, inputs in [
        (x.sum(1), (torch.arange(4),)),
        (x.detach().sum(1), (x,)),
        (x.sum(1), (x, randn(4, 2))),
    ]:
        for slope in (input_gradients, squared_gradient_norm):
            with pytest.raises(ValueError, match="there is no slope to take"):
                slope(logits, inputs)


def test_an_extra_pass_gives_the_same_and_moves_no_buffer() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    output = extra_pass(module, x)
    assert all(torch.equal(before[name], buffer) for name, buffer in module.named_buffers())
    assert output.requires_grad
    assert torch.equal(output, module(x))  # in training mode, by the batch's own statistics
    assert any(not torch.equal(before[name], buffer) for name, buffer in module.named_buffers())
    linear = module[0]
    assert torch.equal(extra_pass(linear, x), linear(x))
