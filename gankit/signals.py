"""What ``gankit diagnose`` goes by: signs of a run's health, measured at every evaluation and never in between.

One row per evaluation, and one (``step`` null) of held-out samples in the generator's place: what the rules of
``gankit.diagnose`` compare with. Nothing that trains is moved: networks are in evaluation mode, random streams are given
back, and gradients are computed beside ``.grad``. Columns:

n                 generated samples looked at; m, of these, are compared with m training samples
finite            share of the generated samples that are finite; below 1 the row ends here
spread            mean distance between two generated samples, over that between two training samples
rank              effective number of dimensions they vary in, over the training samples' own
duplicates        share of generated samples with another one at less than DUPLICATE of the usual distance
precision         share of generated samples that are no farther from some training sample than that is from its NEIGHBORS-th
                  nearest other one (arXiv:1904.06991, on the samples themselves instead of a network's features)
cells             generated samples by nearest anchor, a training sample; cells_now: those of the generator as it is, where
                  samples come from its average
reconstruction    (with an encoder) median distance from a training sample x to G(E(x)), over that to a generated sample
                  that knows nothing of x: 0 where E inverts G, 1 where it does not look at x
labels            generated samples by the class of the nearest training sample, where the data have classes
real_logits, held_out_logits, fake_logits   mean and standard deviation of D's logits, of what it is shown in training
separation        how often D puts a training sample above a generated one (0.5: it cannot tell them apart, 1: always)
held_out_separation   the same for held-out samples
memory            how often D puts a training sample above a held-out one; 0.5 unless it knows them by heart
g_gradient, d_gradient   root mean square over the weights of the adversarial loss's gradient
g_norm, d_norm    Euclidean norm of the weights
train, held_out   (null row) how many different samples stand behind these
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from gankit.contract import watched
from gankit.data import Dataset
from gankit.gan import GAN, derive_seed, seeded
from gankit.hookspecs import hookimpl
from gankit.joint import has_encoder, reconstruct
from gankit.losses import BOTH_SIDES
from gankit.structure import evaluating

N = 512  # samples a side: enough for 25 modes at 20 each, and distances between all pairs cost milliseconds
SHOWN = 128  # that D judges of images beyond PIXELS, where each costs as much as in training
ANCHORS = 32  # cells where the data show no clumps of their own: 16 samples each
MOST_CLUMPS = 64
GAP = 2.0  # clumps end where the next farthest sample is this many times nearer than the last
PIXELS = 16  # images are compared at this side: below it noise and fine texture, which no pixel distance can judge
NEIGHBORS = 3  # as in the paper on precision
DUPLICATE = 0.1  # of the median distance from a training sample to the nearest other one
MOST_CLASSES = 100


class Signals:
    """Measures the signs and writes a row of them at every evaluation."""

    def __init__(self, data: Dataset, write: Callable[[dict[str, Any]], None], n: int = N) -> None:
        """``data``: what is trained on. ``write`` is given each row. ``n``: samples to look at."""
        index = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:n].to(data.device)
        self.n, self.write = n, write
        self.shown = min(n, SHOWN) if data.is_image and max(data.shape[1:]) > PIXELS else n
        self.real, self.held_out = data.batch(index), data.held_out(n)
        self.classes = int(data.labels.max()) + 1 if data.labels is not None else 0
        self.labels = data.labels[index] if data.labels is not None and self.classes <= MOST_CLASSES else None
        self.center, self.scale = torch.zeros(()), torch.ones(())
        if self.real.dim() == 2:  # columns of a table may have any unit
            deviation = self.real.double().std(dim=0, correction=0)
            self.center, self.scale = self.real.double().mean(dim=0), torch.where(deviation > 0, deviation, 1.0)
        self.points = self.features(self.real)
        self.anchors = self.points[anchors(self.points)]
        self.own = variety(self.points)
        # of values that repeat, such as whole numbers, all neighbours would be equal
        self.distinct = torch.unique(self.points, dim=0)
        self.radii = radii(self.distinct)

    def features(self, samples: Tensor) -> Tensor:
        """Samples as vectors to compare, (N, D) float64: standardised columns, or images of few pixels."""
        if samples.dim() == 4 and max(samples.shape[-2:]) > PIXELS:
            samples = torch.nn.functional.adaptive_avg_pool2d(samples, PIXELS)
        return ((samples.double() - self.center.to(samples.device)) / self.scale.to(samples.device)).flatten(1)

    @hookimpl
    def evaluate(self, gan: GAN, draw: Callable[[int], Tensor], step: int | None) -> None:
        """Write the row of this evaluation."""
        if step is None:
            sizes = {"train": min(self.shown, len(self.real)), "held_out": min(self.shown, len(self.held_out))}
            self.write({"step": None, "n": self.n, **self.of(self.held_out), **sizes})
            return
        # networks that draw from torch's global generator train on as if nobody had looked
        with seeded(gan.seed, "signals"):
            samples = draw(self.n)
            inverted = self.of_encoder(gan, samples) if has_encoder(gan) else {}
            row = {"step": step, "n": self.n, **self.of(samples), **inverted, **self.of_players(gan)}
        self.write(row)

    def of(self, samples: Tensor) -> dict[str, Any]:
        """What samples (N, \\*shape) say by themselves, beside training samples."""
        finite = samples.flatten(1).isfinite().all(dim=1).double().mean().item()
        if finite < 1:
            return {"finite": finite}
        points = self.features(samples)
        m = min(len(points), len(self.points))
        one, other = variety(points[:m]), self.own if m == len(self.points) else variety(self.points[:m])
        twins = one["nearest"] <= DUPLICATE * other["nearest"].median()
        row = {
            "finite": finite,
            "m": m,
            "spread": _ratio(one["spread"], other["spread"]),
            "rank": _ratio(one["rank"], other["rank"]),
            "duplicates": twins.double().mean().item(),
            "precision": (torch.cdist(points, self.distinct) <= self.radii).any(dim=1).double().mean().item(),
            "cells": self.cells(points),
        }
        if self.labels is not None:
            nearest = self.labels[torch.cdist(points, self.points).argmin(dim=1)]
            row["labels"] = torch.bincount(nearest, minlength=self.classes).tolist()
        return row

    def cells(self, points: Tensor) -> list[int]:
        """How many points (N, D) are nearest to each anchor."""
        return torch.bincount(torch.cdist(points, self.anchors).argmin(dim=1), minlength=len(self.anchors)).tolist()

    def of_encoder(self, gan: GAN, samples: Tensor) -> dict[str, float]:
        """How near G(E(x)) comes to x, beside samples (N, \\*shape) of G that have nothing to do with x."""
        back = reconstruct(gan, self.real[: len(samples)])
        if not (back.isfinite().all() and samples.isfinite().all()):
            return {}
        points, made = self.points[: len(back)], self.features(samples[: len(back)])
        far = (made - points).norm(dim=1).median().item()
        return {"reconstruction": _ratio((self.features(back) - points).norm(dim=1).median().item(), far)}

    def of_players(self, gan: GAN) -> dict[str, Any]:
        """What the discriminator says, and how strongly both networks are pulled."""
        with gan.streams_kept(), evaluating(*(player.module for player in gan.players.values())):
            return self._shown(gan)

    def _shown(self, gan: GAN) -> dict[str, Any]:
        stream = torch.Generator(gan.device).manual_seed(derive_seed(gan.seed, "signals"))
        size = gan.batch_size // gan.team.size
        updates = max(1, self.shown // size)  # whole batches, since plugins may regroup them
        logits: dict[str, list[Tensor]] = {"real": [], "held_out": [], "fake": []}
        fakes = []
        for update in range(updates):
            z = gan.latent.draw(size, stream)
            place = torch.arange(size, device=gan.device) + update * size
            with torch.no_grad():
                for name, samples in (("held_out", self.held_out), ("real", self.real)):
                    known = {"gan": gan, "phase": "d", "step": gan.step}
                    batch = gan.hook.sample(real=samples[place % len(samples)], z=z, **known)
                    view = gan.hook.view(batch=batch, **known)
                    logits[name].append(_scores(gan, view.real))
                logits["fake"].append(_scores(gan, view.fake))
                fakes.append(batch.fake)
        real, held_out, fake = (torch.cat(found) for found in logits.values())
        row: dict[str, Any] = {}
        if gan.averages.get("generator") is not None and (shown := torch.cat(fakes)).isfinite().all():
            row["cells_now"] = self.cells(self.features(shown))
        for name, found in (("real", real), ("held_out", held_out), ("fake", fake)):
            row[f"{name}_logits"] = [found.mean().item(), found.std().item()]
        row |= {"separation": _above(real, fake), "held_out_separation": _above(held_out, fake)}
        row["memory"] = _above(real, held_out)
        row["pack"] = updates * size / len(real)  # samples that D judges as one
        for phase in "dg":
            row |= self._pull(gan, phase, self.real[place % len(self.real)], z)
        return row

    def _pull(self, gan: GAN, phase: str, real: Tensor, z: Tensor) -> dict[str, float]:
        """The adversarial gradient that one phase's weights would get of this batch, and their norm."""
        with torch.set_grad_enabled(phase == "g"):
            batch = gan.hook.sample(gan=gan, real=real, z=z, phase=phase, step=gan.step)
            view = watched(gan.hook.view(gan=gan, batch=batch, phase=phase, step=gan.step))
        sides = {"real_logits": view.real, "fake_logits": view.fake}
        logits = {name: gan.discriminator(*sides[name]) for name in (BOTH_SIDES if phase == "d" else gan.loss.g_sides)}
        loss = gan.loss.d(*logits.values()) if phase == "d" else gan.loss.g(**logits)
        weights = gan.parameters(phase)
        gradients = [g for g in torch.autograd.grad(loss, weights, allow_unused=True) if g is not None]
        count = sum(weight.numel() for weight in weights)
        return {f"{phase}_gradient": _norm(gradients) / math.sqrt(count), f"{phase}_norm": _norm(weights)}


