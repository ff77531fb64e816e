import collections
import itertools
import json
import math

import numpy as np
import pytest
import scipy.spatial.distance
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gankit.data import from_arrays
from gankit.errors import UsageError
from gankit.metrics import energy_distance, label_modes, mode_histogram, mode_metrics, sliced_wasserstein
from gankit.training import Metrics

STD = 0.01
ANGLES = torch.arange(8, dtype=torch.float64) * (2 * math.pi / 8)
RING = torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1)

sizes = st.integers(1, 12)
seeds = st.integers(0, 2**31)


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=stream(seed), dtype=torch.float64)


def ring(labels: Tensor, seed: int = 0) -> Tensor:
    return RING[labels] + STD * normal(len(labels), 2, seed=seed)


def test_true_ring_scores_the_ceiling() -> None:
    n = 20_000
    found = mode_metrics(ring(torch.arange(n) % 8), RING, 3 * STD)
    ceiling = 1 - math.exp(-4.5)
    assert found["high_quality"] == pytest.approx(ceiling, abs=4 * math.sqrt(ceiling * (1 - ceiling) / n))
    assert found["modes"] == 8
    assert 0 <= found["reverse_kl"] < 1e-4
    assert 0 <= found["jsd"] < 1e-4


def test_collapsed_sample() -> None:
    found = mode_metrics(ring(torch.full((500,), 3)), RING, 3 * STD)
    assert found["modes"] == 1
    assert found["reverse_kl"] == pytest.approx(math.log(8), rel=1e-12)
    point, uniform = np.eye(8)[0], np.full(8, 1 / 8)
    assert found["jsd"] == pytest.approx(scipy.spatial.distance.jensenshannon(point, uniform) ** 2, rel=1e-9)


def test_histogram_by_hand() -> None:
    centers = torch.tensor([[0.0], [10.0], [20.0]])
    samples = torch.tensor([[0.1], [-0.9], [9.5], [1.0], [15.2], [math.nan], [math.inf], [11.5]])
    counts, share = mode_histogram(samples, centers, 1.0)
    assert counts.tolist() == [2, 1, 0]  # exactly one radius away is a miss, as in PacGAN's code
    assert counts.dtype == torch.int64
    assert share == 3 / 8
    found = mode_metrics(samples, centers, 1.0)
    assert found["modes"] == 2
    assert found["high_quality"] == 3 / 8
    assert found["reverse_kl"] == pytest.approx(math.log(3) + 2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))


@given(st.lists(st.integers(0, 30), min_size=2, max_size=9).filter(any))
@settings(deadline=None, max_examples=50)
def test_divergences_of_any_histogram(histogram: list[int]) -> None:
    k = len(histogram)
    centers = torch.arange(k, dtype=torch.float64)[:, None]
    misses = torch.full((5, 1), 0.5)  # between modes: they must not enter q
    samples = torch.cat([centers.repeat_interleave(torch.tensor(histogram), dim=0), misses])
    found = mode_metrics(samples, centers, 0.25)
    q = np.array(histogram) / sum(histogram)
    uniform = np.full(k, 1 / k)
    assert found["modes"] == np.count_nonzero(q)
    assert found["reverse_kl"] == pytest.approx(scipy.stats.entropy(q, uniform), abs=1e-9)
    assert found["jsd"] == pytest.approx(scipy.spatial.distance.jensenshannon(q, uniform) ** 2, abs=1e-9)


def test_no_high_quality_sample_is_the_worst_and_json() -> None:
    far = mode_metrics(RING + 5, RING, 3 * STD)
    collapsed = mode_metrics(ring(torch.zeros(10, dtype=torch.int64)), RING, 3 * STD)
    assert (far["modes"], far["high_quality"]) == (0, 0)
    assert far["reverse_kl"] == pytest.approx(math.log(8))
    assert far["jsd"] == pytest.approx(collapsed["jsd"])
    assert json.loads(json.dumps(far, allow_nan=False)) == far


def test_more_samples_than_a_chunk_and_images() -> None:
    centers = normal(3, 1, 4, 4) * 100
    labels = torch.arange(5000) % 3
    counts, share = mode_histogram(centers[labels].float() + 0.01, centers, 1.0)
    assert counts.tolist() == [1667, 1667, 1666]
    assert share == 1


