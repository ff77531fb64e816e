"""Find plugins, load those that were named, register them, and hold them to the contract.

Free of torch until a plugin is loaded: listing what is installed reads the entry-point table and imports nothing.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import re
import sys
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from time import perf_counter
from types import ModuleType
from typing import Any

import pluggy

from gankit import __version__, hookspecs
from gankit.errors import UsageError
from gankit.files import expanded, imported
from gankit.options import build, closest

GROUP = "gankit"
CORE_NAMES = ("core", "loss", "stats", "averaging", "adv")  # what no plugin may be called


class ContractError(UsageError):
    """A plugin broke the hook contract: the message names plugin, hook and what is expected."""


@dataclass(frozen=True)
class Source:
    """Where a plugin comes from: its name, class, and the distribution and version that define its behaviour.

    The version of a plugin in a file is the hash of that file.
    """

    name: str
    factory: type
    distribution: str
    version: str


def available() -> dict[str, EntryPoint]:
    """Installed plugins by name, without importing them. Two distributions with one name are refused when loaded."""
    return {ep.name: ep for ep in sorted(entry_points(group=GROUP), key=lambda ep: ep.name)}


def distribution_of(entry_point: EntryPoint) -> tuple[str, str]:
    """Name and version of the distribution that declares an entry point."""
    return (entry_point.dist.name, entry_point.dist.version) if entry_point.dist else ("unknown", "0")


def find(spec: str) -> Source:
    """The plugin called ``spec``: an installed name, ``file.py:Class`` or ``module:Class``."""
    return _from_code(spec) if ":" in spec else _installed(spec)


def _installed(name: str) -> Source:
    named = [ep for ep in entry_points(group=GROUP) if ep.name == name]
    if not named:
        known = available()
        guess = closest(name, known)
        listed = f"installed are {', '.join(known) or 'none'}"
        more = guess or f": is its package installed? `gankit plugins` lists those that are; {listed}"
        raise UsageError(f"no plugin called {name!r} is installed{more}")
    if len({ep.value for ep in named}) > 1:
        owners = " and ".join(distribution_of(ep)[0] for ep in named)
        raise UsageError(f"the plugin name {name!r} is claimed by {owners}: uninstall one of them")
    _check_version(named[0])
    try:
        factory = named[0].load()
    except (ImportError, AttributeError) as error:
        raise UsageError(f"plugin {name!r} ({named[0].value}) cannot be loaded: {error}") from error
    return Source(name, _checked_class(factory, name), *distribution_of(named[0]))


def _check_version(entry_point: EntryPoint) -> None:
    """Refuse a plugin whose distribution asks for other versions of gankit."""
    from packaging.requirements import Requirement  # a sixth of the time that ``gankit --help`` would take

    for line in entry_point.dist.requires or () if entry_point.dist else ():
        requirement = Requirement(line)
        if requirement.name == "gankit" and not requirement.specifier.contains(__version__, prereleases=True):
            owner, version = distribution_of(entry_point)
            raise UsageError(
                f"plugin {entry_point.name!r} ({owner} {version}) is made for gankit {requirement.specifier}, and this is "
                f"{__version__}: pip install --upgrade gankit {owner}"
            )


def _from_code(spec: str) -> Source:
    factory, origin = load_object(spec)
    name = snake_case(spec.rpartition(":")[2])
    path = Path(inspect.getfile(sys.modules[factory.__module__])) if inspect.isclass(factory) else origin
    return Source(name, _checked_class(factory, spec), spec.rpartition(":")[0], version_of(path))


def version_of(path: Path | None) -> str:
    """What tells one state of a file of code from another: twelve hexadecimal digits of its SHA-256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path else "0"


