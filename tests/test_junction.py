"""heavy-mode: frames counted by numpy on rectangles written here by hand, and what must not count; metrics against scipy."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from gankit.cli import main
from gankit.data import Dataset, load
from gankit.data.junction import CONFIGURATIONS, Junction
from gankit.errors import UsageError
from gankit.metrics import share_metrics

# rows and columns of each lane in 16 x 16 pixels: traffic keeps to the right, seen from above, north is up
RECTANGLES = {
    "north arriving": (0, 5, 5, 8), "north leaving": (0, 5, 8, 11),
    "south arriving": (11, 16, 8, 11), "south leaving": (11, 16, 5, 8),
    "west arriving": (8, 11, 0, 5), "west leaving": (5, 8, 0, 5),
    "east arriving": (5, 8, 11, 16), "east leaving": (8, 11, 11, 16),
}  # fmt: skip


@pytest.fixture(scope="module")
def data() -> Dataset:
    return load("heavy-mode")


def occupied(x: Tensor) -> list[set[str]]:
    """Lanes that differ from the median frame by more than a vehicle's glass does from asphalt, in numpy."""
    frames = x.numpy().astype(np.float64)
    off = np.abs(frames - np.median(frames, axis=0)).max(axis=1)
    large = {name: off[:, a:b, c:d].max(axis=(1, 2)) > 0.3 for name, (a, b, c, d) in RECTANGLES.items()}
    return [{name for name in RECTANGLES if large[name][i]} for i in range(len(frames))]


def test_labels_say_which_lanes_are_occupied(data: Dataset) -> None:
    x, labels = data.held_out(10_000), data.held_out_labels
    assert labels is not None and data.shape == (3, 16, 16)
    lanes = [set(lanes) for _, lanes in CONFIGURATIONS.values()]
    assert occupied(x) == [lanes[k] for k in labels.tolist()]
    assert data.classes == tuple(CONFIGURATIONS) and data.classes[0] == "empty"
    assert float(x.min()) > -1 and float(x.max()) < 1  # nothing is clipped
    empty = x[labels == 0]
    grey = 127.5 * (empty - empty.mean(dim=0))  # what is left is noise and brightness
    assert 127.5 * float(empty.std(dim=0).max()) == pytest.approx((1 + 4**2 / 3) ** 0.5, rel=0.05)
    assert float(grey.mean(dim=(1, 2, 3)).abs().max()) == pytest.approx(4, abs=0.2)


def test_every_configuration_is_exactly_as_frequent_as_its_share(data: Dataset) -> None:
    shares = [share for share, _ in CONFIGURATIONS.values()]
    assert sum(shares) == pytest.approx(100) and len(shares) == 11
    for labels, count in ((data.labels, 40_000), (data.held_out_labels, 10_000)):
        assert labels is not None
        assert labels.bincount().tolist() == [round(share * count / 100) for share in shares]
        assert not torch.equal(labels, labels.sort().values)


def test_assignment_errs_nowhere_on_true_frames(data: Dataset) -> None:
    assert data.modes is not None and data.labels is not None
    for x, labels in (
        (data.held_out(10_000), data.held_out_labels),
        (data.batch(torch.arange(5_000)), data.labels[:5_000]),
    ):
        assert torch.equal(data.modes.assign(x), labels)
    found = data.modes.metrics(data.held_out(10_000))
    assert found == pytest.approx(
        {"modes": 11, "high_quality": 1, "kl_to_truth": 0, "worst_share_ratio": 1, "rare_share": 0.2}, abs=1e-9
    )


