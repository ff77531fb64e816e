"""The GAN as the hooks see it: networks, latent, loss, optimisers, random streams, and all of its state."""

from __future__ import annotations

import hashlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy
import torch
from torch import Tensor, nn

from gankit import losses, networks
from gankit.contract import PHASES, Player, View
from gankit.defaults import CoreHooks
from gankit.distributed import Team
from gankit.errors import UsageError
from gankit.plugins import manager
from gankit.structure import evaluating

if TYPE_CHECKING:
    from gankit.data import Dataset


@dataclass(frozen=True)
class Latent:
    """The prior of z: ``dim`` independent coordinates, standard normal or uniform on (-1, 1).

    shape: of one z; by default (dim,). DCGAN's own code, for one, has (dim, 1, 1).
    """

    dim: int
    kind: str = "normal"
    shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("normal", "uniform") or self.dim < 1:
            raise UsageError(f"a latent is 'normal' or 'uniform' with at least one dimension, not {self}")

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """(n, \\*shape) float32 on the generator's device."""
        z = torch.empty(n, *(self.shape or (self.dim,)), device=generator.device)
        return z.normal_(generator=generator) if self.kind == "normal" else z.uniform_(-1, 1, generator=generator)


@dataclass
class Optim:
    """Adam's settings for the players of one phase; ``lr`` is the rate before any decay."""

    lr: float = 2e-4
    betas: tuple[float, float] = (0.5, 0.999)
    eps: float = 1e-8


