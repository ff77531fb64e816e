import copy
from collections.abc import Callable
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from gankit_packing import Packing, pack, unpack
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gankit import UsageError, View, hookimpl
from gankit.distributed import Team
from gankit.gan import derive_seed
from gankit.loop import train, update
from gankit.plugins import create
from gankit.testing import run, tiny_gan

SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=3)


def plugins(*names: str, **options: Any) -> dict[str, object]:
    return create(names, {name: values for name, values in options.items() if name in names})[0]


class Spy:
    """Keeps the last view and critic of phase "d", and the terms computed from them."""

    @hookimpl
    def pre_d_loss(self, critic: Callable[..., Tensor], view: View, real_logits: Tensor) -> None:
        self.critic, self.view, self.real_logits = critic, view, real_logits

    @hookimpl
    def post_step(self, terms: dict[str, Tensor], phase: str) -> None:
        if phase == "d":
            self.terms = terms


# -- the functions -------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(packs=st.integers(1, 5), m=st.integers(1, 5), shape=SHAPES, integer=st.booleans())
def test_pack_is_a_bijection(packs: int, m: int, shape: list[int], integer: bool) -> None:
    t = torch.arange(packs * m * int(np.prod(shape)), dtype=torch.int64 if integer else torch.float64)
    t = t.reshape(packs * m, *shape)
    packed = pack(t, m)
    assert packed.shape == (packs, m * shape[0], *shape[1:]) and packed.dtype == t.dtype
    assert torch.equal(unpack(packed, m), t)
    assert torch.equal(pack(unpack(packed, m), m), packed)


@settings(deadline=None)
@given(packs=st.integers(1, 4), m=st.integers(1, 4), shape=SHAPES)
def test_a_pack_is_its_samples_concatenated_along_channels(packs: int, m: int, shape: list[int]) -> None:
    samples = np.random.default_rng(0).normal(size=(packs * m, *shape))
    expected = [np.concatenate(samples[m * j : m * (j + 1)], axis=0) for j in range(packs)]
    assert np.array_equal(pack(torch.from_numpy(samples), m).numpy(), np.stack(expected))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda t: torch.cat([*t.unflatten(0, (2, -1)).transpose(0, 1)], 1).transpose(0, 1).reshape(4, 6, 5, 5),
        lambda t: torch.cat([t[0::2], t[1::2]], dim=2),  # along the height
        lambda t: t.unflatten(1, (3, 1)).reshape(4, 2, 3, 5, 5).transpose(1, 2).reshape(4, 6, 5, 5),  # channels mixed
    ],
)
def test_other_groupings_are_not_packs(wrong: Callable[[Tensor], Tensor]) -> None:
    t = torch.randn(8, 3, 5, 5)
    expected = torch.stack([torch.cat([t[2 * j], t[2 * j + 1]]) for j in range(4)])
    assert torch.equal(pack(t, 2), expected)
    assert wrong(t).shape != expected.shape or not torch.equal(wrong(t), expected)


def test_labels_become_columns_and_memory_layout_does_not_matter() -> None:
    labels = torch.tensor([3, 1, 4, 1, 5, 9])
    assert torch.equal(pack(labels, 3), torch.tensor([[3, 1, 4], [1, 5, 9]]))
    assert torch.equal(unpack(pack(labels, 3), 3), labels[:, None])
    images = torch.randn(4, 3, 2, 2)
    assert torch.equal(pack(images.to(memory_format=torch.channels_last)), pack(images))


def test_the_graph_is_kept() -> None:
    t = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 4, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((pack(t, 2) * weight).sum(), t)
    assert torch.equal(gradient, unpack(weight, 2))


@pytest.mark.parametrize("m", [0, -1, 4])
def test_sizes_that_do_not_fit_are_refused(m: int) -> None:
    with pytest.raises(ValueError, match="samples, not 6"):
        pack(torch.zeros(6, 2), m)
    with pytest.raises(ValueError, match="cannot hold packs"):
        unpack(torch.zeros(6, 6), m)
    with pytest.raises(ValueError, match="cannot hold packs"):
        unpack(torch.zeros(6), 2)


# -- the plugin ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vector", "image"])
@pytest.mark.parametrize("m", [2, 4])
def test_it_trains_on_packs(kind: str, m: int) -> None:
    spy = Spy()
    gan, log = run({"packing": Packing(m), "spy": spy}, kind=kind)
    first = next(p for p in gan.discriminator.parameters())
    assert first.shape[1] == m * gan.shape[0]
    assert spy.real_logits.shape == (8 // m,)
    assert len(log.updates) == 6 and all(np.isfinite(v) for *_, terms in log.updates for v in terms.values())


def test_packs_of_one_change_no_bit() -> None:
    packed, log = run({"packing": Packing(1)})
    plain, plain_log = run({})
    assert log.updates == plain_log.updates
    for mine, other in zip(packed.parameters("d"), plain.parameters("d"), strict=True):
        assert torch.equal(mine, other)


def test_same_seed_same_terms_and_m_matters() -> None:
    assert run({"packing": Packing(2)})[1].updates == run({"packing": Packing(2)})[1].updates
    assert run({"packing": Packing(2)})[1].updates != run({"packing": Packing(4)})[1].updates


def test_a_batch_that_does_not_divide_is_refused_with_the_numbers() -> None:
    with pytest.raises(UsageError, match=r"joins 3 samples .* batch of 8: set the batch size to 9"):
        tiny_gan(plugins={"packing": Packing(3)})
    with pytest.raises(ValueError, match="at least 1"):
        Packing(0)


@pytest.mark.parametrize(("batch", "m", "fitting"), [(10, 2, 12), (4, 3, 6)])
def test_with_several_processes_the_numbers_are_those_of_the_whole_batch(batch: int, m: int, fitting: int) -> None:
    packing = Packing(m)
    gan = tiny_gan(batch_size=batch)
    gan.team, gan.plugins = Team(0, 2), {"packing": packing}
    gan.manager.register(packing, "packing")
    with pytest.raises(
        UsageError, match=rf"share, {batch // 2} of the batch of {batch}: set the batch size to {fitting};"
    ):
        gan.first_view()
    gan.batch_size = fitting
    assert len(gan.first_view().real[0]) == fitting // 2 // m


def test_a_discriminator_made_for_single_samples_is_refused() -> None:
    single = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))
    with pytest.raises(UsageError, match=r"cannot score what it is shown, tensors of shape \(4, 6\)"):
        tiny_gan(plugins={"packing": Packing(2)}, discriminator=single)


