"""What is recorded of 2-D data, against critics whose value and gradient are known, and against runs that do not look."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gankit import GAN, Player, UsageError, hookimpl, train
from gankit.plane import GRID, Field, critic_field, load_frame, save_frame, wider
from gankit.plugins import create
from gankit.rundir import RunDir
from gankit.testing import tiny_gan

LIMITS = (-1.0, 2.0, 3.0, 5.0)
X, Y = np.linspace(-1, 2, GRID), np.linspace(3, 5, GRID)


class Linear(nn.Module):
    """2 x - 3 y + 0.5, and 7 z of a joint view."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0, -3.0, 7.0]))

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        value = x @ self.weight[:2] + 0.5
        return value if z is None else value + self.weight[2] * z.sum(1)


def test_value_and_gradient_of_a_linear_critic_stand_where_they_belong() -> None:
    found = critic_field(tiny_gan(shape=(2,), discriminator=Linear()), LIMITS)
    assert isinstance(found, Field)
    assert not found.joint
    np.testing.assert_allclose(found.values, 2 * X[None, :] - 3 * Y[:, None] + 0.5, atol=1e-4)
    np.testing.assert_allclose(found.slopes, np.broadcast_to([2.0, -3.0], (GRID, GRID, 2)), atol=1e-6)


def test_the_gradient_is_that_of_finite_differences() -> None:
    gan = tiny_gan(shape=(2,), discriminator=nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1)))
    found = critic_field(gan, (-1, 1, -1, 1))
    assert isinstance(found, Field)
    exact = gan.discriminator.double()
    row, column, h = 11, 30, 1e-5
    side = np.linspace(-1, 1, GRID)
    at = torch.tensor([side[column], side[row]], dtype=torch.float64)
    steps = torch.eye(2, dtype=torch.float64) * h
    with torch.no_grad():
        slope = (exact(at + steps) - exact(at - steps)).squeeze(1) / (2 * h)
    np.testing.assert_allclose(found.slopes[row, column], slope.numpy(), atol=1e-5)


def test_a_joint_view_is_looked_at_with_the_code_of_each_point_held_fixed() -> None:
    class Doubles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.factor * x

    class Joint:
        """(x, E(x)) with E(x) = 2 x, by hooks alone."""

        @hookimpl
        def players(self) -> dict[str, Player]:
            return {"encoder": Player(Doubles(), "g")}

        @hookimpl(wrapper=True)
        def view(self, gan: GAN, batch: Any) -> Any:
            view = yield
            encoder = gan.players["encoder"].module
            return view._replace(real=(*view.real, encoder(batch.real)), fake=(*view.fake, batch.z))

    gan = tiny_gan(plugins={"joint": Joint()}, shape=(2,), discriminator=Linear(), z_dim=2)
    found = critic_field(gan, LIMITS)
    assert isinstance(found, Field)
    assert found.joint
    x, y = X[None, :], Y[:, None]
    np.testing.assert_allclose(found.values, 2 * x - 3 * y + 0.5 + 7 * 2 * (x + y), rtol=1e-5)
    np.testing.assert_allclose(found.slopes, np.broadcast_to([2.0, -3.0], (GRID, GRID, 2)), atol=1e-6)


@pytest.mark.parametrize(
    ("plugin", "why"), [("packing", "several samples at once"), ("minibatch_discrimination", "the rest of its batch")]
)
def test_where_a_point_has_no_value_of_its_own_there_is_none(plugin: str, why: str, tmp_path: Path) -> None:
    gan = tiny_gan(plugins=create([plugin], {})[0], shape=(2,))
    train(gan, 2)
    assert why in str(critic_field(gan, LIMITS))
    save_frame(gan, torch.zeros(3, 2), LIMITS, tmp_path / "a.npz")
    assert why in str(load_frame(tmp_path / "a.npz").field)


def test_packs_that_the_points_do_not_fill_have_no_value_either() -> None:
    gan = tiny_gan(plugins=create(["packing"], {"packing": {"m": 5}})[0], shape=(2,), batch_size=10)
    assert "not shown single samples" in str(critic_field(gan, LIMITS))


def test_a_frame_comes_back_as_it_was(tmp_path: Path) -> None:
    gan = tiny_gan(shape=(2,))
    fake = torch.randn(5, 2)
    save_frame(gan, fake, LIMITS, tmp_path / "a.npz")
    frame = load_frame(tmp_path / "a.npz")
    np.testing.assert_array_equal(frame.fake, fake.numpy())
    np.testing.assert_allclose(frame.limits, (-1.225, 2.225, 2.85, 5.15))
    assert isinstance(frame.field, Field)
    expected = critic_field(gan, wider(LIMITS))
    assert isinstance(expected, Field)
    np.testing.assert_array_equal(frame.field.values, expected.values)
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:500])
    with pytest.raises(UsageError, match="a.npz cannot be read"):
        load_frame(tmp_path / "a.npz")


class Looks:
    """Looks at D's field after every update."""

    @hookimpl
    def post_step(self, gan: GAN) -> None:
        assert critic_field(gan, LIMITS)


@pytest.mark.parametrize(
    "plugins", [[], ["bigan"], ["spectral_norm", "gradient_penalty"], ["consistency", "lecam"], ["packing"]]
)
def test_looking_moves_nothing(plugins: list[str]) -> None:
    ends = []
    options = {"bigan": {"stochastic": "true"}} if "bigan" in plugins else {}
    for core in ({}, {"looks": Looks()}):
        torch.manual_seed(0)
        dropout = {} if plugins[:1] == ["bigan"] else {"discriminator": lambda shapes: noisy(shapes[0][0])}
        gan = tiny_gan(plugins=create(plugins, options)[0], core=core, shape=(2,), **dropout)
        train(gan, 4)
        state = {name: rng.get_state() for name, rng in gan.rngs.items()}
        modes = [module.training for player in gan.players.values() for module in player.module.modules()]
        ends.append((gan.weights(), state, torch.get_rng_state(), modes))
    (weights, streams, rng, modes), (looked, looked_streams, looked_rng, looked_modes) = ends
    for network, tensors in weights.items():
        for key, tensor in tensors.items():
            assert torch.equal(tensor, looked[network][key]), f"{network}: {key}"
    assert streams.keys() == looked_streams.keys()
    assert all(torch.equal(streams[name], looked_streams[name]) for name in streams)
    assert torch.equal(rng, looked_rng)
    assert modes == looked_modes


class Noise(nn.Module):
    """Noise from torch's global generator, in evaluation mode, too."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn_like(x)


def noisy(features: int) -> nn.Module:
    """A critic that draws in every mode, and drops in training mode."""
    return nn.Sequential(nn.Linear(features, 8), nn.Dropout(0.3), Noise(), nn.LeakyReLU(), nn.Linear(8, 1))


def test_what_a_resumed_run_forgets_it_forgets_whole(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "a", "x")
    for step in (1, 2, 3):
        for suffix in ("png", "npz"):
            (run.samples / f"fakes-{step:06d}.{suffix}").touch()
    (run.samples / "reals.npz").touch()
    run.trim(2)
    left = sorted(path.name for path in run.samples.iterdir())
    assert left == ["fakes-000001.npz", "fakes-000001.png", "fakes-000002.npz", "fakes-000002.png", "reals.npz"]
