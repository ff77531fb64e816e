"""Every ordered pair of plugins gives what each gives by itself, or is refused with a sentence; the page says which."""

from functools import cache

import pytest
from pairs import IN_TREE, KINDS, PAGE, page, problems

PAIRS = [(one, two) for one in IN_TREE for two in IN_TREE if one != two]
outcome = cache(problems)


@pytest.mark.parametrize(("one", "two"), PAIRS, ids=[f"{one}+{two}" for one, two in PAIRS])
def test_a_pair(one: str, two: str) -> None:
    for kind in KINDS:
        refusal, wrong = outcome(one, two, kind)
        assert not wrong, f"{kind}: {wrong}"
        assert "\n" not in refusal
        assert not refusal or ":" in refusal  # why, and after the colon what to do


def test_the_page_is_fresh() -> None:
    refusals = {(one, two, kind): outcome(one, two, kind)[0] for one, two in PAIRS for kind in KINDS}
    assert PAGE.read_text() == page(refusals), "run: python tests/pairs.py"
