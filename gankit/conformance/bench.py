"""The bench: builds the plugin, trains it in small GANs, and plays single updates again, for the checks to look at."""

from __future__ import annotations

import math
import pickle
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from gankit import losses
from gankit.claims import Claims
from gankit.contract import PHASES, watched
from gankit.errors import UsageError
from gankit.gan import GAN, Latent, Optim, derive_seed, seed_global, threads
from gankit.loop import TERMS, Terms, total, train
from gankit.options import build, options_of
from gankit.plugins import ContractError, manager
from gankit.testing import Log

if TYPE_CHECKING:
    from gankit.conformance.record import Record

T = TypeVar("T")
KINDS: dict[str, tuple[int, ...]] = {"vector": (3,), "image": (1, 16, 16)}  # 16: growing networks double 4 px
TERM_HOOKS = {"d": "pre_d_loss", "g": "post_g_loss"}
Z_DIM = 4
BATCH = 8
STEP = 720720  # a late one: a multiple of all numbers up to 16, so that lazy penalties act
WARM = 3  # steps before a scene: averages and histories have begun
LAST = 17  # the step by which most terms have shown themselves; lazy penalties act every 16th
LATE = (STEP, 2 * STEP)  # where to look for others: in the middle and at the end
Watch = Callable[[str, dict[str, Any]], AbstractContextManager[None]]


class Failed(Exception):
    """A check found something wrong: what, and how to mend it, where the check knows better than its docstring."""

    def __init__(self, what: str, mend: str = "") -> None:
        super().__init__(what)
        self.mend = mend


class Skipped(Exception):
    """A check does not apply: why."""


def expect(truth: object, what: str, mend: str = "") -> None:
    """Raise ``Failed`` unless it is true."""
    if not truth:
        raise Failed(what, mend)


def sentence(error: BaseException) -> str:
    """An error as one line, with the note of whose it is."""
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    text = " ".join(str(error).split()) or "no message"
    return text + notes if isinstance(error, UsageError) else f"{type(error).__name__}: {text}{notes}"


@contextmanager
def global_random(seed: int | None = None) -> Iterator[None]:
    """After the block the global generators of torch, numpy and Python are where they were; in it, seeded if asked."""
    state, legacy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        if seed is not None:
            seed_global(seed)
            np.random.seed(seed)
            random.seed(seed)
        try:
            yield
        finally:
            random.setstate(state)
            np.random.set_state(legacy)


