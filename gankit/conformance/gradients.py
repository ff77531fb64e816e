"""Whether each term trains what it is meant to train, and its gradient is the slope of its value."""

from __future__ import annotations

import contextlib
from itertools import product

import torch
from torch import Tensor

from gankit import losses
from gankit.conformance.bench import (
    TERM_HOOKS,
    Bench,
    Failed,
    Scene,
    Skipped,
    default_dtype,
    expect,
    global_random,
    quiet,
    same,
)
from gankit.errors import UsageError
from gankit.gan import GAN
from gankit.loop import total, update
from gankit.options import options_of

STEP = 1e-7  # of the difference quotient, so small that no kink of a leaky ReLU lies within


def terms_seen(bench: Bench) -> str | None:
    """A plugin with ``pre_d_loss`` or ``post_g_loss`` has a term in some step, or nothing of what it does is checked.

    Mend: choose options with which it acts, ``-o weight=1``; if it has them, see what keeps it from its term.
    """
    if not bench.has(*TERM_HOOKS.values()):
        raise Skipped("it adds no terms")
    if any(names for record in bench.trained() for names in record.terms.values()):
        return None
    with contextlib.suppress(Skipped):
        bench.scenes(repeatable=False)
        return None
    for name, kind, (phase, hook) in product(losses.LOSSES, bench.kinds(), TERM_HOOKS.items()):
        if bench.has(hook):
            with contextlib.suppress(Skipped, UsageError):
                bench.scene(kind, phase, loss=losses.make(name))
                return f"not with the loss {bench.loss(kind)}, with which most is checked, but with {name}"
    raise Failed("it never had a term: neither in early steps nor in late ones, with no kind of data and no loss")


def the_same_again(bench: Bench) -> None:
    """The same update with the same random streams gives the same terms, as often as it is asked.

    Mend: draw from ``gan.rng(self)`` only, and change what the plugin remembers in ``post_step``, not in a term hook.
    """
    for scene in bench.scenes(repeatable=False):
        one, two = ({k: v.item() for k, v in scene.play().items()} for _ in range(2))
        expect(same(one, two), f"{scene.where} gives {one}, and then {two} for the same update")


def gradient_reaches(bench: Bench) -> None:
    """D terms have a gradient in D's parameters, G terms in those of a player of phase "g": else they train nothing.

    Mend: compute the term from the critic's logits (or G's samples) without ``detach``; ``create_graph=True`` for slopes.
    """
    for scene in bench.scenes():
        for name, term in scene.play().items():
            found = [g for g in scene.gradients(term, scene.phase) if g is not None]
            reached = any(g.any() for g in found)
            if found and not reached and term.item() == 0:  # where a one-sided penalty is at rest
                continue
            expect(
                reached,
                f"the term {name!r} of {scene.where} has no gradient in the parameters of phase {scene.phase!r}",
            )


def leaves_g_alone(bench: Bench) -> None:
    """D terms have no path to the generator's side: the graph would be paid for, and a loop's own backward would fill it.

    Mend: what G, or an encoder, makes inside ``pre_d_loss`` is made under ``torch.no_grad()``.
    """
    for scene in bench.scenes():
        if scene.phase == "d":
            for name, term in scene.play().items():
                leaked = any(g is not None for g in scene.gradients(term, "g"))
                expect(not leaked, f"the term {name!r} of {scene.where} has a graph to a player of phase 'g'")


def derivative(bench: Bench) -> None:
    """The gradient of each term is the slope of its value, by difference quotients along random directions in float64.

    Mend: a ``detach``, ``no_grad`` or ``.data`` cuts a path, or ``create_graph`` is missing; if it is cut on purpose:
    ``claims = Claims(waives={"derivative": "why"})``.
    """
    for scene in bench.scenes():
        parameters = scene.gan.parameters(scene.phase)
        for name, term in scene.play().items():
            gradients = scene.gradients(term, scene.phase)
            slopes = [_slopes(scene, name, parameters, gradients, seed) for seed in range(3)]
            near = [abs(slope - gradient) <= allowed for slope, gradient, allowed in slopes]
            slope, gradient, _ = slopes[0]
            # in one direction there may be a kink, not in all
            expect(
                any(near),
                f"the term {name!r} of {scene.where} changes by {slope:.6g} along a direction in the parameters, its "
                f"gradient says {gradient:.6g}",
            )


def _slopes(
    scene: Scene, name: str, parameters: list[torch.nn.Parameter], gradients: list[Tensor | None], seed: int
) -> tuple[float, float, float]:
    """Difference quotient and gradient along a random direction, and by how much they may differ."""
    stream = torch.Generator().manual_seed(seed)
    directions = [
        torch.randn(p.shape, generator=stream, dtype=p.dtype) * (p.detach().abs().mean() + 0.01) for p in parameters
    ]
    start = [p.detach().clone() for p in parameters]
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, s, d in zip(parameters, start, directions, strict=True):
                p.copy_(s + sign * STEP * d)
        values.append(scene.play()[name].item())
    with torch.no_grad():
        for p, s in zip(parameters, start, strict=True):
            p.copy_(s)
    slope = (values[0] - values[1]) / (2 * STEP)
    gradient = sum((g * d).sum().item() for g, d in zip(gradients, directions, strict=True) if g is not None)
    return slope, gradient, 1e-3 * max(abs(slope), abs(gradient)) + 1e-7 * max(map(abs, values))


