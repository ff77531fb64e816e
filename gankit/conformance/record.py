"""One short training in which every stretch of the plugin's own code is watched; many checks read what was noted."""

from __future__ import annotations

import ast
import contextlib
import io
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from gankit import networks
from gankit.conformance.bench import LATE, TERM_HOOKS, WARM, Bench, Skipped, global_states, quiet
from gankit.contract import Batch, View
from gankit.errors import UsageError
from gankit.gan import GAN
from gankit.hookspecs import hookimpl
from gankit.loop import train
from gankit.plugins import ContractError
from gankit.testing import Log

EVERY_STEP = ("sample", "view", "critic", "pre_d_loss", "post_g_loss")
# what alone is noted of calls elsewhere; "" is where the plugin is made. What happens once may wait, and have its own seed.
ELSEWHERE = {"": ("device",), "setup": ("device",), "post_step": ("device", "wait")}
FACTORIES = (
    "arange", "as_tensor", "asarray", "empty", "eye", "from_numpy", "full", "linspace", "logspace", "normal", "ones",
    "rand", "randint", "randn", "randperm", "tensor", "tril_indices", "triu_indices", "zeros",
)  # fmt: skip
WAITS = (
    "item", "tolist", "__bool__", "__int__", "__float__", "__index__", "__complex__", "__array__", "numpy", "cpu",
    "nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount", "equal", "allclose", "is_nonzero",
    "__contains__",
)  # fmt: skip
MOVES = ("to", "cuda", "type_as", "as_tensor", "asarray")
FILLS = ("copy_", "__setitem__")  # from any device, and what is filled stays where it is


class Probe(TorchFunctionMode):
    """Sees the torch functions that the plugin calls, and acts as if the networks lay on another device.

    A tensor made without a device lies on the CPU, where ``torch.rand(3)`` puts it whatever the networks do; to mix it with
    theirs fails on a GPU. So such tensors are marked, and what mixes marked with others is noted. Tensors of one number mix
    with everything. on_cpu: the lines of the file that name the CPU, see :func:`lines_on_cpu`. astray: the marked tensors,
    each with where it came to be on the CPU.
    """

    def __init__(
        self,
        note: Callable[[str, str], None],
        own: Callable[[], torch.Generator | None],
        file: str,
        on_cpu: frozenset[int],
        astray: Any,
    ) -> None:
        super().__init__()
        self.note, self.own, self.file, self.on_cpu, self.astray = note, own, file, on_cpu, astray

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call it, and note what it tells."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        generator = kwargs.get("generator")
        if generator is not None and generator is not self.own():
            self.note("generator", f"{name} draws from another generator{self.line()}")
        if name == "grad" and kwargs.get("create_graph"):
            self.note("double_backward", name)
        given = list(_tensors((args, tuple(kwargs.values()))))
        fetched = name == "cpu" or (
            name == "to" and "cpu" in map(str, (*args[1:], kwargs.get("device"))) and _text(args, kwargs)
        )
        if name in WAITS or fetched:
            self.note("wait", f"{name}{self.line()}")
        elif _masked(name, args):
            self.note("wait", f"an index with a mask{self.line()}")
        out = func(*args, **kwargs)
        made = name in FACTORIES and func is getattr(torch, name, None)
        if fetched:
            if out is args[0] and out not in self.astray:
                out = out.clone()  # as it would be from another device
            self.mark(out, f"{name}{self.line()} brings a tensor to the CPU")
        elif made and not (name in MOVES and isinstance((*args, *kwargs.values())[0], Tensor)):
            device = kwargs.get("device")
            if device is None or isinstance(device, str) or self.number() in self.on_cpu:
                self.mark(out, f"torch.{name}{self.line()} makes a tensor without a device")
        elif name == "cuda" or (name in MOVES and _follows((*args[1:], *kwargs.values()))):
            for t in _tensors((out,)):
                self.astray.pop(t, None)
        elif name not in FILLS:
            sources = [self.astray[t] for t in given if t in self.astray]
            others = [t for t in given if t.dim() and t not in self.astray]
            if sources and others and name != "__getitem__":
                self.note("device", f"{sources[0]}, and {name} mixes it with others")
            elif sources and args and not (name == "__getitem__" and args[0] not in self.astray):
                for t in _tensors((out,)):
                    self.mark(t, sources[0])
        return out

    def mark(self, out: Any, source: str) -> None:
        """Remember that a tensor of more than one number lies on the CPU, and why."""
        if isinstance(out, Tensor) and out.dim():
            self.astray[out] = source

    def line(self) -> str:
        """Where in the plugin's file the call comes from, for messages."""
        return f" in line {number}" if (number := self.number()) else ""

    def number(self) -> int:
        """The line of the plugin's file that the call comes from; 0 if from none."""
        frame = sys._getframe(1)
        while frame and frame.f_code.co_filename != self.file:
            frame = frame.f_back  # type: ignore[assignment]
        return frame.f_lineno if frame else 0


