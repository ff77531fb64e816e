"""Finding and replacing modules inside networks that are not ours."""

import pytest
import torch
from torch import nn

from gankit import UsageError, hookimpl, structure
from gankit.testing import run


class Foreign(nn.Module):
    """Nested, with one module that is called twice and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 2, 3, 2, 1), nn.BatchNorm2d(2), nn.ReLU())
        self.twice = nn.Conv2d(2, 2, 3, 2, 1)
        self.unused = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.twice(self.twice(self.stem(x)))


def test_output_shapes_in_the_order_of_their_end_without_moving_anything() -> None:
    network = Foreign().train()
    network.stem[2].eval()
    before = {name: t.clone() for name, t in network.state_dict().items()}
    shapes = structure.output_shapes(network, torch.randn(5, 1, 16, 16))
    assert shapes == {
        "stem.0": (5, 2, 8, 8), "stem.1": (5, 2, 8, 8), "stem.2": (5, 2, 8, 8), "stem": (5, 2, 8, 8), "twice": (5, 2, 2, 2),
    }  # fmt: skip
    assert list(shapes)[-1] == "twice"
    assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())
    assert network.training and network.stem.training and not network.stem[2].training
    assert not any(m._forward_hooks for m in network.modules())


class Referring(Foreign):
    """Calls itself on a batch of its own, and has a layer under two names with a computed weight."""

    def __init__(self) -> None:
        super().__init__()
        self.again = self.stem[0]
        nn.utils.parametrizations.spectral_norm(self.twice)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + (self(torch.ones(1, 1, 16, 16)) if len(x) > 1 else 0)


def test_calls_in_order_with_graphs_and_without_those_of_a_call_inside() -> None:
    network, x = Referring(), torch.randn(5, 1, 16, 16)
    found = structure.calls(network, x)
    assert [name for name, _ in found] == ["stem.0", "stem.1", "stem.2", "stem", "twice", "twice", ""]
    assert [len(output) for _, output in found] == [5] * 7
    assert found[-1][1].requires_grad
    assert torch.equal(found[-1][1], network.eval()(x))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def test_replace_reaches_all_names_of_a_module() -> None:
    network = Referring()
    new = structure.replace(network, "stem.0", lambda module: nn.Identity())
    assert network.again is new
    assert network.stem[0] is new


def test_replace_keeps_device_and_mode_and_hands_over_the_old_module() -> None:
    network = Foreign().eval()
    old = network.stem[1]
    new = structure.replace(network, "stem.1", lambda module: nn.Sequential(module, nn.Conv2d(2, 2, 1)))
    assert network.stem[1] is new
    assert new[0] is old
    assert not new.training
    assert "stem.1.1.weight" in network.state_dict()
    with pytest.raises(ValueError, match="itself"):
        structure.replace(network, "", lambda module: module)
    meta = Foreign().to("meta")
    assert structure.replace(meta, "unused", lambda module: nn.Linear(3, 4)).weight.device.type == "meta"


def test_messages_name_what_was_looked_at() -> None:
    with pytest.raises(UsageError, match=r"critic has no .* 'stem\.9' \(did you mean 'stem\.\d'\?\); it has stem\.0"):
        structure.named(Foreign(), "stem.9", "critic")
    assert structure.listing(Foreign(), limit=2) == "stem.0 (Conv2d), stem.1 (BatchNorm2d), and 3 more"
    assert structure.listing(nn.ReLU()) == "nothing but the ReLU itself"
    assert list(structure.of_type(Foreign(), nn.Conv2d)) == ["stem.0", "twice"]


def test_new_layers_start_the_same_whatever_else_was_drawn_before() -> None:
    class Layers:
        def __init__(self, name: str) -> None:
            self.name = name

        @hookimpl
        def setup(self, gan: object) -> None:
            torch.rand(3 if self.name == "noisy" else 1)
            with gan.initialising(self):  # type: ignore[attr-defined]
                self.layer = nn.Linear(2, 2)

    state = torch.get_rng_state()
    alone, beside, other = Layers("a"), Layers("a"), Layers("noisy")
    run({"mine": alone}, steps=1)
    run({"noisy": other, "mine": beside}, steps=1)
    assert torch.equal(alone.layer.weight, beside.layer.weight)
    assert not torch.equal(alone.layer.weight, other.layer.weight)
    torch.set_rng_state(state)
