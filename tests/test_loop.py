"""The loop: equal to a hand-written one bit for bit, short, flat, and free of method names."""

import ast
import copy
import itertools
import math
import traceback
from collections.abc import Generator
from functools import partial
from pathlib import Path

import pytest
import torch
from handwritten import Loop
from pairs import IN_TREE, KINDS, SETTINGS, load
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from gankit import GAN, Latent, Player, UsageError, View, hookimpl, loop, train
from gankit.gan import derive_seed
from gankit.inversion import measured
from gankit.loop import update
from gankit.losses import make
from gankit.testing import run, tiny_gan


@pytest.mark.parametrize("kind", ["vector", "image"])
def test_without_plugins_it_equals_a_hand_written_loop_bit_for_bit(kind: str) -> None:
    ours, twin = tiny_gan(kind), tiny_gan(kind)
    train(ours, 10)
    by_hand = Loop(twin.generator, twin.discriminator, twin.next_real, twin.next_z)
    by_hand.train(10)
    for mine, his in zip(ours.weights().values(), twin.weights().values(), strict=True):
        assert mine.keys() == his.keys()
        assert all(torch.equal(mine[key], his[key]) for key in mine)


def test_the_file_is_one_screen() -> None:
    tree = ast.parse(Path(loop.__file__).read_text())
    docstrings = {
        line
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.FunctionDef)) and ast.get_docstring(node)
        for line in range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)
    }
    code = {
        line
        for node in ast.walk(tree)
        if hasattr(node, "lineno")
        for line in range(node.lineno, (node.end_lineno or 0) + 1)
    } - docstrings
    lines = Path(loop.__file__).read_text().splitlines()
    assert sum(1 for number in code if lines[number - 1].strip()) <= 60
    branches = [node for node in ast.walk(tree) if isinstance(node, (ast.If, ast.IfExp, ast.Match, ast.Try))]
    assert not branches  # no method, loss or data set is treated by name


def test_one_frame_lies_between_train_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    backward = torch.autograd.backward

    def spy(*args: object, **kwargs: object) -> None:
        seen.append([frame.name for frame in traceback.extract_stack()])
        backward(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.autograd, "backward", spy)
    run({}, steps=1)
    assert seen[0][-4:] == ["run", "train", "update", "spy"]


class Draws:
    """A plugin that consumes random numbers of its own and of the global generator."""

    @hookimpl
    def pre_d_loss(self, gan: GAN) -> None:
        torch.rand(3, generator=gan.rng(self))
        torch.rand(5)


def test_a_plugin_shifts_neither_the_data_nor_the_latents_nor_another_plugins_stream() -> None:
    class Records(Draws):
        def __init__(self) -> None:
            self.seen: list[torch.Tensor] = []

        @hookimpl
        def sample(self, gan: GAN, real: torch.Tensor, z: torch.Tensor) -> None:
            if gan.step:  # not in the dry pass of the build
                self.seen += [real, z, torch.rand(2, generator=gan.rng(self))]

    alone, beside = Records(), Records()
    run({"records": alone})
    run({"draws": Draws(), "records": beside})
    assert len(alone.seen) == 3 * 2 * 3
    assert all(torch.equal(a, b) for a, b in zip(alone.seen, beside.seen, strict=True))


def test_the_same_seed_gives_the_same_networks_whatever_the_global_generator_does() -> None:
    first, _ = run({}, seed=3)
    torch.rand(17)
    again, _ = run({}, seed=3)
    other, _ = run({}, seed=4)
    for name, weights in first.weights().items():
        assert all(torch.equal(weights[key], again.weights()[name][key]) for key in weights)
        assert any(not torch.equal(weights[key], other.weights()[name][key]) for key in weights)


def test_looking_at_a_view_moves_no_stream() -> None:
    class Noise:
        @hookimpl(wrapper=True)
        def view(self, gan: GAN) -> Generator[None, View, View]:
            view = yield
            return View((view.real[0] + torch.rand((), generator=gan.rng(self)),), view.fake)

    gan, again = tiny_gan(plugins={"noise": Noise()}), tiny_gan(plugins={"noise": Noise()})
    assert not gan.rngs
    train(gan, 1)
    states = {name: rng.get_state() for name, rng in gan.rngs.items()}
    gan.first_view()
    assert states.keys() == gan.rngs.keys()
    assert all(torch.equal(states[name], rng.get_state()) for name, rng in gan.rngs.items())
    again.first_view()
    train(again, 1)
    assert all(torch.equal(a, b) for a, b in zip(gan.parameters("d"), again.parameters("d"), strict=True))


class Noisy(nn.Module):
    """A G whose noise comes from torch's global generator in evaluation mode, too, as StyleGAN's does."""

    def __init__(self, shape: tuple[int, ...], z_dim: int) -> None:
        super().__init__()
        self.body = nn.Linear(z_dim, shape[0])

    def forward(self, z: Tensor) -> Tensor:
        return self.body(z) + torch.randn(len(z), 1)