def lines_on_cpu(file: str) -> frozenset[int]:
    """The lines of calls with ``device=torch.device("cpu")``, or with the name of one: what they make has this device.

    At run time it cannot be told from the networks' own device, which here is the CPU as well.
    """
    try:
        nodes = [*ast.walk(ast.parse(Path(file).read_text()))]
    except (OSError, ValueError, SyntaxError):  # of what was typed in there is no file
        return frozenset()
    constants = {
        target.id
        for node in nodes
        if isinstance(node, ast.Assign) and _is_cpu(node.value)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    return frozenset(
        line
        for node in nodes
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "device" and (_is_cpu(keyword.value) or getattr(keyword.value, "id", "") in constants)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    )


def _is_cpu(node: ast.expr) -> bool:
    """Whether it is ``torch.device("cpu")``."""
    if not isinstance(node, ast.Call) or not node.args or not isinstance(node.args[0], ast.Constant):
        return False
    called = getattr(node.func, "attr", getattr(node.func, "id", ""))
    return called == "device" and str(node.args[0].value).startswith("cpu")


def _follows(values: Iterable[Any]) -> bool:
    """Whether there is a device among them, or a tensor whose device to take."""
    return any(isinstance(value, (Tensor, torch.device)) for value in values)


def _masked(name: str, args: tuple[Any, ...]) -> bool:
    """Whether it looks for the places where a mask is true, to take what is there, or to put several values there."""
    if name != "__getitem__" and not (name == "__setitem__" and isinstance(args[2], Tensor) and args[2].dim()):
        return False
    index = args[1] if isinstance(args[1], (list, tuple)) else args[1:2]
    return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in index)


