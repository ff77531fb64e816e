"""Metrics without a feature network: modes of a known mixture, sliced Wasserstein and energy distance.

Samples are (N, D) or (N, C, H, W), flattened inside. Everything is computed in float64 on the CPU, so a number does
not depend on the device that made the samples. Distances between two samples depend on their sizes: compare only
numbers with equal ones. Where samples are not finite, distances are nan and modes count them as misses.
"""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gankit.errors import UsageError

CHUNK = 1024  # rows of a distance matrix held at once
PROJECTION_CHUNK = 32
EXACT_DIMENSIONS = 32


def mode_histogram(samples: Tensor, centers: Tensor, radius: float) -> tuple[Tensor, float]:
    """Count high-quality samples by nearest centre.

    samples (N, ...), centers (K, ...) -> counts (K,) int64 and the share of samples that are of high quality, that is
    nearer than `radius` to their nearest centre (3 standard deviations in PacGAN's code, arXiv 1712.04086, which
    also excludes the radius itself). `UsageError` for no samples, no centres or different sizes.
    """
    points, means = _pair(samples, centers)
    counts = torch.zeros(len(means), dtype=torch.int64)
    for chunk in torch.split(points, CHUNK):
        distance, nearest = _distances(chunk, means).min(dim=1)
        counts += torch.bincount(nearest[distance < radius], minlength=len(means))
    return counts, int(counts.sum()) / len(points)


def mode_metrics(samples: Tensor, centers: Tensor, radius: float) -> dict[str, float]:
    """Score samples of a mixture with equally likely modes as in PacGAN (arXiv 1712.04086).

    modes: centres with at least one high-quality sample. high_quality: share of such samples.
    reverse_kl: KL(q || uniform) = log K - H(q) in nats. jsd: Jensen-Shannon divergence of q and uniform in nats.
    q is the histogram of the *high-quality* samples only, as in PacGAN's code: a sample far from every centre lowers
    high_quality and nothing else. Where no sample is of high quality (q is undefined, PacGAN's code gives nan) both
    divergences are those of a single mode, the worst attainable: log K for reverse_kl. modes and high_quality are 0.
    """
    counts, high_quality = mode_histogram(samples, centers, radius)
    modes = int((counts > 0).sum())
    q = counts.double() / counts.sum() if modes else torch.eye(1, len(counts), dtype=torch.float64)[0]
    uniform = torch.full_like(q, 1 / len(q))
    middle = (q + uniform) / 2
    jsd = (_kl(q, middle) + _kl(uniform, middle)) / 2
    return {"modes": float(modes), "high_quality": high_quality, "reverse_kl": _kl(q, uniform), "jsd": jsd}


def label_modes(labels: Tensor, classes: int = 10) -> dict[str, float]:
    """Score stacked MNIST's samples by the labels of their channels, as in PacGAN (arXiv 1712.04086).

    labels: (N, C) integers from 0 to classes - 1; a mode is one combination of labels, so there are K = classes^C.
    modes: combinations seen at least once. reverse_kl: KL(q || uniform) = log K - H(q) in nats, q the histogram of the
    labels. With N samples a perfect generator's is about (K - 1) / (2 N): 0.019 for 1000 modes and the usual 26,000
    samples, so state N. No samples: no modes, and log K, the worst attainable. `UsageError` for other labels.
    """
    if labels.ndim != 2 or labels.is_floating_point():
        raise UsageError(f"labels must be integers (N, C), not {labels.dtype} of shape {tuple(labels.shape)}")
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise UsageError(f"labels must lie between 0 and {classes - 1}")
    count = classes ** labels.shape[1]
    place = classes ** torch.arange(labels.shape[1])
    seen = torch.unique((labels.cpu() * place).sum(dim=1), return_counts=True)[1].double()
    if not len(seen):
        return {"modes": 0.0, "reverse_kl": math.log(count)}
    q = seen / seen.sum()
    return {"modes": float(len(seen)), "reverse_kl": max(0.0, math.log(count) + float(torch.xlogy(q, q).sum()))}


def share_metrics(counts: Tensor, samples: int, shares: Tensor) -> dict[str, float]:
    """Score samples of a mixture whose modes have known, unequal shares.

    counts: (K,) integers, valid samples by mode. samples: how many there were, valid or not. shares: (K,) of the truth,
    positive, with sum 1.
    modes: those with at least one valid sample. high_quality: share of valid samples. kl_to_truth: KL(q || shares) in nats,
    q the histogram of the valid samples. worst_share_ratio: max over modes of max(q/p, p/q), 1 at best; a mode without
    a sample counts as half a sample, so that one missing mode of share p gives 2 p N and the number stays finite.
    Where no sample is valid, kl_to_truth is that of the rarest mode alone, the worst attainable, and every mode half a
    sample. `UsageError` for counts and shares of different sizes or no samples.
    """
    if counts.shape != shares.shape or counts.ndim != 1 or samples < 1:
        raise UsageError(
            f"counts and shares are one number per mode, and samples 1 or more, not {tuple(counts.shape)}, "
            f"{tuple(shares.shape)} and {samples}"
        )
    counts, p = counts.double().cpu(), shares.double().cpu()
    valid = int(counts.sum())
    rarest = F.one_hot(p.argmin(), len(p)).double()
    q = counts / valid if valid else rarest
    ratio = counts.clamp(min=0.5) / (valid or samples) / p
    return {
        "modes": float((counts > 0).sum()),
        "high_quality": valid / samples,
        "kl_to_truth": _kl(q, p),
        "worst_share_ratio": float(torch.maximum(ratio, 1 / ratio).max()),
    }


