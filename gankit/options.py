"""Options as dataclass fields: one schema for plugins, the configuration file and the command line. Free of torch."""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Union, get_args, get_origin

from gankit.errors import UsageError

TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


@dataclasses.dataclass(frozen=True)
class Option:
    """One field as a person sees it: name, type, default (or ``dataclasses.MISSING``) and help text."""

    name: str
    annotation: Any
    default: Any
    help: str


def options_of(schema: type) -> dict[str, Option]:
    """The options of a dataclass, in order; help is the string in ``Annotated[type, "help"]``."""
    if not dataclasses.is_dataclass(schema):
        return {}
    hints = typing.get_type_hints(schema, include_extras=True)
    found = {}
    for field in dataclasses.fields(schema):
        if not field.init:
            continue
        annotation, text = hints[field.name], ""
        if hasattr(annotation, "__metadata__"):
            text = next((m for m in annotation.__metadata__ if isinstance(m, str)), "")
            annotation = annotation.__origin__
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        found[field.name] = Option(field.name, annotation, default, text)
    return found


def type_name(annotation: Any) -> str:
    """An annotation as a person would write it: ``number``, ``whole number``, ``yes/no``, ``a|b``, ..."""
    if get_origin(annotation) is Literal:
        return "|".join(map(str, get_args(annotation)))
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join("none" if a is type(None) else type_name(a) for a in get_args(annotation))
    if get_origin(annotation) in (tuple, list):
        return f"list of {type_name(get_args(annotation)[0])}"
    names = {float: "number", int: "whole number", bool: "yes/no", str: "text"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def closest(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the best of ``known``, or nothing."""
    best = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {best[0]!r}?)" if best else ""


def convert(value: Any, annotation: Any, where: str) -> Any:
    """``value`` (text from a flag, or a TOML value) as the annotated type.

    Raises ``UsageError`` naming ``where`` when it does not fit.
    """
    try:
        return _convert(value, annotation)
    except (ValueError, TypeError, OverflowError):
        raise UsageError(f"{where} must be {type_name(annotation)}, not {value!r}") from None


def _convert(value: Any, annotation: Any) -> Any:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        for choice in arguments:
            if value == choice or str(value).replace("-", "_") == str(choice).replace("-", "_"):
                return choice
        raise ValueError
    if origin in (Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "") and type(None) in arguments):
            return None
        for choice in (a for a in arguments if a is not type(None)):
            try:
                return _convert(value, choice)
            except (ValueError, TypeError, OverflowError):
                continue
        raise ValueError
    if origin in (tuple, list):
        items = [item.strip() for item in value.split(",") if item.strip()] if isinstance(value, str) else value
        return origin(_convert(item, arguments[0]) for item in items)
    if annotation is bool:
        text = str(value).lower()
        if text not in TRUE + FALSE:
            raise ValueError
        return text in TRUE
    if isinstance(value, bool) or not isinstance(value, (str, numbers.Real)):
        raise TypeError
    if annotation is int:
        number = float(value)
        if number != int(number):
            raise ValueError
        if isinstance(value, str):
            return int(value) if value.strip().lstrip("+-").isdigit() else int(number)
        return math.trunc(value)
    if annotation is float:
        if math.isnan(float(value)):
            raise ValueError
        return float(value)
    if annotation is str and isinstance(value, str):
        return value
    raise TypeError


def build(schema: type, values: Mapping[str, Any], where: str) -> Any:
    """An instance of the dataclass from option values; ``where`` names it in messages.

    Unknown names, values of the wrong type and whatever ``__post_init__`` rejects raise ``UsageError``.
    """
    known = options_of(schema)
    for name in values:
        if name not in known:
            listed = f"it has {', '.join(known)}" if known else "it has none"
            raise UsageError(f"{where} has no option {name!r}{closest(name, known)}; {listed}")
    converted = {name: convert(value, known[name].annotation, f"{where}.{name}") for name, value in values.items()}
    missing = [name for name, option in known.items() if option.default is dataclasses.MISSING and name not in values]
    if missing:
        raise UsageError(f"{where} needs a value for {missing[0]!r}: -o {where}.{missing[0]}=...")
    try:
        return schema(**converted)
    except (ValueError, TypeError) as error:
        raise UsageError(f"{where}: {error}") from error
