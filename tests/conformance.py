"""Every plugin of this repository, and every broken one, through the whole conformance suite: for the test, and by hand.

make conformance                   # the plugins of this repository; a minute of one core
python tests/conformance.py        # the broken ones as well, for two more
"""

from __future__ import annotations

import sys
from pathlib import Path

from broken import Plugin, all_broken
from torch import Tensor, nn

from gankit.conformance import Result, checks_of

OPTIONS: dict[str, dict[str, object]] = {  # cheap ones, and an extractor that needs no download
    "inception": {"extractor": f"{__file__}:pooled", "n": 20, "kid_subset_size": 10},
    "ivom": {"n": 9, "steps": 5},
    "unrolled": {"k": 2},
}
IN_TREE = sorted(path.parent.name for path in (Path(__file__).parents[1] / "plugins").glob("*/pyproject.toml"))

# Checks that find nothing to look at in a plugin. One that skips more than these has gone blind, which nobody would see.
NO_TERMS = ("terms_seen", "the_same_again", "another_call", "float64", "gradient_reaches", "leaves_g_alone", "derivative",
            "weight_zero", "weight_is_a_factor", "every", "smaller_batch", "logit_shapes")  # fmt: skip
NO_VIEW = ("view_form", "view_sides_alike", "view_gradient", "view_again", "view_phases_alike", "view_keeps_others")
NO_CLAIMS = ("refuses_batch_norm", "claimed_norm", "claimed_place", "claimed_logits", "claimed_slopes", "claimed_draws",
             "claimed_mean", "claimed_rows_apart", "claimed_sign", "claimed_deterministic", "claimed_stateless",
             "claimed_costs")  # fmt: skip
NOTHING = (*NO_TERMS, *NO_VIEW, *NO_CLAIMS, "plain_state")  # but that it works and does no harm
SKIPPED: dict[str, set[str]] = {
    "bigan": {*NO_TERMS, *NO_CLAIMS, "plain_state", "metrics"},
    "consistency": {*NO_VIEW, *NO_CLAIMS, "plain_state", "every", "players", "metrics"}
                   - {"claimed_draws", "claimed_sign", "claimed_costs"},
    "diffaugment": {*NO_TERMS, *NO_CLAIMS, "plain_state", "players", "metrics"},
    "dragan": {*NO_VIEW, "plain_state", "players", "metrics", "claimed_logits", "claimed_slopes", "claimed_mean",
               "claimed_rows_apart", "claimed_deterministic"},
    "feature_matching": {*NO_VIEW, *NO_CLAIMS, "plain_state", "another_call", "every", "players", "metrics"},
    "gradient_penalty": {*NO_VIEW, "plain_state", "players", "metrics", "claimed_logits", "claimed_slopes", "claimed_mean",
                         "claimed_rows_apart", "claimed_deterministic"},
    "historical_averaging": {*NO_VIEW, *NO_CLAIMS, "weight_is_a_factor", "every", "players", "metrics"},
    "inception": {*NOTHING, "players"},
    "ivom": {*NOTHING, "players"},
    "label_smoothing": {*NOTHING, "players", "metrics"},
    "lecam": {*NO_VIEW, "every", "refuses_batch_norm", "players", "metrics", "claimed_norm", "claimed_place",
              "claimed_slopes", "claimed_rows_apart", "claimed_stateless"},
    "minibatch_discrimination": {*NOTHING, "players", "metrics"},
    "mode_seeking": {*NO_VIEW, *NO_CLAIMS, "plain_state", "another_call", "every", "players", "metrics"},
    "packing": {*NO_TERMS, *NO_CLAIMS, "plain_state", "view_sides_alike", "players", "metrics"},
    "pairwise_gp": {*NO_CLAIMS, "plain_state", "metrics"},
    "progressive": {*NOTHING} - {"terms_seen", "another_call"},
    "r1": {*NO_VIEW, "plain_state", "players", "metrics", "claimed_logits", "claimed_slopes", "claimed_rows_apart"},
    "r2": {*NO_VIEW, "plain_state", "players", "metrics", "claimed_logits", "claimed_slopes", "claimed_rows_apart"},
    "self_attention": {*NOTHING, "players", "metrics"},
    "spectral_norm": {*NOTHING, "players", "metrics"},
    "stacked": {*NO_CLAIMS, "plain_state", "weight_zero", "weight_is_a_factor", "every", "view_sides_alike", "metrics"},
    "tensorboard": {*NOTHING, "players"},
    "ttur": {*NOTHING, "players", "metrics"},
    "unrolled": {*NOTHING, "players", "metrics"},
    "veegan": {*NO_CLAIMS, "plain_state", "another_call", "every", "metrics"},
    "virtual_batch_norm": {*NOTHING, "players", "metrics"},
    "weight_clipping": {*NOTHING, "players", "metrics"},
}  # fmt: skip


def pooled(images: Tensor) -> Tensor:
    """Features (B, 4 C) of images: means of their quarters."""
    return nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


def results(target: type | str, only: tuple[str, ...] = (), **options: object) -> list[Result]:
    """What the checks find; of a broken plugin on the kinds of data it takes to see it."""
    checks = checks_of(target, {**OPTIONS.get(str(target), {}), **options}, only)
    checks[0].bench.data = getattr(target, "data", ("vector", "image"))
    return [check.result() for check in checks]


def failures(target: type | str, only: tuple[str, ...] = (), **options: object) -> dict[str, str]:
    """The checks that fail, and their lines."""
    return {result.check: str(result) for result in results(target, only, **options) if result.status == "failed"}


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
