"""Names of values: equal where the provenance is, different where any fact but the seed is."""

import hashlib
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gankit.provenance import column, hash_of, metric_of, same_column

FACTS = {"extractor": "digits", "weights": "0123", "n": 10_000, "split": "test", "k": 3, "seed": 1}
PLAIN = st.one_of(st.integers(), st.text(max_size=5), st.booleans(), st.floats(allow_nan=False))


def test_a_column_says_what_a_person_needs_and_a_hash_of_all() -> None:
    identity = {key: value for key, value in FACTS.items() if key != "seed"}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    assert column("fid", FACTS) == f"fid@digits,n=10000,test,{digest}"
    assert metric_of(column("fid", FACTS)) == metric_of("fid") == "fid"
    assert column("fid", dict(reversed(FACTS.items()))) == column("fid", FACTS)
    without = {key: value for key, value in FACTS.items() if key not in ("split", "n")}
    assert column("modes", without).startswith("modes@digits,")


@pytest.mark.parametrize("fact", ["extractor", "weights", "n", "split", "k"])
def test_another_fact_is_another_column(fact: str) -> None:
    for other in ({**FACTS, fact: "x"}, {key: value for key, value in FACTS.items() if key != fact}):
        assert column("fid", other) != column("fid", FACTS)
        assert not same_column(other, FACTS)


def test_seeds_share_a_column() -> None:
    assert column("fid", {**FACTS, "seed": 2}) == column("fid", FACTS)
    assert same_column({**FACTS, "seed": 2}, FACTS)


@given(st.dictionaries(st.text(max_size=5), PLAIN, max_size=4), st.dictionaries(st.text(max_size=5), PLAIN, max_size=4))
def test_one_column_means_the_same_provenance(a: dict[str, object], b: dict[str, object]) -> None:
    written = [json.dumps({k: v for k, v in facts.items() if k != "seed"}, sort_keys=True) for facts in (a, b)]
    assert (column("m", a) == column("m", b)) == same_column(a, b) == (written[0] == written[1])


def test_hash_of_tensors_sees_names_types_shapes_and_bits() -> None:
    tensors = {"a": torch.arange(6.0), "b": torch.tensor(1)}
    assert hash_of(dict(reversed(tensors.items()))) == hash_of(tensors)
    assert hash_of({**tensors, "a": torch.arange(12.0)[:6]}) == hash_of(tensors)
    digest = hashlib.sha256()
    digest.update(b"a torch.float32 (6,);" + tensors["a"].numpy().tobytes())
    digest.update(b"b torch.int64 ();" + tensors["b"].numpy().tobytes())
    assert hash_of(tensors) == digest.hexdigest()[:12]
    others = [
        {**tensors, "a": torch.arange(6.0).reshape(2, 3)},
        {**tensors, "a": torch.arange(6)},
        {**tensors, "a": torch.arange(6.0).nextafter(torch.tensor(9.0))},
        {"c": tensors["a"], "b": tensors["b"]},
    ]
    assert len({hash_of(t) for t in (tensors, *others)}) == 5
