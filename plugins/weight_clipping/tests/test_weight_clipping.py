"""Weight clipping against numpy, on real networks; each check also meets wrong versions that it must reject."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from gankit_weight_clipping import WeightClipping, clip_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gankit import GAN, Player, UsageError, attach, hookimpl
from gankit.loop import update
from gankit.options import build
from gankit.testing import run, tiny_gan

torch.set_num_threads(1)


def critic() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.LeakyReLU(0.2), nn.Linear(8, 1))


# -- the function ----------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=8), st.floats(1e-3, 20))
def test_it_is_numpys_clip(values: list[float], c: float) -> None:
    tensors = [torch.tensor(values), torch.tensor(values).view(1, -1).requires_grad_()]
    clip_weights(tensors, c)
    for tensor in tensors:
        assert np.array_equal(
            tensor.detach().numpy().ravel(), np.clip(np.float32(values), -np.float32(c), np.float32(c))
        )


def test_it_leaves_no_graph_and_does_not_touch_gradients() -> None:
    w = torch.tensor([3.0, -0.5], requires_grad=True)
    w.square().sum().backward()
    clip_weights([w], 1.0)
    assert w.is_leaf
    assert w.tolist() == [1.0, -0.5]
    assert w.grad is not None
    assert w.grad.tolist() == [6.0, -1.0]


@pytest.mark.parametrize("c", [0.0, -1.0, math.nan])
def test_a_bound_must_be_positive(c: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        clip_weights([torch.ones(1)], c)
    with pytest.raises(UsageError):
        build(WeightClipping, {"c": c}, "weight_clipping")


# -- the plugin ------------------------------------------------------------------------------------------------------


class Record:
    """The largest parameter of each network after every update; registered before the plugin, so it acts after it."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, float, float]] = []

    @hookimpl(trylast=True)
    def post_step(self, gan: GAN, phase: str) -> None:
        networks = gan.discriminator, gan.generator
        self.seen.append((phase, *(max(p.abs().max().item() for p in n.parameters()) for n in networks)))


def check(plugin: object, kind: str = "vector") -> None:
    """Bounded after each of three D updates, some at the bound; the generator and buffers free; no D update missed."""
    record = Record()
    settings = {"discriminator": critic} if kind == "vector" else {}
    gan, _ = run({"weight_clipping": plugin, "record": record}, kind=kind, d_steps=3, steps=2, **settings)
    bound = np.float32(0.01)
    assert [d for phase, d, _ in record.seen if phase == "d"] == [bound] * 6
    assert all(g > 0.02 for _, _, g in record.seen)
    if kind == "vector":
        assert gan.discriminator[1].running_var.min() > 0.011
        assert gan.discriminator[1].num_batches_tracked > 1


@pytest.mark.parametrize("kind", ["vector", "image"])
def test_after_every_update_of_d(kind: str) -> None:
    check(WeightClipping(), kind)


class Wrong:
    def __init__(self, clip: Callable[[GAN, str], None]) -> None:
        self.clip = clip

    @hookimpl
    @torch.no_grad()
    def post_step(self, gan: GAN, phase: str) -> None:
        self.clip(gan, phase)


def clamp(tensors: list[Tensor]) -> None:
    for t in tensors:
        t.clamp_(-0.01, 0.01)


