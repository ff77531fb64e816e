"""IvOM against least squares of numpy and scipy, interpolation against its closed forms, reconstruction, the commands."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.optimize import lsq_linear
from torch import Tensor, nn

from gankit import inversion
from gankit.cli import main
from gankit.errors import UsageError
from gankit.gan import Latent
from gankit.inversion import interpolate_latents, ivom, measured
from gankit.joint import reconstruction_error
from gankit.provenance import hash_of
from gankit.run import load, read_data
from gankit.rundir import RunDir
from gankit.terminal import Terminal
from gankit.testing import tiny_gan

FAST = ["--threads", "1", "--steps", "3", "--batch", "8", "--eval-samples", "20", "--width", "8", "--name", "r",
        "--no-report"]  # fmt: skip


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear(seed: int = 1) -> nn.Linear:
    network = nn.Linear(3, 8)
    network.load_state_dict({"weight": randn(8, 3, seed=seed), "bias": randn(8, seed=seed + 1)})
    return network


# -- IvOM ------------------------------------------------------------------------------------------------------------


def test_a_linear_generator_leaves_the_residual_of_least_squares() -> None:
    network, x = linear(), randn(20, 8)
    found = ivom(network, x, Latent(3), steps=300, restarts=1, generator=generator())
    a, b = network.weight.detach().double().numpy(), network.bias.detach().double().numpy()
    z = np.linalg.lstsq(a, (x.double().numpy() - b).T, rcond=None)[0].T
    residual = ((z @ a.T + b - x.double().numpy()) ** 2).mean(axis=1)
    np.testing.assert_allclose(found.residuals, residual, rtol=1e-4)
    np.testing.assert_allclose(found.z, z, atol=1e-2)


def test_under_a_uniform_prior_z_stays_in_its_support() -> None:
    network, x = linear(), 4 * randn(20, 8)
    found = ivom(network, x, Latent(3, "uniform"), steps=400, restarts=1, generator=generator())
    a, b = network.weight.detach().double().numpy(), network.bias.detach().double().numpy()
    best = [2 * lsq_linear(a, row - b, (-1, 1)).cost / 8 for row in x.double().numpy()]
    assert float(found.z.abs().max()) == 1  # the bound matters here
    np.testing.assert_allclose(found.residuals, best, rtol=1e-3)


class Wells(nn.Module):
    """One coordinate, many minima: the residual of 0 is (z^2 + 3 sin^2(3 z))^2."""

    def forward(self, z: Tensor) -> Tensor:
        return z.square() + 3 * (3 * z).sin().square()


def test_further_starts_and_the_best_of_all_points_count() -> None:
    x, found = torch.zeros(50, 1), {}
    for restarts in (1, 2, 8):
        found[restarts] = ivom(Wells(), x, Latent(1), steps=60, restarts=restarts, generator=generator())
    one, two, many = (found[restarts].residuals for restarts in (1, 2, 8))
    assert bool((two <= one).all()) and bool((many <= two).all())
    assert int((one > 0.1).sum()) > 10 and int((many > 0.1).sum()) < int((one > 0.1).sum()) / 4
    for nearest in found.values():
        np.testing.assert_allclose(Wells()(nearest.z).square().mean(1), nearest.residuals, rtol=1e-6)
    start = Latent(1).draw(50, generator())
    wild = ivom(Wells(), x, Latent(1), steps=5, restarts=1, rate=100.0, generator=generator())
    assert bool((wild.residuals <= Wells()(start).square().mean(1)).all())


def test_no_sample_depends_on_another(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = linear(), randn(7, 8)
    whole = ivom(network, x, Latent(3), steps=20, restarts=2, generator=generator())
    monkeypatch.setattr(inversion, "CHUNK", 2)
    parts = ivom(network, x, Latent(3), steps=20, restarts=2, generator=generator())
    np.testing.assert_allclose(parts.residuals, whole.residuals, rtol=1e-5)
    np.testing.assert_allclose(parts.z, whole.z, atol=1e-5)


def test_the_generator_and_everybodys_random_numbers_stay_as_they_are() -> None:
    network = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 8))
    network[2].eval()
    network[0].weight.grad = torch.ones(6, 3)
    before = copy.deepcopy(network.state_dict())
    state = torch.get_rng_state()
    with torch.no_grad():
        one = ivom(network, randn(5, 8), Latent(3), steps=5, restarts=1, generator=generator())
    again = ivom(network, randn(5, 8), Latent(3), steps=5, restarts=1, generator=generator())
    assert torch.equal(one.residuals, again.residuals)
    assert torch.equal(torch.get_rng_state(), state)
    assert [part.training for part in network] == [True, True, False, True]
    assert torch.equal(network[0].weight.grad, torch.ones(6, 3)) and network[3].weight.grad is None
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not one.z.requires_grad and not one.residuals.requires_grad


def test_other_samples_are_another_column() -> None:
    """Another size of the same images, say: residuals of a pixel that are not comparable."""
    gan = tiny_gan(shape=(2,))
    names = [
        [*measured(gan, torch.full((3, 2), value), "mine", steps=1, restarts=1).metrics] for value in (0.0, 0.0, 1.0)
    ]
    assert names[0] == names[1] != names[2]


def test_bad_input_is_said() -> None:
    for wrong in ({"steps": 0}, {"restarts": 0}, {"rate": 0.0}):
        with pytest.raises(UsageError, match="at least one step"):
            ivom(linear(), randn(2, 8), Latent(3), generator=generator(), **wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"makes \(8,\), and the samples are \(5,\)"):
        ivom(linear(), randn(2, 5), Latent(3), generator=generator())


# -- interpolation ---------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(2, 9))
def test_uniform_latents_are_joined_by_a_line(seed: int, dim: int, count: int) -> None:
    start, end = Latent(dim, "uniform").draw(2, generator(seed)), Latent(dim, "uniform").draw(2, generator(seed + 1))
    z = interpolate_latents(start, end, count, "uniform")
    expected = np.linspace(start.numpy(), end.numpy(), count, axis=1)
    np.testing.assert_allclose(z, expected, atol=1e-6)


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 6), st.integers(2, 9))
def test_normal_latents_of_one_length_are_joined_by_an_arc_at_even_speed(seed: int, dim: int, count: int) -> None:
    start, end = (3 * nn.functional.normalize(randn(2, dim, seed=seed + k).double()) for k in (0, 1))
    z = interpolate_latents(start, end, count, "normal").numpy()
    np.testing.assert_allclose(z[:, 0], start, atol=1e-9)
    np.testing.assert_allclose(z[:, -1], end, atol=1e-9)
    whole = np.arccos(np.clip((start * end).sum(1).numpy() / 9, -1, 1))
    if min(whole.min(), math.pi - whole.max()) < 1e-2:
        return
    np.testing.assert_allclose(np.linalg.norm(z, axis=2), 3, rtol=1e-6)
    angles = np.arccos(np.clip((z[:, :-1] * z[:, 1:]).sum(2) / 9, -1, 1))
    np.testing.assert_allclose(angles, np.repeat(whole[:, None] / (count - 1), count - 1, axis=1), rtol=1e-4)


def test_where_there_is_no_arc_there_is_a_line() -> None:
    start = torch.tensor([[1.0, 0.0], [1.0, 2.0], [0.0, 0.0]])
    end = torch.tensor([[-1.0, 0.0], [2.0, 4.0], [1.0, 0.0]])
    z = interpolate_latents(start, end, 3, "normal")
    np.testing.assert_allclose(z[:, 1], (start + end) / 2, atol=1e-6)
    z = interpolate_latents(torch.tensor([[-1.0]]), torch.tensor([[2.0]]), 4, "normal")
    np.testing.assert_allclose(z.flatten(), [-1, 0, 1, 2], atol=1e-6)
    assert interpolate_latents(randn(2, 5, 1, 1), randn(2, 5, 1, 1, seed=1), 4, "normal").shape == (2, 4, 5, 1, 1)
    for wrong in ((start, end, 1), (start, end[:2], 3)):
        with pytest.raises(UsageError, match="2 points or more"):
            interpolate_latents(*wrong, "normal")


# -- commands --------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def gankit(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == code, (result.output, result.exception)
    return result


def images() -> None:
    np.save("x.npy", np.random.default_rng(0).integers(0, 256, (100, 16, 16, 3), dtype=np.uint8))


def test_invert_a_run_of_images_with_an_encoder() -> None:
    images()
    gankit("run", "--data", "x.npy", "--plugin", "bigan", *FAST)
    arguments = ["invert", "r", "-n", "9", "--steps", "4", "--restarts", "2", "--seed", "1", "--checkpoint", "latest"]
    result = gankit(*arguments, "--json")
    found = json.loads(result.stdout)
    gan, config = load(RunDir(Path("runs/r")), "latest", "cpu")
    x = read_data(config, Terminal(inversion_console())).held_out(9)
    residual, error = found["metrics"]
    assert residual.startswith("ivom@n=9,test,") and error.startswith("reconstruction_error@n=9,test,")
    assert found["provenance"][residual] == {
        "n": 9, "split": "test", "data": "x.npy", "steps": 4, "restarts": 2, "rate": 0.1, "reference": hash_of({"x": x}),
    }  # fmt: skip
    assert "worst IvOM" in result.stderr and "IvOM (n=9, test, " in result.stderr

    np.testing.assert_allclose(found["metrics"][error], float(reconstruction_error(gan, x).mean()), rtol=1e-5)
    assert found["variance"] == pytest.approx(x.numpy().var(axis=0).mean(), rel=1e-5)
    assert found["metrics"][residual] <= found["worst"]
    with Image.open("runs/r/inversion.png") as picture:
        width, height = picture.size
    assert height > width

    assert json.loads(gankit(*arguments, "--json").stdout) == found
    other = json.loads(gankit("invert", "r", "-n", "9", "--steps", "5", "--restarts", "2", "--json").stdout)
    assert residual not in other["metrics"] and error in other["metrics"]
    gankit("invert", "r", "--to", "x.jpg", code=2)


def inversion_console():  # type: ignore[no-untyped-def]
    from rich.console import Console

    return Console(stderr=True)


def test_invert_a_run_of_points_without_an_encoder() -> None:
    gankit("run", *FAST)
    found = json.loads(gankit("invert", "r", "-n", "50", "--steps", "20", "--json", "--to", "p.png").stdout)
    assert [name.partition("@")[0] for name in found["metrics"]] == ["ivom"]
    assert Path("p.png").exists() and found["picture"] == "p.png"


def test_interpolate() -> None:
    images()
    gankit("run", "--data", "x.npy", *FAST)
    assert "picture: runs/r/interpolation.png" in gankit("interpolate", "r").output
    gankit("interpolate", "r", "--rows", "3", "--columns", "5", "--to", "a.png")
    gankit("interpolate", "r", "--rows", "3", "--columns", "5", "--to", "b.png", "--seed", "1")
    with Image.open("a.png") as a, Image.open("b.png") as b:
        scale = round(640 / (5 * 18))
        assert a.size == (5 * (16 * scale + 2) + 2, 3 * (16 * scale + 2) + 2)
        assert a.tobytes() != b.tobytes()
    gankit("interpolate", "r", "--to", "x.jpg", code=2)
    gankit("interpolate", "r", "--columns", "1", code=2)


def test_interpolate_points() -> None:
    gankit("run", *FAST)
    gankit("interpolate", "r", "--rows", "2", "--to", "a.png")
    with Image.open("a.png") as picture:
        assert picture.width > 500
