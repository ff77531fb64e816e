"""The training loop: one update for both players, no method by name.

Read it beside ``docs/plugins/hooks/``: everything a regularizer can change is a ``gan.hook`` call below.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from gankit.contract import Batch, View, watched
from gankit.gan import GAN

Critic = Callable[..., Tensor]
Terms = dict[str, Tensor]


def d_terms(gan: GAN, critic: Critic, batch: Batch, view: View, step: int, ahead: bool = False) -> Terms:
    """The discriminator's loss by term: "adv" (adversarial) and what ``pre_d_loss`` adds; ahead: no update follows."""
    logits = {"real_logits": critic(*view.real), "fake_logits": critic(*view.fake)}
    adv = gan.loss.d(*logits.values())
    added = gan.hook.pre_d_loss(gan=gan, critic=critic, batch=batch, view=view, step=step, ahead=ahead, **logits)
    return {"adv": adv, **dict(chain.from_iterable(map(dict.items, added)))}


def g_terms(gan: GAN, critic: Critic, batch: Batch, view: View, step: int) -> Terms:
    """The generator's loss by term: "adv" and what ``post_g_loss`` adds; the loss says which sides it needs scored."""
    sides = {"real_logits": view.real, "fake_logits": view.fake}
    logits = {name: critic(*sides[name]) for name in gan.loss.g_sides}
    adv = gan.loss.g(**logits)
    known = {"real_logits": None, "g_loss": adv, **logits}
    added = gan.hook.post_g_loss(gan=gan, critic=critic, batch=batch, view=view, step=step, **known)
    return {"adv": adv, **dict(chain.from_iterable(map(dict.items, added)))}


def total(terms: Terms) -> Tensor:
    """The sum of all terms: a player's loss."""
    first, *others = terms.values()
    return sum(others, start=first)


def d_objective(gan: GAN, critic: Critic, batch: Batch, view: View, step: int) -> Tensor:
    """The discriminator's whole loss, for whoever looks ahead."""
    return total(d_terms(gan, critic, batch, view, step, ahead=True))


def update(gan: GAN, phases: str, step: int) -> None:
    """One optimiser step of "d", of "g", or of both: in "dg" each meets the other as it was before.

    Draw, show, score, sum, backward; then step.
    """
    found: dict[str, Terms] = {}
    for phase in phases:
        with torch.set_grad_enabled(phase == "g"):
            batch = gan.hook.sample(gan=gan, real=gan.next_real(), z=gan.next_z(), phase=phase, step=step)
            view = gan.hook.view(gan=gan, batch=batch, phase=phase, step=step)
        scene = {"batch": batch, "view": watched(view), "step": step}
        critic = gan.hook.critic(gan=gan, phase=phase, d_objective=partial(d_objective, gan, **scene), **scene)
        found[phase] = TERMS[phase](gan, critic, **scene)
        torch.autograd.backward(total(found[phase]), inputs=gan.parameters(phase))
    for phase, terms in found.items():
        gan.optimizers[phase].step()
        gan.optimizers[phase].zero_grad()
        gan.hook.post_step(gan=gan, terms={k: v.detach() for k, v in terms.items()}, phase=phase, step=step)


def train(gan: GAN, steps: int) -> None:
    """Train until ``gan.step`` is ``steps`` or somebody sets ``gan.stop``; ``gan.rounds`` says who moves when."""
    gan.steps = max(steps, gan.steps or 0)
    while gan.step < steps and not gan.stop:
        gan.step += 1
        for phases in gan.rounds:
            update(gan, phases, gan.step)


TERMS = {"d": d_terms, "g": g_terms}
