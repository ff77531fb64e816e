"""Regularizers in a training loop of one's own: ``gankit.attach``.

The loop, the optimisers, the devices and the data stay the user's, and nothing global is patched. Set-up happens at the
first batch, which says all that has to be known about shapes and devices, or before, on a batch like it.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from gankit import loop, losses
from gankit.contract import PHASES, Batch, Player, View, watched
from gankit.distributed import team
from gankit.errors import UsageError
from gankit.gan import GAN, Latent
from gankit.hookspecs import hookimpl
from gankit.loop import Critic, Terms, total
from gankit.plugins import create, snake_case
from gankit.structure import evaluating, modes_kept

Side = Tensor | Sequence[Tensor]
PluginSpec = str | tuple[str, Mapping[str, Any]] | object


class Shown(NamedTuple):
    """One update's samples as they are to be scored: ``critic(*real)`` and ``critic(*fake)`` are logits.

    real, fake: D's positional arguments; floating tensors require gradients. critic: D, or what a plugin such as
    ``unrolled`` puts in its place. batch, phase, step: what the plugins are told.
    """

    real: tuple[Tensor, ...]
    fake: tuple[Tensor, ...]
    critic: Critic
    batch: Batch
    phase: str
    step: int


# -- the discriminator as the user calls it ------------------------------------------------------------------------


class LastSigmoid(TorchFunctionMode):
    """Inside ``with``: what the last call of a sigmoid was given and what it returned."""

    given: Any = None
    returned: Any = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call ``func``; take note if it is a sigmoid."""
        output = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in ("sigmoid", "expit", "special_expit") and args:
            self.given, self.returned = args[0], output
        return output


class Scorer:
    """The user's discriminator as a critic, which gives logits.

    With ``probabilities`` the logits are what the sigmoid was given whose result the discriminator returns, exactly; where
    it ends in something else they are log(p / (1 - p)) of its output p, held away from 0 and 1 by the precision of its
    dtype.
    """

    def __init__(self, discriminator: nn.Module, probabilities: bool) -> None:
        self.discriminator, self.probabilities = discriminator, probabilities
        self.exact: bool | None = None  # known after the first call
        self.warned = False

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Logits of the shape that the discriminator returns."""
        if not self.probabilities:
            return self.checked(_one_tensor(self.discriminator(*inputs)))
        with LastSigmoid() as sigmoid:
            p = _one_tensor(self.discriminator(*inputs))
        if self.exact is None:
            self.exact = _same(p, sigmoid.returned)
            if not self.exact and not bool(((p >= 0) & (p <= 1)).all()):
                raise UsageError("the discriminator gives numbers outside 0..1: leave out probabilities=True")
        exact = self.exact and sigmoid.given is not None
        logits: Tensor = sigmoid.given.reshape(p.shape) if exact else torch.logit(p, eps=torch.finfo(p.dtype).eps)
        return logits

    def checked(self, logits: Tensor) -> Tensor:
        """The logits themselves; a warning, or with ``probabilities`` a UsageError, if they come from a sigmoid."""
        if self.warned or not _from_sigmoid(logits):
            return logits
        if self.probabilities:
            raise UsageError("these are probabilities: shown.critic(*shown.real) gives logits, or leave the logits out")
        self.warned = True
        warnings.warn(
            "the discriminator ends in a sigmoid, and regularizers are defined on logits: take it out, or attach with "
            "probabilities=True",
            stacklevel=2,
        )
        return logits


def _one_tensor(output: object) -> Tensor:
    if not isinstance(output, Tensor):
        raise UsageError(
            f"the discriminator must return one tensor of logits, not a {type(output).__name__}: attach a module that does"
        )
    return output


def _same(output: Tensor, other: Tensor | None) -> bool:
    """Whether the output is this tensor, up to its shape and floating type."""
    if other is None or other.numel() != output.numel():
        return False
    return torch.equal(output.detach().flatten(), other.detach().flatten().to(output.dtype))


def _from_sigmoid(tensor: Tensor) -> bool:
    """Whether the last thing that made the tensor, views and copies aside, is a sigmoid."""
    node = tensor.grad_fn
    while node is not None and node.name().startswith(
        ("View", "Reshape", "UnsafeView", "Squeeze", "Unsqueeze", "Select", "Alias", "Clone", "ToCopy")
    ):
        node = node.next_functions[0][0]
    return node is not None and node.name().startswith("Sigmoid")


def bare(module: nn.Module) -> nn.Module:
    """The module inside data-parallel and compiled wrappers, under whose names its own modules are known."""
    while True:
        inner = module.module if isinstance(module, (DataParallel, DistributedDataParallel)) else module
        inner = getattr(inner, "_orig_mod", inner)
        if inner is module:
            return module
        module = inner


def is_shared(module: nn.Module) -> bool:
    """Whether a wrapper is seen that averages the gradients of several processes."""
    return any(isinstance(m, DistributedDataParallel) or "FSDP" in type(m).__name__ for m in module.modules())


class _Around(nn.Module):
    """A critic as a module around the discriminator it calls, so that ``functional_call`` can swap tensors of that."""

    def __init__(self, discriminator: nn.Module, critic: Critic) -> None:
        super().__init__()
        self.discriminator, self.critic = discriminator, (critic,)  # in a tuple: a module there would be a second child

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.critic[0](*inputs)


def held(discriminator: nn.Module, critic: Critic) -> Critic:
    """The critic for a pass that is not the user's: it does not move the discriminator's buffers."""
    buffers = {f"discriminator.{name}": b.clone() for name, b in discriminator.named_buffers()}
    around = _Around(discriminator, critic)

    def score(*inputs: Tensor) -> Tensor:
        logits: Tensor = torch.func.functional_call(around, buffers, inputs)
        return logits

    return score if buffers else critic


@contextmanager
def trainable(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """For one block, these parameters require gradients."""
    frozen = [p for p in parameters if not p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_(True)
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


# -- the GAN that the plugins see ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class OwnLatent(Latent):
    """A prior whose draws have the dtype of the user's z."""

    dtype: torch.dtype = torch.float32

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """(n, \\*shape) on the generator's device."""
        return super().draw(n, generator).to(self.dtype)


