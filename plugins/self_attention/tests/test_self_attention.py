import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from gankit_self_attention import Attended, SelfAttention, SelfAttention2d, attention, insert
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from gankit import UsageError, attach, networks, structure
from gankit.checks import spectral_norms
from gankit.loop import train, update
from gankit.networks import folded
from gankit.plugins import create
from gankit.testing import run, tiny_gan
from gankit.training import Averaging

Array = np.ndarray[Any, Any]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_hand(f: Array, g: Array, h: Array) -> Array:
    """o_j = sum_i beta_ji h_i of one sample, position by position: columns are positions, as in the paper."""
    out = np.zeros((h.shape[0], g.shape[1]))
    for j in range(g.shape[1]):
        s = np.array([sum(f[c, i] * g[c, j] for c in range(len(f))) for i in range(f.shape[1])])
        beta = np.exp(s) / np.exp(s).sum()
        out[:, j] = sum(beta[i] * h[:, i] for i in range(f.shape[1]))
    return out


def block_by_hand(block: SelfAttention2d, x: Tensor) -> Array:
    """Equations 1-3 on each sample, with the matrices of the block; pooling by four slices."""
    w = {name: p.detach().numpy()[:, :, 0, 0] for name, p in block.named_parameters() if name != "gamma"}
    samples = []
    for sample in x.numpy():

        def pooled(maps: Array) -> Array:
            if block.pool:  # odd sides: the last row or column is compared with nothing
                maps = np.pad(maps, ((0, 0), (0, maps.shape[1] % 2), (0, maps.shape[2] % 2)), constant_values=-np.inf)
                corners = [maps[:, a::2, b::2] for a in (0, 1) for b in (0, 1)]
                maps = np.maximum.reduce(corners)
            return maps.reshape(len(maps), -1)

        def times(name: str, maps: Array) -> Array:
            return np.einsum("oc,chw->ohw", w[name], maps)

        flat = sample.reshape(len(sample), -1)
        o = by_hand(
            pooled(times("key.weight", sample)), w["query.weight"] @ flat, pooled(times("value.weight", sample))
        )
        o = w["out.weight"] @ o if "out.weight" in w else o
        samples.append((block.gamma.item() * o + flat).reshape(sample.shape))
    return np.stack(samples)


# -- the function and the block ------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 5), m=st.integers(1, 5), k=st.integers(1, 4), v=st.integers(1, 4), seed=st.integers(0, 99))
def test_attention_is_the_formula(n: int, m: int, k: int, v: int, seed: int) -> None:
    g, f, h = draw(2, n, k, seed=seed), draw(2, m, k, seed=seed + 1), draw(2, m, v, seed=seed + 2)
    expected = [by_hand(f[b].T.numpy(), g[b].T.numpy(), h[b].T.numpy()).T for b in range(2)]
    np.testing.assert_allclose(attention(g, f, h), np.stack(expected), rtol=1e-10, atol=1e-12)


def test_known_answers_and_wrong_versions() -> None:
    h = draw(1, 6, 3)
    nothing, f = torch.zeros(1, 6, 4, dtype=torch.float64), draw(1, 6, 4, seed=1)
    torch.testing.assert_close(attention(nothing, f, h), h.mean(1, keepdim=True).expand(1, 6, 3))
    unit = 100 * torch.eye(6, dtype=torch.float64)[None]
    torch.testing.assert_close(attention(unit, unit.flip(1), h), h.flip(1))  # each looks at its mirror image
    g = draw(1, 6, 4, seed=2)
    right = attention(g, f, h)
    assert not torch.allclose(right, (g @ f.mT).softmax(1) @ h)  # softmax over the positions that ask
    assert not torch.allclose(right, (g @ f.mT / 2).softmax(2) @ h)  # 1 / sqrt(K)
    assert not torch.allclose(right, attention(f, g, h))  # f and g are not the same