def anchors(points: Tensor) -> Tensor:
    """Indices into points (N, D) of samples that stand for parts of the data: one per clump, or else a random choice.

    Clumps are found by farthest-point traversal (Gonzalez 1985): each next sample is the one farthest from all
    taken so far. Where its distance falls by GAP or more from one to the next, those before it are one per clump, unless
    some of them are outliers.
    """
    count = min(MOST_CLUMPS + 1, len(points))
    taken, distances = [0], [math.inf]
    least = (points - points[0]).norm(dim=1)
    while len(taken) < count:
        taken.append(int(least.argmax()))
        distances.append(least[taken[-1]].item())
        least = torch.minimum(least, (points - points[taken[-1]]).norm(dim=1))
    falls = [_ratio(before, after) for before, after in pairwise(distances[1:])]
    if falls and max(falls) >= GAP:
        found = torch.tensor(taken[: falls.index(max(falls)) + 2], device=points.device)
        members = torch.cdist(points, points[found]).argmin(dim=1)
        if torch.bincount(members, minlength=len(found)).min() > 1:
            return found
    return torch.arange(min(ANCHORS, len(points)), device=points.device)


def variety(points: Tensor) -> dict[str, Any]:
    """How points (N, D) differ: mean distance of a pair, effective rank, and each one's distance to the nearest other.

    The rank is the participation ratio of the covariance's eigenvalues, (sum l)^2 / sum l^2.
    """
    distances = torch.cdist(points, points)
    spread = distances.sum().item() / max(1, len(points) * (len(points) - 1))
    centred = points - points.mean(dim=0)
    gram = centred @ centred.T if len(points) < points.shape[1] else centred.T @ centred  # of the same eigenvalues
    rank = _ratio(gram.trace().item() ** 2, gram.square().sum().item())
    distances.fill_diagonal_(math.inf)
    return {"spread": spread, "rank": rank, "nearest": distances.min(dim=1).values}


def radii(points: Tensor) -> Tensor:
    """Distance of each of the points (N, D) to its NEIGHBORS-th nearest other one, or the farthest of fewer; (N,)."""
    distances = torch.cdist(points, points).fill_diagonal_(0.0)
    return distances.kthvalue(min(NEIGHBORS + 1, len(points)), dim=1).values


def _scores(gan: GAN, side: tuple[Tensor, ...]) -> Tensor:
    logits: Tensor = gan.discriminator(*side)
    return logits.double().flatten(1).mean(dim=1) if logits.dim() > 1 else logits.double()


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(tensor.detach().double().square().sum().item() for tensor in tensors))


def _above(one: Tensor, other: Tensor) -> float:
    """How often one is above the other, ties counted half: the area under the ROC curve."""
    difference = one.unsqueeze(1) - other
    return ((difference > 0).double().mean() + (difference == 0).double().mean() / 2).item()


def _ratio(a: float, b: float) -> float:
    return a / b if b else (math.inf if a else 1.0)
