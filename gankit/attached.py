"""Regularizers in a training loop of one's own: ``gankit.attach``.

The loop, the optimisers, the devices and the data stay the user's. Nothing is patched; set-up happens at the first batch,
which says all that has to be known about shapes and devices.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gankit import losses
from gankit.contract import PHASES, Batch, View, watched
from gankit.errors import UsageError
from gankit.gan import GAN, Latent, derive_seed
from gankit.hookspecs import hookimpl
from gankit.loop import Terms, d_terms, g_terms, total
from gankit.plugins import create, snake_case

Side = Tensor | Sequence[Tensor]
PluginSpec = str | tuple[str, Mapping[str, Any]] | object


class Shown(NamedTuple):
    """One update's samples as the critic sees them: ``D(*shown.real)`` and ``D(*shown.fake)``; the batch they came from."""

    real: tuple[Tensor, ...]
    fake: tuple[Tensor, ...]
    batch: Batch
    phase: str
    step: int


class Logits(nn.Module):
    """A discriminator that ends in a sigmoid, as one that gives logits.

    With an ``nn.Sigmoid`` at its end the logits are what that module is given, exactly; else they are log(p / (1 - p)) of
    its probabilities p, held away from 0 and 1 by the precision of their dtype.
    """

    def __init__(self, discriminator: nn.Module) -> None:
        super().__init__()
        self.discriminator = discriminator

    def forward(self, *inputs: Tensor) -> Tensor:
        """Logits of the same shape as the probabilities."""
        last = last_sigmoid(self.discriminator)
        if last is None:
            p: Tensor = self.discriminator(*inputs)
            return torch.logit(p, eps=torch.finfo(p.dtype).eps)
        seen: list[Tensor] = []
        handle = last.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
        try:
            output = self.discriminator(*inputs)
        finally:
            handle.remove()
        return seen[-1].reshape(output.shape)


def last_sigmoid(module: nn.Module) -> nn.Sigmoid | None:
    """The sigmoid that is the last module inside ``module``, if its last module is one."""
    *_, last = module.modules()
    return last if isinstance(last, nn.Sigmoid) else None


class OwnLoop:
    """The core's part of the hooks in somebody's own loop: the samples are those that the loop made."""

    def __init__(self) -> None:
        self.batch: Batch

    @hookimpl(trylast=True)
    def sample(self) -> Batch:
        """What the loop gave to ``show``."""
        return self.batch

    @hookimpl(trylast=True)
    def view(self, batch: Batch) -> View:
        """The samples, and beside them the further arguments of the critic that the loop gave, such as labels."""
        real, fake = (
            tuple(t for name, t in batch.extra.items() if name.startswith(f"argument/{side}/"))
            for side in ("real", "fake")
        )
        return View((batch.real, *real), (batch.fake, *fake))


class OwnGAN(GAN):
    """A GAN that leaves alone what is the user's: modes, devices, optimisers."""

    first: Batch
    given: Mapping[str, torch.optim.Optimizer] = {}

    @torch.no_grad()
    def first_view(self) -> View:
        """A view of zeros like the first batch; the generator is not called."""
        before = {name: rng.get_state() for name, rng in self.rngs.items()}
        modes = [(m, m.training) for player in self.players.values() for m in player.module.modules()]
        for player in self.players.values():
            player.module.eval()
        real, fake, z = (torch.zeros_like(t) for t in self.first[:3])
        batch = Batch(real, fake, z, self.first.extra)
        self.manager.get_plugin("loop").batch = batch  # type: ignore[union-attr]
        batch = self.hook.sample(gan=self, real=real, z=z, phase="d", step=0)
        view: View = self.hook.view(gan=self, batch=batch, phase="d", step=0)
        for module, training in modes:
            module.training = training
        self.rngs = {name: self.rngs[name] for name in before}
        for name, state in before.items():
            self.rngs[name].set_state(state)
        return view

    def _try_discriminator(self) -> None:
        """The user's own; it is not tried."""

    def make_optimizers(self) -> None:
        """The user's optimisers, to which parameters are added that plugins brought."""
        for phase in PHASES:
            modules = [player.module for player in self.players.values() if player.phase == phase]
            self._parameters[phase] = list(dict.fromkeys(chain.from_iterable(m.parameters() for m in modules)))
        for phase, optimizer in self.given.items():
            known = {p for group in optimizer.param_groups for p in group["params"]}
            fresh = [p for p in self._parameters[phase] if p not in known and p.requires_grad]
            if fresh:
                optimizer.add_param_group({"params": fresh})
        self.optimizers = dict(self.given)