def weight_zero(bench: Bench) -> None:
    """With all weights 0, the gradient of the whole loss is that of the adversarial loss, bit for bit.

    Mend: multiply the whole term by the weight; nothing infinite may come before (0 times infinity is not a number).
    """
    zero = {name: 0.0 for name in _weights(bench)}
    if not zero:
        raise Skipped("it has no option called weight")
    for scene in bench.scenes():
        try:
            off = bench.scene(scene.kind, scene.phase, options=zero)
        except Skipped:
            continue
        except ValueError as error:
            raise Skipped(f"a weight of 0 is refused: {error}") from error
        terms = off.all_terms()
        adv = {name: term for name, term in terms.items() if not off.owns(name)}
        for p, one, two in zip(
            off.gan.parameters(off.phase),
            off.gradients(total(terms), off.phase),
            off.gradients(total(adv), off.phase),
            strict=True,
        ):
            one, two = (torch.zeros_like(p) if g is None else g for g in (one, two))
            expect(
                torch.equal(one, two), f"with a weight of 0, {scene.where} still changes the gradient of a parameter"
            )


def weight_is_a_factor(bench: Bench) -> None:
    """Twice the weight is twice the term: the weight is applied once.

    Mend: multiply by the weight outside of every square and norm; not in ``grad_outputs`` as well.
    """
    if "weight" not in _weights(bench):
        raise Skipped("it has no option called weight")
    weight = bench.plugin().weight
    if not weight:
        raise Skipped("its weight is 0")
    _compare(bench, {"weight": weight}, {"weight": 2 * weight}, 2.0, "twice the weight")


def every(bench: Bench) -> None:
    """With ``every=2`` a term comes in every second step, and is twice as strong: as strong as always, on average.

    Mend: ``if step % self.every: return None``, and multiply the term by ``self.every``.
    """
    if "every" not in options_of(bench.factory):
        raise Skipped("it has no option called every")
    for scene in bench.scenes():
        with quiet(), global_random(0), default_dtype(torch.float64):
            scene = bench.scene(scene.kind, scene.phase, options={"every": 1}, frozen=True)
        scene.step += scene.step % 2
        often = scene.play()
        object.__setattr__(scene.plugin, "every", 2)  # in the same state: what it remembers is of the same steps
        _hold(scene, often, scene.play(), 2.0, "every=2")
    plugin = bench.plugin(every=2)
    kind = bench.kinds()[0]
    with quiet(), global_random(0):
        gan = bench.gan(kind, {bench.name: plugin})
        steps = _steps_with_terms(bench, gan, 4)
    expect(all(step % 2 == 0 for step in steps), f"with every=2 it has terms in the steps {sorted(steps)}")


def _steps_with_terms(bench: Bench, gan: GAN, steps: int) -> set[int]:
    found = set()
    for step in range(1, steps + 1):
        gan.step = step
        for phase in "dg":
            for key in [key for key, owner in gan.manager.owners.items() if owner == bench.name]:
                del gan.manager.owners[key]
            update(gan, phase, step)
            mine = [hook for (hook, _), owner in gan.manager.owners.items() if owner == bench.name]
            if any(hook in TERM_HOOKS.values() for hook in mine):
                found.add(step)
    return found


def _compare(bench: Bench, one: dict[str, object], two: dict[str, object], factor: float, what: str) -> None:
    """Hold the terms of one set of options, times the factor, against those of another; the networks do not move."""
    for scene in bench.scenes():
        plain, other = (_at(bench, scene, options) for options in (one, two))
        _hold(scene, plain, other, factor, what)


def _hold(scene: Scene, plain: dict[str, Tensor], other: dict[str, Tensor], factor: float, what: str) -> None:
    for name, term in plain.items():
        if name in other:
            a, b = term.item() * factor, other[name].item()
            near = abs(a - b) <= 1e-9 * max(abs(a), abs(b))
            expect(near, f"{what} makes the term {name!r} of {scene.where} {b:.6g}, not {a:.6g}")


def _at(bench: Bench, scene: Scene, options: dict[str, object]) -> dict[str, Tensor]:
    """The terms with these options in a step that is a multiple of 2, networks frozen."""
    with quiet(), global_random(0), default_dtype(torch.float64):
        found = bench.scene(scene.kind, scene.phase, options=options, frozen=True)
        return found.play()


def _weights(bench: Bench) -> list[str]:
    """The options that are weights of terms."""
    return [
        name
        for name, option in options_of(bench.factory).items()
        if option.annotation is float and (name == "weight" or name.startswith("weight_") or name.endswith("_weight"))
    ]
