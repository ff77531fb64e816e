"""The nine hooks: gankit's public contract.

A plugin is any object whose methods carry :data:`hookimpl`. Each method asks for the arguments it needs, by name,
out of those listed here; pluggy passes only these. Hooks receive values and return values: nothing is changed by
reaching into the loop. ``docs/plugins/hooks/`` holds one page per hook, with the same signature.

Words used below: *phase* is ``"d"`` (the discriminator's update) or ``"g"`` (the generator's); *step* counts from 1 and
all D updates of one step share its number; *term* is a named 0-dim tensor added to a player's loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from torch import Tensor

    from gankit.contract import Batch, Player, View
    from gankit.gan import GAN

hookspec = pluggy.HookspecMarker("gankit")
hookimpl = pluggy.HookimplMarker("gankit")


@hookspec
def players(gan: GAN) -> dict[str, Player]:
    """Networks to train, by name; collected, and a name may be used once.

    Called once, before anything else: ``gan.shape`` (of one sample), ``gan.latent``, ``gan.architecture`` and ``gan.optim``
    are there, no network is. A player called "generator" or "discriminator" takes the place of the shipped one. A
    ``Player`` holds a module, or a factory that asks by name for any of ``shape``, ``z_dim``, ``latent``, and for the
    discriminator ``shapes``, of what it will be shown. The core moves networks to the device, trains each one in the
    phase its ``Player`` names, averages the generator alone, and saves and restores them. Initialise them from the global
    random generator; the core has seeded it for this call alone.
    """
    raise NotImplementedError


@hookspec
def setup(gan: GAN) -> None:
    """Change or inspect the networks before training; broadcast, nothing is returned.

    Called once, when every network exists on its device with its final shapes and no optimiser has been made yet. Wrap
    layers, set ``gan.loss`` or ``gan.optim``, or refuse a combination that cannot work by raising
    ``gankit.UsageError`` with one sentence that says why and what to do.
    """
    raise NotImplementedError


@hookspec(firstresult=True)
def sample(gan: GAN, real: Tensor, z: Tensor, phase: str, step: int) -> Batch:
    """Draw the update's raw batch; the first result counts, and wrappers may transform it.

    ``real`` is (B, \\*shape) and ``z`` (B, z_dim); both belong to the core and must not be edited in place. The core's
    own answer is ``Batch(real, generator(z), z)``. In phase "d" gradients are switched off here, so nothing reaches the
    generator; in phase "g" the graph is kept.
    """
    raise NotImplementedError


@hookspec(firstresult=True)
def view(gan: GAN, batch: Batch, phase: str, step: int) -> View:
    """What the critic is shown; the first result counts, and wrappers may transform it.

    A ``View`` holds two tuples of tensors, the positional arguments of the critic for the real and for the fake side,
    pairwise of equal shape. The core's own answer is ``View((batch.real,), (batch.fake,))``. Joint views, packing and
    augmentation are wrappers; mark one that regroups samples ``tryfirst=True``, so that it comes outermost. Gradients
    as in ``sample``; afterwards the core makes every floating tensor of the view require a gradient, so that penalties
    can differentiate with respect to the critic's inputs. Plugins may call this hook themselves, to see other
    samples as the critic would.
    """
    raise NotImplementedError


@hookspec(firstresult=True)
def critic(
    gan: GAN,
    batch: Batch,
    view: View,
    phase: str,
    d_objective: Callable[[Callable[..., Tensor]], Tensor],
    step: int,
) -> Callable[..., Tensor]:
    """Who scores this update: a callable from the view's tensors to logits; first result, wrappers may transform it.

    The core's own answer is ``gan.discriminator``. Logits are raw, one per sample or pack (or a map of them), larger
    meaning more real. ``d_objective(critic)`` is the discriminator's whole loss, penalties included, of any critic on
    this very batch and view, with its graph: unrolling differentiates through it. Gradients are on.
    """
    raise NotImplementedError


@hookspec
def pre_d_loss(
    gan: GAN,
    critic: Callable[..., Tensor],
    batch: Batch,
    view: View,
    real_logits: Tensor,
    fake_logits: Tensor,
    step: int,
    ahead: bool,
) -> dict[str, Tensor] | None:
    """Further terms of the discriminator's loss, by name, or None; collected and summed.

    Called in every D update after the critic scored both sides, and again by whoever evaluates ``d_objective``, such as
    unrolling: then ``ahead`` is True, no update of D follows, and a plugin that remembers what it saw forgets this. Each
    term is a finite 0-dim floating tensor, already weighted, connected to the critic's parameters. ``view.real`` and
    ``view.fake`` require gradients and are what the logits were computed from. "No term this step" is None or an empty
    dict, never a zero. Random numbers come from ``gan.rng(self)``.
    """
    raise NotImplementedError


@hookspec
def post_g_loss(
    gan: GAN,
    critic: Callable[..., Tensor],
    batch: Batch,
    view: View,
    real_logits: Tensor | None,
    fake_logits: Tensor,
    g_loss: Tensor,
    step: int,
) -> dict[str, Tensor] | None:
    """Further terms of the generator's loss, by name, or None; collected and summed.

    Called in every G update after the adversarial part ``g_loss`` is known. ``real_logits`` is None unless the loss
    scores the real side in this phase. Terms as in ``pre_d_loss``, connected to the parameters of a player of
    phase "g".
    """
    raise NotImplementedError


@hookspec
def post_step(gan: GAN, terms: dict[str, Tensor], phase: str, step: int) -> None:
    """After an optimiser step of either player; broadcast, nothing is returned.

    Called once per update: ``d_steps`` times with phase "d", then once with phase "g", which ends the step. ``terms``
    are the terms of that update, detached; reading their value waits for the device. This is the place to clip
    weights, to average, to log, to save. Gradients are on; guard changes of parameters with ``torch.no_grad()``.
    """
    raise NotImplementedError


@hookspec
def evaluate(gan: GAN, draw: Callable[[int], Tensor], step: int | None) -> dict[str, float] | None:
    """Metrics by name; collected, and a name may be used once.

    Called every ``--eval-every`` steps, and at the end. ``draw(n)`` gives n samples (n, \\*shape) of the averaged
    generator where there is one, in evaluation mode, without gradients, from a random stream of its own: the same call
    in the same run gives the same samples, and training is not disturbed.

    Called once more with ``step`` None: ``draw`` then gives true training samples (as many as there are), and the result
    is what a perfect generator would get; return None if a metric does not come from ``draw``. ``gan.data`` is the data
    set, or None in a loop that has not set it. ``gan.progress(done, total, what)`` tells of what takes time. A
    metric that depends on more than the samples is named by ``gankit.provenance.column(metric, facts)``, and its facts
    put into ``gan.provenance`` under that name: values of different provenance then never share a column.
    """
    raise NotImplementedError


NAMES = ("players", "setup", "sample", "view", "critic", "pre_d_loss", "post_g_loss", "post_step", "evaluate")
