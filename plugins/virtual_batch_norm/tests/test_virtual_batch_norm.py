import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from gankit_virtual_batch_norm import (
    VBN,
    Statistics,
    VirtualBatchNorm,
    reference_of,
    statistics,
    virtual_batch_norm,
    virtualize,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gankit
from gankit import UsageError, View, hookimpl, networks
from gankit.checks import batch_norms
from gankit.functional import extra_pass, squared_gradient_norm
from gankit.loop import train
from gankit.plugins import create
from gankit.testing import run, tiny_gan
from gankit.training import Averaging

Array = np.ndarray[Any, Any]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- the function --------------------------------------------------------------------------------------------------

SHAPES: list[tuple[int, ...]] = [(3,), (3, 5), (3, 4, 2), (3, 2, 2, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_sample_is_batch_normed_with_the_reference_around_it(shape: tuple[int, ...]) -> None:
    reference, x, weight, bias = normal(6, *shape) + 2, normal(4, *shape, seed=1), normal(3, seed=2), normal(3, seed=3)
    made = virtual_batch_norm(x, statistics(reference), weight, bias, 1e-3)
    for sample, got in zip(x, made, strict=True):
        batch = torch.cat([reference, sample[None]])
        batch = batch if batch.dim() > 2 else batch.unsqueeze(2)
        theirs = torch.nn.functional.batch_norm(batch, None, None, weight, bias, training=True, eps=1e-3)
        torch.testing.assert_close(got, theirs[-1].reshape(shape), rtol=1e-10, atol=1e-12)


def by_hand(x: Array, reference: Array, eps: float = 1e-5) -> Array:
    """The weighted means and mean squares, written down; positions are dimension 2."""
    n = len(reference)
    mean = reference.mean((0, 2)) * (n / (n + 1)) + x.mean(2) / (n + 1)
    square = (reference**2).mean((0, 2)) * (n / (n + 1)) + (x**2).mean(2) / (n + 1)
    return (x - mean[..., None]) / np.sqrt(square - mean**2 + eps)[..., None]


@settings(deadline=None)
@given(
    n=st.integers(1, 9),
    positions=st.integers(1, 5),
    shift=st.floats(-30, 30),
    spread=st.floats(0.1, 30),
    seed=st.integers(0, 99),
)
def test_it_is_the_weighted_mean_and_mean_square(
    n: int, positions: int, shift: float, spread: float, seed: int
) -> None:
    reference, x = normal(n, 2, 4, seed=seed) * spread + shift, normal(3, 2, positions, seed=seed + 1)
    made = virtual_batch_norm(x, statistics(reference))
    np.testing.assert_allclose(made, by_hand(x.numpy(), reference.numpy()), rtol=1e-6, atol=1e-6)


def test_a_large_mean_does_not_swallow_the_variance() -> None:
    exact = by_hand((normal(4, 2, 9) + 3e3).numpy(), (normal(8, 2, 9, seed=1) + 3e3).numpy())
    x, reference = (normal(4, 2, 9) + 3e3).float(), (normal(8, 2, 9, seed=1) + 3e3).float()
    np.testing.assert_allclose(virtual_batch_norm(x, statistics(reference)), exact, atol=0.02)
    naive = by_hand(x.numpy(), reference.numpy())  # the wrong version: mean square minus squared mean in float32
    assert not np.allclose(naive, exact, atol=0.5)


def test_derivatives_of_both_orders() -> None:
    def normed(x: Tensor, reference: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return virtual_batch_norm(x, statistics(reference), weight, bias, 1e-2)

    for shape in ((2, 2), (2, 2, 3)):
        arguments = [t.requires_grad_() for t in (normal(*shape), normal(3, *shape[1:], seed=1), normal(2), normal(2))]
        assert torch.autograd.gradcheck(normed, arguments)
        assert torch.autograd.gradgradcheck(normed, arguments)


def test_statistics_are_biased_and_know_their_size() -> None:
    made = statistics(torch.tensor([[[1.0, 3.0]], [[5.0, 7.0]]]))
    assert made == Statistics(torch.tensor([4.0]), torch.tensor([5.0]), 2)


# -- networks ------------------------------------------------------------------------------------------------------


class Own(nn.Module):
    """Not gankit's: two inputs, one batch norm that is used twice, one without parameters, one in another's place, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(2, 4)
        self.shared = nn.BatchNorm1d(4)
        self.inner = nn.ModuleDict({"conv": nn.Conv1d(1, 2, 3), "norm": nn.BatchNorm1d(2, affine=False)})
        self.alias = self.inner["norm"]
        self.out = nn.Linear(4, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = torch.tanh(self.shared(self.first(x))) + torch.tanh(self.shared(self.second(y)))
        maps = self.alias(self.inner["conv"](hidden.unsqueeze(1)))
        logits: Tensor = self.out(maps.flatten(1))
        return logits.squeeze(1)


def own(seed: int = 0) -> Own:
    torch.manual_seed(seed)
    network = Own().double()
    for p in network.parameters():
        nn.init.normal_(p)
    return network


INPUTS = (normal(5, 3, seed=5), normal(5, 2, seed=6))
REFERENCE = (normal(7, 3, seed=7), normal(7, 2, seed=8))


def small(*, smooth: bool = False) -> nn.Sequential:
    torch.manual_seed(1)
    activation = nn.Tanh() if smooth else nn.LeakyReLU(0.2)
    layers = [
        nn.Linear(3, 4),
        nn.BatchNorm1d(4, eps=0.1),
        activation,
        nn.Linear(4, 2),
        nn.BatchNorm1d(2),
        nn.Linear(2, 1),
    ]
    return nn.Sequential(*layers, nn.Flatten(0)).double()


def test_a_whole_network_by_hand() -> None:
    network = virtualize(small(), (REFERENCE[0],))
    parts: Any = {name: t.detach().numpy() for name, t in network.named_parameters()}

    def linear(x: Array, i: int) -> Array:
        return x @ parts[f"{i}.weight"].T + parts[f"{i}.bias"]

    def normed(x: Array, mean: Array, square: Array, i: int) -> Array:
        return (x - mean) / np.sqrt(square - mean**2 + {1: 0.1, 4: 1e-5}[i]) * parts[f"{i}.weight"] + parts[f"{i}.bias"]

    reference, x, n = REFERENCE[0].numpy(), INPUTS[0].numpy(), len(REFERENCE[0])
    for i in (0, 3):
        reference, x = linear(reference, i), linear(x, i)
        mean, square = reference.mean(0), (reference**2).mean(0)
        x = normed(x, (n * mean + x) / (n + 1), (n * square + x**2) / (n + 1), i + 1)
        reference = normed(reference, mean, square, i + 1)  # by its own statistics alone
        if i == 0:
            reference, x = (np.where(t > 0, t, 0.2 * t) for t in (reference, x))
    np.testing.assert_allclose(network(INPUTS[0]).detach(), linear(x, 5)[:, 0], rtol=1e-10)


def test_a_norm_that_is_called_twice_is_as_two_norms() -> None:
    network, twin = own(), own()
    network.shared = nn.BatchNorm1d(4).double()  # of x; the twin's is for x and y

    class Two(Own):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            hidden = torch.tanh(self.shared(self.first(x))) + torch.tanh(self.other(self.second(y)))
            maps = self.alias(self.inner["conv"](hidden.unsqueeze(1)))
            return self.out(maps.flatten(1)).squeeze(1)  # type: ignore[no-any-return]

    network.__class__ = Two
    network.other = nn.BatchNorm1d(4).double()
    for norm in (network.shared, network.other):
        norm.load_state_dict(twin.shared.state_dict())
    expected = virtualize(network, REFERENCE)(*INPUTS)
    torch.testing.assert_close(virtualize(twin, REFERENCE)(*INPUTS), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_no_output_depends_on_another_sample(training: bool) -> None:
    plain, network = own().train(), virtualize(own(), REFERENCE).train(training)
    order = torch.tensor([3, 0, 4, 2, 1])
    whole = network(*INPUTS)
    torch.testing.assert_close(network(*(t[order] for t in INPUTS)), whole[order], rtol=1e-12, atol=1e-12)
    parts = torch.cat([network(*(t[part] for t in INPUTS)) for part in (slice(0, 1), slice(1, 5))])
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)
    other = torch.cat([plain(*(t[part] for t in INPUTS)) for part in (slice(0, 3), slice(3, 5))])
    assert not torch.allclose(other, plain(*INPUTS), rtol=1e-2)  # batch norm, which fails this
    x = INPUTS[0].clone().requires_grad_()
    (slope,) = torch.autograd.grad(network(x, INPUTS[1])[2], x)
    assert slope[2].abs().sum() > 0 and slope[[0, 1, 3, 4]].abs().sum() == 0


def test_training_and_evaluation_are_the_same_and_nothing_moves() -> None:
    network = virtualize(own(), REFERENCE)
    before = {name: t.clone() for name, t in network.state_dict().items()}
    first = network.train()(*INPUTS)
    with torch.no_grad():
        assert torch.equal(network.eval()(*INPUTS), first)
    assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())
    assert torch.equal(extra_pass(network, *INPUTS), first)
    for i, t in enumerate(REFERENCE):
        assert torch.equal(reference_of(network)[i], t) and reference_of(network)[i].data_ptr() != t.data_ptr()


def finite_difference(network: nn.Module, value: Callable[[], Tensor]) -> list[Tensor]:
    made = []
    for p in network.parameters():
        slope, flat = torch.zeros_like(p), p.detach().view(-1)
        for i in range(flat.numel()):
            old, values = flat[i].item(), []
            for step in (1e-5, -1e-5):
                flat[i] = old + step
                values.append(value().item())
            flat[i] = old
            slope.view(-1)[i] = (values[0] - values[1]) / 2e-5
        made.append(slope)
    return made


def test_gradients_flow_through_the_reference() -> None:
    network = virtualize(own(), REFERENCE)

    def value() -> Tensor:
        return network(*INPUTS).sin().mean()

    expected = finite_difference(network, value)
    torch.testing.assert_close(
        list(torch.autograd.grad(value(), [*network.parameters()])), expected, rtol=1e-5, atol=1e-7
    )
    original = VirtualBatchNorm.forward

    def detached(layer: VirtualBatchNorm, x: Tensor) -> Tensor:  # the wrong version: statistics as constants
        layer.noted = [Statistics(m.detach(), v.detach(), n) for m, v, n in layer.noted]
        return original(layer, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VirtualBatchNorm, "forward", detached)
        wrong = torch.autograd.grad(value(), [*network.parameters()])
    assert not all(torch.allclose(w, e, rtol=1e-3, atol=1e-5) for w, e in zip(wrong, expected, strict=True))


def test_a_gradient_penalty_has_the_right_gradient() -> None:
    network = virtualize(small(smooth=True), (REFERENCE[0],))

    def penalty() -> Tensor:
        x = INPUTS[0].clone().requires_grad_()
        return squared_gradient_norm(network(x), (x,)).mean()

    gradients = torch.autograd.grad(penalty(), [*network.parameters()], allow_unused=True)
    made = [torch.zeros_like(p) if g is None else g for p, g in zip(network.parameters(), gradients, strict=True)]
    torch.testing.assert_close(made, finite_difference(network, penalty), rtol=1e-4, atol=1e-6)


def test_slopes_of_single_samples_agree_with_vmap() -> None:
    network = virtualize(small(smooth=True), (REFERENCE[0],))
    x = INPUTS[0].clone().requires_grad_()
    (slopes,) = torch.autograd.grad(network(x).sum(), x)
    one = torch.func.vmap(torch.func.grad(lambda sample: network(sample[None])[0]))(x.detach())
    torch.testing.assert_close(one, slopes, rtol=1e-10, atol=1e-12)


def test_a_copy_is_a_network_of_its_own() -> None:
    network = virtualize(own(), REFERENCE)
    network(*INPUTS).mean().backward()  # a graph that is left behind could not be copied
    twin = copy.deepcopy(network)
    before = network(*INPUTS)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.5)
        reference_of(twin)[0].add_(1)
    assert torch.equal(network(*INPUTS), before)
    fresh = virtualize(own(), (REFERENCE[0] + 1, REFERENCE[1]))
    fresh.load_state_dict(twin.state_dict())
    assert torch.equal(twin(*INPUTS), fresh(*INPUTS))
    assert not torch.allclose(twin(*INPUTS), before)
    file = io.BytesIO()
    torch.save(twin, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(*INPUTS), twin(*INPUTS))


def test_functional_calls_use_the_given_weights_in_both_passes() -> None:
    network, other = virtualize(own(), REFERENCE), virtualize(own(seed=3), REFERENCE)
    made = torch.func.functional_call(network, dict(other.named_parameters()), INPUTS)
    assert torch.equal(made, other(*INPUTS)) and not torch.allclose(made, network(*INPUTS))


def test_weights_keep_their_names_and_their_optimiser() -> None:
    network = own()
    before = dict(network.named_parameters())
    buffers = {name for name, _ in network.named_buffers()}
    assert virtualize(network, REFERENCE) is network
    after = dict(network.named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] for name in after)
    assert buffers and {name for name, _ in network.named_buffers()} == {"virtual_reference_0", "virtual_reference_1"}
    assert not batch_norms(network) and network.alias is network.inner["norm"]
    assert "VirtualBatchNorm(4, eps=1e-05)" in str(network)
    network.float().to(torch.device("cpu"))
    assert network(*(t.float() for t in INPUTS)).dtype == torch.float32


def test_the_shape_of_the_batch_is_free_and_hooks_see_the_real_call_last() -> None:
    network = virtualize(own(), REFERENCE)
    assert network(*(t[:1] for t in INPUTS)).shape == (1,) and network(*(t[:0] for t in INPUTS)).shape == (0,)
    seen: list[int] = []
    network.out.register_forward_hook(lambda _, __, output: seen.append(len(output)))
    network(*INPUTS)
    assert seen == [7, 5]


def test_after_an_error_it_goes_on_as_before() -> None:
    network = virtualize(own(), REFERENCE)
    expected = network(*INPUTS)
    with pytest.raises(RuntimeError):
        network(INPUTS[0], INPUTS[0])
    layers = [m for m in network.modules() if isinstance(m, VirtualBatchNorm)]
    assert not any(layer.noted or layer.noting for layer in layers)
    kept = network.virtual_reference_1
    network.virtual_reference_1 = normal(7, 9)
    with pytest.raises(RuntimeError):
        network(*INPUTS)
    assert not any(layer.noted or layer.noting for layer in layers)
    network.virtual_reference_1 = kept
    assert torch.equal(network(*INPUTS), expected)


def test_what_cannot_be_made_virtual_is_refused() -> None:
    def refused(network: nn.Module, text: str, reference: tuple[Tensor, ...] = REFERENCE[:1]) -> None:
        with pytest.raises(ValueError, match=text):
            virtualize(network, reference)

    class Conditional(nn.BatchNorm1d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1

    refused(nn.Sequential(nn.Linear(3, 4)), r"Sequential has no batch norm; it has 0 \(Linear\)")
    refused(nn.BatchNorm1d(3), "by itself")
    refused(virtualize(small(), REFERENCE[:1]), "virtual batch norms already")
    refused(nn.Sequential(Conditional(3)), "Conditional '0' has a forward")
    refused(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.BatchNorm1d(3), dim=None)), "parametrization")
    refused(nn.Sequential(nn.LazyBatchNorm1d()), "no shape yet")
    refused(nn.Sequential(nn.LazyBatchNorm1d(affine=False)), "no shape yet")
    refused(small(), "equally many", ())
    refused(small(), "equally many", (torch.zeros(0, 3),))
    refused(small(), "equally many", (torch.zeros(2, 3), torch.zeros(3, 3)))
    with pytest.raises(RuntimeError, match="call the network that virtualize was given"):
        virtualize(small(), REFERENCE[:1])[1](torch.zeros(2, 4))
    for norm in (nn.SyncBatchNorm(3), nn.BatchNorm2d(3), nn.BatchNorm3d(3)):
        assert isinstance(virtualize(nn.Sequential(norm), REFERENCE[:1])[0], VirtualBatchNorm)
    lazy = nn.Sequential(nn.LazyBatchNorm1d())
    lazy(torch.zeros(2, 3))
    assert isinstance(virtualize(lazy, REFERENCE[:1])[0], VirtualBatchNorm)


# -- the plugin ----------------------------------------------------------------------------------------------------


def batch_normed(shapes: tuple[tuple[int, ...], ...]) -> nn.Module:
    return networks.discriminator(shapes, width=4, norm="batch")


def gan_with(*names: str, on: str = "both", reference: int | None = None, **options: Any) -> Any:
    """Plugins by name around virtual_batch_norm, and settings of a GAN whose D has batch norm."""
    made = create([name for name in names if name != "virtual_batch_norm"], options)[0]
    vbn = {"virtual_batch_norm": VBN(on=on, reference=reference)}  # type: ignore[arg-type]
    return {**vbn, **made} if names[0] == "virtual_batch_norm" else {**made, **vbn}, {
        "kind": "image",
        "discriminator": batch_normed,
    }


def test_the_generator_is_the_default_and_its_reference_is_z() -> None:
    gan, log = run({"virtual_batch_norm": VBN()}, kind="image", discriminator=batch_normed)
    assert not batch_norms(gan.generator) and batch_norms(gan.discriminator)
    (z,) = reference_of(gan.generator)
    assert z.shape == (8, 4) and z.std() > 0.5
    assert all(np.isfinite(v) for *_, terms in log.updates for v in terms.values())
    assert all(any(p is q for q in gan.parameters("g")) for p in gan.generator.parameters())
    seeds = [tiny_gan("image", {"virtual_batch_norm": VBN(reference=3)}, seed=seed) for seed in (0, 0, 1)]
    first, again, other = (reference_of(gan.generator)[0] for gan in seeds)
    assert first.shape == (3, 4) and torch.equal(first, again) and not torch.equal(first, other)
    plain = tiny_gan("image")
    assert torch.equal(seeds[0].next_z(), plain.next_z())  # nobody else's stream has moved
    started = plain.generator.state_dict()
    assert all(torch.equal(p, started[name]) for name, p in seeds[0].generator.named_parameters())


@pytest.mark.parametrize("reference", [None, 5, 16])
def test_the_discriminators_reference_is_its_first_update(reference: int | None) -> None:
    shown: list[Any] = []

    class Spy:
        @hookimpl(wrapper=True)
        def critic(self, view: View) -> Any:
            shown.append(view)
            return (yield)

    plugin, core = VBN(on="d", reference=reference), {"spy": Spy()}
    gan = tiny_gan("image", {"virtual_batch_norm": plugin}, core, discriminator=batch_normed, d_steps=2)
    assert batch_norms(gan.generator) and not batch_norms(gan.discriminator)
    (kept,) = reference_of(gan.discriminator)
    n = reference or 8
    assert kept.shape == (n, 1, 28, 28) and not kept.any()
    assert gan.discriminator(torch.rand(2, 1, 28, 28)).isfinite().all()  # callable before
    train(gan, 2)
    real, fake = shown[0].real[0], shown[0].fake[0]
    expected = torch.cat([real[: n - n // 2], fake[: n // 2]])
    assert torch.equal(reference_of(gan.discriminator)[0], expected) and len(shown) == 6
    assert not reference_of(gan.discriminator)[0].requires_grad
    again = tiny_gan("image", {"virtual_batch_norm": plugin}, discriminator=batch_normed, seed=5)
    train(again, 1)
    assert reference_of(again.discriminator)[0].any()


@pytest.mark.parametrize("penalty", ["r1", "gradient_penalty", "dragan"])
def test_penalties_of_single_samples_are_accepted_in_either_order(penalty: str) -> None:
    with pytest.raises(UsageError, match="batch norm"):
        run(create([penalty], {})[0], kind="image", discriminator=batch_normed)
    terms = []
    for names in (("virtual_batch_norm", penalty), (penalty, "virtual_batch_norm")):
        plugins, known = gan_with(*names)
        _, log = run(plugins, **known)
        assert all(np.isfinite(v) for *_, found in log.updates for v in found.values())
        terms.append(log.updates)
    assert penalty in terms[0][0][2] and terms[0] == terms[1]


def test_other_plugins_find_the_networks_changed() -> None:
    found: list[list[str]] = []

    class Look:
        @hookimpl
        def setup(self, gan: Any) -> None:
            found.append([*batch_norms(gan.discriminator), *batch_norms(gan.generator)])

    tiny_gan("image", {"look": Look(), "virtual_batch_norm": VBN(on="both")}, discriminator=batch_normed)
    assert found == [[]]


@pytest.mark.parametrize(
    "other", ["spectral_norm", "packing", "bigan", "pairwise_gp", "unrolled", "feature_matching", "diffaugment"]
)
def test_it_works_beside(other: str) -> None:
    options = {"unrolled": {"k": 1}} if other == "unrolled" else {}
    for names in (("virtual_batch_norm", other), (other, "virtual_batch_norm")):
        plugins, known = gan_with(*names, **options)
        gan, log = run(plugins, steps=2, **known)
        assert all(np.isfinite(v) for *_, found in log.updates for v in found.values())
        sizes = [tuple(t.shape) for t in reference_of(gan.discriminator)]
        assert sizes == {
            "packing": [(4, 2, 28, 28)],
            "bigan": [(8, 1, 28, 28), (8, 4)],
            "pairwise_gp": [(8, 1, 28, 28), (8, 4)],
        }.get(other, [(8, 1, 28, 28)])
        assert all(t.any() for t in reference_of(gan.discriminator))


def test_what_the_plugin_refuses() -> None:
    with pytest.raises(
        UsageError, match=r"on the generator \(.*\): MLP has no batch norm; it has layers.hidden0 \(Linear\)"
    ):
        tiny_gan("vector", {"virtual_batch_norm": VBN()})
    with pytest.raises(UsageError, match=r"on the discriminator \(.*\): Scorer has no batch norm"):
        tiny_gan("image", {"virtual_batch_norm": VBN(on="both")})
    with pytest.raises(UsageError, match="shows 8 real .* to 16 at most"):
        tiny_gan("image", {"virtual_batch_norm": VBN(on="d", reference=17)}, discriminator=batch_normed)
    with pytest.raises(ValueError, match="at least 2"):
        VBN(reference=1)
    with pytest.raises(ValueError, match="on is 'g', 'd' or 'both', not 'generator'"):
        VBN(on="generator")  # type: ignore[arg-type]


def test_networks_of_ones_own() -> None:
    def generator(shape: tuple[int, ...], z_dim: int) -> nn.Module:
        return nn.Sequential(nn.Linear(z_dim, 6), nn.LazyBatchNorm1d(), nn.ReLU(), nn.Linear(6, shape[0]))

    def discriminator(shapes: Any) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 6), nn.SyncBatchNorm(6), nn.ReLU(), nn.Linear(6, 1), nn.Flatten(0))

    # torch's SyncBatchNorm needs a GPU in training, so it is virtual before D's first step
    gan, log = run({"vbn": VBN(on="both")}, generator=generator, discriminator=discriminator)
    assert isinstance(gan.generator[1], VirtualBatchNorm) and isinstance(gan.discriminator[1], VirtualBatchNorm)
    assert all(np.isfinite(v) for *_, terms in log.updates for v in terms.values())


def attached(z: Tensor | None) -> tuple[nn.Sequential, nn.Sequential, Tensor]:
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).double()
    discriminator = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1)).double()
    optimizers = {"d": torch.optim.Adam(discriminator.parameters()), "g": torch.optim.Adam(generator.parameters())}
    loop = gankit.attach(
        generator, discriminator, [VBN(on="both"), *create(["r1"], {})[0].values()], optimizers=optimizers
    )
    loop.setup(INPUTS[0], torch.zeros_like(INPUTS[0]), z)
    for phase, optimizer in optimizers.items():
        loss = loop.d_loss if phase == "d" else loop.g_loss
        loss(INPUTS[0], generator(normal(5, 4)), z).backward()
        optimizer.step()
    return generator, discriminator, generator(normal(5, 4))


def test_a_first_batch_that_is_too_small_for_the_reference_is_refused() -> None:
    generator = nn.Linear(4, 3)
    discriminator = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    loop = gankit.attach(generator, discriminator, [VBN(on="d")])
    loop.setup(torch.zeros(16, 3), torch.zeros(16, 3))
    with pytest.raises(UsageError, match="reference of 16 samples .* and that has 6 and 6: begin with a whole batch"):
        loop.d_loss(torch.randn(6, 3), torch.randn(6, 3))


def test_it_attaches_to_a_loop_of_ones_own() -> None:
    generator, discriminator, fake = attached(normal(5, 4))
    assert isinstance(generator[1], VirtualBatchNorm) and fake.isfinite().all()
    assert reference_of(generator)[0].shape == (5, 4) and reference_of(generator)[0].dtype == torch.float64
    assert torch.equal(reference_of(discriminator)[0][:3], INPUTS[0][:3])
    with pytest.raises(UsageError, match=r"latents of shape \(5, 0\) .* does not take them"):
        attached(None)


def test_a_continued_run_takes_the_same_steps_bit_for_bit() -> None:
    def fresh(plugin_seed: int = 0) -> Any:
        plugins = {"virtual_batch_norm": VBN(on="both")}
        return tiny_gan("image", plugins, {"averaging": Averaging(0.9)}, discriminator=batch_normed, seed=plugin_seed)

    whole, first, second = fresh(), fresh(), fresh(7)
    second.seed = 0
    data = [normal(8, 1, 28, 28, seed=i).float().tanh() for i in range(8)]
    for gan in (whole, first, second):
        gan.next_real = iter(data if gan is not second else data[4:]).__next__
    train(whole, 4)
    train(first, 2)
    weights = {name: {k: t.clone() for k, t in tensors.items()} for name, tensors in first.weights().items()}
    second.load_weights(weights)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(second, 4)
    for name, tensors in whole.weights().items():
        for key, tensor in tensors.items():
            assert torch.equal(tensor, second.weights()[name][key]), (name, key)
    assert torch.equal(weights["discriminator"]["virtual_reference_0"], reference_of(second.discriminator)[0])


def test_an_average_has_the_reference_unchanged_and_its_own_layers() -> None:
    gan, _ = run({"vbn": VBN(), "averaging": Averaging(0.9)}, kind="image", steps=5)
    average = gan.averages["generator"]
    (z,), (own,) = reference_of(gan.generator), reference_of(average)
    assert torch.equal(z, own) and z is not own
    fresh = virtualize(networks.generator((1, 28, 28), 4, width=8), (torch.zeros_like(z),))
    fresh.load_state_dict(average.state_dict())
    latents = normal(3, 4).float()
    assert torch.equal(average(latents), fresh(latents)) and not torch.equal(average(latents), gan.generator(latents))


def test_published_weights_work_in_a_network_made_virtual_alike() -> None:
    plugins, known = gan_with("virtual_batch_norm", "spectral_norm", on="both")
    gan, _ = run(plugins, steps=2, **known)
    for module, bare, n in (
        (gan.discriminator, batch_normed(((1, 28, 28),)), (8, 1, 28, 28)),
        (gan.generator, networks.generator((1, 28, 28), 4, width=8), (8, 4)),
    ):
        virtualize(bare, (torch.empty(n),))
        bare.load_state_dict(networks.folded(module).state_dict())
        x = normal(3, *n[1:], seed=4).float()
        assert torch.equal(bare.eval()(x), module.eval()(x))


def test_same_seed_same_terms_and_the_global_stream_is_left_alone() -> None:
    plugins, known = gan_with("virtual_batch_norm", "r1")
    before = torch.get_rng_state()
    first = run(plugins, **known)[1].updates
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert run(plugins, **known)[1].updates == first