def test_samples_of_a_network_that_draws_are_the_same_each_time_and_shift_nothing() -> None:
    gan = tiny_gan(generator=Noisy)
    state = torch.get_rng_state()
    first, again = (gan.draw(5, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), state)
    latents = gan.latent.draw(5, torch.Generator().manual_seed(3))
    noise = first - gan.generator.body(latents)
    assert noise.std(0).min() > 0.1
    other = torch.Generator().manual_seed(4)
    more = gan.latent.draw(5, torch.Generator().manual_seed(4))
    assert not torch.allclose(gan.draw(5, other) - gan.generator.body(more), noise, atol=1e-3)


def test_so_is_what_is_found_by_inversion() -> None:
    """IvOM and G(E(x)) ask G themselves, and not through ``draw``."""

    class Encodes:
        @hookimpl
        def players(self, gan: GAN) -> dict[str, Player]:
            return {"encoder": Player(nn.Linear(gan.shape[0], gan.latent.dim), phase="g")}

    gan, state = tiny_gan(plugins={"encodes": Encodes()}, generator=Noisy), torch.get_rng_state()
    found, again = (measured(gan, torch.zeros(4, *gan.shape), "zeros", steps=2, seed=1) for _ in range(2))
    assert torch.equal(found.nearest.residuals, again.nearest.residuals)
    assert found.reconstruction is not None and again.reconstruction is not None
    assert torch.equal(found.reconstruction, again.reconstruction)
    assert torch.equal(torch.get_rng_state(), state)


def test_building_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(4)
    torch.manual_seed(0)
    tiny_gan("image")
    assert torch.equal(torch.rand(4), expected)


def test_streams_of_different_names_and_seeds_differ() -> None:
    seeds = {derive_seed(seed, name) for seed in range(50) for name in ("data", "latent", "plugin:a")}
    assert len(seeds) == 150


def test_d_steps_and_unequal_rates() -> None:
    from gankit import Optim

    gan, log = run({}, steps=4, d_steps=3, optim={"d": Optim(1e-3), "g": Optim(1e-4)})
    assert [phase for phase, _, _ in log.updates] == [*"dddg"] * 4
    assert [gan.optimizers[phase].param_groups[0]["lr"] for phase in "dg"] == [1e-3, 1e-4]


@pytest.mark.parametrize("simultaneous", [False, True])
def test_players_move_one_after_the_other_or_at_once(simultaneous: bool) -> None:
    """The Dirac GAN: D(x) = psi x, G makes theta, data are 0. At once the players spiral outwards, by sqrt(1 + lr^2) a step
    (Mescheder et al. 2018, arXiv 1801.04406); one after the other they stay on a closed curve."""
    theta, psi, lr, steps = 1.0, 0.5, 0.1, 200
    point = torch.nn.Linear(1, 1).requires_grad_(False)
    point.weight.zero_()
    point.bias.fill_(theta).requires_grad_()
    slope = torch.nn.Linear(1, 1, bias=False)
    slope.weight.data.fill_(psi)
    gan = GAN(point, slope, (1,), Latent(1), loss=make("wasserstein"), batch_size=2, simultaneous=simultaneous)
    gan.next_real = lambda: torch.zeros(2, 1)
    gan.build()
    for phase in "dg":
        gan.optimizers[phase] = torch.optim.SGD(gan.parameters(phase), lr)
    train(gan, steps)

    for _ in range(steps):
        met = psi
        psi -= lr * theta
        theta += lr * (met if simultaneous else psi)
    assert point.bias.item() == pytest.approx(theta, abs=1e-3)
    assert slope.weight.item() == pytest.approx(psi, abs=1e-3)
    grown = (1 + lr**2) ** (steps / 2) * math.hypot(1.0, 0.5)
    assert math.hypot(theta, psi) == pytest.approx(grown) if simultaneous else math.hypot(theta, psi) < 1.3


def test_at_once_the_last_update_of_d_and_that_of_g_share_a_round() -> None:
    class Weights:
        def __init__(self) -> None:
            self.seen: list[tuple[str, Tensor, Tensor]] = []

        @hookimpl
        def post_step(self, gan: GAN, phase: str) -> None:
            self.seen.append((phase, *(parameters_to_vector(gan.parameters(p)).detach() for p in "dg")))

    weights = Weights()
    gan, log = run({"weights": weights}, steps=2, d_steps=3, simultaneous=True)
    assert gan.rounds == ("d", "d", "dg")
    assert [phase for phase, _, _ in log.updates] == [*"dddg"] * 2
    for before, after in itertools.pairwise(weights.seen):
        moved = [not torch.equal(a, b) for a, b in zip(before[1:], after[1:], strict=True)]
        assert moved == [after[0] == "d", after[0] == "g"]