def test_shapes_that_do_not_fit_are_refused() -> None:
    for shapes in (
        [(2, 5, 4), (2, 6, 3), (2, 6, 3)],
        [(2, 5, 4), (2, 6, 4), (2, 5, 3)],
        [(2, 5, 4), (1, 6, 4), (1, 6, 3)],
    ):
        with pytest.raises(ValueError, match="do not have the shapes"):
            attention(*(torch.zeros(shape) for shape in shapes))
    with pytest.raises(ValueError, match="do not have the shapes"):
        attention(torch.zeros(5, 4), torch.zeros(5, 4), torch.zeros(5, 4))
    with pytest.raises(ValueError, match="1 or more"):
        SelfAttention2d(0)
    with pytest.raises(ValueError, match="C/8, C/2, C, not 'C/4'"):
        SelfAttention2d(8, value_channels="C/4")  # type: ignore[arg-type]


@pytest.mark.parametrize("value_channels", ["C/8", "C/2", "C"])
@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("channels", [4, 16])
def test_the_block_is_equations_1_to_3(value_channels: Any, pool: bool, channels: int) -> None:
    torch.manual_seed(0)
    block = SelfAttention2d(channels, value_channels=value_channels, pool=pool).double()
    x = draw(2, channels, 3, 4)
    assert torch.equal(block(x), x)  # gamma is 0
    nn.init.constant_(block.gamma, 0.7)
    y = block(x).detach()
    np.testing.assert_allclose(y, block_by_hand(block, x), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(torch.cat([block(x[:1]), block(x[1:])]), y)  # no sample sees another
    assert not torch.allclose(x - 0.7 * (y - x), y)
    expected = {"C/8": max(1, channels // 8), "C/2": channels // 2, "C": channels}[value_channels]
    assert block.key.weight.shape == block.query.weight.shape == (max(1, channels // 8), channels, 1, 1)
    assert len(block.value.weight) == expected
    assert ("out.weight" in block.state_dict()) == (value_channels != "C")
    assert not any("bias" in name for name in block.state_dict())


def test_weights_start_by_xaviers_rule() -> None:
    torch.manual_seed(0)
    block = SelfAttention2d(256)
    for layer in (block.key, block.query, block.value, block.out):
        bound = (6 / (256 + 32)) ** 0.5
        assert 0.98 * bound < layer.weight.abs().max() <= bound


def test_all_positions_are_alike() -> None:
    block = SelfAttention2d(8).double()
    nn.init.ones_(block.gamma)
    x = draw(2, 8, 3, 3)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    shuffled = x.flatten(2)[:, :, order].unflatten(2, (3, 3))
    torch.testing.assert_close(block(shuffled), block(x).flatten(2)[:, :, order].unflatten(2, (3, 3)))
    assert not torch.allclose(block(shuffled), block(x))


def test_first_and_second_derivatives() -> None:
    tensors = [draw(2, n, c, seed=c).requires_grad_() for n, c in ((3, 2), (4, 2), (4, 3))]
    assert torch.autograd.gradcheck(attention, tensors)
    assert torch.autograd.gradgradcheck(attention, tensors)
    for pool in (False, True):
        torch.manual_seed(0)
        block = SelfAttention2d(8, pool=pool).double()
        nn.init.constant_(block.gamma, 0.5)

        def call(x: Tensor, gamma: Tensor, key: Tensor, block: SelfAttention2d = block) -> Tensor:
            out: Tensor = torch.func.functional_call(block, {"gamma": gamma, "key.weight": key}, (x,))
            return out

        given_ = [draw(1, 8, 2, 3).requires_grad_(), block.gamma, block.key.weight]
        assert torch.autograd.gradgradcheck(call, [t.detach().requires_grad_() for t in given_])


# -- inserting into networks that are not ours ---------------------------------------------------------------------


class Functional(nn.Module):
    """Activations are functions, one convolution is called twice, the classifier at the end is none of our business."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(1, 16, 3, 2, 1)
        self.b = nn.Conv2d(16, 16, 3, 1, 1)
        self.same = nn.Conv2d(16, 16, 3, 1, 1)
        self.c = nn.Conv2d(16, 32, 3, 2, 1)
        self.unused = nn.Conv2d(16, 16, 1)
        self.out = nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.b(F.relu(self.a(x))))
        x = self.same(F.relu(self.same(x)))
        x = F.relu(self.c(x)).mean((2, 3))
        return self.out(x).squeeze(1)


class Residual(nn.Module):
    """A residual network whose shortcuts work before the pooling, so that layers inside a block see the larger maps."""

    class Block(nn.Module):
        def __init__(self, inside: int, outside: int) -> None:
            super().__init__()
            self.conv, self.shortcut = nn.Conv2d(inside, outside, 3, 1, 1), nn.Conv2d(inside, outside, 1)

        def forward(self, x: Tensor, scale: Tensor, *, power: int = 1) -> Tensor:
            main = F.avg_pool2d(self.conv(F.relu(x)) * scale**power, 2)
            return main + F.avg_pool2d(self.shortcut(x), 2)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([self.Block(1, 16), self.Block(16, 16), self.Block(16, 16)])
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, self.scale, power=2)
        return x.sum((1, 2, 3))


class UNet(nn.Module):
    """Skip connections: no module of the lower resolution carries everything."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.low = nn.Conv2d(1, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1)
        self.up = nn.ConvTranspose2d(8, 8, 4, 2, 1)
        self.out = nn.Conv2d(9, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([x, self.up(self.low(F.relu(self.down(x))))], 1))


def small(*layers: nn.Module, end: nn.Module | None = None) -> nn.Sequential:
    """16 channels of 8 x 8, then the layers, then ``end``, which defaults to a convolution that leaves 4 x 4."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, 2, 1), *layers, end or nn.Conv2d(16, 32, 3, 2, 1), nn.Flatten(1), nn.LazyLinear(1)
    )


def normed() -> nn.Sequential:
    """The weight of the second convolution, (32, 16, 8, 8), is returned by a module and looks like maps."""
    return small(nn.ReLU(), end=nn.utils.parametrizations.spectral_norm(nn.Conv2d(16, 32, 8)))


class Nested(nn.Module):
    """One module under two names, called by the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 16, 3, 2, 1)
        self.layers = nn.ModuleList([self.first, nn.Flatten(1), nn.LazyLinear(1)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Hidden(Nested):
    """The same, called from a list that no one knows of."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.list = nn.ModuleList(), list(self.layers)
        self.end = self.list[-1]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.list:
            x = layer(x)
        return x


class Twice(Residual):
    """Calls itself on something of its own before it answers, as virtual batch norm makes networks do."""

    def forward(self, x: Tensor) -> Tensor:
        return (self(torch.ones(1, 1, 16, 16)) if len(x) > 1 else 0) + super().forward(x)


IMAGES = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def ready(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    network = make()
    network(IMAGES)  # lazy layers take shape
    return network


def attended(network: nn.Module) -> list[str]:
    return list(structure.of_type(network, Attended))


@pytest.mark.parametrize(
    ("make", "resolution", "place"),
    [
        (Functional, None, "b"),  # not the convolution that is called twice, nor the one that never is
        (Functional, 4, "c"),
        (Residual, None, "blocks.0"),  # not blocks.1.conv or blocks.1.shortcut, which see 8 x 8 maps later
        (Residual, 4, "blocks.1"),
        (Twice, None, "blocks.0"),
        (UNet, None, "low"),
        (Nested, None, "first"),
        (normed, None, "1"),
        (lambda: small(nn.ReLU(inplace=True)), None, "1"),
        (lambda: small(nn.Dropout()), 8, "1"),
        (
            lambda: nn.Sequential(small(nn.ReLU())[:2], small(nn.ReLU())[2:]),
            None,
            "0.1",
        ),  # not the Sequential around it
        (lambda: small(nn.Conv2d(16, 1, 1), end=nn.Conv2d(1, 16, 3, 2, 1)), 8, "0"),  # one channel is no place
    ],
)
def test_it_finds_the_end_of_the_maps(make: Callable[[], nn.Module], resolution: int | None, place: str) -> None:
    network = ready(make)
    network.get_submodule(place).eval()  # a mode of its own
    modes = {m: m.training for m in network.modules()}
    outputs = copy.deepcopy(network).eval()(IMAGES)
    state = {name: t.clone() for name, t in network.state_dict().items()}
    block = insert(network, IMAGES, resolution=resolution)
    assert attended(network) == [place]
    assert network.get_submodule(f"{place}.attention") is block
    assert all(m.training == training for m, training in modes.items())
    assert not block.training
    assert not any(m._forward_hooks for m in network.modules())
    after, inside = network.state_dict(), place + "."
    for name, tensor in state.items():
        renamed = name.replace(inside, f"{inside}module.", 1) if name.startswith(inside) else name
        if not name.startswith("layers.0."):  # the second name of a module
            assert torch.equal(after[renamed], tensor)
    assert torch.equal(network.eval()(IMAGES), outputs)
    nn.init.ones_(block.gamma)
    assert not torch.equal(network(IMAGES), outputs)


@pytest.mark.parametrize("network", ["dcgan", "resnet"])
@pytest.mark.parametrize(("side", "default"), [(28, 14), (32, 16), (64, 32), (128, 32)])
def test_the_default_is_half_the_image_and_at_most_32(network: str, side: int, default: int) -> None:
    shape = (3, side, side)
    for made, x in (
        (networks.generator(shape, 2, network=network, width=8), torch.zeros(1, 2)),
        (networks.discriminator([shape], network=network, width=8), torch.zeros(1, *shape)),
    ):
        insert(made, x)
        (place,) = attended(made)
        assert structure.output_shapes(made, x)[place][2:] == (default, default)
        assert "." not in place.partition("layers.")[2]  # a block, and no layer inside one
        insert(made, x, resolution=7 if side == 28 else 8)  # a second one elsewhere
        assert len(attended(made)) == 2


def test_sides_that_differ_and_other_number_types() -> None:
    network = nn.Sequential(nn.Conv2d(1, 8, 3, (2, 1), 1), nn.Conv2d(8, 8, 3, 2, 1), nn.Flatten(), nn.LazyLinear(1))
    network(torch.zeros(2, 1, 8, 16))
    network.double()
    x = draw(2, 1, 8, 16)
    before = network(x)
    block = insert(network, x)
    assert attended(network) == ["1"]  # 2 x 8; the one before is 4 x 16
    assert block.gamma.dtype == torch.float64
    assert torch.equal(network(x), before)


def test_by_name_in_a_network_of_ones_own() -> None:
    network = ready(Residual)
    insert(network, IMAGES, after="blocks.1.conv", value_channels="C/2", pool=True)
    assert attended(network) == ["blocks.1.conv"]
    block = network.get_submodule("blocks.1.conv.attention")
    assert block.pool
    assert len(block.value.weight) == 8
    narrow = ready(lambda: small(nn.Conv2d(16, 3, 1), end=nn.Conv2d(3, 16, 3, 2, 1)))
    assert insert(narrow, IMAGES, after="1").key.weight.shape == (1, 3, 1, 1)  # fewer than 8 channels, if asked for


def test_refusals_say_what_there_is() -> None:
    with pytest.raises(
        UsageError, match=r"of resolution 5 .* the critic does not .* 8 \(C = 16, 'b'\), 4 \(C = 32, 'c'\)"
    ):
        insert(ready(Functional), IMAGES, resolution=5, name="critic")
    with pytest.raises(UsageError, match=r"looked at: a \(Conv2d\), b \(Conv2d\)"):
        insert(ready(Functional), IMAGES, resolution=16)
    with pytest.raises(UsageError, match=r"at most half the image, 8, .* 16 \(C = 16, '0'\)"):
        insert(nn.Sequential(nn.Conv2d(1, 16, 3, 1, 1)), IMAGES)
    with pytest.raises(UsageError, match="'same' in the network does not"):
        insert(ready(Functional), IMAGES, after="same")  # twice per call
    for name in ("out", "unused"):
        with pytest.raises(UsageError, match=f"'{name}' in the network does not"):
            insert(ready(Functional), IMAGES, after=name)
    with pytest.raises(UsageError, match=r"no module called 'blocks.1.con' \(did you mean 'blocks.1.conv'"):
        insert(ready(Residual), IMAGES, after="blocks.1.con")
    with pytest.raises(UsageError, match="not both"):
        insert(ready(Functional), IMAGES, after="a", resolution=8)
    with pytest.raises(UsageError, match=r"convolutional networks of images; looked at: 0 \(Linear\)"):
        insert(nn.Sequential(nn.Linear(3, 3)), torch.zeros(2, 3))
    with pytest.raises(UsageError, match="does not call 'first' by that name"):
        insert(ready(Hidden), IMAGES)


# -- the plugin ----------------------------------------------------------------------------------------------------


def blocks(gan: Any) -> dict[str, list[str]]:
    return {name: attended(player.module) for name, player in gan.players.items()}


@pytest.mark.parametrize("on", ["d", "g", "both"])
@pytest.mark.parametrize("pool", [False, True])
def test_it_trains(on: Any, pool: bool) -> None:
    gan, log = run({"self_attention": SelfAttention(on=on, pool=pool)}, kind="image")
    expected = {"generator": ["layers.activation1"], "discriminator": ["trunk.layers.activation0"]}
    assert blocks(gan) == {name: where if on in (name[0], "both") else [] for name, where in expected.items()}
    assert all(np.isfinite(v) for *_, terms in log.updates for v in terms.values())


@pytest.mark.parametrize("options", [{"value_channels": "C/2"}, {"value_channels": "C"}, {"pool": True}], ids=str)
def test_value_channels_and_pool_arrive(options: dict[str, Any]) -> None:
    gan = tiny_gan("image", {"self_attention": SelfAttention(**options)})
    for network, place in ((gan.generator, "layers.activation1"), (gan.discriminator, "trunk.layers.activation0")):
        block = network.get_submodule(place).attention.double()
        nn.init.constant_(block.gamma, 0.7)
        channels = block.key.weight.shape[1]
        same, default = SelfAttention2d(channels, **options).double(), SelfAttention2d(channels).double()
        same.load_state_dict(block.state_dict())
        x = draw(2, channels, 3, 4)
        torch.testing.assert_close(block(x), same(x))
        np.testing.assert_allclose(block(x).detach(), block_by_hand(same, x), rtol=1e-9, atol=1e-10)
        if "pool" in options:
            default.load_state_dict(block.state_dict())
            assert not torch.allclose(block(x), default(x))
        else:
            assert block.value.weight.shape != default.value.weight.shape


@pytest.mark.parametrize("network", ["dcgan", "resnet"])
@pytest.mark.parametrize("others", [[], ["gradient_penalty"]])
def test_at_the_start_nothing_else_notices(network: str, others: list[str]) -> None:
    """Losses, and the gradient of every parameter outside the blocks, bit for bit; inside only gamma has one."""
    found = []
    for plugins in ({}, {"self_attention": SelfAttention()}):
        gan = tiny_gan("image", {**create(others, {})[0], **plugins}, architecture={"width": 8, "network": network})
        for optimizer in gan.optimizers.values():
            optimizer.zero_grad = optimizer.step = lambda *args, **kwargs: None  # type: ignore[method-assign, assignment]
        for phase in "dg":
            update(gan, phase, 1)
        found.append(
            {
                f"{name}.{key.replace('.module.', '.')}": p.grad
                for name, player in gan.players.items()
                for key, p in player.module.named_parameters()
            }
        )
    plain, mine = found
    assert all(p is not None for p in plain.values())
    for name, gradient in mine.items():
        if name in plain:
            assert torch.equal(gradient, plain[name]), name
        elif name.endswith("gamma"):
            assert gradient.abs() > 0
        else:
            assert gradient.abs().max() == 0, name
    assert len(mine) == len(plain) + 2 * 5


@pytest.mark.parametrize("order", [["self_attention", "spectral_norm"], ["spectral_norm", "self_attention"]])
def test_spectral_norm_sees_the_new_layers_in_either_order(order: list[str]) -> None:
    gan, _ = run(create(order, {"spectral_norm": {"on": "both"}})[0], kind="image", loss="hinge")
    for network, place in ((gan.generator, "layers.activation1"), (gan.discriminator, "trunk.layers.activation0")):
        names = spectral_norms(network)
        assert {f"{place}.attention.{layer}" for layer in ("key", "query", "value", "out")} <= set(names)
        assert not torch.equal(network.get_submodule(place).attention.gamma, torch.zeros(()))
        weight = network.get_submodule(f"{place}.attention.key").weight.detach()[:, :, 0, 0]
        assert np.linalg.svd(weight, compute_uv=False)[0] == pytest.approx(1, abs=0.05)
        flat = folded(network)
        assert not spectral_norms(flat)
        z = torch.zeros(2, *gan.shape) if network is gan.discriminator else torch.zeros(2, 4)
        assert torch.equal(flat.eval()(z), network.eval()(z))


@pytest.mark.parametrize("names", [["bigan"], ["packing"], ["bigan", "packing"], ["r1"], ["gradient_penalty"]])
def test_other_views_and_penalties(names: list[str]) -> None:
    gan, log = run({**create(names, {})[0], "self_attention": SelfAttention()}, kind="image")
    assert blocks(gan)["discriminator"] == ["trunk.layers.activation0"]
    assert blocks(gan)["generator"] == ["layers.activation1"]
    assert blocks(gan).get("encoder", []) == []
    assert all(np.isfinite(v) for *_, terms in log.updates for v in terms.values())
    assert gan.discriminator.trunk.layers.activation0.attention.gamma != 0


class Pictures(nn.Module):
    """A generator as one would write it by hand, with functions between the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.grow = nn.Linear(4, 16 * 49), nn.ConvTranspose2d(16, 8, 4, 2, 1)
        self.norm, self.end = nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 1, 4, 2, 1)

    def forward(self, z: Tensor) -> Tensor:
        x = F.relu(self.start(z).unflatten(1, (16, 7, 7)))
        return torch.tanh(self.end(F.relu(self.norm(self.grow(x)))))


def test_networks_of_ones_own() -> None:
    own = {"generator": Pictures, "discriminator": lambda: nn.Sequential(Residual(), nn.Identity())}
    gan, _ = run({"self_attention": SelfAttention()}, kind="image", **own)
    assert blocks(gan) == {"generator": ["norm"], "discriminator": ["0.blocks.0"]}
    named = SelfAttention(g_after="grow", d_after="0.blocks.1")
    assert blocks(run({"a": named}, kind="image", **own)[0]) == {"generator": ["grow"], "discriminator": ["0.blocks.1"]}
    assert gan.generator.norm.attention.gamma != 0


def test_in_a_loop_of_ones_own() -> None:
    """``attach``: networks, optimisers and the shape of z are the user's."""
    torch.manual_seed(0)
    generator = nn.Sequential(
        nn.ConvTranspose2d(4, 16, 7),
        nn.ReLU(),
        nn.ConvTranspose2d(16, 8, 4, 2, 1),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 1, 4, 2, 1),
    )
    discriminator = networks.discriminator([(1, 28, 28)], width=8)
    optimizers = {phase: torch.optim.SGD(m.parameters(), 0.1) for phase, m in (("g", generator), ("d", discriminator))}
    attached_ = attach(generator, discriminator, ["self_attention", "r1"], optimizers=optimizers)
    real, z = torch.rand(4, 1, 28, 28), torch.randn(4, 4, 1, 1)
    attached_.setup(real, generator(z), z)
    assert attended(generator) == ["3"]
    assert attended(discriminator) == ["trunk.layers.activation0"]
    attached_.d_loss(real, generator(z), z).backward()
    optimizers["d"].step()
    optimizers["d"].zero_grad()
    assert discriminator.trunk.layers.activation0.attention.gamma != 0


def test_what_it_refuses() -> None:
    with pytest.raises(UsageError, match=r"no module of the generator .* looked at: layers.hidden0 \(Linear\)"):
        tiny_gan("vector", {"self_attention": SelfAttention()})
    with pytest.raises(UsageError, match=r"resolution 5 .* the discriminator .* -o self_attention.d_after"):
        tiny_gan("image", {"self_attention": SelfAttention(on="d", resolution=5)})
    with pytest.raises(UsageError, match="the generator has no module called 'up9'"):
        tiny_gan("image", {"self_attention": SelfAttention(g_after="up9")})
    with pytest.raises(ValueError, match="g_after names a place in a network that on=d leaves alone"):
        SelfAttention(on="d", g_after="up1")
    with pytest.raises(ValueError, match="d_after"):
        SelfAttention(on="g", d_after="up1")
    for places in ({"g_after": "up1", "d_after": "up1"}, {"on": "g", "g_after": "up1"}, {"on": "d", "d_after": "up1"}):
        with pytest.raises(ValueError, match="resolution has no use"):
            SelfAttention(**places, resolution=8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 2"):
        SelfAttention(resolution=1)
    with pytest.raises(ValueError, match="on is 'd', 'g' or 'both', not 'generator'"):
        SelfAttention(on="generator")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="C/8, C/2, C, not 'C/3'"):
        SelfAttention(value_channels="C/3")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="value_channels"):
        create(["self_attention"], {"self_attention": {"value_channels": "C/3"}})


def test_same_seed_same_run_and_the_global_stream_is_left_alone() -> None:
    before = torch.get_rng_state()
    log = run({"self_attention": SelfAttention()}, kind="image")[1]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert run({"self_attention": SelfAttention()}, kind="image")[1].updates == log.updates
    start = [tiny_gan("image", {"self_attention": SelfAttention()}, seed=seed) for seed in (0, 1)]
    keys = [gan.generator.layers.activation1.attention.key.weight for gan in start]
    assert not torch.equal(*keys)


def test_a_continued_run_takes_the_same_steps_average_included() -> None:
    def fresh() -> Any:
        return tiny_gan("image", {"self_attention": SelfAttention()}, {"averaging": Averaging(0.9)})

    whole, first, second = fresh(), fresh(), fresh()
    train(whole, 4)
    train(first, 2)
    second.load_weights(copy.deepcopy(first.weights()))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.next_real = first.next_real
    train(second, 4)
    assert "generator_ema" in whole.weights()
    for network, weights in whole.weights().items():
        for key, tensor in weights.items():
            assert torch.equal(tensor, second.weights()[network][key]), f"{network}.{key}"
    average = whole.averages["generator"].layers.activation1.attention
    assert average.gamma != 0
    assert average.gamma != whole.generator.layers.activation1.attention.gamma


def test_exported_weights_load_into_a_network_prepared_alike() -> None:
    gan, _ = run({"self_attention": SelfAttention(), **create(["spectral_norm"], {})[0]}, kind="image")
    fresh = networks.discriminator([(1, 28, 28)], width=8)
    insert(fresh, torch.zeros(1, 1, 28, 28))
    fresh.load_state_dict(folded(gan.discriminator).state_dict())
    x = torch.rand(2, 1, 28, 28)
    assert torch.equal(fresh.eval()(x), gan.discriminator.eval()(x))
