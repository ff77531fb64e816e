"""Every plugin of this repository, and every broken one, through the whole conformance suite: for the test, and by hand.

make conformance                   # the plugins of this repository; a minute of one core
python tests/conformance.py        # the broken ones as well, for two more
"""

from __future__ import annotations

import sys
from pathlib import Path

from broken import Plugin, all_broken
from torch import Tensor, nn

from gankit.conformance import checks_of

OPTIONS: dict[str, dict[str, object]] = {  # cheap ones, and an extractor that needs no download
    "inception": {"extractor": f"{__file__}:pooled", "n": 20, "kid_subset_size": 10},
    "ivom": {"n": 9, "steps": 5},
    "unrolled": {"k": 2},
}
IN_TREE = sorted(path.parent.name for path in (Path(__file__).parents[1] / "plugins").glob("*/pyproject.toml"))


def pooled(images: Tensor) -> Tensor:
    """Features (B, 4 C) of images: means of their quarters."""
    return nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


def failures(target: type | str, only: tuple[str, ...] = (), **options: object) -> dict[str, str]:
    """The checks that fail, and their lines; of a broken plugin on the kinds of data it takes to see it."""
    checks = checks_of(target, {**OPTIONS.get(str(target), {}), **options}, only)
    checks[0].bench.data = getattr(target, "data", ("vector", "image"))
    results = [check.result() for check in checks]
    return {result.check: str(result) for result in results if result.status == "failed"}


def caught_by_its_own(cls: type[Plugin]) -> str:
    """What is wrong with how a broken plugin was caught, or nothing."""
    found = failures(cls)
    return "" if found.keys() == {cls.caught_by} else f"{cls.__name__} is for {cls.caught_by}, and fails {found}"


if __name__ == "__main__":
    wrong = [f"{name}: {line}" for name in IN_TREE for line in failures(name).values()]
    if "--in-tree" not in sys.argv:
        wrong += filter(None, map(caught_by_its_own, all_broken()))
    print("\n".join(wrong) or "nothing wrong")
    sys.exit(bool(wrong))