def derive_seed(seed: int, *names: str) -> int:
    """A 63-bit seed for the stream called ``names`` of a run with this seed; unrelated names, unrelated streams."""
    digest = hashlib.sha256("/".join((str(seed), *names)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@contextmanager
def seeded(seed: int, *names: str) -> Iterator[None]:
    """Seed torch's global generators for one block, and give them back as they were.

    Modules initialise themselves from the global generator; this is the one place where it is used.
    """
    cuda = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices=cuda):
        seed_global(derive_seed(seed, *names))
        yield


def seed_global(seed: int) -> None:
    """``torch.manual_seed``, which without an accelerator would keep a stack trace of each call, for one that may come."""
    (torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed)(seed)


@contextmanager
def threads(n: int) -> Iterator[None]:
    """CPU threads for the block; one is fastest for small networks, and fixes the order of sums, and so the last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def call_with_accepted(factory: Callable[..., Any], **known: Any) -> Any:
    """Call ``factory`` with those of the ``known`` arguments that its signature names (all, if it takes ``**kwargs``).

    UsageError if it cannot do without another one.
    """
    parameters = inspect.signature(factory).parameters.values()
    for p in parameters:
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in known:
            name = getattr(factory, "__name__", repr(factory))
            raise UsageError(f"{name} asks for {p.name!r}; what it can be given, by name, is {', '.join(known)}")
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        known = {p.name: known[p.name] for p in parameters if p.name in known}
    return factory(**known)


def need_module(name: str, factory: object, made: Any) -> nn.Module:
    """What a factory made, if it is a module; else UsageError. name: of the network. factory: as it was given."""
    if not isinstance(made, nn.Module):
        raise UsageError(f"the {name} factory {factory!r} returned a {type(made).__name__}, not a torch Module")
    return made


Network = nn.Module | Callable[..., nn.Module]


@dataclass(eq=False)
class GAN:
    """Two networks, what they are trained on, and the hooks that act on them.

    generator: a module (B, z_dim) -> (B, \\*shape), or a factory of one that asks by name for any of ``shape``,
        ``z_dim``, ``latent``, ``width``, ``depth``.
    discriminator: a module from the view's tensors to logits, or a factory of one that asks by name for any of
        ``shapes`` (of the tensors it is shown, without the batch dimension), ``shape``, ``z_dim``, ``width``,
        ``depth``. A factory is called when the view is known, so that packing and joint views fit. None, for either: a
        plugin's, or the shipped one.
    shape: of one sample, (D,) or (C, H, W).
    plugins: objects with hook implementations, by name, in the order in which they are to act.
    architecture: ``network``, ``width`` and ``depth`` of the shipped networks, and of those that plugins bring;
        factories that ask for width or depth are given them, where they are set and no `functools.partial` has bound them.
    encoder: from samples to latents, for plugins that need one; without it they make their own.
    allow: names of refusals that are to be warnings.
    core: the same for behaviour of the core or of the caller; it acts after the plugins.

    ``build`` completes it. ``state_dict`` holds everything that moves, in tensors and plain containers.

    A plugin may also read ``players`` (by name, with their module and phase), ``averages`` (averaged copies of players),
    ``step``, ``steps`` (of the whole run; None where nobody has said), ``data`` (the data set) and ``folder`` (of the run),
    both None in a loop that has none; set ``stop``; and call ``progress(done, total, what)`` where something takes time.
    """

    generator: Any
    discriminator: Any
    shape: tuple[int, ...]
    latent: Latent
    loss: losses.Loss = field(default_factory=lambda: losses.make("non_saturating"))
    plugins: Mapping[str, object] = field(default_factory=dict)
    core: Mapping[str, object] = field(default_factory=dict)
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    optim: dict[str, Optim] = field(default_factory=lambda: {phase: Optim() for phase in PHASES})
    batch_size: int = 64
    d_steps: int = 1
    simultaneous: bool = False
    architecture: Mapping[str, Any] = field(default_factory=dict)
    encoder: nn.Module | None = None
    allow: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        self.team = Team()  # the processes that train together, set by whoever trains
        self.rank = 0  # of this one among them, once set-up is over: from then on its random numbers are its own
        self.step = 0  # finished or running steps, from 1
        self.steps: int | None = None  # of the whole run, for what follows a schedule; None where nobody has said
        self.stop = False  # set by anyone: the loop ends after the running step
        self.players: dict[str, Player] = {}
        self.averages: dict[str, nn.Module] = {}  # averaged copies of players, by player
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.next_real: Callable[[], Tensor]  # the data stream, set by whoever trains
        self.data: Dataset | None = None  # the data set, for metrics; set by whoever evaluates
        self.folder: Path | None = None  # of the run, for plugins that write files; set by whoever records it
        self.progress: Callable[[int, int, str], None] = lambda done, total, what: None  # for what takes time
        self.provenance: dict[str, dict[str, Any]] = {}  # of metrics, by the name `provenance.column` gives
        self.manager = manager(self.plugins, {"core": CoreHooks(), **self.core})
        self.hook: pluggy.HookRelay = self.manager.hook
        self.rngs: dict[str, torch.Generator] = {}
        self._parameters: dict[str, list[nn.Parameter]] = {}

    def decayed(self, to: float, step: int) -> float:
        """What is left in ``step`` of a quantity that falls by the same factor every step, to the share ``to`` at the end.

        to ** (step / steps): 1 before the first step and ``to`` in the last. For weights that fall along with the rates.
        `UsageError` if nobody has said how many steps there will be, unless ``to`` is 1.
        """
        if to == 1:
            return 1.0
        if self.steps is None:
            raise UsageError(
                "a weight that falls needs to know how many steps there will be: gankit.attach(..., steps=10_000)"
            )
        return float(to ** min(1.0, step / self.steps))

    @property
    def rounds(self) -> tuple[str, ...]:
        """The phases of a step: "d" ``d_steps`` times, then "g"; with ``simultaneous`` the last two at once, as "dg"."""
        return (self.d_steps - 1) * ("d",) + (("dg",) if self.simultaneous else ("d", "g"))

    # -- random streams ------------------------------------------------------------------------------------------

    def stream(self, name: str) -> torch.Generator:
        """The random stream called ``name``, on the GAN's device; made on first use from the seed and the name.

        During set-up it is the same in all processes of a team, then each one's own, except that of the latents.
        """
        if name not in self.rngs:
            own = ("rank", str(self.rank)) if self.rank and name != "latent" else ()
            self.rngs[name] = torch.Generator(self.device).manual_seed(derive_seed(self.seed, *own, name))
        return self.rngs[name]

    @contextmanager
    def streams_kept(self) -> Iterator[None]:
        """After the block, all random streams are where they were, and those that began in it have not."""
        before = {name: rng.get_state() for name, rng in self.rngs.items()}
        yield
        self.rngs = {name: self.rngs[name] for name in before}
        for name, state in before.items():
            self.rngs[name].set_state(state)

    def rng(self, plugin: object) -> torch.Generator:
        """The random stream of a registered plugin: its draws shift neither the data nor any other plugin's."""
        name = self.manager.get_name(plugin)
        if name is None:
            raise LookupError(f"{plugin!r} is not one of this GAN's plugins")
        return self.stream(f"plugin:{name}")

    def initialising(self, plugin: object) -> AbstractContextManager[None]:
        """A block in which torch's global random generator, from which modules initialise themselves, is seeded for
        this plugin alone: for new layers in ``setup``."""
        return seeded(self.seed, "initialising", str(self.manager.get_name(plugin)))

    def next_z(self, n: int | None = None) -> Tensor:
        """The next (n, z_dim) draw of the training latents; n defaults to this process's share of the batch size."""
        joined = n * self.team.size if n else self.batch_size
        return self.team.rows(self.latent.draw(joined, self.stream("latent")))

    def refuse(self, name: str, sentence: str) -> None:
        """Raise UsageError with this sentence, unless the user allows what is called ``name``: then warn.

        For ``setup``: what is known not to work, or not to mean what its author thinks.
        """
        if name not in self.allow:
            raise UsageError(f"{sentence} (to go on all the same: --allow {name})")
        warnings.warn(sentence, stacklevel=2)

    # -- building ------------------------------------------------------------------------------------------------

    def build(self) -> GAN:
        """Build networks, collect players, fit the discriminator to the view, run ``setup``, make the optimisers."""
        known = {"shape": self.shape, "z_dim": self.latent.dim, "latent": self.latent.kind}
        found = self._collect_players()
        generator, discriminator = (found.pop(name) for name in ("generator", "discriminator"))
        for name, player in {"generator": generator, **found}.items():
            self._add(name, self._make(name, player.module, **known), player.phase)
        with seeded(self.seed, "lazy"):  # a player's lazy layers begin here
            shapes = tuple(t.shape[1:] for t in self.first_view().real)
        self._add("discriminator", self._make("discriminator", discriminator.module, shapes=shapes, **known), "d")
        self._try_discriminator()
        self.hook.setup(gan=self)
        self.make_optimizers()
        self.rank = self.team.rank
        if self.rank:
            self.rngs = {name: rng for name, rng in self.rngs.items() if name == "latent"}
        return self

    def _collect_players(self) -> dict[str, Player]:
        """Everybody who plays, by name, as module or factory: what plugins bring, and the GAN's own G and D."""
        found: dict[str, Player] = {}
        registered = self.manager.get_plugins()
        for plugin in (*self.plugins.values(), *self.core.values()):
            # one by one, so that no network's start depends on another plugin
            with seeded(self.seed, "players"):
                brought = self.manager.subset_hook_caller("players", registered - {plugin})(gan=self)
            for name, player in chain.from_iterable(map(dict.items, brought)):
                if name in found:
                    raise UsageError(f"two plugins bring a player called {name!r}: rename one, or switch one off")
                found[name] = player
        for name, phase in (("generator", "g"), ("discriminator", "d")):
            own = getattr(self, name)
            if name in found and own is not None:
                raise UsageError(f"a plugin brings the {name}, and so do you: leave out one of the two")
            shipped = partial(getattr(networks, name), **self.architecture)
            found.setdefault(name, Player(shipped if own is None else own, phase))
        return found

    def _try_discriminator(self) -> None:
        """Score one view: lazy layers take shape, and a network that cannot do it is refused in one sentence."""
        shown = self.first_view().real
        self.discriminator.eval()
        with seeded(self.seed, "lazy"), torch.no_grad():
            try:
                logits = self.discriminator(*shown)
            except (TypeError, RuntimeError) as error:
                shapes = ", ".join(str(tuple(t.shape)) for t in shown)
                raise UsageError(
                    f"the discriminator cannot score what it is shown, tensors of shape {shapes}: {error}"
                ) from error
        self.discriminator.train()
        if not isinstance(logits, Tensor) or logits.shape[:1] != shown[0].shape[:1]:
            raise UsageError("the discriminator must return one logit per sample it is shown, shape (B,) or (B, ...)")

    def _make(self, name: str, network: Network, **known: Any) -> nn.Module:
        if isinstance(network, nn.Module):
            return network
        bound = network.keywords if isinstance(network, partial) else {}
        asked = [key for key in ("width", "depth") if self.architecture.get(key) is not None and key not in bound]
        sizes = {key: self.architecture[key] for key in asked}
        with seeded(self.seed, name):
            return need_module(name, network, call_with_accepted(network, **known, **sizes))

    def _add(self, name: str, module: nn.Module, phase: str) -> None:
        module = module.to(self.device)
        self.players[name] = Player(module, phase)
        setattr(self, name, module)

    @torch.no_grad()
    def first_view(self) -> View:
        """A view of zeros in evaluation mode: shapes without moving any state, random streams included."""
        with self.streams_kept():
            for player in self.players.values():
                player.module.eval()
            share = self.batch_size // self.team.size
            real = torch.zeros(share, *self.shape, device=self.device)
            z = torch.zeros(share, *(self.latent.shape or (self.latent.dim,)), device=self.device)
            batch = self.hook.sample(gan=self, real=real, z=z, phase="d", step=0)
            if batch.fake.shape != real.shape:
                raise UsageError(
                    f"the generator makes samples of shape {tuple(batch.fake.shape[1:])}, the data has {self.shape}"
                )
            view: View = self.hook.view(gan=self, batch=batch, phase="d", step=0)
            for player in self.players.values():
                player.module.train()
        return view

    def parameters(self, phase: str) -> list[nn.Parameter]:
        """The trained parameters of one phase's players."""
        return self._parameters[phase]

    def make_optimizers(self) -> None:
        """One Adam per phase over its players; call again after a plugin replaced parameters."""
        for phase in PHASES:
            modules = [player.module for player in self.players.values() if player.phase == phase]
            self._parameters[phase] = [p for m in modules for p in m.parameters() if p.requires_grad]
            s = self.optim[phase]
            self.optimizers[phase] = torch.optim.Adam(
                self._parameters[phase], lr=s.lr, betas=s.betas, eps=s.eps, fused=True
            )
            self.team.attend(self.optimizers[phase], self.players)

    # -- samples -------------------------------------------------------------------------------------------------

    @property
    def sampled(self) -> nn.Module:
        """The network that samples come from: the averaged generator if there is one, else the generator."""
        network: nn.Module = self.averages.get("generator", self.generator)
        return network

    @torch.no_grad()
    def generate(self, z: Tensor) -> Tensor:
        """The samples (N, \\*shape) of latents z (N, \\*latent) by :attr:`sampled`, in evaluation mode."""
        with evaluating(self.sampled):
            samples: Tensor = self.sampled(z)
        return samples

    def draw(self, n: int, stream: torch.Generator, chunk: int = 1000) -> Tensor:
        """(n, \\*shape) samples of latents drawn from ``stream``, see :meth:`generate`.

        A network that draws noise of its own, from torch's global generator, meets the same noise for the same stream,
        and training goes on as if nobody had looked.
        """
        sizes = [min(chunk, n - start) for start in range(0, n, chunk)]
        with seeded(stream.initial_seed(), "draw"):
            return torch.cat([self.generate(self.latent.draw(size, stream)) for size in sizes])

    # -- state ---------------------------------------------------------------------------------------------------

    def networks(self) -> dict[str, nn.Module]:
        """All players and averages by name; an average is called ``<player>_ema``."""
        named = {name: player.module for name, player in self.players.items()}
        return named | {f"{name}_ema": module for name, module in self.averages.items()}

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """The state dicts of all networks, by name."""
        return {name: module.state_dict() for name, module in self.networks().items()}

    def load_weights(self, weights: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Undo :meth:`weights`; every network must be there."""
        for name, module in self.networks().items():
            module.load_state_dict(weights[name])

    def state_dict(self) -> dict[str, Any]:
        """Everything that moves besides :meth:`weights`: step, optimisers, random streams, plugins.

        In a team all processes call it, and what process 0 gets holds the streams and plugins of the "others", too.
        """
        stateful = {name: plugin for name, plugin in self.manager.list_name_plugin() if hasattr(plugin, "state_dict")}
        own = {
            "rngs": {name: rng.get_state() for name, rng in self.rngs.items()},
            "global_rngs": [torch.get_rng_state(), *(torch.cuda.get_rng_state(gpu) for gpu in self._gpus())],
            "plugins": {name: plugin.state_dict() for name, plugin in stateful.items()},
        }
        return {
            "step": self.step,
            "optimizers": {phase: optimizer.state_dict() for phase, optimizer in self.optimizers.items()},
            **own,
            **({"others": self.team.gathered(own)[1:]} if self.team.size > 1 else {}),
        }

    def _gpus(self) -> list[torch.device]:
        """The GPU it trains on, if it does."""
        return [self.device] if self.device.type == "cuda" else []

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo :meth:`state_dict` in a GAN built in the same way."""
        self.step = state["step"]
        for phase, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][phase])
        own = state["others"][self.team.rank - 1] if self.team.rank else state
        for name, value in own["rngs"].items():
            self.stream(name).set_state(value.cpu())  # states are set from the CPU, and loading may have mapped them
        cpu, *gpus = (value.cpu() for value in own["global_rngs"])
        torch.set_rng_state(cpu)
        for gpu, value in zip(self._gpus(), gpus, strict=False):  # older versions kept those of GPUs that are not used
            torch.cuda.set_rng_state(value, gpu)
        for name, value in own["plugins"].items():
            plugin: Any = self.manager.get_plugin(name)
            plugin.load_state_dict(value)