class OwnLoop:
    """The core's part of the hooks in somebody's own loop: the samples are those that the loop made."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
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

    @hookimpl(trylast=True)
    def critic(self) -> Critic:
        """The discriminator, in logits."""
        return self.scorer


class Optimizers(dict[str, torch.optim.Optimizer]):
    """The optimisers by phase; a missing one is asked for."""

    def __missing__(self, phase: str) -> torch.optim.Optimizer:
        raise UsageError(
            f'a plugin reads the optimiser of phase {phase!r}: attach(..., optimizers={{"d": ..., "g": ...}})'
        )


@dataclass(eq=False, kw_only=True)
class OwnGAN(GAN):
    """A GAN that leaves alone what is the user's: modes, devices, optimisers; what plugins bring follows the samples."""

    here: OwnLoop
    example: Batch  # zeros like the first batch
    given: Mapping[str, torch.optim.Optimizer] | None
    shared: bool  # whether the user's networks are in a DistributedDataParallel by now, as far as one knows

    def __post_init__(self) -> None:
        self.core, self.here.batch = {"loop": self.here}, self.example
        super().__post_init__()
        self.optimizers = Optimizers(self.given or {})
        self.own = [m for m in (self.generator, self.discriminator, self.encoder) if m is not None]
        self.known = {p for module in self.own for p in module.parameters()}
        self.rebuilt = False  # whether set-up changed the user's networks

    def check_optimizers(self) -> None:
        """Refuse an optimiser that trains nothing of its own player, such as the other one's."""
        players = {"d": [self.discriminator], "g": [m for m in self.own if m is not self.discriminator]}
        for phase, optimizer in self.optimizers.items():
            own = {p for module in players[phase] for p in module.parameters()}
            if own and own.isdisjoint(p for group in optimizer.param_groups for p in group["params"]):
                player = "discriminator" if phase == "d" else "generator"
                self.refuse(
                    "optimizers",
                    f"optimizers[{phase!r}] holds no parameter of the {player} that was attached: give "
                    f'{{"d": the discriminator\'s, "g": the generator\'s}}, made of these very networks',
                )

    def build(self) -> GAN:
        """As for any GAN; then see what set-up changed, and give each rank random numbers of its own."""
        before, optim = self._structure(), dict(self.optim)
        with modes_kept(*self.own):
            super().build()
        self.rebuilt = before != self._structure()
        if self.optim != optim:
            raise UsageError("a plugin sets learning rates, and the optimisers are yours: leave it out, set them there")
        members = team()
        self.rank = members.rank
        if self.rebuilt and self.shared and members.size > 1:
            raise UsageError(
                "a plugin changes a network that is wrapped for several processes already, which would not see it: call "
                "attached.setup(...) first, then wrap it, and say so: attached.discriminator = the wrapped one"
            )
        if self.rank:
            self.rngs.clear()
        return self

    def learn_latent(self, z: Tensor) -> None:
        """Take note of the shape and dtype of z where the batches so far came without."""
        if z.numel() and not self.example.z.numel():
            self.latent = OwnLatent(math.prod(z.shape[1:]), self.latent.kind, tuple(z.shape[1:]), z.dtype)
            self.example = self.here.batch = self.example._replace(z=like(z))

    def refuse(self, name: str, sentence: str) -> None:
        """Raise UsageError with this sentence, unless the user allows what is called ``name``: then warn."""
        if name not in self.allow:
            raise UsageError(f"{sentence} (to go on all the same: attach(..., allow=[{name!r}]))")
        warnings.warn(sentence, stacklevel=2)

    @torch.no_grad()
    def first_view(self) -> View:
        """A view of zeros like the first batch, in evaluation mode; the generator is not called."""
        modules = [player.module for player in self.players.values()]
        with self.streams_kept(), evaluating(*modules):
            batch = self.hook.sample(gan=self, real=self.example.real, z=self.example.z, phase="d", step=0)
            view: View = self.hook.view(gan=self, batch=batch, phase="d", step=0)
        return view

    def make_optimizers(self) -> None:
        """The user's optimisers, to which parameters are added that plugins brought."""
        for phase in PHASES:
            modules = [player.module for player in self.players.values() if player.phase == phase]
            self._parameters[phase] = list(dict.fromkeys(chain.from_iterable(m.parameters() for m in modules)))
            fresh = [p for p in self._parameters[phase] if p not in self.known and p.requires_grad]
            if not fresh:
                continue
            if team().size > 1 and not {p for m in self.own for p in m.parameters()}.issuperset(fresh):
                raise UsageError(
                    "a plugin brings a network, whose gradients nobody averages over the processes: give your own, "
                    "wrapped, as attach(..., encoder=...)"
                )
            self.known.update(fresh)
            if self.given == {}:
                continue
            if phase not in self.optimizers:
                raise UsageError(f"a plugin brings parameters to train: {GIVE_OPTIMIZERS}")
            if any("initial_lr" in group for group in self.optimizers[phase].param_groups):
                raise UsageError(
                    "a plugin brings parameters to train, and a learning-rate scheduler that is made already does not know "
                    "them: call attached.setup(real, fake, z) before you make the scheduler"
                )
            self.optimizers[phase].add_param_group({"params": fresh})

    def _add(self, name: str, module: nn.Module, phase: str) -> None:
        if not any(module is m for m in self.own):
            module = module.to(self.device, self.example.real.dtype)
        self.players[name] = Player(module, phase)
        setattr(self, name, module)

    def _try_discriminator(self) -> None:
        """The user's own; it is not tried."""

    def _structure(self) -> list[object]:
        modules = [(name, type(m)) for network in self.own for name, m in network.named_modules()]
        return [*modules, *(id(p) for network in self.own for p in network.parameters())]


