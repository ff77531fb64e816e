"""Every ordered pair of plugins for two steps: what comes out, for the test and for docs/compatibility.md.

python tests/pairs.py        # writes docs/compatibility.md
"""

from __future__ import annotations

import math
import warnings
from functools import cache, partial
from pathlib import Path
from typing import Any

from gankit import GAN, UsageError
from gankit.loop import train, update
from gankit.options import build
from gankit.plugins import find
from gankit.testing import Log, tiny_gan

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "compatibility.md"
IN_TREE = sorted(path.parent.name for path in (ROOT / "plugins").glob("*/pyproject.toml"))
KINDS: dict[str, dict[str, Any]] = {"vector": {}, "image": {"shape": (1, 16, 16)}}  # 4 * 2^k px, which growing needs
OPTIONS: dict[str, dict[str, Any]] = {"unrolled": {"k": 1}, "lecam": {"start": 0}}  # cheap, and on from the first step
SETTINGS: dict[str, dict[str, Any]] = {"weight_clipping": {"loss": "wasserstein"}}
TERM_HOOKS = ("pre_d_loss", "post_g_loss")
located = cache(find)  # which looks through all that is installed


def load(names: tuple[str, ...]) -> dict[str, object]:
    """Fresh plugins by name, in this order."""
    return {name: build(located(name).factory, OPTIONS.get(name, {}), name) for name in names}


def muted(plugin: object) -> object | None:
    """The plugin without its loss terms: what is left changes networks, views or critics; None if nothing is."""
    quiet = type(f"Muted{type(plugin).__name__}", (type(plugin),), dict.fromkeys(TERM_HOOKS))
    twin = quiet.__new__(quiet)
    twin.__dict__.update(vars(plugin))
    left = [name for name in dir(twin) if hasattr(getattr(twin, name, None), "gankit_impl")]
    return twin if left else None


def first_terms(gan: GAN, log: Log) -> dict[str, list[float]]:
    """Each plugin's terms in one D update and in one G update, both from the networks' start."""
    update(gan, "dg", 1)  # both players' terms are known before either moves
    owners = {name: owner for (_, name), owner in gan.manager.owners.items()}
    found: dict[str, list[float]] = {name: [] for name in gan.plugins}
    for _, _, terms in log.updates:
        for name, value in terms.items():
            if owners[name] in found:
                found[owners[name]].append(value)
    return found


def with_log(plugins: dict[str, object], kind: str, settings: dict[str, Any]) -> tuple[GAN, Log]:
    """A tiny GAN with these plugins, and the record of its updates."""
    log = Log()
    return tiny_gan(kind, plugins, {"log": log}, **settings), log


@cache
def by_itself(name: str, kind: str, settings: tuple[tuple[str, Any], ...]) -> list[float]:
    """A plugin's terms without any other."""
    return first_terms(*with_log(load((name,)), kind, dict(settings)))[name]


def problems(one: str, two: str, kind: str) -> tuple[str, list[str]]:
    """The refusal of the pair, if any, and what is wrong with what it gave."""
    settings = {**KINDS[kind], **SETTINGS.get(one, {}), **SETTINGS.get(two, {})}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            gan, log = with_log(load((one, two)), kind, settings)
            together = first_terms(gan, log)
            gan.step = 1
            train(gan, 2)  # one player after the other, as in most runs
        except UsageError as error:
            return " ".join(str(error).split()), []
        wrong = [
            f"{phase} step {step}: {name} is {value}"
            for phase, step, terms in log.updates
            for name, value in terms.items()
            if not math.isfinite(value)
        ]
        for name, other in ((one, two), (two, one)):
            plugins = load((one, two))
            quiet = muted(plugins[other])
            if quiet is None:
                alone = by_itself(name, kind, tuple(settings.items()))
            else:
                alone = first_terms(*with_log(plugins | {other: quiet}, kind, settings))[name]
            if alone != together[name]:
                wrong.append(f"{name} gives {together[name]} beside {other}, {alone} by itself")
    return "", wrong


def loss_of(names: tuple[str, ...], kind: str = "vector") -> tuple[Any, ...] | None:
    """What the plugins, in this order, make of the adversarial loss; None if they are refused."""

    def plain(function: Any) -> Any:
        return (function.func, function.keywords) if isinstance(function, partial) else function

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            loss = tiny_gan(kind, load(names), **KINDS[kind]).loss
        except UsageError:
            return None
    return plain(loss.d), plain(loss.g), loss.g_sides, plain(loss.mirrored), loss.real_target


def page(refusals: dict[tuple[str, str, str], str]) -> str:
    """docs/compatibility.md: a table of all pairs, and the sentences of the refusals."""
    sentences: dict[str, int] = {}
    lines = [
        "# Which plugins combine",
        "",
        "Generated by `python tests/pairs.py` from two steps of every ordered pair on vectors and on images: in the first",
        "both players move at once, in the second in turn. A test keeps it fresh. Row first, column second on the command",
        "line. A dot: both give finite terms, equal to what each gives by itself on the networks and views of the pair. A",
        "number: refused at set-up, with the sentence below.",
        "`v` and `i` mark what holds for vectors or images only.",
        "",
        "| | " + " | ".join(IN_TREE) + " |",
        "|---" * (len(IN_TREE) + 1) + "|",
    ]
    for one in IN_TREE:
        cells = []
        for two in IN_TREE:
            marks = []
            for kind in KINDS:
                refusal = refusals.get((one, two, kind), "")
                marks.append(str(sentences.setdefault(refusal, len(sentences) + 1)) if refusal else "·")
            same = marks[0] == marks[1]
            cells.append("" if one == two else marks[0] if same else f"v {marks[0]} i {marks[1]}")
        lines.append(f"| **{one}** | " + " | ".join(cells) + " |")
    lines += ["", *(f"{number}. {sentence}" for sentence, number in sentences.items()), ""]
    return "\n".join(lines)


def everything() -> tuple[dict[tuple[str, str, str], str], list[str]]:
    """All pairs: refusals by pair and kind, and all problems."""
    refusals, wrong = {}, []
    for one in IN_TREE:
        for two in IN_TREE:
            for kind in KINDS if one != two else ():
                refusals[one, two, kind], found = problems(one, two, kind)
                wrong += [f"{one} + {two} ({kind}): {text}" for text in found]
    return refusals, wrong


if __name__ == "__main__":
    refusals, wrong = everything()
    PAGE.write_text(page(refusals))
    print("\n".join(wrong) or "no problems")