WRONG = {
    "once per step": lambda gan, phase: clamp(gan.parameters("d")) if phase == "g" else None,
    "the generator, too": lambda gan, phase: clamp(gan.parameters("d") + gan.parameters("g")),
    "buffers, too": lambda gan, phase: clamp([t for t in gan.discriminator.state_dict().values() if t.dim()]),
    "matrices only": lambda gan, phase: clamp([p for p in gan.parameters("d") if p.dim() > 1]),
    "from above only": lambda gan, phase: [p.clamp_(max=0.01) for p in gan.parameters("d")],
    "copies": lambda gan, phase: clamp([p.clone() for p in gan.parameters("d")]),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_check_rejects(wrong: str) -> None:
    with pytest.raises(AssertionError):
        check(Wrong(WRONG[wrong]))


def test_all_players_of_phase_d_and_only_what_is_trained() -> None:
    class Others:
        @hookimpl
        def players(self, gan: GAN) -> dict[str, Player]:
            frozen = nn.Linear(3, 1)
            frozen.bias.requires_grad_(False)
            with torch.no_grad():
                frozen.bias.fill_(2.0)
            return {"second": Player(frozen, "d"), "encoder": Player(nn.Linear(3, 4), "g")}

        @hookimpl
        def pre_d_loss(self, gan: GAN, real_logits: Tensor) -> dict[str, Tensor]:
            return {"second": gan.players["second"].module(torch.ones(1, 3)).sum()}

        @hookimpl
        def post_g_loss(self, gan: GAN) -> dict[str, Tensor]:
            return {"encoder": gan.players["encoder"].module(torch.ones(1, 3)).square().sum()}

    gan, _ = run({"others": Others(), "weight_clipping": WeightClipping()})
    assert gan.players["second"].module.weight.abs().max() <= 0.01
    assert gan.players["second"].module.bias.item() == 2
    assert gan.players["encoder"].module.weight.abs().max() > 0.02


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_frozen_backbone_in_a_loop_of_ones_own(when: str) -> None:
    torch.manual_seed(0)
    backbone, head, generator = nn.Linear(3, 8), nn.Linear(8, 1), nn.Linear(4, 3)
    discriminator, real, z = nn.Sequential(backbone, nn.Tanh(), head), torch.randn(8, 3), torch.randn(8, 4)
    if when == "before":
        backbone.requires_grad_(False)
    optimizers = {phase: torch.optim.SGD(m.parameters(), 0.1) for phase, m in (("d", discriminator), ("g", generator))}
    attached = attach(generator, discriminator, [WeightClipping()], optimizers=optimizers)
    attached.setup(real, generator(z), z)
    backbone.requires_grad_(False)
    frozen = copy.deepcopy(backbone.state_dict())
    attached.d_loss(real, generator(z), z).backward()
    optimizers["d"].step()
    assert all(torch.equal(value, frozen[key]) for key, value in backbone.state_dict().items())
    assert head.weight.abs().max() == np.float32(0.01)


def test_the_initial_weights_are_left_alone() -> None:
    plain = tiny_gan().discriminator.state_dict()
    assert all(
        torch.equal(value, plain[key])
        for key, value in tiny_gan(plugins={"weight_clipping": WeightClipping()}).discriminator.state_dict().items()
    )


@pytest.mark.parametrize("kind", ["vector", "image"])
def test_an_infinite_bound_changes_no_bit(kind: str) -> None:
    plain, _ = run({}, kind=kind)
    clipped, log = run({"weight_clipping": build(WeightClipping, {"c": "inf"}, "")}, kind=kind)
    for name, weights in clipped.weights().items():
        assert all(torch.equal(value, plain.weights()[name][key]) for key, value in weights.items())
    assert all(terms.keys() == {"adv"} for _, _, terms in log.updates)


NORMS = {
    "spectral": nn.utils.parametrizations.spectral_norm,
    "weight": nn.utils.parametrizations.weight_norm,
    "orthogonal": nn.utils.parametrizations.orthogonal,
    "old spectral": nn.utils.spectral_norm,
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_computed_weights_are_refused_and_why(norm: str) -> None:
    def normed() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), NORMS[norm](nn.Linear(4, 1)))

    with pytest.raises(UsageError, match="discriminator computes its weight at '2'.*--allow clipped-parametrization"):
        tiny_gan(plugins={"weight_clipping": WeightClipping()}, discriminator=normed)
    with pytest.warns(UserWarning, match="weight_clipping"):
        gan = tiny_gan(
            plugins={"weight_clipping": WeightClipping()},
            discriminator=normed,
            allow=frozenset({"clipped-parametrization"}),
        )
    update(gan, "d", 1)
    gan.discriminator(torch.zeros(1, 3))
    if "spectral" in norm:
        assert gan.discriminator[2].weight.abs().max() > 0.05  # the weight that acts is not bounded by 0.01


def test_a_generator_may_have_computed_weights() -> None:
    def generator() -> nn.Module:
        return nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3))

    run({"weight_clipping": WeightClipping()}, generator=generator, steps=1)


def test_a_layer_wrapped_in_setup_by_a_later_plugin_is_seen() -> None:
    class Wraps:
        @hookimpl
        def setup(self, gan: GAN) -> None:
            nn.utils.parametrizations.spectral_norm(gan.discriminator[0])

    with pytest.raises(UsageError, match="weight_clipping"):
        tiny_gan(plugins={"weight_clipping": WeightClipping(), "wraps": Wraps()}, discriminator=critic)


def test_the_next_step_after_a_round_trip_is_the_same() -> None:
    first, log = run({"weight_clipping": WeightClipping()}, steps=2)
    assert log.updates == run({"weight_clipping": WeightClipping()}, steps=2)[1].updates
    twin = tiny_gan(plugins={"weight_clipping": WeightClipping()})
    twin.load_weights(first.weights())
    twin.load_state_dict(copy.deepcopy(first.state_dict()))
    for gan in (first, twin):
        gan.next_real = lambda: torch.linspace(-1, 1, 24).view(8, 3)
        update(gan, "d", 3)
    for mine, his in zip(first.discriminator.parameters(), twin.discriminator.parameters(), strict=True):
        assert torch.equal(mine, his)