def like(tensor: Tensor) -> Tensor:
    """Zeros of the same shape, dtype and device, which take no memory."""
    return tensor.new_zeros(()).expand(tensor.shape)


GIVE_OPTIMIZERS = (
    'attach(..., optimizers={"d": ..., "g": ...}), or optimizers={} if you train attached.parameters(phase) and call '
    "attached.stepped(phase) yourself"
)


# -- the bundle ----------------------------------------------------------------------------------------------------

PATIENCE = 100  # batches without a step of the optimiser after which one asks whether the weights have moved

_hooked: WeakSet[Attached] = WeakSet()  # those that are told of optimisers' steps


class Attached:
    """Plugins on somebody's own generator and discriminator; made by :func:`attach`.

    gan: what the plugins are told, a :class:`gankit.GAN`; None before set-up. terms: what each plugin added to the last
    losses of phase "d" and of phase "g", by name, detached, for logging.

    Plugins count steps. With the optimisers given, a step begins with the first batch of D after an update of G (of D, if
    only that one is given), so that micro-batches of one update share it. Else it begins with the first batch of D after one
    of G. Where only one player's batches are shown here, it begins with every batch, or after every update.
    """

    def __init__(
        self,
        make: Callable[[Batch, bool], OwnGAN],
        scorer: Scorer,
        loss: losses.Loss,
        optimizers: Mapping[str, torch.optim.Optimizer] | None,
        plugins: Mapping[str, object],
    ) -> None:
        self._make, self._scorer, self._loss = make, scorer, loss
        self._optimizers, self._plugins = optimizers, plugins
        self.gan: OwnGAN | None = None
        self.terms: dict[str, Terms] = {phase: {} for phase in PHASES}
        self._pending: Mapping[str, Any] = {}
        self._count: dict[str, Any] = {"last": "", "shown": [], "counted": sorted(optimizers or ()), "moved": []}
        self._in_training: list[nn.Parameter] = []  # of D, as its last own update had them
        self._told = False
        self._handles: list[RemovableHandle] = []  # of the hooks on the optimisers
        self._unseen = dict.fromkeys(PHASES, 0)  # batches since a step of the phase's optimiser was seen
        self._marks: dict[str, list[Tensor]] = {}  # values of weights as they were half PATIENCE ago
        self._awaited: set[str] = set()  # phases whose steps the plugins need
        self._fitted = False  # D, by what plugins do with the first batch
        self._tried: set[str] = set()  # terms that were seen to have a second derivative through a compiled D

    @property
    def discriminator(self) -> nn.Module:
        """D as it is called; set it when you have wrapped or compiled D after set-up. UsageError for another network."""
        return self._scorer.discriminator

    @discriminator.setter
    def discriminator(self, discriminator: nn.Module) -> None:
        if bare(self._scorer.discriminator) not in discriminator.modules():
            raise UsageError("this is no wrapper around the discriminator that was attached")
        self._scorer.discriminator = discriminator

    # -- the loop's side -----------------------------------------------------------------------------------------

    def setup(self, real: Side, fake: Side, z: Tensor | None = None) -> None:
        """Set the plugins up now, on samples of the shapes to come; else the first batch does it.

        Needed for plugins that change a network or bring one (``spectral_norm``, ``bigan``), before you load weights and
        optimisers, wrap a network in DistributedDataParallel, compile it, or make a learning-rate scheduler. Only shapes,
        dtypes and the device are looked at. A second call does nothing.
        """
        self._set_up(_batch(real, fake, z, "d"), explicit=True)

    def show(self, real: Side, fake: Side, z: Tensor | None = None, *, phase: str = "d") -> Shown:
        """What is to be scored in this update: ``shown.critic(*shown.real)`` and ``shown.critic(*shown.fake)``.

        real, fake: the samples (B, \\*shape), or a tuple of them and D's further arguments, such as labels. z: what ``fake``
            was made from, (B, \\*z_shape), for plugins that look at latents. phase: whose update it is; in "d" a graph to
            the generator is cut.
        """
        if phase not in PHASES:
            raise UsageError(f'a phase is "d" or "g", not {phase!r}')
        batch = _batch(real, fake, z, phase)
        gan = self._set_up(batch)
        gan.learn_latent(batch.z)
        self._count_step(gan, phase)
        self._await_step(gan, phase)
        gan.here.batch = batch
        with advised(batch):
            with torch.set_grad_enabled(phase == "g"):
                batch = gan.hook.sample(gan=gan, real=batch.real, z=batch.z, phase=phase, step=gan.step)
                gan.here.batch = gan.example  # let go of this one
                view = watched(gan.hook.view(gan=gan, batch=batch, phase=phase, step=gan.step))
            scene: dict[str, Any] = {"batch": batch, "view": view, "step": gan.step}
            if phase == "g" and not self._in_training:
                self._refuse_looking_ahead(gan)
            if phase == "d":
                self._in_training = [p for p in gan.parameters("d") if p.requires_grad]
            with trainable(self._in_training):  # D may be frozen now, and unrolling goes on training it
                critic: Critic = gan.hook.critic(
                    gan=gan, phase=phase, d_objective=lambda c: loop.d_objective(gan, c, **scene), **scene
                )
            if not self._fitted:
                self._share_fit(gan)
        return Shown(*view, critic, batch, phase, gan.step)

    def _share_fit(self, gan: OwnGAN) -> None:
        """What plugins fitted in D to the first batch, each process to its own rows, is as in process 0 from here on."""
        self._fitted = True
        fits = any(hook.plugin in gan.plugins.values() for hook in gan.hook.critic.get_hookimpls())
        if fits and self._averaged():
            d = bare(self.discriminator)
            team().share((*d.parameters(), *d.buffers()))

    def _averaged(self) -> bool:
        """Whether DistributedDataParallel averages D's gradients over several processes."""
        return team().size > 1 and any(isinstance(m, DistributedDataParallel) for m in self.discriminator.modules())

    def d_terms(
        self,
        real: Side | Shown,
        fake: Side | None = None,
        z: Tensor | None = None,
        *,
        real_logits: Tensor | None = None,
        fake_logits: Tensor | None = None,
    ) -> Tensor:
        """The sum of what the plugins add to D's loss, 0-dim: ``d_loss = d_loss + attached.d_terms(real, fake)``.

        real, fake, z: as in :meth:`show`, for plugins that do nothing but add terms; or what ``show`` returned. real_logits,
            fake_logits: of what was shown, where you have them; else D is called where a plugin asks for logits. No call of
            D for plugins moves its buffers.
        """
        return self._sum("d", real, fake, z, {"real_logits": real_logits, "fake_logits": fake_logits})

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
        """The sum of what the plugins add to G's loss, 0-dim; arguments as in :meth:`d_terms`, ``fake`` with its graph.

        g_loss: the adversarial part, for plugins that ask for it.
        """
        known = {"real_logits": real_logits, "fake_logits": fake_logits, "g_loss": g_loss}
        return self._sum("g", real, fake, z, known)

    def d_loss(self, real: Side | Shown, fake: Side | None = None, z: Tensor | None = None) -> Tensor:
        """D's whole loss, 0-dim: the adversarial one that ``attach`` was given, as plugins set it up, and all terms."""
        return self._whole("d", real, fake, z)

    def g_loss(self, real: Side | Shown, fake: Side | None = None, z: Tensor | None = None) -> Tensor:
        """The whole loss of G (and an encoder), 0-dim, ``fake`` with its graph; else as :meth:`d_loss`."""
        return self._whole("g", real, fake, z)

    @property
    def loss(self) -> losses.Loss:
        """The adversarial loss, after set-up as plugins made it: ``loss.d(real_logits, fake_logits)``."""
        return self._loss if self.gan is None else self.gan.loss

    def stepped(self, phase: str) -> None:
        """Tell the plugins that an optimiser made its step; done for you for those given to ``attach``."""
        self._count["moved"] = sorted({*self._count["moved"], phase})
        self._count["counted"] = sorted({*self._count["counted"], phase})
        self._unseen[phase] = 0
        if self.gan is not None:
            self.gan.hook.post_step(gan=self.gan, terms=dict(self.terms[phase]), phase=phase, step=self.gan.step)

    def detach(self) -> None:
        """Take the hooks off the optimisers: these plugins act after their steps no more, unless you call ``stepped``.

        For attaching anew to optimisers that stay. What plugins changed in networks, and parameters that they added to
        optimisers, stay as well. A second call does nothing.
        """
        for handle in self._handles:
            handle.remove()
        self._handles = []
        _hooked.discard(self)

    def parameters(self, phase: str) -> list[nn.Parameter]:
        """The parameters of phase "d" or "g", those of networks that plugins brought among them."""
        if self.gan is None:
            raise UsageError("parameters are known after set-up: call attached.setup(real, fake, z) first")
        return self.gan.parameters(phase)

    # -- state ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Step, random streams, the plugins' states, and the weights of networks that plugins brought.

        Tensors and plain containers. It is this process's own: in a process group each rank has its random streams.
        """
        gan = self.gan
        if gan is None:
            return dict(self._pending)
        stateful = {name: plugin for name, plugin in gan.plugins.items() if hasattr(plugin, "state_dict")}
        return copy.deepcopy(
            {
                "step": gan.step,
                "count": self._count,
                "rngs": {name: rng.get_state() for name, rng in gan.rngs.items()},
                "plugins": {name: plugin.state_dict() for name, plugin in stateful.items()},
                "players": {name: module.state_dict() for name, module in self._brought(gan).items()},
            }
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo :meth:`state_dict`, with the same plugins; before set-up, the state waits for it."""
        gan = self.gan
        if gan is None:
            self._pending = copy.deepcopy(dict(state))
            return
        if not state:
            return
        known = {
            "plugins": {name for name, plugin in gan.plugins.items() if hasattr(plugin, "state_dict")},
            "players": set(self._brought(gan)),
        }
        for what, names in known.items():
            if state[what].keys() != names:
                raise UsageError(f"the state is of other {what}, {sorted(state[what])}, not of {sorted(names)}")
        state = copy.deepcopy(dict(state))
        counted = sorted({*self._count["counted"], *state["count"]["counted"]})
        gan.step, self._count = state["step"], {**state["count"], "counted": counted}
        for name, value in state["rngs"].items():
            gan.stream(name).set_state(value.cpu())  # where loading may have mapped it elsewhere
        for name, value in state["plugins"].items():
            plugin: Any = gan.plugins[name]
            plugin.load_state_dict(value)
        for name, module in self._brought(gan).items():
            module.load_state_dict(state["players"][name])

    # -- inside --------------------------------------------------------------------------------------------------

    def _brought(self, gan: OwnGAN) -> dict[str, nn.Module]:
        """Networks that plugins brought, by name."""
        own = {id(module) for module in gan.own}
        return {name: player.module for name, player in gan.players.items() if id(player.module) not in own}

    def _acting(self, gan: OwnGAN, *hooks: str) -> list[str]:
        """Plugins that implement any of these hooks, in their order."""
        found = {impl.plugin_name for hook in hooks for impl in getattr(gan.hook, hook).get_hookimpls()}
        return [name for name in self._plugins if name in found]

    def _set_up(self, batch: Batch, *, explicit: bool = False) -> OwnGAN:
        if self.gan is not None:
            return self.gan
        gan = self._make(batch, explicit)
        acting = self._acting(gan, "post_step")
        if acting and self._optimizers != {} and set(PHASES) - gan.optimizers.keys():
            raise UsageError(f"{acting[0]} acts after the optimisers' steps: {GIVE_OPTIMIZERS}")
        gan.check_optimizers()
        with advised(batch):
            gan.build()
        self._hook(gan.optimizers)
        self._awaited = set(gan.optimizers or (PHASES if acting else ()))
        self.gan = gan
        self._in_training = [p for p in gan.parameters("d") if p.requires_grad]
        self.load_state_dict(self._pending)
        return gan

    def _hook(self, optimizers: Mapping[str, torch.optim.Optimizer]) -> None:
        """Be told of the optimisers' steps; warn of plugins of an earlier one that go on acting after them."""
        mine = bare(self.discriminator)  # another one is of another pair of networks, whose plugins are to act
        acting = [
            name
            for other in _hooked
            if other.gan and bare(other.discriminator) is mine
            if not set(other.gan.optimizers.values()).isdisjoint(optimizers.values())
            for name in other._acting(other.gan, "post_step")
        ]
        if acting:
            warnings.warn(
                f"{' and '.join(acting)} of an earlier gankit.attach still acts after the steps of these optimisers: call "
                "its attached.detach() before you attach anew, or make new optimisers",
                stacklevel=4,
            )
        for phase, optimizer in optimizers.items():
            self._handles.append(optimizer.register_step_post_hook(partial(self._optimizer_stepped, phase)))
            _hooked.add(self)

    def _optimizer_stepped(self, phase: str, optimizer: torch.optim.Optimizer, *_: object) -> None:
        # a GradScaler calls a fused optimiser also where it is to skip the update
        if not getattr(optimizer, "found_inf", None):
            self.stepped(phase)

    def _await_step(self, gan: OwnGAN, phase: str) -> None:
        """Warn, once, if a player's weights move and nobody tells of its optimiser's steps."""
        self._unseen[phase] += 1
        if phase not in self._awaited or self._unseen[phase] % (PATIENCE // 2):
            return
        # one value of each parameter; in an update that many batches accumulate to, they have not moved
        marks = [p.detach()[(slice(1),) * p.dim()].clone() for p in gan.parameters(phase)]
        if self._unseen[phase] == PATIENCE // 2:
            self._marks[phase] = marks
        elif not all(map(torch.equal, marks, self._marks[phase])):
            self._awaited = set()
            warnings.warn(
                f"{self._unseen[phase]} batches of phase {phase!r} were shown, the weights move, and no step of their "
                "optimiser was seen, so that steps are not counted and plugins do not act after them: give attach the "
                f"optimisers that are in use, or call attached.stepped({phase!r}) after each of their steps",
                stacklevel=6,
            )

    def _refuse_looking_ahead(self, gan: OwnGAN) -> None:
        """Refuse plugins that train the discriminator on, for all of it is frozen."""
        for impl in gan.hook.critic.get_hookimpls():
            if "d_objective" in impl.argnames:
                raise UsageError(
                    f"{impl.plugin_name} looks ahead at the discriminator's training, and all of it is frozen: freeze it "
                    "(requires_grad_(False)) after attached.setup(real, fake, z), or after its first update"
                )

    def _count_step(self, gan: OwnGAN, phase: str) -> None:
        """Begin a step, or go on with the running one; see the class."""
        count = self._count
        if count["counted"]:
            moved = ("g" if "g" in count["counted"] else "d") in count["moved"]
            begins = moved and (phase == "d" or "d" not in count["shown"])  # updates of G share the step of D's before
        elif phase == "d":
            begins = count["last"] == "g" or "g" not in count["shown"]
        else:
            begins = "d" not in count["shown"]
        if begins or not gan.step:
            gan.step += 1
            count["moved"] = []
        count["last"], count["shown"] = phase, sorted({*count["shown"], phase})

    def _sum(
        self, phase: str, real: Side | Shown, fake: Side | None, z: Tensor | None, known: dict[str, Tensor | None]
    ) -> Tensor:
        fresh = self.gan is None
        shown = self._shown(phase, real, fake, z)
        gan = self._set_up(shown.batch)
        if not isinstance(real, Shown):
            self._refuse_terms_alone(gan, phase, fresh, known)
        hook = gan.hook.pre_d_loss if phase == "d" else gan.hook.post_g_loss
        wanted = {argument for impl in hook.get_hookimpls() for argument in impl.argnames}
        sides = {"real_logits": shown.real, "fake_logits": shown.fake}
        scored = sides if phase == "d" else gan.loss.g_sides
        missing = [name for name in scored if name in wanted and known[name] is None]
        for logits in (known["real_logits"], known["fake_logits"]):
            if logits is not None:
                self._scorer.checked(logits)
        critic = held(gan.discriminator, shown.critic) if missing or "critic" in wanted else shown.critic
        known |= {name: critic(*sides[name]) for name in missing}
        if phase == "g" and "g_loss" in wanted and known["g_loss"] is None:
            raise UsageError("a plugin asks for the adversarial part of G's loss: g_terms(..., g_loss=...)")
        scene = {"batch": shown.batch, "view": View(shown.real, shown.fake), "step": shown.step}
        scene |= {"ahead": False} if phase == "d" else {}
        with advised(shown.batch):
            added = hook(gan=gan, critic=critic, **scene, **known)
        return self._kept(dict(chain.from_iterable(map(dict.items, added))), phase, shown)

    def _whole(self, phase: str, real: Side | Shown, fake: Side | None, z: Tensor | None) -> Tensor:
        shown = self._shown(phase, real, fake, z)
        if team().size > 1 and not self._told and not is_shared(self._scorer.discriminator):
            self._told = True
            warnings.warn(
                "the discriminator that was attached is not wrapped for several processes, so the gradients of this loss "
                "are averaged only if the whole loop runs inside a wrapped module: attached.discriminator = the wrapped one",
                stacklevel=3,
            )
        view = View(shown.real, shown.fake)
        with advised(shown.batch):
            terms = loop.TERMS[phase](self._set_up(shown.batch), shown.critic, shown.batch, view, shown.step)
        return self._kept(terms, phase, shown)

    def _shown(self, phase: str, real: Side | Shown, fake: Side | None, z: Tensor | None) -> Shown:
        if not isinstance(real, Shown):
            if fake is None:
                raise UsageError("give real and fake samples, or what show returned")
            return self.show(real, fake, z, phase=phase)
        if real.phase != phase:
            raise UsageError(f'this was shown for phase {real.phase!r}: show(..., phase="{phase}")')
        return real

    def _refuse_terms_alone(self, gan: OwnGAN, phase: str, fresh: bool, known: Mapping[str, Tensor | None]) -> None:
        """Refuse what cannot be right beside an adversarial loss of D(real) and D(fake), which nobody showed us."""
        mine, given = gan.loss, self._loss
        changed = mine.d is not given.d if phase == "d" else (mine.g, mine.g_sides) != (given.g, given.g_sides)
        instead = (
            f"use attached.{phase}_loss(real, fake, z), which is the whole loss; or score shown = attached.show(real, fake, "
            f'z, phase="{phase}") by shown.critic and attached.loss, and add attached.{phase}_terms(shown)'
        )
        acting = self._acting(gan, "sample", "view", "critic")
        if acting:
            raise UsageError(f"{acting[0]} acts on what is scored, or on who scores it: {instead}")
        if changed:
            raise UsageError(f"a plugin changes the adversarial loss: {instead}")
        if fresh and gan.rebuilt:
            raise UsageError(
                "a plugin changes a network, which may be in use: call attached.setup(real, fake, z) before"
            )
        if known["real_logits"] is not None or known["fake_logits"] is not None:
            raise UsageError(f"logits must be of what was shown: {instead}")

    def _kept(self, terms: Terms, phase: str, shown: Shown) -> Tensor:
        self.terms[phase] = {name: term.detach() for name, term in terms.items()}
        self._try_twice(terms, phase)
        if not terms:
            return shown.batch.real.new_zeros(
                (), requires_grad=True
            )  # one may call backward on it, as on any other term
        loss = total(terms)
        if self._averaged():
            # pytorch#47562: it averages nothing until every parameter has a gradient, and a last bias has none in a penalty
            parts = [p.flatten()[0] for p in self.parameters(phase) if p.requires_grad]
            loss = loss + 0 * torch.stack(parts).sum()
        return loss

    def _try_twice(self, terms: Terms, phase: str) -> None:
        """Refuse a compiled discriminator under a second derivative, which torch.compile does not have."""
        assert self.gan is not None
        new = {name: term for name, term in terms.items() if name not in self._tried}
        self._tried |= new.keys()
        compiled = (
            hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None
            for m in self.discriminator.modules()
        )
        if not new or not any(compiled):
            return
        parameters = [p for p in self.gan.parameters(phase) if p.requires_grad]
        try:
            torch.autograd.grad(total(new), parameters, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            if "double backward" not in str(error):
                raise
            raise UsageError(
                f"{' and '.join(new)}: torch.compile cannot differentiate a discriminator twice, which a gradient penalty "
                "and unrolling need: compile the generator alone, or attach to the discriminator that is not compiled"
            ) from error


# an empty tensor's shape, as z has one where none was given: 6x0, [6, 0], (0,)
NOTHING = re.compile(r"\d+x0\b|[(\[](\d+, )*0,?[)\]]|size 0\b")


@contextmanager
def advised(batch: Batch) -> Iterator[None]:
    """Say in errors of plugins what may be behind them: that there was no z, or a framework's wrapper."""
    try:
        yield
    except Exception as error:
        if not batch.z.numel() and NOTHING.search(str(error)):
            error.add_note(
                "(no z was given; where a plugin needs it: attached.show(real, fake, z), and so for terms and losses)"
            )
        if isinstance(error, TypeError) and "forward() missing" in str(error):
            error.add_note(
                "(plugins call a generator with z alone; where yours takes more, such as labels, use the plugin's function "
                "on samples that you make)"
            )
        if "fabric.backward" in str(error):
            error.add_note(
                "Fabric's wrapper forbids derivatives inside the loss under mixed precision: attach the network in it, "
                "attach(G, D.module, ...), and take the terms within fabric.autocast()"
            )
        raise


def attach(
    generator: nn.Module,
    discriminator: nn.Module,
    plugins: Iterable[PluginSpec],
    *,
    encoder: nn.Module | None = None,
    optimizers: Mapping[str, torch.optim.Optimizer] | None = None,
    loss: str | losses.Loss = "non_saturating",
    latent: str = "normal",
    probabilities: bool = False,
    seed: int = 0,
    steps: int | None = None,
    architecture: Mapping[str, Any] | None = None,
    allow: Iterable[str] = (),
) -> Attached:
    """Switch plugins on in a training loop of your own.

    generator, discriminator: your modules as you call them, wrapped or not. D gives logits, larger = more real, of shape
        (B,), (B, 1), (B, 1, 1, 1) or a map (B, 1, h, w).
    plugins: names, names with options, or objects: ``["r1", ("packing", {"m": 4}), GradientPenalty(weight=5)]``.
    encoder: yours, from samples to latents, for plugins that need one; without it they bring their own.
    optimizers: ``{"d": ..., "g": ...}``, for plugins that act after a step, continue an optimiser's own steps
        (``unrolled``) or bring networks; new parameters are added to them as a group.
    loss: the adversarial loss, by name or as a value: that of :meth:`Attached.d_loss` and :meth:`Attached.g_loss`, of
        plugins that unroll D's update, and of refusals.
    latent: what z is drawn from, "normal" or "uniform" on (-1, 1), for plugins that draw more, or bring an encoder.
    probabilities: D ends in a sigmoid; plugins then get the logits before it.
    seed: of the plugins' random numbers and networks. Each rank of a process group has random numbers of its own.
    steps: how many there will be, for plugins whose weight falls over the training (r1's ``decay_to``).
    architecture: ``network``, ``width``, ``depth`` of networks that plugins bring. allow: refusals that are to be warnings.

    Raises UsageError, here or at set-up, with one sentence for what cannot work.
    """
    found = resolved(plugins)
    chosen = losses.make(loss) if isinstance(loss, str) else loss
    given = None if optimizers is None else {phase: innermost(o) for phase, o in optimizers.items()}
    for phase in given or ():
        if phase not in PHASES:
            raise UsageError(f'optimizers are given as {{"d": ..., "g": ...}}, not {phase!r}')
    scorer = Scorer(discriminator, probabilities)

    def make(batch: Batch, explicit: bool) -> OwnGAN:
        real, fake, z = map(like, batch[:3])
        z_shape = tuple(z.shape[1:])
        gan = OwnGAN(
            generator=bare(generator),
            discriminator=bare(discriminator),
            encoder=encoder,
            shape=tuple(real.shape[1:]),
            latent=OwnLatent(max(1, math.prod(z_shape)), latent, z_shape, z.dtype),
            loss=chosen,
            plugins=found,
            seed=seed,
            device=real.device,
            batch_size=len(real),
            architecture=dict(architecture or {}),
            allow=frozenset(allow),
            here=OwnLoop(scorer),
            example=Batch(real, fake, z, {name: like(t) for name, t in batch.extra.items()}),
            given=given,
            shared=not explicit or is_shared(generator) or is_shared(discriminator),
        )
        gan.steps = steps
        return gan

    return Attached(make, scorer, chosen, given, found)


def resolved(plugins: Iterable[PluginSpec]) -> dict[str, object]:
    """Plugins by name, from names, (name, options) and objects."""
    if isinstance(plugins, str):
        raise UsageError(f"plugins are a list: [{plugins!r}]")
    found: dict[str, object] = {}
    for spec in plugins:
        if isinstance(spec, str):
            made = create([spec], {})[0]
        elif isinstance(spec, type):
            raise UsageError(f"{spec.__name__} is a class: give an object, {spec.__name__}()")
        elif isinstance(spec, tuple):
            if len(spec) != 2:
                raise UsageError(f'a plugin with options is (name, {{"option": value}}), not {spec!r}')
            name, options = spec
            made = create([name], {name: options})[0]
        else:
            made = {snake_case(type(spec).__name__): spec}
        for name, plugin in made.items():
            if name in found:
                raise UsageError(f"plugin {name!r} is given twice")
            found[name] = plugin
    return found


def innermost(optimizer: Any) -> torch.optim.Optimizer:
    """The optimiser inside the wrappers of Lightning, Fabric and Accelerate, which makes the steps."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UsageError(f"an optimiser is a torch.optim.Optimizer, not a {type(optimizer).__name__}")
    return optimizer


def _batch(real: Side, fake: Side, z: Tensor | None, phase: str) -> Batch:
    """The loop's samples as a batch; D's further arguments lie in ``extra``."""
    sides = {
        name: (side,) if isinstance(side, Tensor) else tuple(side) for name, side in (("real", real), ("fake", fake))
    }
    shapes = {name: [tuple(t.shape) for t in side] for name, side in sides.items()}
    if shapes["real"] != shapes["fake"] or (z is not None and len(z) != len(sides["real"][0])):
        z_shape = "" if z is None else f", z {tuple(z.shape)}"
        raise UsageError(f"both sides need the same shapes: real {shapes['real']}, fake {shapes['fake']}{z_shape}")
    if phase == "d":
        sides = {name: tuple(t.detach() for t in side) for name, side in sides.items()}
    # under autocast G gives half precision, and points between the sides need one dtype
    sides["fake"] = tuple(f.to(r.dtype) for r, f in zip(sides["real"], sides["fake"], strict=True))
    extra = {f"argument/{name}/{i}": t for name, side in sides.items() for i, t in enumerate(side[1:])}
    x = sides["real"][0]
    return Batch(x, sides["fake"][0], x.new_zeros(len(x), 0) if z is None else z, extra)