@pytest.mark.parametrize(("n", "m"), [(50, 50), (50, 37), (1, 7), (12, 30)])
def test_sliced_wasserstein_against_scipy(n: int, m: int) -> None:
    x, y = normal(n, 3, seed=1), normal(m, 3, seed=2) * 2 + 1
    directions = torch.randn(3, 40, generator=stream(5)).double()
    directions /= directions.square().sum(dim=0).sqrt()
    expected = np.mean([scipy.stats.wasserstein_distance(x @ d, y @ d) for d in directions.T])
    assert sliced_wasserstein(x, y, projections=40, generator=stream(5)) == pytest.approx(expected, rel=1e-9)


@given(sizes, sizes, seeds)
@settings(deadline=None, max_examples=40)
def test_one_dimensional_distances_against_scipy(n: int, m: int, seed: int) -> None:
    x, y = normal(n, 1, seed=seed), 3 * normal(m, 1, seed=seed + 1)
    w1 = scipy.stats.wasserstein_distance(x[:, 0], y[:, 0])
    assert sliced_wasserstein(x, y, projections=1, generator=stream()) == pytest.approx(w1, rel=1e-9, abs=1e-12)
    energy = scipy.stats.energy_distance(x[:, 0], y[:, 0]) ** 2
    assert energy_distance(x, y) == pytest.approx(energy, rel=1e-7, abs=1e-10)


def test_a_shift_has_closed_forms() -> None:
    # 1-D: all mass moves by 3. In D dimensions W1 along u is |3 u_1|, with mean 3 * E|u_1| = 3 * 2 / pi for D = 2
    x = normal(100, 1)
    assert sliced_wasserstein(x, x + 3, generator=stream()) == pytest.approx(3)
    plane = normal(50, 2)
    moved = plane + torch.tensor([3.0, 0.0])
    assert sliced_wasserstein(plane, moved, projections=20_000, generator=stream()) == pytest.approx(
        6 / math.pi, rel=0.02
    )
    points = torch.zeros(4, 3)
    assert energy_distance(points, points + torch.tensor([0.0, 3.0, 4.0])) == pytest.approx(10)


@pytest.mark.parametrize("features", [2, 200])
def test_energy_distance_against_numpy(features: int) -> None:
    # 200 features take the matrix-product path; the offset makes rounding in it visible
    x, y = normal(1100, features, seed=1) + 1e5, normal(60, features, seed=2) + 1e5 + 0.5
    cdist = scipy.spatial.distance.cdist
    expected = 2 * cdist(x, y).mean() - cdist(x, x).mean() - cdist(y, y).mean()
    assert energy_distance(x, y) == pytest.approx(expected, rel=1e-7)
    assert energy_distance(x, x) == 0


def test_a_runs_distances_are_over_128_directions_and_of_at_most_2000_samples() -> None:
    # as docs/runs.md has it; the directions are drawn from seed 0
    data = from_arrays("plane", normal(25_000, 2).numpy())
    samples, held_out = 1.5 * normal(3000, 2, seed=1) + 0.5, data.held_out(3000).double()
    assert len(held_out) == 2500
    found = Metrics(data, 3000).of(samples)
    directions = torch.randn(2, 128, generator=stream()).double()
    directions /= directions.square().sum(dim=0).sqrt()
    w1 = [scipy.stats.wasserstein_distance(samples @ d, held_out @ d) for d in directions.T]
    assert found["sliced_wasserstein"] == pytest.approx(np.mean(w1), rel=1e-9)
    x, y = samples[:2000], held_out[:2000]
    cdist = scipy.spatial.distance.cdist
    energy = 2 * cdist(x, y).mean() - cdist(x, x).mean() - cdist(y, y).mean()
    assert found["energy_distance"] == pytest.approx(energy, rel=1e-7)


def test_energy_distance_sees_tiny_differences() -> None:
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [1 + 1e-9]], dtype=torch.float64)
    assert energy_distance(x, y) == pytest.approx(0.5e-9, rel=1e-5)


@given(sizes, sizes, st.integers(1, 4), seeds, st.floats(-20, 20))
@settings(deadline=None, max_examples=40)
def test_distances_are_symmetric_and_invariant(n: int, m: int, features: int, seed: int, shift: float) -> None:
    x, y = normal(n, features, seed=seed), normal(m, features, seed=seed + 1)
    order = torch.randperm(n, generator=stream(seed))

    def sliced(a: Tensor, b: Tensor) -> float:
        return sliced_wasserstein(a, b, projections=8, generator=stream(3))

    for distance in (sliced, energy_distance):
        value = distance(x, y)
        assert value >= 0
        for other in (distance(y, x), distance(x[order], y), distance(x + shift, y + shift)):
            assert other == pytest.approx(value, rel=1e-6, abs=1e-9)
        assert distance(x, x[order]) == pytest.approx(0, abs=1e-12)
        assert distance(2 * x, 2 * y) == pytest.approx(2 * value, rel=1e-9, abs=1e-12)


