"""What the plugin remembers: saved and restored exactly, kept apart from other runs, not growing."""

from __future__ import annotations

import gc
import io
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from gankit.conformance.bench import Bench, Failed, Skipped, expect, global_random, quiet, sentence, unequal, weights_of
from gankit.functional import extra_pass
from gankit.gan import GAN
from gankit.hookspecs import hookimpl
from gankit.loop import train

STEPS = 4


def same_seed(bench: Bench) -> None:
    """Two runs with one seed are the same run, also in one process.

    Mend: nothing in the class or the module may be written to; every random number comes from ``gan.rng(self)``.
    """
    for kind in bench.kinds():
        name = unequal(plain_end(bench, kind), end(bench, kind))
        expect(not name, f"on {kind}s, two runs with the same seed differ, first in {name!r}")


def two_at_once(bench: Bench) -> None:
    """Two GANs that are trained in turns, with a plugin each, end like each by itself.

    Mend: keep what is remembered in the instance (``__post_init__``, ``field(default_factory=...)``), not in class or
    module.
    """
    for kind in bench.kinds():
        with quiet(), global_random(0):
            gans = [_begun(bench, kind, seed=seed) for seed in (0, 1)]
            for _ in range(STEPS):
                for gan in gans:
                    train(gan, gan.step + 1)
        name = unequal(plain_end(bench, kind), weights_of(gans[0]))
        expect(not name, f"on {kind}s, another GAN in the same process changes the training, first in {name!r}")