def snake_case(name: str) -> str:
    """GradientPenalty -> gradient_penalty: what a class is called among plugins."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def load_object(spec: str) -> tuple[Any, Path | None]:
    """The object that ``file.py:name`` or ``module:name`` names, and the file it lies in.

    A file is loaded under its own stem. Modules are found as Python finds them, the current folder included.
    """
    where, _, attribute = spec.rpartition(":")
    if not where.strip(".") or (where.startswith(".") and not where.endswith(".py")) or not attribute:
        raise UsageError(f"{spec!r} names no object: give file.py:name or module:name")
    if where.endswith(".py"):
        path = expanded(where).resolve()
        if not path.is_file():
            raise UsageError(f"{where} is no file, so {spec!r} cannot be loaded")
        module = _load_file(path)
    else:
        if "" not in sys.path and str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        try:
            module = importlib.import_module(where)
        except ImportError as error:
            raise UsageError(f"cannot import {where!r} for {spec!r}: {error}") from error
        except Exception as error:
            raise UsageError(f"{where!r} for {spec!r} cannot be imported: {type(error).__name__}: {error}") from error
    if not hasattr(module, attribute):
        names = [name for name in vars(module) if not name.startswith("_")]
        raise UsageError(f"{where} has no {attribute!r}{closest(attribute, names)}")
    return getattr(module, attribute), Path(module.__file__) if module.__file__ else None


def _load_file(path: Path) -> ModuleType:
    try:
        return imported(path, f"gankit_file_{path.stem}")
    except Exception as error:
        raise UsageError(f"{path} cannot be loaded: {type(error).__name__}: {error}") from error


def _checked_class(factory: Any, name: str) -> type:
    if not inspect.isclass(factory):
        raise UsageError(f"plugin {name!r} is a {type(factory).__name__}; it must be a class with hook implementations")
    return factory


def create(specs: Iterable[str], options: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, object], list[Source]]:
    """The named plugins with their options, by name and in order, and where each came from."""
    sources = [find(spec) for spec in specs]
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"plugin {name!r} is named twice")
    for name in options:
        if name not in names:
            raise UsageError(f"options are given for {name!r}{closest(name, names)}, but --plugin {name} is not")
    plugins = {source.name: build(source.factory, options.get(source.name, {}), source.name) for source in sources}
    return plugins, sources


class Meter:
    """Seconds spent inside each plugin's hooks while ``on``; ``clock`` may wait for a device first."""

    def __init__(self) -> None:
        self.on = False
        self.clock: Callable[[], float] = perf_counter
        self.seconds: dict[str, float] = {}

    def add(self, plugin: str, started: float) -> None:
        """Charge the time since ``started`` to ``plugin``."""
        self.seconds[plugin] = self.seconds.get(plugin, 0.0) + self.clock() - started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A block that counts for nobody: what evaluation costs is no part of a step."""
        before, self.on = self.on, False
        try:
            yield
        finally:
            self.on = before


class Manager(pluggy.PluginManager):
    """One run's hooks: who is registered, what their hooks cost, and which plugin owns which term or metric."""

    def __init__(self) -> None:
        super().__init__("gankit")
        self.add_hookspecs(hookspecs)
        self.meter = Meter()
        self.owners: dict[tuple[str, str], str] = {(hook, "adv"): "core" for hook in ("pre_d_loss", "post_g_loss")}

    def parse_hookimpl_opts(self, plugin: object, name: str) -> pluggy.HookimplOpts | None:
        """As in pluggy, but for what every object has, such as ``__init__``: that is most of what there is to look at."""
        return None if name in vars(object) else super().parse_hookimpl_opts(plugin, name)

    def register(self, plugin: object, name: str | None = None) -> str | None:
        """As in pluggy; what it warns of, deprecated hooks and arguments, is said with the plugin's name."""
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            registered = super().register(plugin, name)
        for warning in said:
            text = f"plugin {registered!r}: {warning.message}"
            warnings.warn_explicit(text, warning.category, warning.filename, warning.lineno)
        return registered


def manager(plugins: Mapping[str, object], core: Mapping[str, object]) -> Manager:
    """Register ``core`` and ``plugins`` so that plugins act in their order, before the core.

    pluggy calls the last registered first, hence the reversal. Raises ``ContractError`` for a class given instead of an
    instance, a misspelt hook or argument, a hook without its marker, or no hook at all.
    """
    pm = Manager()
    for name, plugin in reversed((*plugins.items(), *core.items())):
        _validate(plugin, name)
        try:
            pm.register(plugin, name)
        except pluggy.PluginValidationError as error:
            raise ContractError(_explain(error, name)) from error
    for name, plugin in plugins.items():
        callers = pm.get_hookcallers(plugin) or []
        if not callers:
            raise ContractError(f"plugin {name!r} implements no hook: mark its methods with @gankit.hookimpl")
        for caller in callers:
            for impl in caller.get_hookimpls():
                if impl.plugin is plugin:
                    wrapped = (_guard_wrapper if impl.wrapper else _guard)(impl.function, caller.name, name, pm)
                    impl.function = wrapped  # type: ignore[misc]
    return pm