def _text(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return any(isinstance(value, str) for value in (*args[1:], kwargs.get("device")))


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


class Record:
    """What happened in three steps on one kind of data, and in late ones, if the plugin had no term by then.

    error: why it stopped, or None. refused: the plugin refused these data. notes: per subject, what was noted at which step
    of which hook. updates: the terms of each update. late: the late step by which it had a term, 0 if it had one before or
    never.
    """

    def __init__(self, bench: Bench, kind: str) -> None:
        self.bench, self.kind = bench, kind
        self.notes: dict[str, list[tuple[int, str, str]]] = {}
        self.costs: Counter[tuple[str, str, int]] = Counter()
        self.error: BaseException | None = None
        self.gan: GAN | None = None
        self.phase = ""
        self.file = sys.modules[bench.factory.__module__].__file__ or ""
        self.on_cpu = lines_on_cpu(self.file)
        self.astray: Any = WeakIdKeyDictionary()
        self.looking = False
        self.late = 0
        log = Log()
        try:
            with self._probed(""):
                self.plugin = bench.plugin()
            printed = io.StringIO()
            with quiet(), contextlib.redirect_stdout(printed):
                core = {"log": log, "phase": self}
                bench.gan(kind, {bench.name: self.plugin}, core=core, watch=self.watch, prepare=self._prepare)
                assert self.gan is not None
                train(self.gan, WARM)
                for late in LATE:
                    if bench.has(*TERM_HOOKS.values()) and not any(self._names().values()):
                        self.gan.step = late - 2
                        train(self.gan, late)
                        self.late = late if any(self._names().values()) else 0
            if text := printed.getvalue().strip():
                self.note("print", "", f"{text.splitlines()[0]!r:.60}")
        except Skipped:
            raise
        except Exception as error:
            self.error = error
        self.updates, self.terms = log.updates, self._names()

    def _names(self) -> dict[str, set[str]]:
        """Of the plugin's terms so far, by phase."""
        owners = self.gan.manager.owners.items() if self.gan else ()
        return {
            phase: {name for (hook, name), owner in owners if (hook, owner) == (of_terms, self.bench.name)}
            for phase, of_terms in TERM_HOOKS.items()
        }

    @hookimpl(wrapper=True, tryfirst=True)
    def post_step(self, phase: str) -> Generator[None, Any, Any]:
        """Take note, as part of the core, of whose update it is: not every plugin asks."""
        self.phase = phase
        return (yield)

    @property
    def refused(self) -> bool:
        """Whether the plugin said in a sentence that it is not for these data."""
        return isinstance(self.error, UsageError) and not isinstance(self.error, ContractError)

    def _prepare(self, gan: GAN) -> None:
        self.gan = gan
        self.pulled = 0
        draw = gan.next_real

        def next_real() -> Tensor:
            self.pulled += 1
            return draw()

        gan.next_real = next_real

    def note(self, subject: str, hook: str, text: str) -> None:
        """Take a note."""
        self.notes.setdefault(subject, []).append((self.gan.step if self.gan else 0, hook, text))

    def found(self, subject: str, *, steps: int = 1) -> str:
        """The first note on a subject, with its hook, if there are notes of at least so many steps; or nothing."""
        notes = self.notes.get(subject, [])
        if len({step for step, *_ in notes}) < steps:
            return ""
        _, hook, text = notes[-1]
        return f"{hook} on {self.kind}s: {text}" if hook else f"on {self.kind}s: {text}"

    @contextmanager
    def watch(self, hook: str, known: dict[str, Any]) -> Iterator[None]:
        """Around a stretch of the plugin's code: compare what must be as it was."""
        gan = self.gan
        assert gan is not None
        with self._looks():
            before = self._look(gan, hook, known)
        if not gan.optimizers:  # the core has moved the networks that were brought to their device
            for buffer in (b for player in gan.players.values() for b in player.module.buffers()):
                self.astray.pop(buffer, None)
        if hook in EVERY_STEP or hook in ELSEWHERE:
            with self._probed(hook):
                yield
        else:
            yield
        with self._looks():
            for (subject, what), value in self._look(gan, hook, known).items():
                was = before.get((subject, what), value)
                if not _alike(was, value):
                    self.note(subject, hook, what)

    @contextmanager
    def _probed(self, hook: str) -> Iterator[None]:
        """Note what the plugin's code calls, by :class:`Probe`, and count it."""
        gan, calls = self.gan, Counter[str]()
        subjects = ELSEWHERE.get(hook)
        if hook == "post_step" and "every" in self.bench.options.keys() - self.bench.given.keys():
            subjects = ("device",)  # it may well log, and only the bench has it do so in every step

        def note(subject: str, text: str) -> None:
            # while a hook inside this one is looked at, the calls are not the plugin's
            if not self.looking and (subjects is None or subject in subjects):
                calls[subject] += 1
                self.note(subject, hook, text)

        def own() -> torch.Generator | None:
            return gan.rngs.get(f"plugin:{self.bench.name}") if gan else None

        player = gan.players.get("discriminator") if gan and hook in EVERY_STEP else None
        handle = player and player.module.register_forward_pre_hook(lambda *_: calls.update(("forward",)))
        try:
            with Probe(note, own, self.file, self.on_cpu, self.astray):
                yield
        finally:
            if handle:
                handle.remove()
        for subject, number in calls.items():
            self.costs[subject, hook, gan.step if gan else 0] += number

    @contextmanager
    def _looks(self) -> Iterator[None]:
        """A block in which it is this code that reads values, not the plugin's."""
        self.looking = True
        try:
            yield
        finally:
            self.looking = False

    def _look(self, gan: GAN, hook: str, known: dict[str, Any]) -> dict[tuple[str, str], Any]:
        """All that a hook must leave alone, by subject and name."""
        found: dict[tuple[str, str], Any] = {
            ("switch", "gradients on or off"): torch.is_grad_enabled(),
            ("switch", "the default dtype"): torch.get_default_dtype(),
            ("switch", "the default device"): str(torch.get_default_device()),
            ("switch", "the number of threads"): torch.get_num_threads(),
            ("switch", "the deterministic algorithms"): torch.are_deterministic_algorithms_enabled(),
            ("switch", "cudnn.benchmark"): torch.backends.cudnn.benchmark,
            ("switch", "cudnn.deterministic"): torch.backends.cudnn.deterministic,
            ("switch", "anomaly detection"): torch.is_anomaly_enabled(),
            ("stream", "draws from the data (gan.next_real)"): self.pulled,
        }
        for name, state in global_states().items():
            if hook != "players" or "torch" not in name:  # for which the core has seeded it
                found["global", name] = state
        for name, rng in gan.rngs.items():
            if name != f"plugin:{self.bench.name}":
                found["stream", f"draws from the stream {name!r}"] = rng.get_state()
        for network, module in gan.networks().items():
            own = network not in ("generator", "discriminator") or type(module).__module__ != networks.__name__
            for name, m in module.named_modules():
                path = f"{network}.{name}".rstrip(".")
                found["switch", f"training mode of {path}"] = m.training
                if hook != "setup":
                    number = len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
                    found["growth", f"hooks on the module {path}"] = number
            for name, p in module.named_parameters():
                if hook != "setup":
                    found["switch", f"requires_grad of {network}.{name}"] = p.requires_grad
                elif not own:
                    found["frozen", f"{network}.{name}"] = p.requires_grad
                found["grad", f".grad of {network}.{name}"] = None if p.grad is None else (p.grad, p.grad._version)
            if hook in EVERY_STEP:
                # a network that runs moves its statistics: those of G in sample, those of the plugin's own anywhere
                runs = own or hook == "sample"
                for name, t in (*module.named_parameters(), *(() if runs else module.named_buffers())):
                    found["weights", f"{network}.{name}"] = (t.detach().clone(), t._version)
        if hook == "post_step" and self.phase == "d":
            for network, player in gan.players.items():
                for name, p in player.module.named_parameters() if player.phase == "g" else ():
                    if p.requires_grad:
                        found["g_weights", f"{network}.{name}"] = p.detach().clone()
        for name in ("batch", "view", "real", "z", "real_logits", "fake_logits", "inner"):
            value = known.get(name)
            parts = value._asdict() if isinstance(value, (Batch, View)) else {"": value}
            for part, inside in parts.items():
                for i, t in enumerate(_tensors(inside.values() if isinstance(inside, dict) else (inside,))):
                    path = f"{name}.{part}".rstrip(".").replace("inner", "what it was handed")
                    found["inputs", f"{path}[{i}]" if i else path] = (t.detach().clone(), t._version)
        return found


def _alike(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return one.shape == two.shape and torch.equal(one.nan_to_num(), two.nan_to_num())
    if isinstance(one, tuple) and isinstance(two, tuple):
        return all(map(_alike, one, two))
    return bool(one is two or one == two)