def resumes(bench: Bench) -> None:
    """A run that was saved in the middle and loaded in a fresh GAN ends in the same weights, bit for bit.

    Mend: ``state_dict()`` gives all that moves, ``load_state_dict(state)`` puts it back; what is part of a network belongs
    into its parameters or buffers.
    """
    for kind in bench.kinds():
        with quiet(), global_random(0):
            first, second = (_begun(bench, kind) for _ in range(2))
            until = first.step + STEPS
            train(first, until - STEPS // 2)
            saved = _through_file({"weights": first.weights(), "state": first.state_dict()}, weights_only=False)
            try:
                second.load_weights(saved["weights"])
                second.load_state_dict(saved["state"])
                train(second, until)
            except Exception as error:
                raise Failed(f"on {kind}s, a saved run cannot be continued: {sentence(error)}") from error
        name = unequal(plain_end(bench, kind), weights_of(second))
        expect(not name, f"on {kind}s, a continued run ends elsewhere than an uninterrupted one, first in {name!r}")


def plain_end(bench: Bench, kind: str) -> dict[str, Tensor]:
    """The weights at the end of an undisturbed run; computed once."""
    return bench.once(("end", kind), lambda: end(bench, kind))


def end(bench: Bench, kind: str, core: Mapping[str, object] | None = None) -> dict[str, Tensor]:
    """The weights at the end of a run of a fresh plugin on a fresh GAN."""
    with quiet(), global_random(0):
        gan = _begun(bench, kind, core=core)
        train(gan, gan.step + STEPS)
    return weights_of(gan)


def _begun(bench: Bench, kind: str, **settings: Any) -> GAN:
    """A fresh GAN with a fresh plugin alone, from where it has terms within ``STEPS``, if it has them late."""
    late = next(record.late for record in bench.records() if record.kind == kind)
    gan = bench.gan(kind, {bench.name: bench.plugin()}, **settings)
    gan.step = max(0, late - STEPS)
    return gan


def plain_state(bench: Bench) -> None:
    """``state_dict`` holds tensors and plain containers alone, so that a checkpoint can be read without the plugin's code.

    Mend: numbers, text, lists, dicts and detached tensors.
    """
    if not hasattr(bench.factory, "state_dict"):
        raise Skipped("it has no state_dict")
    expect(hasattr(bench.factory, "load_state_dict"), "it has a state_dict, but no load_state_dict")
    for record in bench.trained():
        assert record.gan is not None
        state = record.plugin.state_dict()
        try:
            _through_file(state, weights_only=True)
        except Exception as error:
            raise Failed(
                f"its state cannot be read back as plain data: {sentence(error).splitlines()[0]:.120}"
            ) from error
        graph = next((path for path, t in walk(state, "state") if isinstance(t, Tensor) and t.grad_fn is not None), "")
        expect(not graph, f"{graph} carries a graph: detach it")


def no_graph_kept(bench: Bench) -> None:
    """After a step the plugin holds no tensor with a graph, which would keep all of that step's memory.

    Mend: ``.detach()`` what is remembered.
    """
    for record in bench.trained():
        for path, value in walk(vars(record.plugin), ""):
            held = isinstance(value, Tensor) and value.grad_fn is not None
            expect(not held, f"after a step on {record.kind}s, its attribute {path} is a tensor with a graph")


def no_leak(bench: Bench) -> None:
    """From step to step it does not come to hold more and more.

    Mend: remember an average or the last few (``collections.deque(maxlen=n)``), not everything.
    """
    kind = bench.kinds()[0]
    with quiet(), global_random(0):
        plugin = bench.plugin()
        gan = bench.gan(kind, {bench.name: plugin})
        train(gan, 4)
        gc.collect()
        gc.freeze()  # to look at what is made from here on alone, which is fast
        try:
            counts = []
            for until in (12, 20):
                train(gan, until)
                gc.collect()
                tensors = sum(issubclass(type(o), Tensor) for o in gc.get_objects()) - _bounded(vars(plugin))
                counts.append((sum(1 for _ in walk(vars(plugin), "", bounded=False)), tensors))
        finally:
            gc.unfreeze()
    for what, before, after in zip(("things in it", "tensors"), *counts, strict=True):
        expect(after - before < 8, f"from step 12 to step 20 there come to be {after - before} more {what}")


def another_call(bench: Bench) -> None:
    """The D terms may be asked for once more between two updates, as unrolling does, and training does not notice.

    Mend: in ``pre_d_loss`` change nothing that lasts; learn from an update in ``post_step``, where phase is "d".
    """
    if not bench.has("pre_d_loss"):
        raise Skipped("it has no D terms")
    for kind in bench.kinds():
        name = unequal(plain_end(bench, kind), end(bench, kind, {"ahead": Ahead()}))
        expect(
            not name, f"on {kind}s, asking for D's loss once more in G's update changes the training, first in {name!r}"
        )


class Ahead:
    """A core hook that evaluates D's whole loss in G's update, and lets go of it."""

    @hookimpl(tryfirst=True, wrapper=True)
    def critic(self, gan: GAN, phase: str, d_objective: Callable[[Callable[..., Tensor]], Tensor]) -> Any:
        """The critic as it is."""
        critic = yield
        if phase == "g":
            with gan.streams_kept():
                d_objective(lambda *inputs: extra_pass(gan.discriminator, *inputs))
        return critic


def parameters_kept(bench: Bench) -> None:
    """After a step the parameters are the ones the optimisers train, leaves that require gradients, and finite.

    Mend: change parameters in place under ``torch.no_grad()``; after replacing modules in ``setup`` nothing is to be done,
    after that ``gan.make_optimizers()``.
    """
    for record in bench.trained():
        gan = record.gan
        assert gan is not None
        where, _, name = record.found("frozen").partition(": ")
        expect(
            not name,
            f"{where}: freezes {name}, which no optimiser trains from then on",
            'keep its requires_grad; if it is frozen on purpose: `claims = Claims(waives={"parameters_kept": "why"})`',
        )
        for phase in "dg":
            there = {id(p) for player in gan.players.values() for p in player.module.parameters()}
            for p in gan.parameters(phase):
                expect(
                    id(p) in there,
                    f"on {record.kind}s, a parameter of phase {phase!r} is in the optimiser, but in no network",
                )
        for player, module in ((name, player.module) for name, player in gan.players.items()):
            for name, p in module.named_parameters():
                expect(
                    p.is_leaf,
                    f"on {record.kind}s, the parameter {player}.{name} has become the result of a computation",
                )
                expect(
                    p.isfinite().all(), f"on {record.kind}s, the parameter {player}.{name} is not finite after 3 steps"
                )


def _through_file(value: Any, *, weights_only: bool) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def walk(value: Any, path: str, *, bounded: bool = True) -> Any:
    """(path, value) of everything inside containers; without ``bounded`` those with a bounded length count as one."""
    yield path, value
    if isinstance(value, Mapping):
        for key, inside in value.items():
            yield from walk(inside, f"{path}.{key}".lstrip("."), bounded=bounded)
    elif isinstance(value, (list, tuple, set, deque)) and (bounded or getattr(value, "maxlen", None) is None):
        for i, inside in enumerate(value):
            yield from walk(inside, f"{path}[{i}]", bounded=bounded)


def _bounded(value: Any) -> int:
    """The number of tensors in containers whose length is bounded."""
    found = (v for _, v in walk(value, "", bounded=False) if isinstance(v, deque) and v.maxlen)
    return sum(isinstance(t, Tensor) for v in found for t in v)