def test_what_is_no_frame_of_this_camera_counts_for_nothing(data: Dataset) -> None:
    assert data.modes is not None and data.held_out_labels is not None
    x, labels = data.held_out(10_000), data.held_out_labels
    empty, assign = x[labels == 0][:200], data.modes.assign
    single = torch.cat([x[labels == k][:50] for k in range(1, 9)])[:200]
    assert bool((assign(empty) == 0).all()) and bool((assign(single) > 0).all())

    for opacity in (0.35, 0.5, 0.65):  # a ghost, as the mean of two modes is
        assert bool((assign(opacity * single + (1 - opacity) * empty[: len(single)]) == -1).all())
    west = x[labels == 1][:50].clone()
    east = x[labels == 2][:50]
    half = empty[:50].clone()
    half[:, :, 8:11, 2:5] = west[:, :, 8:11, 2:5]
    assert bool((assign(half) == -1).all())
    torn = empty.clone()
    torn[:, :, 8:] = torn[:, :, 8:].roll(1, dims=3)
    assert bool((assign(torn) == -1).all())
    crossing = empty[:50].clone()
    crossing[:, :, 6:9, 5:10] = west[:, :, 8:11, 0:5]
    assert bool((assign(crossing) == -1).all())
    unknown = empty[:50].clone()  # two vehicles, each right, that are never there together
    unknown[:, :, 8:11, 0:5] = west[:, :, 8:11, 0:5]
    north = x[labels == 5][:50]
    both = unknown.clone()
    both[:, :, 0:5, 5:8] = north[:, :, 0:5, 5:8]
    assert bool((assign(unknown) == 1).all()) and bool((assign(both) == -1).all())
    both = unknown.clone()
    both[:, :, 5:8, 11:16] = east[:, :, 5:8, 11:16]
    assert bool((assign(both) == 9).all())
    for wrong in (empty + 0.25, torch.zeros_like(empty), empty.roll(8, dims=2), torch.full_like(empty, math.nan)):
        assert bool((assign(wrong) == -1).all())
    assert bool((assign(empty.mean(dim=0, keepdim=True)) == 0).all())  # no noise is no fault
    assert data.modes.metrics(torch.zeros(20, 3, 16, 16))["high_quality"] == 0
    with pytest.raises(UsageError, match=r"\(3, 16, 16\), not \(1, 16, 16\)"):
        assign(torch.zeros(2, 1, 16, 16))


def test_the_same_at_every_call_and_nobody_elses_random_numbers(data: Dataset) -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    again = load("heavy-mode", image_size=16)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(again.held_out(100), data.held_out(100))
    assert torch.equal(again.train.items, data.train.items)
    with pytest.raises(UsageError, match="leave image_size out"):
        load("heavy-mode", image_size=32)
    assert data.to("meta").train.items.device.type == "meta"
    assert isinstance(data.to("meta").modes, Junction)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 500), st.integers(1, 50)), min_size=1, max_size=12),
    st.integers(0, 100),
)
def test_shares_against_scipy(modes: list[tuple[int, int]], invalid: int) -> None:
    counts, weights = (np.array(column) for column in zip(*modes, strict=True))
    p, valid = weights / weights.sum(), int(counts.sum())
    if valid + invalid == 0:
        return
    found = share_metrics(torch.from_numpy(counts), valid + invalid, torch.from_numpy(p))
    assert found["modes"] == (counts > 0).sum()
    assert found["high_quality"] == pytest.approx(valid / (valid + invalid))
    kl = stats.entropy(counts, p) if valid else -math.log(p.min())
    assert found["kl_to_truth"] == pytest.approx(kl, abs=1e-12)
    seen = np.where(counts > 0, counts, 0.5) / (valid or invalid)
    assert found["worst_share_ratio"] == pytest.approx(np.exp(np.abs(np.log(seen / p)).max()))


def test_shares_by_hand() -> None:
    shares = torch.tensor([0.9, 0.08, 0.02], dtype=torch.float64)
    found = share_metrics(torch.tensor([900, 40, 0]), 1000, shares)
    assert found["modes"] == 2 and found["high_quality"] == 0.94
    assert found["worst_share_ratio"] == pytest.approx(2 * 0.02 * 940)  # one that is missing: 2 p N
    assert share_metrics(torch.tensor([900, 40, 60]), 1000, shares)["worst_share_ratio"] == pytest.approx(3)
    nothing = share_metrics(torch.tensor([0, 0, 0]), 1000, shares)
    assert nothing == pytest.approx(
        {"modes": 0, "high_quality": 0, "kl_to_truth": math.log(50), "worst_share_ratio": 2 * 0.9 * 1000}
    )
    for counts, samples in ((torch.tensor([1, 2]), 5), (torch.tensor([0, 0, 0]), 0)):
        with pytest.raises(UsageError, match="one number per mode"):
            share_metrics(counts, samples, shares)


def test_a_run_counts_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fast = ["--width", "4", "--steps", "2", "--batch", "8", "--eval-samples", "500", "--threads", "1", "--no-report"]
    result = CliRunner().invoke(main, ["run", "--data", "heavy-mode", *fast, "--json"])
    assert result.exit_code == 0, (result.output, result.exception)
    found = json.loads(result.stdout)
    assert found["truth"]["high_quality"] == 1 and 8 <= found["truth"]["modes"] <= 11
    assert found["truth"]["rare_share"] == pytest.approx(0.2, abs=0.06)
    assert found["metrics"]["modes"] == found["metrics"]["high_quality"] == 0
    assert found["metrics"]["worst_share_ratio"] == pytest.approx(2 * 0.8 * 500)
    for text in ("KL to the true shares", "worst share, times off", "share of rare modes"):
        assert text in result.stderr