def global_states() -> dict[str, bytes]:
    """What the global generators of torch, numpy and Python would draw next, to compare."""
    return {
        "torch's global random generator": torch.get_rng_state().numpy().tobytes(),
        "numpy's global random generator": pickle.dumps(np.random.get_state()),
        "Python's global random generator": pickle.dumps(random.getstate()),
    }


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """A block with another default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def observe(gan: GAN, plugin: object, watch: Watch) -> None:
    """Run every stretch of the plugin's own code inside ``watch(hook, arguments)``; a wrapper's two parts one by one."""
    for caller in gan.manager.get_hookcallers(plugin) or ():
        for impl in caller.get_hookimpls():
            if impl.plugin is plugin:
                around = _around_wrapper if impl.wrapper else _around
                impl.function = around(impl.function, impl.argnames, caller.name, watch)  # type: ignore[misc]


def _around(function: Callable[..., Any], names: tuple[str, ...], hook: str, watch: Watch) -> Callable[..., Any]:
    def observed(*args: Any) -> Any:
        with watch(hook, dict(zip(names, args, strict=False))):
            return function(*args)

    return observed


def _around_wrapper(
    function: Callable[..., Any], names: tuple[str, ...], hook: str, watch: Watch
) -> Callable[..., Any]:
    def observed(*args: Any) -> Any:
        known = dict(zip(names, args, strict=False))
        generator = function(*args)
        with watch(hook, known):
            next(generator)
        try:
            inner = yield
        except BaseException as error:
            try:
                generator.throw(error)
            except StopIteration as done:
                return done.value
            raise
        with watch(hook, {**known, "inner": inner}):
            try:
                generator.send(inner)
            except StopIteration as done:
                return done.value
        return None

    return observed


class Bench:
    """One plugin, its options, and what several checks share.

    given: the options as they were asked for. options: those the checks use; a lazy plugin acts in every step, or most of
    what it does would lie beyond the few steps that are watched.
    """

    def __init__(self, name: str, factory: type, options: Mapping[str, Any] | None = None) -> None:
        self.name, self.factory, self.given = name, factory, dict(options or {})
        self.options = {**({"every": 1} if "every" in options_of(factory) else {}), **self.given}
        self.data = tuple(KINDS)
        self._kept: dict[Any, Any] = {}

    # -- the plugin ----------------------------------------------------------------------------------------------

    def plugin(self, **options: Any) -> Any:
        """A fresh instance with these options over those of the bench; without any, one that must come to be."""
        try:
            return build(self.factory, {**self.options, **options}, self.name)
        except UsageError:
            if options:
                raise
            raise Skipped("it cannot be built: see options") from None

    @property
    def claims(self) -> Claims:
        """What the class claims; nothing, if it has no claims."""
        found = getattr(self.factory, "claims", None)
        return found if isinstance(found, Claims) else Claims()

    def has(self, *hooks: str) -> bool:
        """Whether the class implements one of these hooks."""
        return any(hasattr(getattr(self.factory, hook, None), "gankit_impl") for hook in hooks)

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """What ``make`` gives, made once for all checks; what it raises is raised again."""
        if key not in self._kept:
            try:
                self._kept[key] = make()
            except Exception as error:
                self._kept[key] = error
        kept = self._kept[key]
        if isinstance(kept, Exception):
            raise kept
        found: T = kept
        return found

    # -- GANs ----------------------------------------------------------------------------------------------------

    def gan(
        self,
        kind: str,
        plugins: Mapping[str, object],
        *,
        core: Mapping[str, object] | None = None,
        watch: Watch | None = None,
        prepare: Callable[[GAN], None] | None = None,
        lively: bool = False,
        frozen: bool = False,
        **settings: Any,
    ) -> GAN:
        """A built GAN with small networks, on data and latents of its own streams.

        watch: around the plugin's code, from the start. prepare: called with the GAN before it is built. lively: all weights
        drawn anew, so that no gradient is near 0. frozen: learning rates of 0.
        """
        shape = KINDS[kind]
        known: dict[str, Any] = {"generator": None, "discriminator": None, "architecture": {"width": 8}, "seed": 0}
        if frozen:
            known["optim"] = {phase: Optim(lr=0.0) for phase in PHASES}
        gan = GAN(
            **{**known, "batch_size": BATCH, "loss": losses.make(self.loss(kind)), **settings},
            shape=shape,
            latent=Latent(Z_DIM),
            plugins=plugins,
            core=core or {},
        )
        gan.next_real = lambda: (
            torch.rand(gan.batch_size, *shape, generator=gan.stream("data"), device=gan.device) * 2 - 1
        )
        gan.data = None
        gan.steps = LATE[-1]
        if watch:
            observe(gan, plugins[self.name], watch)
        if prepare:
            prepare(gan)
        gan.build()
        if lively:
            stream = torch.Generator().manual_seed(derive_seed(gan.seed, "lively"))
            for player in gan.players.values():
                for p in player.module.parameters():
                    if p.dim() > 1:
                        fan = max(1, p[0].numel())
                        with torch.no_grad():
                            p.copy_(torch.randn(p.shape, generator=stream) * (1.5 / math.sqrt(fan)))
        return gan

    def loss(self, kind: str) -> str:
        """The adversarial loss the checks use: the first that the plugin does not refuse."""
        if ("loss", kind) in self._kept:
            loss: str = self._kept["loss", kind]
            return loss
        for name in ("non_saturating", "wasserstein", "hinge"):
            self._kept["loss", kind] = name
            try:
                with quiet():
                    self.gan(kind, {self.name: self.plugin()})
            except ContractError:
                break
            except UsageError:
                continue
            except Exception:
                break
            return name
        self._kept["loss", kind] = "non_saturating"
        return "non_saturating"

    def train(self, kind: str, steps: int, **settings: Any) -> tuple[GAN, list[tuple[str, int, dict[str, float]]]]:
        """A GAN with a fresh plugin alone, trained; and the terms of every update."""
        log = Log()
        gan = self.gan(kind, {self.name: self.plugin()}, core={"log": log}, **settings)
        train(gan, steps)
        return gan, log.updates

    # -- scenes --------------------------------------------------------------------------------------------------

    def scene(self, kind: str, phase: str, *, options: Mapping[str, Any] | None = None, **settings: Any) -> Scene:
        """The first update of this phase after the third step in which the plugin has a term, in float64 and lively.

        Where it has none in the first 17 steps, one in the middle or at the end of the run. Raises ``Skipped`` if there
        it has none either.
        """
        with quiet(), global_random(0), default_dtype(torch.float64):
            plugin = self.plugin(**(options or {}))
            gan = self.gan(kind, {self.name: plugin}, **{"lively": True, **settings})
            for step in (*range(WARM + 1, LAST + 1), *LATE):
                if step in LATE:
                    gan.step = step - 2  # one update before, in which averages begin
                train(gan, step - 1)
                gan.step = step
                scene = Scene(self.name, gan, plugin, phase)
                if scene.play():
                    return scene
                scene.rewind()
                gan.step = step - 1
        late = " and ".join(map(str, LATE))
        raise Skipped(
            f"it has no {phase.upper()} term in its first {LAST} steps, nor in steps {late}, with these options"
        )

    def scenes(self, *, repeatable: bool = True) -> list[Scene]:
        """The scenes of both phases on all kinds of data the plugin trains on and has terms in; made once.

        Raises ``Skipped`` if there is none. repeatable: only those that give the same terms each time they are played.
        """
        found = []
        for kind in self.kinds():
            for phase, hook in TERM_HOOKS.items():
                if self.has(hook):
                    try:
                        found.append(self.once(("scene", kind, phase), lambda k=kind, p=phase: self.scene(k, p)))  # type: ignore[misc]
                    except Skipped as skipped:
                        reason = str(skipped)
        if not self.has(*TERM_HOOKS.values()):
            raise Skipped("it adds no terms")
        if not found:
            raise Skipped(reason)
        if repeatable:
            found = [scene for scene in found if self.once(("again", id(scene)), scene.repeats)]
            if not found:
                raise Skipped("its terms differ from call to call: see the_same_again")
        return found

    def records(self) -> list[Record]:
        """One short watched training on each kind of data, made once; raises ``Skipped`` if it cannot be registered."""
        from gankit.conformance.record import Record

        try:
            manager({self.name: self.plugin()}, {})
        except ContractError as error:
            raise Skipped("it cannot be registered: see hooks and two_instances") from error

        def record(kind: str) -> Record:
            with threads(2):  # so that a plugin is seen to set the usual number, one
                return Record(self, kind)

        return [self.once(("record", kind), lambda kind=kind: record(kind)) for kind in self.data]  # type: ignore[misc]

    def trained(self) -> list[Record]:
        """The records of the kinds of data it trains on; raises ``Skipped`` if there is none."""
        found = [record for record in self.records() if record.error is None]
        if not found:
            raise Skipped("it does not train: see three_steps")
        return found

    def kinds(self) -> list[str]:
        """The kinds of data it trains on; raises ``Skipped`` if there is none."""
        return [record.kind for record in self.trained()]


@contextmanager
def quiet() -> Iterator[None]:
    """Warnings, which a plugin may give, are not what is looked at."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Scene:
    """One update, which can be played again and again: same networks, same random streams, same batch."""

    def __init__(self, name: str, gan: GAN, plugin: Any, phase: str) -> None:
        self.name, self.gan, self.plugin, self.phase, self.step = name, gan, plugin, phase, gan.step
        self.rngs = {key: rng.get_state() for key, rng in gan.rngs.items()}
        self.buffers = [(b, b.clone()) for p in gan.players.values() for b in p.module.buffers()]
        self.real, self.z = gan.next_real(), gan.next_z()
        self.seed = 1  # of the plugin's stream when it is played

    @property
    def kind(self) -> str:
        """What the data are."""
        return "image" if len(self.gan.shape) == 3 else "vector"

    @property
    def where(self) -> str:
        """For messages."""
        return f"{TERM_HOOKS[self.phase]} on {self.kind}s"

    def rewind(self) -> None:
        """Random streams and buffers back to where they were; the plugin's own stream to its start."""
        gan = self.gan
        gan.rngs = {name: rng for name, rng in gan.rngs.items() if name in self.rngs}
        for name, state in self.rngs.items():
            gan.rngs[name].set_state(state)
        gan.rng(self.plugin).manual_seed(self.seed)
        with torch.no_grad():
            for buffer, value in self.buffers:
                buffer.copy_(value)

    def play(self, real: Tensor | None = None, z: Tensor | None = None) -> Terms:
        """The plugin's own terms of this update, with their graph."""
        return {name: term for name, term in self.all_terms(real, z).items() if self.owns(name)}

    def owns(self, term: str) -> bool:
        """Whether the plugin added this term."""
        return self.gan.manager.owners.get((TERM_HOOKS[self.phase], term)) == self.name

    def all_terms(self, real: Tensor | None = None, z: Tensor | None = None) -> Terms:
        """All terms of this update, the adversarial one included."""
        self.rewind()
        gan, step, phase = self.gan, self.step, self.phase
        real, z = self.real if real is None else real, self.z if z is None else z
        with quiet(), global_random(0), default_dtype(torch.float64):
            with torch.set_grad_enabled(phase == "g"):
                batch = gan.hook.sample(gan=gan, real=real, z=z, phase=phase, step=step)
                view = gan.hook.view(gan=gan, batch=batch, phase=phase, step=step)
            known = {"batch": batch, "view": watched(view), "step": step}

            def d_objective(critic: Callable[..., Tensor]) -> Tensor:
                return total(TERMS["d"](gan, critic, **known))

            critic = gan.hook.critic(gan=gan, phase=phase, d_objective=d_objective, **known)
            return TERMS[phase](gan, critic, **known)

    def repeats(self) -> bool:
        """Whether it gives the same terms when it is played again."""
        one, two = ({k: v.item() for k, v in self.play().items()} for _ in range(2))
        return same(one, two)

    def gradients(self, term: Tensor, phase: str) -> list[Tensor | None]:
        """Of a term, with respect to the parameters of one phase's players; None where there is no path."""
        parameters = self.gan.parameters(phase)
        if not term.requires_grad:
            return [None] * len(parameters)
        return list(torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True))