def _validate(plugin: object, name: str) -> None:
    if inspect.isclass(plugin):
        raise ContractError(f"plugin {name!r} is the class {plugin.__name__}: give an instance, {plugin.__name__}()")
    if type(plugin).__hash__ is None:
        raise ContractError(f"plugin {name!r} compares by value: declare it @dataclass(eq=False)")
    attributes = {name: value for owner in reversed(type(plugin).__mro__) for name, value in vars(owner).items()}
    for attribute, method in attributes.items():  # as they stand in the class: looking must not call a property
        marker = getattr(method, "gankit_impl", None)
        if attribute in hookspecs.NAMES and inspect.isfunction(method) and marker is None:
            raise ContractError(f"plugin {name!r}: its method {attribute} is no hook until it carries @gankit.hookimpl")
        if marker is None:
            continue
        hook = marker.get("specname") or attribute
        if hook not in hookspecs.NAMES:
            raise ContractError(f"plugin {name!r}: there is no hook {hook!r}{closest(hook, hookspecs.NAMES)}")
        if marker.get("hookwrapper"):
            raise ContractError(f"plugin {name!r}, hook {hook}: use @hookimpl(wrapper=True), not hookwrapper=True")
        for argument, parameter in inspect.signature(method).parameters.items():
            if parameter.default is not inspect.Parameter.empty:  # which some versions of pluggy never pass
                raise ContractError(f"plugin {name!r}, hook {hook}: the argument {argument!r} must not have a default")


def _explain(error: pluggy.PluginValidationError, name: str) -> str:
    match = re.search(r"hook '(\w+)'.*Argument\(s\) \{(.+?)\}", str(error), re.DOTALL)
    if not match:
        return f"plugin {name!r}: {error}"
    hook, unknown = match[1], match[2].replace("'", "").split(", ")[0]
    known = list(inspect.signature(getattr(hookspecs, hook)).parameters)
    return (
        f"plugin {name!r}, hook {hook}: no argument {unknown!r}{closest(unknown, known)}; it offers {', '.join(known)}"
    )


def _note(error: Exception, plugin: str, hook: str) -> None:
    """Say whose error it is; the innermost plugin speaks first and alone."""
    if not any(note.startswith("in plugin ") for note in getattr(error, "__notes__", ())):
        error.add_note(f"in plugin {plugin!r}, hook {hook!r}")


def _check(value: Any, hook: str, plugin: str, pm: Manager, *, passed_on: bool = False) -> None:
    """Hold a result to the contract; one that a wrapper passed on may hold names of other plugins."""
    from gankit.contract import CHECKS

    try:
        CHECKS[hook](value)
    except (TypeError, ValueError) as error:
        raise ContractError(f"plugin {plugin!r}, hook {hook}: {error}") from None
    if isinstance(value, dict):
        for name in value:
            owner = pm.owners.setdefault((hook, name), plugin)
            if owner != plugin and not passed_on:
                raise ContractError(
                    f"plugin {plugin!r}, hook {hook}: the name {name!r} is already used by {owner!r}: "
                    "switch one of the two off"
                )


def _guard(function: Callable[..., Any], hook: str, plugin: str, pm: Manager) -> Callable[..., Any]:
    """A plain implementation, timed when the meter is on, its errors noted and its result checked."""

    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        started = pm.meter.clock() if pm.meter.on else 0.0
        try:
            value = function(*args, **kwargs)
        except Exception as error:
            _note(error, plugin, hook)
            raise
        if pm.meter.on:
            pm.meter.add(plugin, started)
        if value is not None:
            _check(value, hook, plugin, pm)
        return value

    return guarded


def _guard_wrapper(function: Callable[..., Any], hook: str, plugin: str, pm: Manager) -> Callable[..., Any]:
    """The same for a wrapper; an error from further inside passes through it without a note."""

    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Generator[None, Any, Any]:
        started = pm.meter.clock() if pm.meter.on else 0.0
        generator = function(*args, **kwargs)
        try:
            next(generator)
        except StopIteration:
            raise ContractError(f"plugin {plugin!r}, hook {hook}: a wrapper must yield once") from None
        except Exception as error:
            _note(error, plugin, hook)
            raise
        if pm.meter.on:
            pm.meter.add(plugin, started)
        try:
            inner = yield
        except BaseException as error:
            try:
                generator.throw(error)
            except StopIteration as done:
                value = done.value
            else:
                raise ContractError(f"plugin {plugin!r}, hook {hook}: a wrapper must yield only once") from error
        else:
            started = pm.meter.clock() if pm.meter.on else 0.0
            try:
                generator.send(inner)
            except StopIteration as done:
                value = done.value
            except Exception as error:
                _note(error, plugin, hook)
                raise
            else:
                raise ContractError(f"plugin {plugin!r}, hook {hook}: a wrapper must yield only once")
            if pm.meter.on:
                pm.meter.add(plugin, started)
        for item in value if isinstance(value, list) else [value]:
            if item is not None or hook in ("sample", "view", "critic"):
                _check(item, hook, plugin, pm, passed_on=True)
        return value

    return guarded
