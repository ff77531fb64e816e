"""Every ordered pair of plugins gives what each gives by itself, or is refused with a sentence; the page says which."""

from functools import cache
from itertools import combinations

import pytest
from pairs import IN_TREE, KINDS, PAGE, loss_of, page, problems

PAIRS = [(one, two) for one in IN_TREE for two in IN_TREE if one != two]
outcome = cache(problems)


@pytest.mark.parametrize(("one", "two"), PAIRS, ids=[f"{one}+{two}" for one, two in PAIRS])
def test_a_pair(one: str, two: str) -> None:
    for kind in KINDS:
        refusal, wrong = outcome(one, two, kind)
        assert not wrong, f"{kind}: {wrong}"
        assert "\n" not in refusal
        assert not refusal or ":" in refusal  # why, and after the colon what to do


def test_the_loss_does_not_depend_on_the_order() -> None:
    alone = {name: loss_of((name,)) for name in IN_TREE}
    changing = [name for name, loss in alone.items() if loss not in (None, loss_of(()))]
    assert {"bigan", "label_smoothing", "unrolled", "veegan"} <= {*changing}
    for one, two in combinations(changing, 2):
        assert loss_of((one, two)) == loss_of((two, one)), f"{one} + {two}"


def test_the_page_is_fresh() -> None:
    refusals = {(one, two, kind): outcome(one, two, kind)[0] for one, two in PAIRS for kind in KINDS}
    assert PAGE.read_text() == page(refusals), "run: python tests/pairs.py"
