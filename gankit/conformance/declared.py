"""What can be seen before anything trains: options, hooks, names, source."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
import re

from gankit.conformance.bench import Bench, Failed, Skipped, expect, sentence
from gankit.errors import UsageError
from gankit.options import build, options_of
from gankit.plugins import CORE_NAMES, ContractError, available, manager

NETWORKS = ("generator", "discriminator", "encoder")  # which a plugin may bring, in the place the GAN has for them
WORDS = 3  # the least that says something


def options(bench: Bench) -> None:
    """Options are dataclass fields, each with a default and a help text, and can be given as text on the command line.

    Mend: ``name: Annotated[type, "what it is"] = default`` with numbers, text, yes/no, Literal, tuples or None.
    """
    cls = bench.factory
    expect(
        dataclasses.is_dataclass(cls) or "__init__" not in vars(cls),
        f"{cls.__name__} takes its options through an __init__ of its own, which no command line can see",
        "make it @dataclass(eq=False) and its options fields",
    )
    for name, option in options_of(cls).items():
        expect(option.default is not dataclasses.MISSING, f"the option {name!r} has no default")
        expect(option.help.strip(), f"the option {name!r} has no help text")
        given = option.default
        text = ",".join(map(str, given)) if isinstance(given, (tuple, list)) else str(given)
        try:
            read = getattr(build(cls, {name: text}, bench.name), name)
        except UsageError as error:
            raise Failed(f"the option {name!r} cannot be given as text, not even its default: {error}") from error
        expect(read == given, f"the option {name!r} given as {text!r} becomes {read!r}, not {given!r}")
    try:
        build(cls, bench.given, bench.name)
    except UsageError as error:
        raise Failed(f"it cannot be built with its defaults: {error}") from error


def two_instances(bench: Bench) -> None:
    """Two instances with equal options are two plugins: they register side by side.

    Mend: declare the class ``@dataclass(eq=False)``, and no ``__eq__``.
    """
    one, two = bench.plugin(), bench.plugin()
    expect(type(one).__hash__ is not None and one != two, f"two instances of {bench.factory.__name__} compare as equal")
    try:
        manager({"one": one, "two": two}, {})
    except ContractError as error:
        raise Skipped("no instance can be registered: see hooks") from error
    except ValueError as error:
        raise Failed(f"two instances cannot be registered together: {error}") from error


def hooks(bench: Bench) -> None:
    """Every hook is one that exists, takes arguments that exist, and carries ``@hookimpl``; there is at least one.

    Mend: as the sentence says; docs/plugins/hooks lists hooks and arguments.
    """
    try:
        manager({bench.name: bench.plugin()}, {})
    except ContractError as error:
        raise Failed(str(error).removeprefix(f"plugin {bench.name!r}").lstrip(":, ")) from error


def described(bench: Bench) -> None:
    """The class says what it does, its formula and its paper, which ``gankit plugins show`` prints.

    Mend: a docstring, ``formula: ClassVar[str] = "..."`` and ``paper: ClassVar[str] = "..."``, none of them "TODO"; where
    there is no paper: "none".
    """
    cls = bench.factory
    doc = vars(cls).get("__doc__") or ""
    # a dataclass without a docstring is given its signature
    expect(doc.strip() and not doc.startswith(f"{cls.__name__}("), f"{cls.__name__} has no docstring")
    for name in ("formula", "paper"):
        text = getattr(cls, name, "")
        expect(isinstance(text, str) and text.strip(), f"{cls.__name__}.{name} is missing or empty")
        expect(name not in options_of(cls), f"{name} is an option", f"annotate it: {name}: ClassVar[str]")
    for what, text in (("docstring", doc), ("formula", cls.formula), ("paper", cls.paper)):  # type: ignore[attr-defined]
        expect("TODO" not in text, f"the {what} of {cls.__name__} still says TODO")
        # signs count in a formula: weight*relu(D)
        words = re.findall(r"\w+|[^\w\s]" if what == "formula" else r"\w+", text)
        enough = len(words) >= WORDS or (what != "docstring" and text.startswith("none"))
        expect(enough, f"the {what} of {cls.__name__} is no more than {text!r}")


def names(bench: Bench) -> None:
    """Terms are named after the plugin, so that no two plugins share one, and nothing has a name of the core.

    Mend: call a term after the plugin, or plugin_what; a player or a metric by a name that nobody else has.
    """
    expect(bench.name not in CORE_NAMES, f"{bench.name!r} is a name of the core", "choose another name")
    others = {name for name in available() if name != bench.name}
    for record in bench.trained():
        for phase, found in record.terms.items():
            for name in found:
                own = name == bench.name or name.startswith(f"{bench.name}_")
                expect(own, f"the {phase.upper()} term {name!r} does not begin with the plugin's name, {bench.name!r}")
                expect(name not in others, f"the term {name!r} has the name of another plugin")
        assert record.gan is not None
        if brought := sorted(record.gan.players.keys() - NETWORKS):
            taken = {*dir(bench.gan(record.kind, {})), *(f"{name}_ema" for name in record.gan.players)}
            for name in brought:
                expect(name not in taken, f"the player {name!r} has the name of something that the GAN has already")


def no_cuda(bench: Bench) -> None:
    """No device is written into the code: what runs on one GPU has to run on any device.

    Mend: take the device of a tensor at hand, ``torch.zeros(n, device=x.device)`` or ``torch.zeros_like(x)``.
    """
    try:
        lines, first = inspect.getsourcelines(inspect.getmodule(bench.factory) or bench.factory)
    except (OSError, TypeError) as error:
        raise Skipped("its source is not at hand") from error
    for node in ast.walk(ast.parse("".join(lines))):
        line = getattr(node, "lineno", 0) + max(first - 1, 0)
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            expect(name != "cuda", f"line {line} calls .cuda()")
            written = [*node.args, *(k.value for k in node.keywords if k.arg == "device")]
            if name in ("to", "device", "Generator") or any(k.arg == "device" for k in node.keywords):
                for value in written:
                    text = value.value if isinstance(value, ast.Constant) else None
                    expect(
                        not (isinstance(text, str) and text.startswith("cuda")),
                        f"line {line} names the device {text!r}",
                    )


def three_steps(bench: Bench) -> str:
    """It trains for three steps on vectors and on images, or refuses one of them in a sentence.

    Mend: what cannot work is refused in ``setup`` with ``UsageError``; every other exception is a bug.
    """
    records = bench.records()
    for record in records:
        if record.error is not None and not record.refused:
            error = record.error
            text, mend = sentence(error), ""
            if "a second time" in text:
                mend = "take gradients with create_graph=True (or retain_graph=True), and leave .backward to the loop"
            elif "no slope to take" in text or "differentiated Tensors" in text:
                mend = (
                    "take slopes with respect to `view.real` and `view.fake`, from which the logits at hand were computed, "
                    "not to `batch.real` and `batch.fake`"
                )
            raise Failed(f"on {record.kind}s: {text}", mend)
    if all(record.refused for record in records):
        raise Failed(f"it refuses vectors and images alike: {records[0].error}", "give options with which it works: -o")
    return "; ".join(
        f"on vectors alone, for images are refused: {r.error}"
        if r.kind == "image"
        else f"on images alone, for vectors are refused: {r.error}"
        for r in records
        if r.refused
    )


def finite(bench: Bench) -> None:
    """Every term of these steps is a finite number.

    Mend: no root of 0 (its slope is infinite), no logarithm of 0, no division by a norm that may be 0.
    """
    for record in bench.trained():
        for phase, step, terms in record.updates:
            for name in record.terms[phase] & terms.keys():
                text = f"the {phase.upper()} term {name!r} is {terms[name]} in step {step} on {record.kind}s"
                expect(math.isfinite(terms[name]), text)
