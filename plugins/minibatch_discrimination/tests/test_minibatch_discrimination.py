import copy
import math
from collections.abc import Callable
from typing import Any

import gankit_minibatch_discrimination as module
import numpy as np
import pytest
import torch
from gankit_minibatch_discrimination import (
    MinibatchDiscrimination,
    MinibatchStatistics,
    MinibatchStddev,
    insert,
    minibatch_similarities,
    minibatch_stddev,
    widened,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gankit import UsageError, View, attach, hookimpl
from gankit.checks import spectral_norms
from gankit.loop import train, update
from gankit.networks import folded
from gankit.plugins import create
from gankit.testing import run, tiny_gan
from gankit.training import Averaging

KINDS = ("kernels", "stddev")
double = torch.float64


def by_hand(m: Any) -> np.ndarray[Any, Any]:
    """The paper's sum over the others, sample by sample, in numpy."""
    m = m.detach().numpy()
    others = [np.delete(m, i, axis=0) for i in range(len(m))]
    return np.stack([np.exp(-np.abs(own - rest).sum(2)).sum(0) for own, rest in zip(m, others, strict=True)])


def broadcast(m: Tensor) -> Tensor:
    """The same by broadcasting, for autograd."""
    return torch.exp(-(m[:, None] - m[None]).abs().sum(-1)).sum(1) - 1


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=double, generator=torch.Generator().manual_seed(seed))


