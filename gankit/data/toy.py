"""Mixtures of Gaussians whose modes are known: ring, grid and gaussians1200.

Definitions as in the synthetic experiments of PacGAN (Lin et al. 2018, arXiv 1712.04086) and, for the last,
VEEGAN (Srivastava et al. 2017, arXiv 1705.07761).
"""

import math

import torch
from torch import Tensor

from gankit.data.dataset import Dataset, Modes, Store, seeded

COUNT, HELD_OUT = 100_000, 10_000
_CONSTANTS_1200 = (-1.0, -0.5, 0.0, 0.5, -2.0, -2.5, 10.0, 0.25, -13.0, -5.5)
_RADIUS_700 = 28.077817849873615  # sqrt of the (1 - exp(-4.5)) quantile of chi-squared, 700 degrees of freedom


def ring() -> Dataset:
    """8 Gaussians with std 0.01 on the unit circle, the k-th at angle 2 pi k / 8, equally likely.

    High quality: within 3 std of the nearest centre, which 1 - exp(-4.5) = 98.89 % of the true data are.
    """
    angle = torch.arange(8, dtype=torch.float64) * (2 * math.pi / 8)
    centers = torch.stack([angle.cos(), angle.sin()], dim=1).float()
    return _mixture("ring", Modes(centers, std=0.01, radius=0.03), noisy=2, seed=11)


def grid() -> Dataset:
    """25 Gaussians with std 0.05 at {-4, -2, 0, 2, 4}^2, equally likely; high quality as for `ring`."""
    axis = torch.arange(-4.0, 5.0, 2.0)
    return _mixture("grid", Modes(torch.cartesian_prod(axis, axis), std=0.05, radius=0.15), noisy=2, seed=12)


def gaussians1200() -> Dataset:
    """10 modes in 1200 dimensions: N(0, 1) in coordinates 0..699, 0 in the rest, plus the mode's constant.

    The radius is a choice of ours. VEEGAN (arXiv:1705.07761, its authors' page) asks for less than 10 standard deviations
    to the nearest centre, PacGAN's `MetricLogger` for less than 3; with 700 noisy coordinates the Euclidean length of
    true data is 26.5 +- 0.7, so not one true sample would pass either. We keep the meaning of the rule in two dimensions,
    where it accepts 1 - exp(-4.5) = 98.89 % of the true data, and take the radius with the same share here: the square
    root of that quantile of chi-squared with 700 degrees of freedom. So the ceiling is 98.89 % for all three sets.

    Two limits. Neighbouring centres (constants 0 and 0.25) are 8.7 apart, much closer than the radius, so a
    sample between them counts as of high quality; the nearest centre still names the mode of true data (an
    error needs 5.7 standard deviations). And a sample without any noise counts too: the rule bounds the
    distance from above only.
    """
    centers = torch.tensor(_CONSTANTS_1200)[:, None].repeat(1, 1200)
    return _mixture("gaussians1200", Modes(centers, std=1.0, radius=_RADIUS_700), noisy=700, seed=13)


def _mixture(name: str, modes: Modes, *, noisy: int, seed: int) -> Dataset:
    """Samples of the equal mixture: a centre drawn at random plus std N(0, 1) in the first coordinates."""
    generator = seeded(seed)
    count, (modes_count, dim) = COUNT + HELD_OUT, modes.centers.shape
    labels = torch.randint(modes_count, (count,), generator=generator)
    x: Tensor = torch.empty(count, dim)
    for start in range(0, count, 10_000):  # in pieces: 1200 dimensions would need half a gigabyte more
        piece = modes.centers[labels[start : start + 10_000]]
        piece[:, :noisy] += modes.std * torch.randn(len(piece), noisy, generator=generator)
        x[start : start + 10_000] = piece
    return Dataset(
        name,
        Store(x[:COUNT]),
        Store(x[COUNT:]),
        labels=labels[:COUNT],
        held_out_labels=labels[COUNT:],
        classes=tuple(str(k) for k in range(modes_count)),
        modes=modes,
    )