def sliced_wasserstein(x: Tensor, y: Tensor, *, projections: int = 128, generator: torch.Generator) -> float:
    """Mean of the 1-D Wasserstein-1 distance over random unit projections (arXiv 1306.0007 uses W2).

    x (N, ...), y (M, ...) of equal sample size, N and M may differ. generator: for the directions; a generator
    of another device gives other directions, so compare only numbers from the same kind.
    Cost: `projections` sorts of N and M numbers. `UsageError` for empty or different shapes, or no projections.
    """
    if projections < 1:
        raise UsageError(f"projections must be 1 or more, not {projections}")
    x, y = _pair(x, y)
    if not (x.isfinite().all() and y.isfinite().all()):
        return math.nan
    directions = torch.randn(x.shape[1], projections, generator=generator, device=generator.device)
    directions = directions.to("cpu", torch.float64)
    directions /= directions.norm(dim=0)
    total = 0.0
    for chunk in torch.split(directions, PROJECTION_CHUNK, dim=1):
        total += float(_wasserstein_1d(x @ chunk, y @ chunk).sum())
    return total / projections


def energy_distance(x: Tensor, y: Tensor) -> float:
    """Squared energy distance 2 E|X - Y| - E|X - X'| - E|Y - Y'| with Euclidean norms (Szekely & Rizzo 2013).

    x (N, ...), y (M, ...). The V-statistic: means over all pairs, a sample with itself included. It is never
    negative, 0 only for equal samples, and has an upward bias of order 1/N + 1/M. In one dimension it is
    `scipy.stats.energy_distance(x, y) ** 2`. Cost (N + M)^2 distances: meant for at most a few thousand samples.
    """
    x, y = _pair(x, y)
    if not (x.isfinite().all() and y.isfinite().all()):
        return math.nan
    middle = x.mean(dim=0)  # far from the origin the matrix-product form of the distance loses digits
    x, y = x - middle, y - middle
    return max(0.0, 2 * _mean_distance(x, y) - _mean_distance(x, x) - _mean_distance(y, y))


def _wasserstein_1d(x: Tensor, y: Tensor) -> Tensor:
    """W1 of each column of x (N, P) and y (M, P), as the integral of |quantile_x - quantile_y| -> (P,)."""
    # torch sorts places with the values, which takes six times as long
    x, y = (torch.from_numpy(np.sort(t.numpy(), axis=0)) for t in (x, y))
    n, m = len(x), len(y)
    if n == m:
        return (x - y).abs().mean(dim=0)
    # quantile functions are steps at i/n and j/m; in units of 1/(n m) these are integers, so nothing is rounded
    steps = torch.unique(torch.cat([torch.arange(n + 1) * m, torch.arange(m + 1) * n]))
    start, length = steps[:-1], steps.diff()
    gaps = (x[start // m] - y[start // n]).abs()
    distance: Tensor = (gaps * length.double().unsqueeze(1)).sum(dim=0) / (n * m)
    return distance


def _mean_distance(x: Tensor, y: Tensor) -> float:
    return sum(float(_distances(chunk, y).sum()) for chunk in torch.split(x, CHUNK)) / (len(x) * len(y))


def _distances(x: Tensor, y: Tensor) -> Tensor:
    # the matrix-product form is 50 times faster for images, but loses half the digits of tiny distances; in float64
    # and between points of many dimensions that is far below anything measured here
    exact = x.shape[1] <= EXACT_DIMENSIONS
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist" if exact else "use_mm_for_euclid_dist")


def _kl(p: Tensor, q: Tensor) -> float:
    # in exact arithmetic it is never negative
    return max(0.0, float((torch.xlogy(p, p) - torch.xlogy(p, q)).sum()))


def _pair(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if x.ndim < 2 or y.ndim < 2 or x.shape[1:] != y.shape[1:] or 0 in x.shape or 0 in y.shape:
        raise UsageError(
            "give two non-empty sets of samples (N, ...) and (M, ...) of equal sample shape, "
            f"not {tuple(x.shape)} and {tuple(y.shape)}"
        )
    return tuple(t.detach().to("cpu", torch.float64).flatten(1) for t in (x, y))  # type: ignore[return-value]