def test_a_discriminator_with_one_logit_per_sample_is_refused() -> None:
    class Unpacking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, packs: Tensor) -> Tensor:
            return self.layer(unpack(packs, 2)).squeeze(1)

    with pytest.raises(UsageError, match="one logit per sample"):
        tiny_gan(plugins={"packing": Packing(2)}, discriminator=Unpacking())


@pytest.mark.parametrize("kind", ["vector", "image"])
def test_a_joint_view_packs_both_tensors_in_either_order(kind: str) -> None:
    seen = []
    for order in permutations(("packing", "bigan")):
        spy = Spy()
        gan, log = run({**plugins(*order), "spy": spy}, kind=kind)
        shapes = [t.shape[1:] for t in spy.view.real]
        assert shapes == [(2 * gan.shape[0], *gan.shape[1:]), (2 * 4,)]
        seen.append(log.updates)
    assert seen[0] == seen[1]


def test_labels_are_packed_with_the_samples() -> None:
    labels = torch.arange(8)

    class Labels:
        @hookimpl(wrapper=True)
        def view(self) -> Any:
            view = yield
            return View((*view.real, labels), (*view.fake, labels))

    class Conditional(nn.Module):
        def __init__(self, shapes: tuple[tuple[int, ...], ...]) -> None:
            super().__init__()
            assert [tuple(s) for s in shapes] == [(6,), (2,)]
            self.embed, self.out = nn.Embedding(8, 3), nn.Linear(6 + 2 * 3, 1)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.out(torch.cat([x, self.embed(y).flatten(1)], 1)).squeeze(1)

    spy = Spy()
    for order in permutations([("packing", Packing(2)), ("labels", Labels())]):
        run({**dict(order), "spy": spy}, discriminator=lambda shapes: Conditional(shapes))
        assert torch.equal(spy.view.real[1], torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]]))


def test_a_gradient_penalty_takes_one_weight_and_one_norm_per_pack() -> None:
    spy = Spy()
    gan = tiny_gan(plugins={**plugins("packing", "gradient_penalty"), "spy": spy})
    initial = {k: v.clone() for k, v in gan.discriminator.state_dict().items()}
    update(gan, "d", 1)
    gan.discriminator.load_state_dict(initial)
    stream = torch.Generator().manual_seed(derive_seed(0, "plugin:gradient_penalty"))
    u = torch.rand(4, generator=stream)  # four packs of two
    real, fake = spy.view.real[0].detach(), spy.view.fake[0].detach()

    def penalty(mixed: Tensor) -> float:
        norms = []
        for pack_of_two in mixed:  # one pack at a time: nothing can leak between packs
            x = pack_of_two[None].clone().requires_grad_()
            (slope,) = torch.autograd.grad(gan.discriminator(x).sum(), x)
            norms.append(float(np.sqrt((slope.numpy().astype(float) ** 2).sum())))
        return float(10 * np.mean((np.array(norms) - 1) ** 2))

    expected = penalty(u[:, None] * real + (1 - u[:, None]) * fake)
    assert spy.terms["gradient_penalty"].item() == pytest.approx(expected, rel=1e-5)
    per_sample = torch.rand(8, generator=torch.Generator().manual_seed(stream.initial_seed())).repeat_interleave(3)
    wrong = penalty(pack(per_sample.view(8, 3)) * real + (1 - pack(per_sample.view(8, 3))) * fake)
    assert wrong != pytest.approx(expected, rel=1e-5)


def test_packed_penalties_go_with_a_joint_view() -> None:
    _, log = run(plugins("pairwise_gp", "packing"))
    assert all("pairwise_gp" in terms for phase, _, terms in log.updates if phase == "d")


def test_a_continued_run_takes_the_same_next_step() -> None:
    first, _ = run({"packing": Packing(2)}, steps=2)
    second = tiny_gan(plugins={"packing": Packing(2)})
    second.load_weights(first.weights())
    second.load_state_dict(copy.deepcopy(first.state_dict()))  # torch would share the optimisers' tensors
    for gan in (first, second):
        gan.next_real = lambda: torch.full((8, 3), 0.5)
        train(gan, 3)
    for mine, other in zip(first.parameters("d"), second.parameters("d"), strict=True):
        assert torch.equal(mine, other)