def test_label_modes_of_every_triple_and_of_one() -> None:
    every = torch.cartesian_prod(*3 * [torch.arange(10)])
    assert label_modes(every) == {"modes": 1000, "reverse_kl": pytest.approx(0, abs=1e-12)}
    assert label_modes(every.repeat(3, 1))["reverse_kl"] == pytest.approx(0, abs=1e-12)
    assert label_modes(every[:1].repeat(50, 1)) == {"modes": 1, "reverse_kl": pytest.approx(math.log(1000))}
    assert label_modes(every[:500]) == {"modes": 500, "reverse_kl": pytest.approx(math.log(2))}
    assert label_modes(torch.tensor([[0, 1], [1, 0]])) == {"modes": 2, "reverse_kl": pytest.approx(math.log(50))}
    assert label_modes(torch.empty(0, 3, dtype=torch.int64)) == {"modes": 0, "reverse_kl": math.log(1000)}


def test_reverse_kl_of_26000_perfect_samples_is_the_known_0_019() -> None:
    found = label_modes(torch.randint(10, (26_000, 3), generator=stream()))
    assert found["modes"] == 1000
    assert found["reverse_kl"] == pytest.approx(999 / 52_000, rel=0.1)


@given(sizes, st.integers(1, 3), st.integers(2, 5), seeds)
@settings(deadline=None, max_examples=40)
def test_label_modes_against_counting_and_scipy(n: int, channels: int, classes: int, seed: int) -> None:
    labels = torch.randint(classes, (n, channels), generator=stream(seed))
    counts = collections.Counter(map(tuple, labels.tolist()))
    q = np.array([counts.get(mode, 0) / n for mode in itertools.product(range(classes), repeat=channels)])
    expected = scipy.stats.entropy(q, np.full(len(q), 1 / len(q)))
    assert label_modes(labels, classes) == {"modes": len(counts), "reverse_kl": pytest.approx(expected, abs=1e-12)}


def test_label_modes_refuses_what_are_no_labels() -> None:
    for bad in (torch.zeros(5, 3), torch.zeros(5, dtype=torch.int64)):
        with pytest.raises(UsageError, match="integers"):
            label_modes(bad)
    for value in (-1, 10):
        with pytest.raises(UsageError, match="between 0 and 9"):
            label_modes(torch.full((2, 3), value))


@given(sizes, seeds, st.floats(-20, 20))
@settings(deadline=None, max_examples=30)
def test_modes_are_invariant(n: int, seed: int, shift: float) -> None:
    samples, centers = normal(n, 2, seed=seed), normal(4, 2, seed=seed + 1)
    before, share = mode_histogram(samples, centers, 0.7)
    order = torch.randperm(n, generator=stream(seed))
    moved, moved_share = mode_histogram(samples[order] + shift, centers + shift, 0.7)
    assert (moved.tolist(), moved_share) == (before.tolist(), share)
    swapped, _ = mode_histogram(samples, centers.flip(0), 0.7)
    assert swapped.tolist() == before.tolist()[::-1]


def test_only_the_given_generator_is_used() -> None:
    x, y = normal(20, 3).float().requires_grad_(), normal(20, 3, seed=1).float()
    state = torch.get_rng_state()
    one, two = (sliced_wasserstein(x, y, generator=stream(4)) for _ in range(2))
    other = sliced_wasserstein(x, y, generator=stream(5))
    assert one == two != other
    assert torch.equal(state, torch.get_rng_state())


def test_non_finite_samples() -> None:
    x, y = normal(5, 2), normal(5, 2, seed=1)
    x[0, 0] = math.inf
    assert math.isnan(sliced_wasserstein(x, y, generator=stream()))
    assert math.isnan(energy_distance(y, x))
    assert mode_metrics(torch.full((5, 2), math.nan), RING, 1.0)["high_quality"] == 0


def test_errors() -> None:
    for bad in (torch.zeros(0, 2), torch.zeros(5, 3), torch.zeros(5)):
        with pytest.raises(UsageError, match="non-empty"):
            mode_metrics(bad, RING, 1.0)
        with pytest.raises(UsageError, match="non-empty"):
            energy_distance(RING, bad)
        with pytest.raises(UsageError, match="non-empty"):
            sliced_wasserstein(bad, RING, generator=stream())
    with pytest.raises(UsageError, match="projections"):
        sliced_wasserstein(RING, RING, projections=0, generator=stream())
