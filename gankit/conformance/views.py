"""What the critic is shown: both sides alike, with G's graph and no more, row by row."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gankit.conformance.bench import (
    BATCH,
    Bench,
    Failed,
    Skipped,
    default_dtype,
    expect,
    global_random,
    quiet,
    sentence,
)
from gankit.conformance.surroundings import Conditional, Labels
from gankit.contract import Batch, View
from gankit.errors import UsageError
from gankit.gan import GAN
from gankit.loop import train


def shown(gan: GAN, batch: Batch, phase: str = "d") -> View:
    """The view of a batch in the next step."""
    with quiet(), global_random(0), torch.set_grad_enabled(phase == "g"):
        view: View = gan.hook.view(gan=gan, batch=batch, phase=phase, step=gan.step + 1)
    return view


def staged(bench: Bench, kind: str, phase: str = "d") -> tuple[GAN, Any, Batch]:
    """A GAN after one step with its plugin, and the batch of the next update."""
    with quiet(), global_random(0):
        plugin = bench.plugin()
        gan = bench.gan(kind, {bench.name: plugin})
        train(gan, 1)
        with torch.set_grad_enabled(phase == "g"):
            known = {"real": gan.next_real(), "z": gan.next_z(), "phase": phase, "step": 2}
            batch: Batch = gan.hook.sample(gan=gan, **known)
    return gan, plugin, batch


def need_view(bench: Bench) -> list[str]:
    """The kinds of data, if it changes the view."""
    if not bench.has("view"):
        raise Skipped("it leaves the view as it is")
    return bench.kinds()


def view_sides_alike(bench: Bench) -> None:
    """The same samples on both sides are treated alike: else the critic learns to tell the treatment, not the samples.

    Mend: apply one function to ``view.real`` and ``view.fake``, each with random draws from the same distribution.
    """
    for kind in need_view(bench):
        changes = _changes(bench, kind)
        for what, f in CHANGES.items():
            values = f(changes).flatten(2)
            values = torch.cat([values, values.mean(2, keepdim=True)], dim=2)
            apart = values[:, 0] - values[:, 1]
            # The sides may be swapped, so each draw's difference has either sign with equal chance, whatever its
            # distribution; then |sum| > t sqrt(sum of squares) has a chance of at most 2 exp(-t^2 / 2) (Hoeffding).
            t = math.sqrt(2 * math.log(2 * apart.shape[1] / CHANCE))
            excess = apart.sum(0).abs() - t * apart.square().sum(0).sqrt() - DRAWS * ROUNDING
            on_real, on_fake = values[:, :, excess.argmax()].mean(0).tolist()
            expect(
                excess.max() <= 0,
                f"on {kind}s, over {DRAWS} draws the {what} equal samples is {on_real:.3g} on the real side and "
                f"{on_fake:.3g} on the fake side",
            )


DRAWS = 128
CHANCE = 1e-6  # of a false alarm, at most
ROUNDING = 1e-5
CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "change of": lambda changes: changes,
    "squared change of": lambda changes: changes.square(),
    "squared mean change of": lambda changes: changes.flatten(3).mean(3).square(),
}


def _changes(bench: Bench, kind: str) -> Tensor:
    """(DRAWS, 2, B, \\*shape): what the view does to the same samples on either side, with ever new random numbers."""
    gan, plugin, _ = staged(bench, kind)
    real, z, found = gan.next_real(), gan.next_z(), []
    for seed in range(DRAWS):
        gan.rng(plugin).manual_seed(seed)
        with quiet(), global_random(0), torch.no_grad():
            batch: Batch = gan.hook.sample(gan=gan, real=real, z=z, phase="d", step=gan.step + 1)
        view = shown(gan, batch._replace(fake=batch.real))
        if view.real[0].shape != batch.real.shape:
            raise Skipped("it regroups samples or adds to them, so they cannot be compared with what they were")
        found.append(torch.stack([side[0] - batch.real for side in view]))
    return torch.stack(found).double()


def view_gradient(bench: Bench) -> None:
    """In G's update the fake side carries G's graph; in D's update no side carries any.

    Mend: differentiable operations, no ``detach``, ``no_grad`` or numpy; no ``torch.enable_grad()``.
    """
    for kind in need_view(bench):
        gan, _, batch = staged(bench, kind, "g")
        x = shown(gan, batch, "g").fake[0]
        weight = torch.rand(x.shape, generator=torch.Generator().manual_seed(0))
        parameters = gan.parameters("g")
        found = torch.autograd.grad((x * weight).sum(), parameters, allow_unused=True) if x.requires_grad else ()
        reached = any(g is not None and g.any() for g in found)
        expect(reached, f"on {kind}s, what the critic is shown of G's samples has no gradient in G")
        gan, _, batch = staged(bench, kind)
        for side, tensors in zip(View._fields, shown(gan, batch), strict=True):
            expect(
                not any(t.requires_grad for t in tensors), f"on {kind}s, in D's update the {side} side carries a graph"
            )


def view_form(bench: Bench) -> None:
    """The view has a row per sample, or per pack of equally many, in the dtype of the samples, of smaller batches, too.

    Mend: no samples dropped or repeated; ``len(x)`` for ``gan.batch_size``; ``dtype=x.dtype`` for what is mixed in.
    """
    for kind, dtype, half in itertools.product(need_view(bench), (torch.float32, torch.float64), (False, True)):
        with default_dtype(dtype):
            gan, _, batch = staged(bench, kind)
            if half:  # as the last batch of an epoch may be
                rows = slice(BATCH // 2)
                extra = {name: t[rows] for name, t in batch.extra.items()}
                batch = Batch(batch.real[rows], batch.fake[rows], batch.z[rows], extra)
            try:
                real, fake = (side[0] for side in shown(gan, batch))
            except UsageError:
                continue
            except Exception as error:
                raise Failed(f"on {kind}s, {len(batch.real)} samples: {sentence(error)}") from error
        n = len(real)
        expect(n and len(batch.real) % n == 0, f"on {kind}s, {len(batch.real)} samples are shown as {n} rows")
        for name, x in (("real", real), ("fake", fake)):
            expect(
                x.dtype == batch.real.dtype,
                f"on {kind}s, the {name} side is shown as {x.dtype}, not {batch.real.dtype}",
            )
            expect(x.isfinite().all(), f"on {kind}s, the {name} side has values that are not finite")


def view_again(bench: Bench) -> None:
    """The same update shows the same, as often as it is asked: other plugins ask, too.

    Mend: compute a schedule from ``step``, and move what the plugin remembers in ``post_step``.
    """
    for kind in need_view(bench):
        gan, plugin, batch = staged(bench, kind)
        expect(
            _same(*(_replayed(gan, plugin, batch) for _ in range(2))),
            f"on {kind}s, the second call shows something else",
        )


def view_phases_alike(bench: Bench) -> None:
    """G's update shows of the same samples what D's does: D scores what it was trained on.

    Mend: leave ``phase`` alone in ``view``.
    """
    for kind in need_view(bench):
        gan, plugin, batch = staged(bench, kind)
        d, g = (_replayed(gan, plugin, batch, phase) for phase in "dg")
        expect(_same(d, g), f"on {kind}s, the same samples are shown otherwise in phase 'g' than in phase 'd'")


def _replayed(gan: GAN, plugin: object, batch: Batch, phase: str = "d") -> View:
    gan.rng(plugin).manual_seed(1)
    return shown(gan, batch, phase)


def _same(one: View, two: View) -> bool:
    """Equal shapes and values, not a number included."""
    if (len(one.real), len(one.fake)) != (len(two.real), len(two.fake)):
        return False
    pairs = zip((*one.real, *one.fake), (*two.real, *two.fake), strict=True)
    return all(a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)


def view_keeps_others(bench: Bench) -> None:
    """Of a view (x, code, label) that others made, code and label are handed on, and the label's whole numbers as they are.

    Mend: ``View((mine(view.real[0]), *view.real[1:]), (mine(view.fake[0]), *view.fake[1:]))``.
    """
    for kind in need_view(bench):
        with quiet(), global_random(0):
            try:
                plugin = bench.plugin()
                others = {"labels": Labels()}
                gan = bench.gan(kind, {bench.name: plugin}, core=others, discriminator=Conditional)
                known = {"real": gan.next_real(), "z": gan.next_z(), "phase": "d", "step": 1}
                with torch.no_grad():
                    batch = gan.hook.sample(gan=gan, **known)
                view = shown(gan, batch)
            except UsageError as error:
                raise Skipped(f"it refuses: {error}") from error
        for name, side in zip(View._fields, view, strict=True):
            expect(len(side) >= 3, f"on {kind}s, of x, code and label on the {name} side only {len(side)} are left")
            labels = [t.flatten().sort().values for t in side if not t.is_floating_point()]
            right = torch.arange(BATCH).remainder(3).sort().values
            kept = any(torch.equal(t, right.to(t)) for t in labels)
            expect(kept, f"on {kind}s, the labels of the {name} side are not what they were")


def claimed_rows_apart(bench: Bench) -> None:
    """Claimed per sample: equal samples get draws of their own, and the order of the samples does not matter.

    Mend: one random number per sample, of shape (B, 1, ..., 1), as ``gankit.functional.mixing_weights`` makes them.
    """
    if not bench.claims.per_sample:
        raise Skipped("its claims do not say per_sample")
    for kind in need_view(bench):
        gan, plugin, batch = staged(bench, kind)
        equal = batch.real[:1].expand_as(batch.real).clone()
        views: list[Tensor] = []
        for seed in (0, 1):
            gan.rng(plugin).manual_seed(seed)
            views.append(shown(gan, batch._replace(real=equal, fake=equal)).real[0])
        random = not torch.equal(*views)
        rows_equal = bool((views[0] == views[0][:1]).all())
        expect(not (random and rows_equal), f"on {kind}s, all samples of a batch get the same random draw")
        expect(random or rows_equal, f"on {kind}s, equal samples are shown unequally, by their place in the batch")
