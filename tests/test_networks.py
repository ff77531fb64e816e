import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree
from torch import Tensor, nn

from gankit.errors import UsageError
from gankit.networks import (
    NETWORKS,
    deep_discriminator,
    deep_generator,
    dense_discriminator,
    disconnected_generator,
    discriminator,
    encoder,
    fourier_generator,
    generator,
    product_discriminator,
    spread_discriminator,
)

Z = 5
IMAGES = [(1, 28, 28), (3, 32, 32), (6, 28, 28), (3, 64, 64)]
CASES = [
    *[("auto", shape) for shape in [(1,), (2,), (1200,), *IMAGES]],
    *[("mlp", shape) for shape in [*IMAGES, (2, 5), (1, 20, 13)]],
    *[("resnet", shape) for shape in [*IMAGES, (1, 6, 6)]],
]
FAMILIES = [("mlp", (2,)), ("mlp", (1, 6, 6)), ("dcgan", (1, 28, 28)), ("resnet", (1, 28, 28))]


def build(factory: Callable[..., nn.Module], *args: Any, seed: int = 0, **options: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return factory(*args, **{"width": 4, **options})


def data(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2 - 1


@pytest.mark.parametrize(("network", "shape"), CASES)
def test_shapes(network: str, shape: tuple[int, ...]) -> None:
    x, z = data(3, *shape), data(3, Z)
    fake = build(generator, shape, Z, network=network)(z)
    assert fake.shape == (3, *shape)
    assert build(discriminator, [shape], network=network)(x).shape == (3,)
    assert build(discriminator, [shape, (Z,), (2, 2)], network=network)(x, z, data(3, 2, 2)).shape == (3,)
    assert build(encoder, shape, Z, network=network)(x).shape == (3, Z)


def test_auto_follows_the_shape() -> None:
    def keys(shape: tuple[int, ...], network: str) -> list[str]:
        return list(build(generator, shape, Z, network=network).state_dict())

    assert keys((2,), "auto") == keys((2,), "mlp")
    assert keys((1, 28, 28), "auto") == keys((1, 28, 28), "dcgan") != keys((1, 28, 28), "resnet")


def test_state_dict_names_are_stable() -> None:
    # weights are saved under these names: changing one breaks old files
    assert list(build(discriminator, [(2,)], depth=2).state_dict()) == [
        "layers.hidden0.weight",
        "layers.hidden0.bias",
        "layers.hidden1.weight",
        "layers.hidden1.bias",
        "layers.out.weight",
        "layers.out.bias",
    ]
    assert {k.rsplit(".", 1)[0] for k in build(generator, (1, 28, 28), Z).state_dict()} == {
        "project",
        "layers.norm0",
        "layers.up1",
        "layers.norm1",
        "layers.out",
    }
    assert {k.rsplit(".", 1)[0] for k in build(discriminator, [(1, 28, 28), (Z,)]).state_dict()} == {
        "trunk.layers.down0",
        "trunk.layers.down1",
        "joint",
        "out",
    }
    resnet = {k.rsplit(".", 1)[0] for k in build(generator, (1, 28, 28), Z, network="resnet").state_dict()}
    block = {f"layers.block{i}.{part}" for i in (0, 1) for part in ("norm1", "conv1", "norm2", "conv2", "shortcut")}
    assert resnet == {"project", "layers.norm", "layers.out"} | block


@pytest.mark.parametrize("side", [6, 8, 10, 12, 14, 16, 24, 28, 32, 48, 64, 96])
def test_dcgan_sizes(side: int) -> None:
    g = build(generator, (1, side, side), Z, network="dcgan", width=2)
    assert g(data(2, Z)).shape == (2, 1, side, side)
    assert build(discriminator, [(1, side, side)], width=2)(data(2, 1, side, side)).shape == (2,)


def test_default_sizes_of_dcgan() -> None:
    state = generator((3, 32, 32), 100).state_dict()
    assert state["project.weight"].shape == (128 * 4 * 4, 100)
    assert state["layers.out.weight"].shape[:2] == (32, 3)  # width: the layer next to the image
    assert discriminator([(3, 32, 32)]).state_dict()["trunk.layers.down0.weight"].shape[:2] == (32, 3)


@pytest.mark.parametrize(("network", "shape"), FAMILIES)
def test_packing_changes_only_the_first_layer(network: str, shape: tuple[int, ...]) -> None:
    m = 3
    packed_shape = (m * shape[0], *shape[1:])
    plain = build(discriminator, [shape, (Z,)], network=network).state_dict()
    packed = build(discriminator, [packed_shape, (Z,)], network=network).state_dict()
    assert list(plain) == list(packed)
    changed = {k for k in plain if plain[k].shape != packed[k].shape}
    first = {
        "mlp": {"layers.hidden0.weight"},
        "dcgan": {"trunk.layers.down0.weight"},
        "resnet": {"trunk.layers.block0.conv1.weight", "trunk.layers.block0.shortcut.weight"},
    }[network]
    assert changed == first
    for key in changed:
        assert plain[key].shape[0] == packed[key].shape[0] and plain[key].shape[2:] == packed[key].shape[2:]
        added = (m - 1) * (math.prod(shape) if network == "mlp" else shape[0])
        assert packed[key].shape[1] - plain[key].shape[1] == added


@pytest.mark.parametrize(("network", "shape"), FAMILIES)
def test_construction_is_seeded_and_forward_is_not_random(network: str, shape: tuple[int, ...]) -> None:
    for factory, args in ((generator, (shape, Z)), (discriminator, ([shape, (Z,)],)), (encoder, (shape, Z))):
        one, same, other = (build(factory, *args, network=network, seed=seed).state_dict() for seed in (1, 1, 2))
        assert all(torch.equal(one[k], same[k]) for k in one)
        assert not all(torch.equal(one[k], other[k]) for k in one)
    before = torch.get_rng_state()
    build(generator, shape, Z, network=network)(data(2, Z))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("network", ["mlp", "dcgan", "resnet"])
def test_image_generators_stay_in_range_and_use_it(network: str) -> None:
    images = build(generator, (2, 28, 28), Z, network=network)(1000 * data(20, Z))
    assert images.min() >= -1 and images.max() <= 1
    assert images.std() > 0.01


def test_vector_generators_are_unbounded() -> None:
    assert build(generator, (2,), Z)(1e6 * data(20, Z)).abs().max() > 10


@pytest.mark.parametrize(("network", "shape"), FAMILIES)
def test_encoder_reaches_the_latent_support(network: str, shape: tuple[int, ...]) -> None:
    x = data(8, *shape)
    outputs = {}
    for latent in ("normal", "uniform"):
        e = build(encoder, shape, Z, latent=latent, network=network)
        with torch.no_grad():
            for name, parameter in e.named_parameters():
                if name.endswith("out.weight"):
                    parameter.mul_(1e3)
        outputs[latent] = e(x)
    assert outputs["normal"].abs().max() > 2
    assert outputs["uniform"].abs().max() <= 1
    torch.testing.assert_close(outputs["uniform"], outputs["normal"].tanh())


@pytest.mark.parametrize(("network", "shape"), FAMILIES)
def test_discriminator_scores_samples_independently(network: str, shape: tuple[int, ...]) -> None:
    d = build(discriminator, [shape, (Z,)], network=network).double()
    assert not any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in d.modules())
    x, z = data(4, *shape, dtype=torch.float64), data(4, Z, dtype=torch.float64)
    before = d(x, z)
    x[2], z[3] = 7.0, -7.0
    after = d(x, z)
    torch.testing.assert_close(after[:2], before[:2], rtol=1e-12, atol=0)
    assert (after[2:] != before[2:]).all()


@pytest.mark.parametrize(("network", "shape"), FAMILIES)
def test_joint_inputs_interact(network: str, shape: tuple[int, ...]) -> None:
    # D(x, z) must not be f(x) + h(z): then swapping the z of two samples would leave the sum of logits as it is
    d = build(discriminator, [shape, (Z,)], network=network, width=16).double()
    with torch.no_grad():
        for parameter in d.parameters():
            parameter.mul_(3.0)
    x, z = data(2, *shape, dtype=torch.float64) * 3, data(2, Z, dtype=torch.float64, seed=1) * 3
    matched, swapped = d(x, z).detach(), d(x, z.flip(0)).detach()
    assert abs(float(matched.sum() - swapped.sum())) > 1e-6 * float(matched.abs().sum())


@pytest.mark.parametrize(("network", "shape"), FAMILIES)
def test_double_backward(network: str, shape: tuple[int, ...]) -> None:
    d = build(discriminator, [shape, (Z,)], network=network).double()
    x, z = data(3, *shape, dtype=torch.float64).requires_grad_(), data(3, Z, dtype=torch.float64)
    (slope,) = torch.autograd.grad(d(x, z).sum(), x, create_graph=True)
    assert slope.shape == x.shape and slope.abs().sum() > 0
    slope.square().sum().backward()
    weights = {name: p.grad for name, p in d.named_parameters() if name.endswith("weight")}
    assert all(grad is not None and grad.isfinite().all() for grad in weights.values())
    assert any(grad.abs().sum() > 0 for grad in weights.values() if grad is not None)


@pytest.mark.parametrize(("network", "shape"), FAMILIES)
def test_modules_can_be_copied_and_converted(network: str, shape: tuple[int, ...]) -> None:
    for module, inputs in (
        (build(generator, shape, Z, network=network), [data(3, Z)]),
        (build(discriminator, [shape, (Z,)], network=network), [data(3, *shape), data(3, Z)]),
        (build(encoder, shape, Z, network=network, latent="uniform"), [data(3, *shape)]),
    ):
        twin = copy.deepcopy(module)
        torch.testing.assert_close(twin(*inputs), module(*inputs))
        wide = twin.double()(*[x.double() for x in inputs])
        assert wide.dtype == torch.float64
        torch.testing.assert_close(wide.float(), module(*inputs), rtol=1e-3, atol=1e-4)


def test_dcgan_initialisation() -> None:
    for module in (
        build(generator, (1, 32, 32), 64, width=16),
        build(discriminator, [(1, 32, 32), (Z,)], width=16),
    ):
        for layer in module.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
                if layer.weight.numel() > 1000:
                    assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
                    assert abs(float(layer.weight.detach().mean())) < 0.002
                assert layer.bias is None or not layer.bias.any()


@pytest.mark.parametrize(("network", "shape"), FAMILIES)
def test_first_logits_are_moderate(network: str, shape: tuple[int, ...]) -> None:
    logits = build(discriminator, [shape], network=network, width=32)(data(16, *shape))
    assert logits.abs().max() < 5


def test_resnet_upsampling_order_does_not_matter() -> None:
    # the cheap order (1x1 convolution, then nearest upsampling) equals the order of the paper
    block = build(generator, (1, 28, 28), Z, network="resnet").layers.block0.double()  # type: ignore[union-attr]
    x = data(2, 4, 7, 7, dtype=torch.float64)
    torch.testing.assert_close(block.upsample(block.shortcut(x)), block.shortcut(block.upsample(x)))


def test_batch_norm_is_an_option_of_dcgan() -> None:
    d = build(discriminator, [(1, 32, 32)], norm="batch")
    names = [name for name, layer in d.named_modules() if isinstance(layer, nn.BatchNorm2d)]
    assert names == ["trunk.layers.norm1", "trunk.layers.norm2"]  # not on the first layer
    assert d(data(2, 1, 32, 32)).shape == (2,)
    for network in ("mlp", "resnet"):
        with pytest.raises(UsageError, match="norm"):
            discriminator([(1, 32, 32)], network=network, norm="batch")


@pytest.mark.parametrize("depth", [1, 4])
def test_mlp_depth_and_width(depth: int) -> None:
    state = generator((2,), Z, width=7, depth=depth).state_dict()
    assert sum(key.endswith("weight") for key in state) == depth + 1
    assert state["layers.hidden0.weight"].shape == (7, Z)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: generator((1, 30, 30), Z), r"--image-size 32"),
        (lambda: generator((1, 30, 30), Z, network="resnet"), r"28, 32.*not 30 x 30"),
        (lambda: discriminator([(1, 30, 30)], network="resnet"), r"not 30 x 30"),
        (lambda: encoder((1, 7, 7), Z), r"not 7 x 7"),
        (lambda: generator((1, 4, 4), Z), r"not 4 x 4"),
        (lambda: generator((1, 2, 2), Z), r"not 2 x 2"),
        (lambda: discriminator([(1, 72, 72)]), r"not 72 x 72"),
        (lambda: discriminator([(1, 28, 32)]), r"square"),
        (lambda: generator((2,), Z, network="dcgan"), r"--network mlp"),
        (lambda: generator((2,), Z, network="dcgna"), r"did you mean 'dcgan'"),
        (lambda: generator((1, 28, 28), Z, depth=3), r"leave depth out"),
        (lambda: generator((2,), Z, width=0), r"width must be 1 or more"),
        (lambda: generator((2,), Z, depth=0), r"depth must be 1 or more"),
        (lambda: generator((2,), 0), r"z_dim must be 1 or more"),
        (lambda: generator((), Z), r"shape must be"),
        (lambda: generator((0,), Z), r"shape must be"),
        (lambda: discriminator([]), r"at least one input"),
        (lambda: discriminator([(2,)], norm="layer"), r"no norm 'layer'"),
        (lambda: encoder((2,), Z, latent="norml"), r"did you mean 'normal'"),
        (lambda: deep_generator((2,), Z), r"square images"),
        (lambda: deep_discriminator([(1, 28, 32)]), r"square images"),
        (lambda: deep_generator((1, 28, 28), Z, width=0), r"width must be 1 or more"),
        (lambda: disconnected_generator((1, 28, 28), Z, features=0), r"features must be 1 or more"),
        (lambda: disconnected_generator((1, 28, 28), Z, scale=0), r"scale must be above 0, not 0"),
        (lambda: disconnected_generator((1, 28, 28), Z, cells=0), r"cells must be 1 or more"),
        (lambda: disconnected_generator((2,), Z), r"square images"),
        (lambda: spread_discriminator([(2,)], depth=0), r"depth must be 1 or more"),
        (lambda: discriminator([(1, 28, 28)])(data(2, 1, 28, 28), data(2, Z)), r"one input"),
    ],
)
def test_errors(call: Callable[[], object], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        call()


def test_fourier_features_are_octaves_of_each_coordinate() -> None:
    network = fourier_generator((2,), 3, width=8, depth=1, octaves=4)
    z = torch.rand(5, 3) * 2 - 1
    angles = np.pi * z.double().numpy()[:, :, None] * 2.0 ** np.arange(4)
    features = np.concatenate([z, np.sin(angles).reshape(5, -1), np.cos(angles).reshape(5, -1)], axis=1)
    w0, b0, w1, b1 = (p.detach().double().numpy() for p in network.parameters())  # the frequencies are no parameters
    expected = np.maximum(features @ w0.T + b0, 0) @ w1.T + b1
    np.testing.assert_allclose(network(z).detach().numpy(), expected, atol=1e-5)
    with pytest.raises(UsageError, match="octaves"):
        fourier_generator((2,), 1, octaves=0)


def test_a_g_of_one_latent_sees_its_fourier_features_unless_another_network_is_asked_for() -> None:
    auto, features = build(generator, (2,), 1, depth=2), build(fourier_generator, (2,), 1, depth=2)
    z = data(5, 1)
    assert torch.equal(auto(z), features(z))
    assert [tuple(p.shape) for p in auto.parameters()] == [(4, 11), (4,), (4, 4), (4,), (2, 4), (2,)]
    for other in (
        build(generator, (2,), 1, network="mlp"),
        build(generator, (2,), 2),
        build(generator, (1, 28, 28), 1),
    ):
        assert "frequencies" not in other.state_dict()
    with pytest.raises(UsageError, match="width must be 1 or more"):
        generator((2,), 1, width=0)


def test_a_disconnected_generator_is_a_deep_one_of_the_features_of_the_nearest_point() -> None:
    g = build(disconnected_generator, (3, 16, 16), 4, features=2000, scale=3.0, cells=500).double()
    state = g.state_dict()
    frequencies, points = state["frequencies"].numpy(), state["points"].numpy()
    assert frequencies.shape == (4, 2000) and points.shape == (500, 4)
    assert abs(frequencies.mean()) < 0.15 and frequencies.std() == pytest.approx(3, rel=0.05)
    assert abs(points.mean()) < 0.1 and points.std() == pytest.approx(1, rel=0.1)
    z = data(50, 4, seed=1, dtype=torch.float64)
    nearest = points[cKDTree(points).query(z.numpy())[1]]
    angles = nearest @ frequencies
    plain = deep_generator((3, 16, 16), 4004, width=4).double()
    plain.load_state_dict({k.removeprefix("body."): v for k, v in state.items() if k.startswith("body.")})
    inputs = torch.from_numpy(np.concatenate([z, np.sin(angles), np.cos(angles)], axis=1))
    torch.testing.assert_close(g(z), plain(inputs))
    other = build(disconnected_generator, (3, 16, 16), 4, features=2000, scale=3.0, cells=500, seed=1).state_dict()
    assert not np.allclose(frequencies, other["frequencies"]) and not np.allclose(points, other["points"])
    assert {k for k, _ in g.named_parameters()} == {f"body.{k}" for k, _ in plain.named_parameters()}


def test_the_gradient_of_a_disconnected_generator_goes_straight_through_the_cells() -> None:
    g = build(disconnected_generator, (3, 16, 16), 4, features=20, cells=500).double()
    frequencies, points = g.state_dict()["frequencies"].numpy(), g.state_dict()["points"].numpy()
    g.body = nn.Identity()  # what it is given comes out: z, sines, cosines
    z = data(50, 4, seed=1, dtype=torch.float64)
    angles = points[cKDTree(points).query(z.numpy())[1]] @ frequencies
    jacobian = torch.autograd.functional.jacobian(lambda z: g(z).sum(0), z).numpy()  # (4 + 40, 50, 4)
    np.testing.assert_allclose(jacobian[4:24], np.einsum("bf,df->fbd", np.cos(angles), frequencies))
    np.testing.assert_allclose(jacobian[24:], np.einsum("bf,df->fbd", -np.sin(angles), frequencies))


def test_a_disconnected_generator_jumps_from_cell_to_cell_and_nowhere_else() -> None:
    g = build(disconnected_generator, (3, 16, 16), 2, width=8, cells=3).double().eval()
    points = g.state_dict()["points"]
    share = torch.linspace(0.3, 0.7, 41, dtype=torch.float64).unsqueeze(1)
    path = (1 - share) * points[0] + share * points[1]
    cells = cKDTree(points.numpy()).query(path.numpy())[1]
    change = g(path).diff(dim=0).square().mean(dim=(1, 2, 3)).sqrt()
    jumps = torch.from_numpy(np.diff(cells) != 0)
    assert 1 <= jumps.sum() <= 2
    assert change[jumps].min() > 20 * change[~jumps].max()


@pytest.mark.parametrize(("side", "inner"), [(6, 8), (8, 8), (16, 16), (28, 32), (33, 64)])
def test_deep_networks_are_those_of_the_next_side_cropped_and_padded(side: int, inner: int) -> None:
    deep, x = deep_discriminator([(3, side, side), (2,)], width=4), data(2, 3, side, side)
    padded, before = np.zeros((2, 3, inner, inner), np.float32), (inner - side) // 2
    padded[:, :, before : before + side, before : before + side] = x.numpy()
    plain = discriminator([(3, inner, inner), (2,)], width=4)
    assert [w.shape for w in deep.parameters()] == [w.shape for w in plain.parameters()]
    with torch.no_grad():
        for mine, its in zip(deep.parameters(), plain.parameters(), strict=True):
            its.copy_(mine)
    y = data(2, 2)
    torch.testing.assert_close(deep(x, y), plain(torch.from_numpy(padded), y))
    g, whole = deep_generator((3, side, side), Z, width=4), generator((3, inner, inner), Z, width=4)
    with torch.no_grad():
        for mine, its in zip(g.parameters(), whole.parameters(), strict=True):
            its.copy_(mine)
    z = data(5, Z)
    inside = slice(before, before + side)
    torch.testing.assert_close(g(z), whole(z)[:, :, inside, inside])


def changed(side: int, apart: int) -> list[Tensor]:
    """An image with two of its columns changed, with only one, with only the other, with none; they span so many pixels."""
    neither = data(1, 3, side, side, dtype=torch.float64)
    one, other, both = (neither.clone() for _ in range(3))
    start = (side - apart) // 2
    for x in (one, both):
        x[..., start] *= -1
    for x in (other, both):
        x[..., start + apart - 1] *= -1
    return [both, one, other, neither]


@pytest.mark.parametrize(("side", "reach"), [(16, 10), (28, 22), (32, 22)])
def test_a_dcgan_d_adds_up_distant_parts_and_a_dense_one_sees_them_together(side: int, reach: int) -> None:
    def interaction(d: nn.Module, apart: int) -> float:
        parts = [d(x).item() for x in changed(side, apart)]
        return abs(parts[0] - parts[1] - parts[2] + parts[3]) / (max(parts) - min(parts))

    deep, dense = (
        build(factory, [(3, side, side)], width=16).double() for factory in (deep_discriminator, dense_discriminator)
    )
    assert interaction(deep, reach + 2) < 1e-12
    assert interaction(deep, 4) > 1e-6
    assert interaction(dense, reach + 2) > 1e-6


def test_products_see_distant_parts_together_wherever_the_data_are_and_bends_only_where_they_bend() -> None:
    """(a.h + b)(c.h + d) of h + s + t less that of h + s and of h + t is (a.s)(c.t) + (a.t)(c.s), whatever h, b and d."""
    images = changed(16, 12)
    product, dense = (
        build(factory, [(3, 16, 16)], width=8).double() for factory in (product_discriminator, dense_discriminator)
    )
    _, one, other, neither = (product.trunk(x)[0] for x in images)
    s, t = one - neither, other - neither
    a, c = product.joint.one.weight, product.joint.two.weight
    expected = (product.out.weight[0] @ ((a @ s) * (c @ t) + (a @ t) * (c @ s))).item()
    assert abs(expected) > 1e-6

    def interaction(d: nn.Module) -> float:
        both, one, other, neither = (d(x).item() for x in images)
        return both - one - other + neither

    assert interaction(product) == pytest.approx(expected, rel=1e-6)
    for layer in (product.joint.one, product.joint.two, dense.joint[0], dense.joint[2]):
        nn.init.constant_(layer.bias, 100.0)
    assert interaction(product) == pytest.approx(expected, rel=1e-4)
    assert abs(interaction(dense)) < 1e-9


def test_a_dense_d_of_one_input_refuses_a_second_and_joins_it_where_it_was_built_for_it() -> None:
    with pytest.raises(UsageError, match="one input"):
        dense_discriminator([(1, 28, 28)])(data(2, 1, 28, 28), data(2, Z))
    dense = dense_discriminator([(1, 28, 28), (Z,)], width=4)
    sizes = [tuple(w.shape) for w in dense.parameters() if w.dim() == 2]
    assert sizes == [(32, 16 * 4 * 4 + Z), (32, 32), (1, 32)]
    x, z = data(2, 1, 28, 28), data(2, Z)
    assert dense(x, z).shape == (2,)
    assert dense(x, z + 1).ne(dense(x, z)).all()


def test_deep_networks_start_with_pytorchs_weights() -> None:
    """U(-1/sqrt(fan), 1/sqrt(fan)): the largest of many is close to the bound, and biases are not 0."""
    first_of_g = list(deep_generator((3, 28, 28), Z).parameters())[:2]
    second_of_d = list(deep_discriminator([(3, 28, 28)]).parameters())[2:4]
    for (weight, bias), fan in ((first_of_g, Z), (second_of_d, 32 * 4 * 4)):
        bound = 1 / math.sqrt(fan)
        assert 0.95 * bound < weight.abs().max() <= bound
        assert 0 < bias.abs().max() <= bound


def test_units_of_a_spread_discriminator_bend_all_over_the_data() -> None:
    """Along the diagonal of 1200 coordinates the shipped network's units all bend near 0, those of this one up to 10."""

    def bends(network: nn.Module) -> torch.Tensor:
        weight, bias = list(network.parameters())[:2]
        return (-bias / weight.sum(1)).abs()

    assert bends(discriminator([(1200,)])).median() < 0.1
    assert bends(spread_discriminator([(1200,)])).median() > 3
    first, second = (list(spread_discriminator([(3,)], spread=2.0).parameters())[i] for i in (1, 3))
    assert 1.9 < first.abs().max() <= 2 and 0.6 < second.abs().max() <= 2 / 3
    assert spread_discriminator([(3,)], depth=1)(data(2, 3)).shape == (2,)


def test_networks_are_listed() -> None:
    assert NETWORKS == ("auto", "mlp", "dcgan", "resnet")