@pytest.mark.parametrize("name", IN_TREE)
def test_at_once_every_plugin_acts_on_d_as_before_and_on_g_as_if_d_had_not_moved(name: str) -> None:
    settings = {**KINDS["image"], **SETTINGS.get(name, {})}
    at_once, twin = (tiny_gan("image", load((name,)), **settings) for _ in range(2))
    update(at_once, "dg", 1)
    start = [p.detach().clone() for p in twin.parameters("d")]
    adam = copy.deepcopy(twin.optimizers["d"].state_dict())
    update(twin, "d", 1)
    moved = [p.detach().clone() for p in twin.parameters("d")]
    assert not all(torch.equal(a, b) for a, b in zip(start, moved, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(at_once.parameters("d"), moved, strict=True))
    with torch.no_grad():
        for parameter, value in zip(twin.parameters("d"), start, strict=True):
            parameter.copy_(value)
    twin.optimizers["d"].load_state_dict(adam)
    update(twin, "g", 1)
    assert all(torch.equal(a, b) for a, b in zip(at_once.parameters("g"), twin.parameters("g"), strict=True))


def test_what_falls_is_a_hundredth_at_the_end_and_stays_there() -> None:
    gan = tiny_gan()
    gan.steps = 10
    assert [gan.decayed(0.01, step) for step in (0, 5, 10, 11, 20)] == pytest.approx([1, 0.1, 0.01, 0.01, 0.01])
    assert gan.decayed(1, 20) == 1
    gan.steps = None
    assert gan.decayed(1, 20) == 1
    with pytest.raises(UsageError, match="how many steps"):
        gan.decayed(0.01, 20)


def test_a_users_own_modules_also_with_lazy_layers() -> None:
    gan = GAN(
        generator=torch.nn.Linear(2, 5),
        discriminator=torch.nn.Sequential(torch.nn.LazyLinear(4), torch.nn.ReLU(), torch.nn.Linear(4, 1)),
        shape=(5,),
        latent=Latent(2),
        batch_size=6,
    )
    gan.next_real = lambda: torch.ones(6, 5)
    gan.build()
    assert gan.discriminator[0].in_features == 5
    train(gan, 2)
    assert gan.step == 2


def test_latents_of_another_shape_are_those_that_g_is_built_with() -> None:
    generator = nn.Sequential(nn.ConvTranspose2d(4, 1, 8), nn.Tanh())  # as DCGAN's: (B, 4, 1, 1) -> (B, 1, 8, 8)
    discriminator = nn.Sequential(nn.Flatten(), nn.Linear(64, 1))
    gan = GAN(generator, discriminator, (1, 8, 8), Latent(4, shape=(4, 1, 1)), batch_size=6).build()
    gan.next_real = lambda: torch.zeros(6, 1, 8, 8)
    train(gan, 1)
    assert gan.first_view().fake[0].shape == (6, 1, 8, 8)


def test_lazy_layers_begin_by_the_seed_of_the_gan() -> None:
    starts = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        lazy = tiny_gan(generator=torch.nn.LazyLinear(3), discriminator=torch.nn.LazyLinear(1))
        starts.append([p.detach().clone() for player in lazy.players.values() for p in player.module.parameters()])
    assert all(map(torch.equal, *starts))


def test_a_generator_of_the_wrong_shape_is_refused() -> None:
    from gankit import UsageError

    with pytest.raises(UsageError, match=r"shape \(4,\).*\(3,\)"):
        tiny_gan(generator=torch.nn.Linear(4, 4))


def test_every_loss_trains() -> None:
    from gankit.config import LOSSES

    for loss in LOSSES:
        gan, log = run({}, loss=loss)
        assert all(torch.isfinite(torch.tensor(terms["adv"])) for _, _, terms in log.updates)
        assert gan.loss.name == loss


def test_a_factory_is_given_width_and_depth_where_they_are_set_and_it_asks_for_them() -> None:
    asked = {}

    def mine(shape: tuple[int, ...], z_dim: int, width: int = 5, depth: int = 7) -> torch.nn.Module:
        asked.update(width=width, depth=depth)
        return torch.nn.Linear(z_dim, *shape)

    def small(shapes: list[tuple[int, ...]]) -> torch.nn.Module:
        return torch.nn.Linear(*shapes[0], 1)

    GAN(mine, small, (2,), Latent(3), architecture={"network": "mlp", "width": 8, "depth": None}).build()
    assert asked == {"width": 8, "depth": 7}
    GAN(partial(mine, width=9), small, (2,), Latent(3), architecture={"width": 8, "depth": 2}).build()
    assert asked == {"width": 9, "depth": 2}


def test_a_factory_that_asks_for_what_there_is_not_is_told() -> None:
    def mine(shape: tuple[int, ...], noise: int) -> torch.nn.Module:
        raise AssertionError("not called")

    with pytest.raises(
        UsageError, match="mine asks for 'noise'; what it can be given, by name, is shape, z_dim, latent"
    ):
        GAN(mine, torch.nn.Linear(2, 1), (2,), Latent(3)).build()
