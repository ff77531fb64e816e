"""The conformance suite: what every plugin has to hold to, as named checks.

``gankit check TARGET`` runs them, and :func:`gankit.testing.plugin_checks` gives them to pytest. A check is a function of a
:class:`~gankit.conformance.bench.Bench`, which shares what is costly; its docstring says what must hold, and after "Mend:"
how to get there. ``docs/plugins/testing.md`` lists them.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import unittest
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gankit.conformance import claimed, declared, effects, gradients, state, surroundings, views
from gankit.conformance.bench import Bench, Failed, Skipped, global_random, sentence
from gankit.errors import UsageError
from gankit.gan import threads
from gankit.options import build, closest
from gankit.plugins import available, find, snake_case

# a check raises what is wrong, and may say what it did not look at
Checker = Callable[[Bench], str | None]

CHECKS: tuple[Checker, ...] = (
    declared.options,
    declared.two_instances,
    declared.hooks,
    declared.described,
    declared.no_cuda,
    declared.three_steps,
    declared.names,
    declared.finite,
    effects.inputs_kept,
    effects.weights_kept,
    effects.g_weights_kept,
    effects.grads_kept,
    effects.switches_kept,
    effects.global_random,
    effects.own_stream,
    effects.own_generator,
    effects.any_device,
    effects.no_waiting,
    effects.no_growth,
    effects.no_printing,
    state.parameters_kept,
    state.same_seed,
    state.two_at_once,
    state.resumes,
    state.plain_state,
    state.no_graph_kept,
    state.no_leak,
    gradients.terms_seen,
    gradients.the_same_again,
    state.another_call,
    surroundings.float64,
    gradients.gradient_reaches,
    gradients.leaves_g_alone,
    gradients.derivative,
    gradients.weight_zero,
    gradients.weight_is_a_factor,
    gradients.every,
    views.view_form,
    views.view_sides_alike,
    views.view_gradient,
    views.view_again,
    views.view_phases_alike,
    views.view_keeps_others,
    surroundings.batch_sizes,
    surroundings.smaller_batch,
    surroundings.logit_shapes,
    surroundings.several_inputs,
    surroundings.refuses_batch_norm,
    surroundings.players,
    surroundings.metrics,
    surroundings.companions,
    surroundings.own_loop,
    claimed.claimed_norm,
    claimed.claimed_place,
    claimed.claimed_logits,
    claimed.claimed_slopes,
    claimed.claimed_draws,
    claimed.claimed_mean,
    views.claimed_rows_apart,
    claimed.claimed_sign,
    claimed.claimed_deterministic,
    claimed.claimed_stateless,
    claimed.claimed_costs,
)


# those without which the random numbers of an update cannot be played again
RANDOM = (effects.global_random, effects.own_generator)
# What a slip breaks as well is told by one check alone: the others wait until that one holds.
AFTER: dict[Checker, tuple[Checker, ...]] = {
    declared.hooks: (declared.two_instances,),
    effects.own_generator: (effects.own_stream,),
    state.parameters_kept: (declared.finite,),
    state.two_at_once: (state.same_seed, effects.global_random),
    state.resumes: (state.same_seed, state.parameters_kept, effects.global_random),
    gradients.terms_seen: (effects.grads_kept,),
    state.another_call: (state.same_seed, effects.global_random, effects.grads_kept, gradients.the_same_again),
    gradients.derivative: (declared.finite, gradients.gradient_reaches, surroundings.float64),
    gradients.weight_is_a_factor: (declared.finite, state.same_seed),
    gradients.every: (declared.finite, state.same_seed),
    views.view_sides_alike: (effects.inputs_kept, *RANDOM),
    views.view_again: (effects.inputs_kept, *RANDOM),
    views.view_phases_alike: (views.view_again, effects.inputs_kept, *RANDOM),
    views.view_keeps_others: (effects.inputs_kept, views.view_form),
    surroundings.batch_sizes: (state.parameters_kept, views.view_form),
    surroundings.logit_shapes: (declared.finite, gradients.derivative, state.two_at_once, *RANDOM),
    surroundings.several_inputs: (state.parameters_kept,),
    surroundings.companions: (
        state.parameters_kept,
        effects.inputs_kept,
        views.view_form,
        surroundings.smaller_batch,
        surroundings.several_inputs,
    ),
    surroundings.own_loop: (
        declared.finite,
        effects.inputs_kept,
        effects.own_stream,
        state.same_seed,
        gradients.the_same_again,
        views.view_again,
        *RANDOM,
    ),
    claimed.claimed_norm: (gradients.weight_is_a_factor, *RANDOM),
    claimed.claimed_place: RANDOM,
    claimed.claimed_logits: RANDOM,
    claimed.claimed_slopes: (gradients.the_same_again, gradients.derivative, gradients.weight_is_a_factor, *RANDOM),
    claimed.claimed_draws: RANDOM,
    claimed.claimed_mean: (gradients.derivative, claimed.claimed_norm, claimed.claimed_slopes, *RANDOM),
    views.claimed_rows_apart: RANDOM,
    claimed.claimed_costs: (gradients.derivative,),
}


@dataclass(frozen=True)
class Result:
    """What a check found. what: is wrong, and where, or was not looked at, and why. mend: what to do about it."""

    check: str
    status: Literal["ok", "failed", "skipped"]
    what: str = ""
    mend: str = ""

    def __str__(self) -> str:
        """One line."""
        mend = f" -- {self.mend}" if self.mend else ""
        status = "FAILED" if self.status == "failed" else self.status
        return f"{status:<8}{self.check}" + (f": {self.what}{mend}" if self.what else "")


@dataclass(frozen=True)
class Check:
    """One check of one plugin: call it, and it raises AssertionError with one line, or skips the test with the reason."""

    function: Checker
    bench: Bench

    def __str__(self) -> str:
        """Its name."""
        return self.function.__name__

    def result(self) -> Result:
        """Run it, once."""
        return self.bench.once(("result", str(self)), self._result)

    def _result(self) -> Result:
        name = str(self)
        for first in AFTER.get(self.function, ()):
            # also after one that itself waits for another
            if Check(first, self.bench).result().status == "failed" or _waits(first, self.bench):
                return Result(name, "skipped", f"first see {first.__name__}")
        if name in self.bench.claims.waives:
            return Result(name, "skipped", f"waived: {self.bench.claims.waives[name]}")
        try:
            with threads(1), global_random(), contextlib.redirect_stdout(io.StringIO()):
                said = self.function(self.bench)
        except Failed as failed:
            return Result(name, "failed", str(failed), failed.mend or mend_of(self.function))
        except Skipped as skipped:
            return Result(name, "skipped", str(skipped))
        except UsageError as error:
            return Result(name, "failed", f"refused where it was not before: {sentence(error)}", mend_of(self.function))
        except Exception as error:
            return Result(name, "failed", f"the check stopped: {sentence(error)}", mend_of(self.function))
        return Result(name, "ok", said or "")

    def __call__(self) -> None:
        """Run it for pytest or unittest."""
        __tracebackhide__ = True  # pytest then shows the line of the test that called it
        result = self.result()
        if result.status == "failed":
            raise AssertionError(str(result))
        if result.status == "skipped":
            reason = f"{result.check}: {result.what}"
            if "PYTEST_CURRENT_TEST" in os.environ:
                import pytest

                pytest.skip(reason)
            raise unittest.SkipTest(reason)


def _waits(check: Checker, bench: Bench) -> bool:
    return any(
        Check(first, bench).result().status == "failed" or _waits(first, bench) for first in AFTER.get(check, ())
    )


def rule_of(check: Checker) -> str:
    """What must hold."""
    return _paragraphs(check)[0]


def mend_of(check: Checker) -> str:
    """What to do if it does not."""
    return _paragraphs(check)[1]


def _paragraphs(check: Checker) -> tuple[str, str]:
    rule, mend = (" ".join(part.split()) for part in inspect.getdoc(check).split("Mend:"))  # type: ignore[union-attr]
    return rule, mend.replace("``", "`")


def checks_of(target: str | type, options: Mapping[str, Any] | None = None, only: Iterable[str] = ()) -> list[Check]:
    """The checks of a plugin: an installed name, ``file.py:Class``, ``module:Class``, or the class itself.

    options: of the plugin, for all checks. only: names of checks; all of them by default. Raises UsageError for a target
    that cannot be found, and for options it does not take.
    """
    if isinstance(target, str):
        source = find(target)
        name, factory = source.name, source.factory
    else:
        name, factory = name_of(target), target
    if options:
        build(factory, options, name)
    bench = Bench(name, factory, options)
    known = {check.__name__: check for check in CHECKS}
    for wanted in only:
        if wanted not in known:
            raise UsageError(f"there is no check {wanted!r}{closest(wanted, known)}; there are {', '.join(known)}")
    chosen = tuple(only) or tuple(known)
    return [Check(known[check], bench) for check in chosen]


def name_of(factory: type) -> str:
    """What a class is called among plugins: by its entry point, or after itself."""
    value = f"{factory.__module__}:{factory.__qualname__}"
    return next((name for name, ep in available().items() if ep.value == value), snake_case(factory.__name__))