class Attached:
    """Plugins on somebody's own generator and discriminator; made by :func:`attach`.

    terms: the plugins' terms of the last update by name, detached, for logging.
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        plugins: Iterable[PluginSpec],
        *,
        encoder: nn.Module | None,
        optimizers: Mapping[str, torch.optim.Optimizer] | None,
        loss: str | losses.Loss,
        probabilities: bool,
        seed: int,
        architecture: Mapping[str, Any] | None,
        allow: Iterable[str],
    ) -> None:
        self.plugins = resolved(plugins)
        self.loss = losses.make(loss) if isinstance(loss, str) else loss
        self.optimizers = dict(optimizers or {})
        unknown = self.optimizers.keys() - set(PHASES)
        if unknown:
            raise UsageError(f'optimizers are given as {{"d": ..., "g": ...}}, not {sorted(unknown)[0]!r}')
        self.generator, self.encoder, self.given_discriminator = generator, encoder, discriminator
        self.discriminator = Logits(discriminator) if probabilities else discriminator
        if last_sigmoid(discriminator) is not None and not probabilities:
            warnings.warn(
                "the discriminator ends in a sigmoid, and regularizers are defined on logits: take it out, or attach with "
                "probabilities=True",
                stacklevel=3,
            )
        rank = torch.distributed.get_rank() if _distributed() else 0
        self.seed = derive_seed(seed, "rank", str(rank)) if rank else seed
        self.settings: dict[str, Any] = {"architecture": dict(architecture or {}), "allow": frozenset(allow)}
        self.own = OwnLoop()
        self.gan: OwnGAN | None = None
        self.terms: Terms = {}
        self._pending: Mapping[str, Any] | None = None
        self._phase = "g"  # of the last update
        self._tried_twice = False

    # -- the loop's side -----------------------------------------------------------------------------------------

    def show(self, real: Side, fake: Side, z: Tensor | None = None, *, phase: str = "d") -> Shown:
        """What the discriminator is to be shown in this update, for ``D(*shown.real)`` and ``D(*shown.fake)``.

        real, fake: the samples (B, \\*shape), or a tuple of them and D's further arguments, such as labels. In phase "d"
            a graph to the generator is cut. z: what ``fake`` was made from, for plugins that compare latents.
        """
        batch = self._batch(real, fake, z, phase)
        gan = self._built(batch)
        if phase == "d" and self._phase == "g":
            gan.step += 1
        self._phase = phase
        self.own.batch = batch
        with torch.set_grad_enabled(phase == "g"):
            made = gan.hook.sample(gan=gan, real=batch.real, z=batch.z, phase=phase, step=gan.step)
            view = gan.hook.view(gan=gan, batch=made, phase=phase, step=gan.step)
        return Shown(*watched(view), made, phase, gan.step)

    def d_terms(
        self,
        real: Side | Shown,
        fake: Side | None = None,
        z: Tensor | None = None,
        *,
        real_logits: Tensor | None = None,
        fake_logits: Tensor | None = None,
    ) -> Tensor:
        """The sum of what the plugins add to D's loss, 0-dim: ``d_loss = d_loss + attached.d_terms(real, fake, z)``.

        real: the samples as in :meth:`show`, or what ``show`` returned. real_logits, fake_logits: of what was shown, if you
            have them; else the critic is called where a plugin needs them. Samples that a plugin changes before they are
            shown (packing, joint views, augmentation) must be scored as shown.
        """
        return self._sum("d", "pre_d_loss", real, fake, z, real_logits=real_logits, fake_logits=fake_logits)

    def g_terms(
        self,
        real: Side | Shown,
        fake: Side | None = None,
        z: Tensor | None = None,
        *,
        real_logits: Tensor | None = None,
        fake_logits: Tensor | None = None,
        g_loss: Tensor | None = None,
    ) -> Tensor:
        """The sum of what the plugins add to G's loss, 0-dim; arguments as in :meth:`d_terms`, ``fake`` with its graph."""
        logits = {"real_logits": real_logits, "fake_logits": fake_logits}
        return self._sum("g", "post_g_loss", real, fake, z, **logits, g_loss=g_loss)

    def d_loss(self, real: Side | Shown, fake: Side | None = None, z: Tensor | None = None) -> Tensor:
        """D's whole loss, 0-dim: the adversarial one that ``attach`` was given, and all terms."""
        return self._whole("d", real, fake, z)

    def g_loss(self, real: Side | Shown, fake: Side | None = None, z: Tensor | None = None) -> Tensor:
        """The whole loss of G (and an encoder), 0-dim: the adversarial one as plugins set it up, and all terms."""
        return self._whole("g", real, fake, z)

    def critic(self, shown: Shown) -> Callable[..., Tensor]:
        """Who scores this update: D, or what a plugin such as ``unrolled`` puts in its place."""
        gan = self._built(shown.batch)
        scene: dict[str, Any] = {
            "batch": shown.batch, "view": View(shown.real, shown.fake), "step": shown.step
        }  # fmt: skip

        def d_objective(critic: Callable[..., Tensor]) -> Tensor:
            return total(d_terms(gan, critic, **scene))

        critic: Callable[..., Tensor] = gan.hook.critic(gan=gan, phase=shown.phase, d_objective=d_objective, **scene)
        return critic

    def stepped(self, phase: str) -> None:
        """Tell plugins that an optimiser made its step; called for you for the optimisers given to ``attach``."""
        if self.gan is not None:
            self.gan.hook.post_step(gan=self.gan, terms=dict(self.terms), phase=phase, step=self.gan.step)

    def parameters(self, phase: str) -> list[nn.Parameter]:
        """The parameters that are trained in phase "d" or "g", those of networks that plugins brought among them."""
        if self.gan is None:
            raise UsageError("parameters are known after the first batch was shown")
        return self.gan.parameters(phase)

    # -- state ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Step, random streams, plugins' states, and the weights of networks that plugins brought."""
        if self.gan is None:
            return dict(self._pending or {})
        state = self.gan.state_dict()
        kept = {name: state[name] for name in ("step", "rngs", "plugins")}
        brought = {name: player.module.state_dict() for name, player in self._brought().items()}
        return copy.deepcopy({**kept, "players": brought, "phase": self._phase})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo :meth:`state_dict`; before the first batch it is kept until then."""
        if self.gan is None:
            self._pending = copy.deepcopy(dict(state))
            return
        if not state:
            return
        self.gan.step, self._phase = state["step"], state["phase"]
        for name, value in state["rngs"].items():
            self.gan.stream(name).set_state(value)
        for name, value in state["plugins"].items():
            plugin: Any = self.gan.manager.get_plugin(name)
            plugin.load_state_dict(value)
        for name, player in self._brought().items():
            player.module.load_state_dict(state["players"][name])

    # -- inside --------------------------------------------------------------------------------------------------

    def _brought(self) -> dict[str, Any]:
        assert self.gan is not None
        own = {id(m) for m in (self.generator, self.discriminator, self.encoder)}
        return {name: player for name, player in self.gan.players.items() if id(player.module) not in own}

    def _batch(self, real: Side, fake: Side, z: Tensor | None, phase: str) -> Batch:
        sides = {"real": _tensors(real), "fake": _tensors(fake)}
        if phase == "d":
            sides = {name: tuple(t.detach() for t in side) for name, side in sides.items()}
        if len(sides["real"]) != len(sides["fake"]) or sides["real"][0].shape != sides["fake"][0].shape:
            shapes = {name: [tuple(t.shape) for t in side] for name, side in sides.items()}
            raise UsageError(f"both sides need the same shapes: real {shapes['real']}, fake {shapes['fake']}")
        arguments = {f"argument/{name}/{i}": t for name, side in sides.items() for i, t in enumerate(side[1:])}
        x, y = sides["real"][0], sides["fake"][0]
        return Batch(x, y, x.new_zeros(len(x), 0) if z is None else z, arguments)

    def _built(self, batch: Batch) -> OwnGAN:
        if self.gan is not None:
            return self.gan
        gan = OwnGAN(
            generator=self.generator,
            discriminator=self.discriminator,
            encoder=self.encoder,
            shape=tuple(batch.real.shape[1:]),
            latent=Latent(max(1, math.prod(batch.z.shape[1:])), shape=tuple(batch.z.shape[1:])),
            loss=self.loss,
            plugins=self.plugins,
            core={"loop": self.own},
            seed=self.seed,
            device=batch.real.device,
            batch_size=len(batch.real),
            **self.settings,
        )
        gan.first, gan.given = batch, self.optimizers
        gan.build()
        for phase in PHASES:
            self._need_optimizer(gan, phase)
        for phase, optimizer in self.optimizers.items():
            optimizer.register_step_post_hook(lambda *_, phase=phase: self.stepped(phase))
        self.gan = gan
        if self._pending is not None:
            self.load_state_dict(self._pending)
        return gan

    def _need_optimizer(self, gan: OwnGAN, phase: str) -> None:
        """Refuse plugins that act on optimisers, or bring parameters, when there is no optimiser for them."""
        if phase in self.optimizers:
            return
        own = (self.generator, self.given_discriminator, self.encoder)
        known = {id(p) for module in own if module is not None for p in module.parameters()}
        acting = [name for name in self.plugins if _implements(gan, name, "post_step")]
        brings = any(id(p) not in known for p in gan.parameters(phase))
        if brings or acting:
            why = "a plugin brings parameters to train" if brings else f"{acting[0]} acts after the optimiser's step"
            raise UsageError(f'{why}: attach(..., optimizers={{"d": ..., "g": ...}})')

    def _sum(
        self, phase: str, hook: str, real: Side | Shown, fake: Side | None, z: Tensor | None, **known: Tensor | None
    ) -> Tensor:
        shown = self._shown(real, fake, z, phase)
        gan = self._built(shown.batch)
        critic = self.critic(shown)
        impls = getattr(gan.hook, hook).get_hookimpls()
        for side in ("real", "fake"):
            if known[f"{side}_logits"] is None and any(f"{side}_logits" in impl.argnames for impl in impls):
                known[f"{side}_logits"] = critic(*getattr(shown, side))
        added = getattr(gan.hook, hook)(
            gan=gan, critic=critic, batch=shown.batch, view=View(shown.real, shown.fake), step=shown.step, **known
        )
        return self._kept(dict(chain.from_iterable(map(dict.items, added))), phase, shown)

    def _whole(self, phase: str, real: Side | Shown, fake: Side | None, z: Tensor | None) -> Tensor:
        shown = self._shown(real, fake, z, phase)
        gan = self._built(shown.batch)
        terms = (d_terms if phase == "d" else g_terms)(
            gan, self.critic(shown), shown.batch, View(shown.real, shown.fake), shown.step
        )
        return self._kept(terms, phase, shown)

    def _shown(self, real: Side | Shown, fake: Side | None, z: Tensor | None, phase: str) -> Shown:
        if isinstance(real, Shown):
            if real.phase != phase:
                raise UsageError(f'this was shown for phase {real.phase!r}: show(..., phase="{phase}")')
            return real
        if fake is None:
            raise UsageError("give real and fake samples, or what show returned")
        return self.show(real, fake, z, phase=phase)

    def _kept(self, terms: Terms, phase: str, shown: Shown) -> Tensor:
        self.terms = {name: term.detach() for name, term in terms.items()}
        if phase == "d" and terms and not self._tried_twice and hasattr(self.given_discriminator, "_orig_mod"):
            self._try_twice(total(terms))
        return total(terms) if terms else shown.real[0].new_zeros(())

    def _try_twice(self, term: Tensor) -> None:
        """Refuse a compiled discriminator under a penalty on its gradient, which torch.compile cannot train."""
        assert self.gan is not None
        self._tried_twice = True
        parameters = [p for p in self.gan.parameters("d") if p.requires_grad]
        try:
            torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            if "double backward" not in str(error):
                raise
            raise UsageError(
                "a compiled discriminator cannot be differentiated twice, which a gradient penalty needs: compile the "
                "generator alone, or attach to the discriminator before it is compiled"
            ) from error


def attach(
    generator: nn.Module,
    discriminator: nn.Module,
    plugins: Iterable[PluginSpec],
    *,
    encoder: nn.Module | None = None,
    optimizers: Mapping[str, torch.optim.Optimizer] | None = None,
    loss: str | losses.Loss = "non_saturating",
    probabilities: bool = False,
    seed: int = 0,
    architecture: Mapping[str, Any] | None = None,
    allow: Iterable[str] = (),
) -> Attached:
    """Switch plugins on in a training loop of your own.

    generator, discriminator: your modules. The discriminator gives logits, larger = more real, (B,), (B, 1), (B, 1, 1, 1)
        or a map (B, 1, h, w).
    plugins: names, names with options, or objects: ``["r1", ("packing", {"m": 4}), GradientPenalty(weight=5)]``.
    encoder: yours, from samples to latents, for plugins that need one; without it they bring their own.
    optimizers: ``{"d": ..., "g": ...}``, needed by plugins that act after a step or bring networks: their parameters are
        added to the optimiser as a group.
    loss: the adversarial loss, by name or as a value: used by :meth:`Attached.d_loss` and :meth:`Attached.g_loss`, by
        plugins that unroll D's update, and for refusals.
    probabilities: D ends in a sigmoid; regularizers then act on the logits before it.
    seed: of the plugins' random numbers and networks; other ranks of a process group get other numbers.
    architecture: ``network``, ``width``, ``depth`` of networks that plugins bring. allow: refusals that are to be warnings.

    Plugins are set up at the first batch, which tells shapes and device. Raises UsageError with one sentence for what cannot
    work.
    """
    return Attached(
        generator,
        discriminator,
        plugins,
        encoder=encoder,
        optimizers=optimizers,
        loss=loss,
        probabilities=probabilities,
        seed=seed,
        architecture=architecture,
        allow=allow,
    )


def resolved(plugins: Iterable[PluginSpec]) -> dict[str, object]:
    """Plugins by name, from names, (name, options) and objects."""
    found: dict[str, object] = {}
    for spec in plugins:
        if isinstance(spec, str):
            made = create([spec], {})[0]
        elif isinstance(spec, tuple):
            name, options = spec
            made = create([name], {name: options})[0]
        else:
            made = {snake_case(type(spec).__name__): spec}
        for name, plugin in made.items():
            if name in found:
                raise UsageError(f"plugin {name!r} is given twice")
            found[name] = plugin
    return found


def _tensors(side: Side) -> tuple[Tensor, ...]:
    return (side,) if isinstance(side, Tensor) else tuple(side)


def _implements(gan: GAN, name: str, hook: str) -> bool:
    return any(impl.plugin_name == name for impl in getattr(gan.hook, hook).get_hookimpls())


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