# -- similarities --------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 7), st.integers(1, 4), st.integers(1, 3), st.integers(0, 99), st.floats(0.01, 10))
def test_similarities_are_the_papers_sum_over_the_others(b: int, k: int, d: int, seed: int, scale: float) -> None:
    m = scale * draw(b, k, d, seed=seed)
    o = minibatch_similarities(m)
    np.testing.assert_allclose(o, by_hand(m), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(minibatch_similarities(m, include_self=True), by_hand(m) + 1, rtol=1e-12)
    np.testing.assert_allclose(minibatch_similarities(m, average=True), by_hand(m) / max(1, b - 1), atol=1e-14)
    both = minibatch_similarities(m, include_self=True, average=True)
    np.testing.assert_allclose(both, (by_hand(m) + 1) / b, rtol=1e-12)
    assert (o >= 0).all() and (o <= b - 1 + 1e-12).all()
    order = torch.randperm(b, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(minibatch_similarities(m[order]), o[order], rtol=1e-12, atol=1e-14)


def test_a_repeated_sample_is_as_similar_as_can_be_and_one_sample_has_no_others() -> None:
    assert torch.equal(minibatch_similarities(draw(1, 3, 2).repeat(6, 1, 1)), torch.full((6, 3), 5.0, dtype=double))
    assert torch.equal(minibatch_similarities(draw(1, 3, 2)), torch.zeros(1, 3, dtype=double))
    assert torch.equal(minibatch_similarities(draw(1, 3, 2), average=True), torch.zeros(1, 3, dtype=double))
    with pytest.raises(ValueError, match=r"\(B, kernels, dims\), not a tensor of shape \(4, 6\)"):
        minibatch_similarities(draw(4, 6))


def test_small_similarities_are_not_rounded_away() -> None:
    m = torch.tensor([0.0, 18.0]).view(2, 1, 1)
    np.testing.assert_allclose(minibatch_similarities(m), np.full((2, 1), math.exp(-18)), rtol=1e-5)
    assert (broadcast(m) - math.exp(-18)).abs().max() > 1e-9  # the wrong version: i's own 1, taken off afterwards


def test_derivatives_of_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CACHED", 40)  # of 3 kernels, 2 at a time
    m = draw(4, 3, 2).requires_grad_()
    assert torch.autograd.gradcheck(minibatch_similarities, m)
    assert torch.autograd.gradgradcheck(minibatch_similarities, m)

    def derivatives(function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        found = [function(m)]
        for _ in range(4):
            found += torch.autograd.grad(found[-1].square().sum(), m, create_graph=True)
        return found

    for mine, other in zip(derivatives(minibatch_similarities), derivatives(broadcast), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("cached", [1, 200, 10**6])
def test_kernels_at_a_time_change_nothing(cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    m = draw(6, 13, 2).requires_grad_()
    monkeypatch.setattr(module, "CACHED", cached)
    o = minibatch_similarities(m)
    (gradient,) = torch.autograd.grad((o * draw(6, 13)).sum(), m)
    (expected,) = torch.autograd.grad((broadcast(m) * draw(6, 13)).sum(), m)
    torch.testing.assert_close(o, broadcast(m))
    torch.testing.assert_close(gradient, expected)


def test_identical_samples_have_finite_gradients() -> None:
    m = draw(1, 3, 2).repeat(4, 1, 1).requires_grad_()
    (slope,) = torch.autograd.grad(minibatch_similarities(m).square().sum(), m, create_graph=True)
    (second,) = torch.autograd.grad(slope.square().sum() + slope.sum(), m)
    assert torch.equal(slope, torch.zeros_like(slope)) and second.isfinite().all()


def test_no_matrix_of_pairs_is_kept_for_the_backward_pass() -> None:
    def largest(function: Callable[[Tensor], Tensor]) -> int:
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
            function(torch.randn(40, 6, 5, requires_grad=True))
        return max(kept)

    assert largest(minibatch_similarities) == 40 * 6 * 5
    assert largest(broadcast) >= 40 * 40 * 6 * 5


# -- standard deviation --------------------------------------------------------------------------------------------


def stddev_by_hand(x: Tensor, group_size: int, features: int = 1, ddof: int = 0) -> np.ndarray[Any, Any]:
    """(B, features), with samples n, n + M, ... in a group, M = B // group_size, at least 1."""
    a = x.detach().numpy()
    groups = max(1, len(a) // group_size)
    out = np.zeros((len(a), features))
    for g in range(groups):
        deviation = np.sqrt(a[g::groups].var(axis=0, ddof=ddof) + 1e-8)
        parts = np.split(deviation, features, axis=0)
        out[g::groups] = [part.mean() for part in parts]
    return out


@settings(deadline=None, max_examples=40)
@given(
    b=st.integers(1, 13), group_size=st.integers(1, 6), features=st.integers(1, 3),
    positions=st.sampled_from([(), (3,), (2, 3)]), seed=st.integers(0, 99),
)  # fmt: skip
def test_stddev_is_the_deviation_of_the_group(
    b: int, group_size: int, features: int, positions: tuple[int, ...], seed: int
) -> None:
    x = draw(b, 2 * features, *positions, seed=seed)
    out = minibatch_stddev(x, group_size, features)
    assert out.shape == (b, 3 * features, *positions) and torch.equal(out[:, : 2 * features], x)
    added = out[:, 2 * features :].flatten(2) if positions else out[:, 2 * features :, None]
    assert (added == added[:, :, :1]).all()  # the same at all positions
    np.testing.assert_allclose(added[:, :, 0], stddev_by_hand(x, group_size, features), rtol=1e-12)
    groups = max(1, b // group_size)
    sizes = [len(x[g::groups]) for g in range(groups)]
    assert min(sizes) >= min(group_size, b) and max(sizes) - min(sizes) <= 1


def test_groups_are_those_of_the_official_code() -> None:
    values = torch.tensor([0, 0, 0, 0, 1, 2, 3, 4, 100, 200, 300, 400], dtype=double)[:, None]
    added = minibatch_stddev(values, 4)[:, 1].numpy()
    official = np.sqrt(values.numpy().reshape(4, 3).var(0) + 1e-8)  # GM: sample n is in group n mod M
    np.testing.assert_allclose(added, np.tile(official, 4))
    swapped = np.repeat(official, 4)  # a known bug of a port: numbers handed out to the wrong samples
    neighbours = np.repeat(values.numpy().reshape(3, 4).std(1), 4)
    unbiased = stddev_by_hand(values, 4, ddof=1)[:, 0]
    assert not any(np.allclose(added, wrong) for wrong in (swapped, neighbours, unbiased))


def test_identical_samples_vary_by_nothing_and_have_finite_gradients() -> None:
    for x in (draw(1, 3, 2, 2).repeat(8, 1, 1, 1), draw(1, 5)):  # one repeated sample; a batch of one
        x.requires_grad_()
        added = minibatch_stddev(x)[:, -1]
        np.testing.assert_allclose(added.detach(), 1e-4, rtol=1e-12)
        (slope,) = torch.autograd.grad(added.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(slope.square().sum() + slope.sum(), x)
        assert torch.equal(slope, torch.zeros_like(slope)) and second.isfinite().all()
        (wrong,) = torch.autograd.grad(minibatch_stddev(x, eps=0.0)[:, -1].sum(), x)
        assert wrong.isnan().any()


@pytest.mark.parametrize("b", [4, 7])
def test_second_derivatives_of_the_deviation(b: int) -> None:
    x = draw(b, 4, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: minibatch_stddev(t, 2, 2), x)
    assert torch.autograd.gradgradcheck(lambda t: minibatch_stddev(t, 2, 2), x)


def test_a_large_group_is_the_whole_batch_in_any_order() -> None:
    x, order = draw(9, 4), torch.randperm(9, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(minibatch_stddev(x[order], 1000), minibatch_stddev(x, 1000)[order])
    np.testing.assert_allclose(minibatch_stddev(x, 1000)[:, -1], np.sqrt(x.numpy().var(0) + 1e-8).mean())
    assert not torch.allclose(minibatch_stddev(x[order], 2), minibatch_stddev(x, 2)[order])


@pytest.mark.parametrize("sizes", [{"features": 3}, {"features": 0}, {"group_size": 0}])
def test_sizes_of_the_deviation_that_do_not_fit(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"shape \(6, 4\) has no statistics for group_size"):
        minibatch_stddev(draw(6, 4), **sizes)


# -- modules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6,), (2, 3, 1)])
@pytest.mark.parametrize("weight_norm", [False, True])
def test_the_layer_appends_what_the_paper_says(shape: tuple[int, ...], weight_norm: bool) -> None:
    layer = MinibatchDiscrimination(6, 4, 3, weight_norm=weight_norm).double()
    x = draw(5, *shape)
    out = layer(x)
    assert out.shape == (5, shape[0] + 4, *shape[1:]) and torch.equal(out[:, : shape[0]], x)
    expected = by_hand(torch.tensor(np.einsum("na,abc->nbc", x.flatten(1).numpy(), layer.T.detach().numpy())))
    added = out[:, shape[0] :].detach()
    np.testing.assert_allclose(added.flatten(2)[:, :, 0] if added.dim() > 2 else added, expected, rtol=1e-6)
    np.testing.assert_allclose(layer.T.detach().norm(dim=0), 1, rtol=1e-6)
    assert "6, kernels=4, dims=3" in repr(layer)


def test_weight_norm_leaves_the_length_to_log_scale() -> None:
    layer = MinibatchDiscrimination(6, 4, 3, weight_norm=True).double()
    x, m = draw(5, 6), None
    with torch.no_grad():
        m = layer.projected(x)
        layer.T.mul_(7)
        torch.testing.assert_close(layer.projected(x), m)
        assert layer.log_scale is not None
        layer.log_scale[1, 2] += math.log(3)
        scaled = m.clone()
        scaled[:, 1, 2] *= 3
        torch.testing.assert_close(layer.projected(x), scaled)


@pytest.mark.parametrize("weight_norm", [False, True])
@pytest.mark.parametrize("average", [False, True])
def test_calibration_is_the_official_initialisation(weight_norm: bool, average: bool) -> None:
    layer = MinibatchDiscrimination(6, 4, 3, weight_norm=weight_norm, average=average).double()
    x = 100 * draw(9, 6)
    layer.calibrate(x)
    m = layer.projected(x).detach().numpy()
    distances = np.abs(m[:, None] - m[None]).sum(-1)
    distances[np.arange(9), np.arange(9)] = np.inf
    np.testing.assert_allclose(distances.min(1).mean(0), 2, rtol=1e-9)
    added = layer(x)[:, 6:].detach()
    np.testing.assert_allclose(added.mean(0), 0, atol=1e-9)
    assert added.std() > (0.001 if average else 0.01)
    torch.testing.assert_close(
        added + layer.center, minibatch_similarities(layer.projected(x).detach(), average=average)
    )


def test_centring_alone_keeps_the_scale_and_copies_do_no_harm() -> None:
    layer = MinibatchDiscrimination(6, 4, 3).double()
    before = layer.T.detach().clone()
    layer.calibrate(draw(9, 6), rescale=False)
    assert torch.equal(layer.T, before)
    np.testing.assert_allclose(layer(draw(9, 6))[:, 6:].detach().mean(0), 0, atol=1e-12)
    layer.calibrate(draw(1, 6).repeat(4, 1))
    assert torch.equal(layer.T, before) and torch.equal(layer.center, torch.full((4,), 3.0, dtype=double))
    layer.calibrate(draw(1, 6))  # no others
    assert torch.equal(layer.T, before) and torch.equal(layer.center, torch.zeros(4, dtype=double))


def test_sizes_of_the_modules_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="1 or more, not 6, 0, 5"):
        MinibatchDiscrimination(6, 0)
    for sizes in ({"group_size": 1}, {"features": 0}):
        with pytest.raises(ValueError, match="group_size must be 2 or more"):
            MinibatchStddev(**sizes)
    assert repr(MinibatchStddev(6, 2)) == "MinibatchStddev(group_size=6, features=2)"


def test_statistics_of_a_smaller_last_batch() -> None:
    layer, x = MinibatchDiscrimination(6, 4, 3).double().eval(), draw(8, 6)
    np.testing.assert_allclose(layer(x[:3])[:, 6:].detach(), by_hand(layer.projected(x[:3])), rtol=1e-10)
    same = draw(1, 6).repeat(8, 1)
    averaging = MinibatchDiscrimination(6, 4, 3, average=True).double().eval()
    assert torch.equal(averaging(same[:3])[0], averaging(same)[0])  # comparable
    assert not torch.equal(layer(same[:3])[0], layer(same)[0])  # a sum is not
    assert MinibatchStddev()(x[:3]).shape == (3, 7) and MinibatchStddev()(x[:6]).shape == (6, 7)


# -- the point -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_a_collapsed_batch_of_plausible_samples_is_seen(kind: Any) -> None:
    """Each sample by itself comes from the same distribution in both batches: 8 modes, all of them or one at random."""
    generator = torch.Generator().manual_seed(0)
    angles = torch.arange(8) * math.pi / 4
    modes = torch.stack([angles.cos(), angles.sin()], 1)

    def batch(collapsed: bool) -> Tensor:
        which = torch.randint(8, (1 if collapsed else 16,), generator=generator).expand(16)
        return modes[which] + 0.01 * torch.randn(16, 2, generator=generator)

    torch.manual_seed(0)
    critic = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 1), nn.Flatten(0))
    if kind:
        insert(critic, batch(False), kind=kind, kernels=8, group_size=16)
    optimizer = torch.optim.Adam(critic.parameters(), lr=0.05)
    for _ in range(100):
        loss = nn.functional.softplus(-critic(batch(False))).mean() + nn.functional.softplus(critic(batch(True))).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        right = torch.stack([t for _ in range(50) for t in (critic(batch(False)) > 0, critic(batch(True)) < 0)])
    accuracy = right.double().mean().item()
    assert accuracy > 0.97 if kind else accuracy < 0.65


# -- into a network ------------------------------------------------------------------------------------------------


class Foreign(nn.Module):
    """A patch critic whose last layer is not the last one registered, with one layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.ModuleDict({"score": nn.Conv2d(6, 1, 3, padding=1)})
        self.body = nn.Sequential(nn.Conv2d(2, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 1))
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head["score"](self.body(x)).flatten(1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("before", [None, "body.3"])
def test_a_layer_of_a_foreign_network_is_widened(kind: Any, before: str | None) -> None:
    critic, x = Foreign().train(), torch.randn(5, 2, 8, 8)
    critic.body[1].eval()
    old, original = {k: v.clone() for k, v in critic.state_dict().items()}, copy.deepcopy(critic)
    statistics = insert(critic, x, kind=kind, before=before, kernels=3, dims=2)
    name, inside = ("head.score", 6) if before is None else ("body.3", 4)
    place = critic.get_submodule(name)
    extra = 3 if kind == "kernels" else 1
    assert place.statistics is statistics and place.layer.in_channels == inside + extra
    assert isinstance(statistics, MinibatchDiscrimination if kind == "kernels" else MinibatchStddev)
    new = critic.state_dict()
    assert torch.equal(new[f"{name}.layer.weight"][:, :inside], old.pop(f"{name}.weight"))
    assert torch.equal(new[f"{name}.layer.bias"], old.pop(f"{name}.bias"))
    assert all(torch.equal(new[key], value) for key, value in old.items())
    columns = place.layer.weight[:, inside:]
    bound = 1 / math.sqrt(place.layer.weight[0].numel())
    assert 0.5 * bound < columns.abs().max() <= bound
    assert critic.training and place.layer.training and not critic.body[1].training
    assert not any(m._forward_pre_hooks for m in critic.modules())
    assert not torch.equal(critic(x), original(x))
    with torch.no_grad():
        columns.zero_()
    torch.testing.assert_close(critic(x), original(x))


def test_maps_get_the_statistics_of_all_their_positions() -> None:
    critic, x = Foreign().double().eval(), draw(5, 2, 8, 8)
    statistics = insert(critic, x, before="body.3", kernels=3)
    seen: list[Tensor] = []
    statistics.register_forward_hook(lambda m, a, output: seen.append(output))
    critic(x)
    features = critic.body[:3](x)
    assert isinstance(statistics, MinibatchDiscrimination) and len(statistics.T) == 4 * 4 * 4
    maps = by_hand(statistics.projected(features))
    np.testing.assert_allclose(
        seen[0][:, 4:].detach(), np.broadcast_to(maps[:, :, None, None], (5, 3, 4, 4)), rtol=1e-9
    )


def test_several_inputs_lazy_layers_and_other_dtypes() -> None:
    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.joint, self.out = nn.LazyLinear(6), nn.Linear(6, 1, bias=False)

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            return self.out(self.joint(torch.cat([x, z], 1)).relu()).squeeze(1)

    critic = Pairs().double()
    insert(critic, draw(4, 3), draw(4, 2), kernels=2)
    assert critic(draw(4, 3), draw(4, 2)).dtype == double
    assert critic.out.layer.in_features == 8 and critic.out.layer.bias is None
    frozen = nn.Sequential(nn.Linear(3, 2))
    frozen.requires_grad_(False)
    insert(frozen, torch.zeros(2, 3), kind="stddev")
    assert not frozen[0].layer.weight.requires_grad


class Stubborn(nn.Module):
    def __init__(self, call: Callable[[nn.Module, Tensor], Tensor], layer: nn.Module | None = None) -> None:
        super().__init__()
        self.out, self.call = layer or nn.Linear(3, 1), call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.out, x)


def shared() -> nn.Module:
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    network[1].weight = network[0].weight
    return network


REFUSED: list[tuple[nn.Module, str | None, str]] = [
    (Foreign(), "haed.score", r"no module called 'haed.score' .*'head.score'\?\); it has head.score \(Conv2d\)"),
    (Foreign(), "body.1", "'body.1', for it is a BatchNorm2d: name .* one of body.0, body.3, head.score"),
    (Foreign(), "unused", "'unused', for it is never called"),
    (nn.Sequential(nn.Flatten(), nn.ReLU()), None, r"calls none; it has 0 \(Flatten\), 1 \(ReLU\)"),
    (nn.Linear(3, 1), None, "put it into a Sequential"),
    (nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 1))), None, "'0': its weight is computed from"),
    (nn.Sequential(nn.utils.spectral_norm(nn.Linear(3, 1))), None, "insert first, normalise afterwards"),
    (nn.Sequential(nn.Unflatten(1, (3, 1)), nn.Conv1d(3, 3, 1, groups=3)), None, "in groups"),
    (shared(), None, "used in two places"),
    (Stubborn(lambda out, x: out(x) + out(-x)), None, "called 2 times for one batch"),
    (Stubborn(lambda out, x: out(x.repeat(2, 1))), None, r"shape \(8, 3\), not one vector or map for each of 4 samples"),
    (Stubborn(lambda out, x: out(x[:, None]).squeeze(1)), None, r"shape \(4, 1, 3\), not one vector"),
    (Stubborn(lambda out, x: out(x) * out.weight.norm()), None, "does not work with a Sequential in the place of 'out'"),
]  # fmt: skip


@pytest.mark.parametrize(("critic", "before", "message"), REFUSED)
def test_what_cannot_be_done_is_refused_and_changes_nothing(
    critic: nn.Module, before: str | None, message: str
) -> None:
    old = copy.deepcopy(critic.state_dict())
    x = torch.randn(4, 2, 8, 8) if isinstance(critic, Foreign) else torch.randn(4, 3)
    with pytest.raises(UsageError, match=message):
        insert(critic, x, before=before, kernels=2)
    assert list(critic.state_dict()) == list(old)
    assert all(torch.equal(v, old[k]) for k, v in critic.state_dict().items())
    critic(x)


def test_sizes_that_do_not_fit_the_layer_are_refused_with_its_name() -> None:
    with pytest.raises(UsageError, match="before '0': in_features, kernels and dims must be 1 or more.* has 0"):
        insert(nn.Sequential(nn.Linear(3, 1)), torch.zeros(2, 3), kernels=0)
    with pytest.raises(UsageError, match="features that divide"):
        insert(nn.Sequential(nn.Linear(3, 1)), torch.zeros(2, 3), kind="stddev", features=2)
    with pytest.raises(UsageError, match="not a ReLU"):
        widened(nn.ReLU(), 1)


# -- the plugin ----------------------------------------------------------------------------------------------------


def plugins(*names: str, **options: Any) -> dict[str, object]:
    return create(names, {"minibatch_discrimination": options, "unrolled": {"k": 1}} if "unrolled" in names
                  else {"minibatch_discrimination": options})[0]  # fmt: skip


def small(kind: Any = "kernels", **options: Any) -> MinibatchStatistics:
    sizes = {"kernels": 6, "dims": 3} if kind == "kernels" else {}
    return MinibatchStatistics(kind=kind, **{**sizes, **options})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("data", ["vector", "image"])
def test_it_trains(kind: Any, data: str) -> None:
    gan, log = run({"mine": small(kind)}, kind=data)
    assert all(math.isfinite(v) for *_, terms in log.updates for v in terms.values())
    place = gan.discriminator.layers.out if data == "vector" else gan.discriminator.out
    plain = tiny_gan(data).discriminator.state_dict()
    start = tiny_gan(data, {"mine": small(kind)}).discriminator.state_dict()
    for key, tensor in plain.items():  # D starts as without the plugin
        wide = start[key] if key in start else start[key.replace("out.", "out.layer.")]
        assert torch.equal(wide[:, : tensor.shape[1]] if key.endswith("out.weight") else wide, tensor)
    assert all(any(p is q for q in gan.parameters("d")) for p in place.parameters())
    if kind == "kernels":
        key = "layers.out.statistics.T" if data == "vector" else "out.statistics.T"
        assert not torch.equal(place.statistics.T, start[key])


@pytest.mark.parametrize("options", [{"dims": 2}, {"weight_norm": True}, {"average": True}], ids=str)
def test_the_options_of_the_kernels_arrive(options: dict[str, Any]) -> None:
    gan = tiny_gan(plugins={"mine": small(calibrate="off", **options)})
    layer, x = gan.discriminator.layers.out.statistics.double(), draw(8, 16)
    assert layer.T.shape == (16, 6, options.get("dims", 3))
    assert (layer.log_scale is not None) == options.get("weight_norm", False)
    theta = layer.T.detach().numpy().copy()
    if layer.log_scale is not None:  # another length of T is none of its columns
        with torch.no_grad():
            layer.T.mul_(7)
            layer.log_scale.copy_(0.3 * draw(6, 3, seed=1))
        theta *= np.exp(0.3 * draw(6, 3, seed=1).numpy()) / np.linalg.norm(theta, axis=0)
    expected = by_hand(torch.tensor(np.einsum("na,abc->nbc", x.numpy(), theta)))
    expected = expected / 7 if options.get("average") else expected
    np.testing.assert_allclose(layer(x)[:, 16:].detach(), expected, rtol=1e-6)


@pytest.mark.parametrize("group_size", [2, 8])
def test_the_size_of_the_groups_arrives(group_size: int) -> None:
    gan = tiny_gan(plugins={"mine": small("stddev", group_size=group_size)})
    x = draw(8, 16)
    added = gan.discriminator.layers.out.statistics(x)[:, 16:]
    np.testing.assert_allclose(added, stddev_by_hand(x, group_size), rtol=1e-10)
    assert not np.allclose(added, stddev_by_hand(x, 4), rtol=1e-3)


class Spy:
    """Keeps what D's statistics were given in the last update of D, and the view it belongs to."""

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []

    @hookimpl(trylast=True)
    def setup(self, gan: Any) -> None:
        layer = next(m for m in gan.discriminator.modules() if isinstance(m, MinibatchDiscrimination | MinibatchStddev))
        layer.register_forward_pre_hook(lambda m, arguments: self.inputs.append(arguments[0].detach()))

    @hookimpl
    def pre_d_loss(self, view: View, real_logits: Tensor, fake_logits: Tensor) -> None:
        self.view, self.logits = view, (real_logits.detach(), fake_logits.detach())


@pytest.mark.parametrize("kind", KINDS)
def test_real_and_fake_are_never_compared(kind: Any) -> None:
    spy = Spy()
    gan = tiny_gan(plugins={"mine": small(kind, **({"calibrate": "off"} if kind == "kernels" else {})), "spy": spy})
    old = copy.deepcopy(gan.discriminator)
    update(gan, "d", 1)
    assert [len(x) for x in spy.inputs] == [8, 8]
    apart = [old(*side).detach() for side in spy.view]
    for mine, other in zip(spy.logits, apart, strict=True):
        assert torch.equal(mine, other)
    mixed = old(torch.cat([spy.view.real[0], spy.view.fake[0]])).detach()  # the wrong version
    assert not torch.allclose(mixed[:8], apart[0])


@pytest.mark.parametrize("calibrate", ["off", "center", "scale"])
def test_calibration_happens_once_before_the_first_update_on_the_real_side(calibrate: Any) -> None:
    spy = Spy()
    gan = tiny_gan(plugins={"mine": small(calibrate=calibrate), "spy": spy}, d_steps=2)
    start = copy.deepcopy(gan.discriminator.layers.out.statistics)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    update(gan, "d", 1)
    assert torch.equal(torch.get_rng_state(), state)
    expected = copy.deepcopy(start)
    if calibrate != "off":
        expected.calibrate(spy.inputs[-2], rescale=calibrate == "scale")
        assert len(spy.inputs) == 3 and torch.equal(spy.inputs[0], spy.inputs[1])
    center = gan.discriminator.layers.out.statistics.center.clone()
    assert torch.equal(center, expected.center) and center.any() == (calibrate != "off")
    ratio = (gan.discriminator.layers.out.statistics.T / start.T).detach().flatten(2).median()
    assert (ratio > 1.5) == (calibrate == "scale")
    for phase in "dgd":
        update(gan, phase, 1)
    assert torch.equal(center, gan.discriminator.layers.out.statistics.center)


def test_calibration_comes_with_d_s_first_batch_where_g_goes_first() -> None:
    torch.manual_seed(0)
    generator = nn.Linear(2, 3)
    critic = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1), nn.Flatten(0))
    optimizers = {p: torch.optim.SGD(m.parameters(), lr=0.1) for p, m in (("d", critic), ("g", generator))}
    attached = attach(generator, critic, [small(calibrate="center")], optimizers=optimizers)
    z, real = torch.randn(8, 2), torch.randn(8, 3)
    attached.g_loss(real, generator(z), z).backward()
    optimizers["g"].step()
    statistics = next(m for m in critic.modules() if isinstance(m, MinibatchDiscrimination))
    assert not statistics.center.any()
    attached.d_loss(real, generator(z), z)
    center = statistics.center.clone()
    assert center.any()
    attached.d_loss(real + 1, generator(z), z)
    assert torch.equal(statistics.center, center)


def test_calibration_moves_no_statistics_of_batch_norm_and_no_dropout() -> None:
    states = []
    for calibrate in ("center", "off"):
        torch.manual_seed(3)
        critic = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(), nn.Linear(5, 1), nn.Flatten(0))
        gan = tiny_gan(plugins={"mine": small(calibrate=calibrate)}, discriminator=critic)
        update(gan, "d", 1)
        assert gan.discriminator[1].num_batches_tracked == 2  # real and fake
        assert gan.discriminator[3].statistics.center.any() == (calibrate == "center")
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_same_seed_same_terms_and_the_global_stream_is_left_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = run({"mine": small()})[1].updates
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert run({"mine": small()})[1].updates == first
    assert run({"mine": small()}, seed=1)[1].updates != first


@pytest.mark.parametrize("options", [{}, {"weight_norm": True, "calibrate": "scale"}, {"kind": "stddev"}])
def test_a_continued_run_is_the_uninterrupted_one_to_the_bit(options: dict[str, Any]) -> None:
    def build() -> Any:
        return tiny_gan("image", {"mine": small(**options)}, {"averaging": Averaging(0.9)})

    first = build()
    train(first, 2)
    second = build()
    second.load_weights(copy.deepcopy(first.weights()))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for gan in (first, second):
        gan.next_real = lambda: torch.linspace(-1, 1, 8 * 28 * 28).view(8, 1, 28, 28)
        train(gan, 4)
    assert "generator_ema" in first.weights()
    for name, weights in first.weights().items():
        for key, tensor in weights.items():
            assert torch.equal(tensor, second.weights()[name][key]), f"{name} {key}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("data", ["vector", "image"])
@pytest.mark.parametrize("other", ["gradient_penalty", "r1", "packing", "bigan", "unrolled", "pairwise_gp"])
def test_it_combines(kind: str, data: str, other: str) -> None:
    for names in (("minibatch_discrimination", other), (other, "minibatch_discrimination")):
        sizes = {"kernels": 6} if kind == "kernels" else {}
        _, log = run(plugins(*names, kind=kind, **sizes), kind=data, steps=2)
        assert all(math.isfinite(v) for *_, terms in log.updates for v in terms.values())


def test_unrolling_through_a_gradient_penalty() -> None:
    names = ("minibatch_discrimination", "unrolled", "gradient_penalty")
    _, log = run(plugins(*names, kernels=6), steps=2)
    assert all(math.isfinite(v) for *_, terms in log.updates for v in terms.values())


@pytest.mark.parametrize("order", [1, -1])
def test_spectral_norm_bounds_the_wide_layer_and_not_t(order: int) -> None:
    names = ("minibatch_discrimination", "spectral_norm")[::order]
    gan, _ = run(plugins(*names, kernels=6))
    found = spectral_norms(gan.discriminator)
    assert "layers.out.layer" in found and not any("statistics" in name for name in found)
    assert gan.discriminator.layers.out.layer.weight.shape == (1, 16 + 6)


def test_packs_are_compared_with_packs() -> None:
    spy = Spy()
    gan = tiny_gan(plugins={**plugins("packing", "minibatch_discrimination", kernels=6), "spy": spy})
    update(gan, "d", 1)
    assert {len(x) for x in spy.inputs} == {4}
    with pytest.raises(UsageError, match="shown one at a time: set a larger batch size"):
        tiny_gan(plugins=plugins("packing", "minibatch_discrimination"), batch_size=2)
    with pytest.raises(UsageError, match="shown one at a time"):
        tiny_gan(plugins={"mine": small()}, batch_size=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("before", [None, "body.3"])
def test_it_works_on_the_users_own_network(kind: Any, before: str | None) -> None:
    class Own(Foreign):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.expand(-1, 2, -1, -1)[:, :, ::2, ::2])

    gan, log = run({"mine": small(kind, before=before)}, kind="image", discriminator=Own)
    assert isinstance(gan.discriminator.get_submodule(before or "head.score"), nn.Sequential)
    assert all(math.isfinite(v) for *_, terms in log.updates for v in terms.values())
    with pytest.raises(UsageError, match="no module called 'nose'.* it has head.score"):
        tiny_gan("image", {"mine": small(kind, before="nose")}, discriminator=Own)


def test_exported_weights_load_into_a_network_with_the_same_statistics() -> None:
    gan, _ = run(plugins("minibatch_discrimination", "spectral_norm", kernels=6), kind="image")
    exported = folded(gan.discriminator).state_dict()
    fresh = tiny_gan("image").discriminator
    x = torch.randn(5, 1, 28, 28)
    insert(fresh, x, kernels=6)
    fresh.load_state_dict(exported)
    assert torch.equal(fresh.eval()(x), gan.discriminator.eval()(x))


@pytest.mark.parametrize("options", [{"kernels": 0}, {"dims": 0}, {"group_size": 1}])
def test_options_out_of_range(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least"):
        MinibatchStatistics(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"kind": "kernel"}, {"calibrate": "centre"}])
def test_choices_that_there_are_not(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} is '.*' or '.*', not '{options[name]}'"):
        MinibatchStatistics(**options)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("stddev", {"kernels": 6}),
        ("stddev", {"dims": 3}),
        ("stddev", {"weight_norm": True}),
        ("stddev", {"average": True}),
        ("stddev", {"calibrate": "off"}),
        ("kernels", {"group_size": 8}),
    ],
    ids=str,
)
def test_options_of_the_other_kind_are_refused(kind: Any, options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(UsageError, match=f"kind={kind} has no {name}"):
        create(["minibatch_discrimination"], {"minibatch_discrimination": {"kind": kind, **options}})
    defaults = {name: getattr(MinibatchStatistics, name)}
    create(["minibatch_discrimination"], {"minibatch_discrimination": {"kind": kind, **defaults}})