def same(one: Mapping[str, float], two: Mapping[str, float]) -> bool:
    """Equal names and values, bit for bit; not a number equals itself."""
    return one.keys() == two.keys() and all(
        one[k] == two[k] or (math.isnan(one[k]) and math.isnan(two[k])) for k in one
    )


def close(one: Tensor | float, two: Tensor | float, tolerance: float = 1e-6) -> bool:
    """Equal up to a relative tolerance, in float64."""
    a, b = (float(value.detach() if isinstance(value, Tensor) else value) for value in (one, two))
    return abs(a - b) <= tolerance * max(abs(a), abs(b)) + 1e-12 or (math.isnan(a) and math.isnan(b))


def weights_of(gan: GAN) -> dict[str, Tensor]:
    """A copy of all weights and buffers, by name."""
    return {f"{network}.{k}": v.clone() for network, w in gan.weights().items() for k, v in w.items()}


def unequal(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> str:
    """The name of the first tensor that differs in one bit, or nothing."""
    if one.keys() != two.keys():
        return next(iter(one.keys() ^ two.keys()))
    return next((k for k in one if not torch.equal(one[k].nan_to_num(), two[k].nan_to_num())), "")


class Shaped(nn.Module):
    """A network whose logits (B,) are given out in another shape; a map holds each logit as often as it has places."""

    def __init__(self, network: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.network, self.shape = network, shape

    def forward(self, *inputs: Tensor) -> Tensor:
        """(B, \\*shape)."""
        logits: Tensor = self.network(*inputs)
        return logits.view(-1, *(1,) * len(self.shape)).expand(-1, *self.shape)
