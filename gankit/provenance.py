"""Where a metric's value comes from, as part of its name: values that cannot be compared have no name in common."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

SHOWN = ("extractor", "n", "split")


def column(metric: str, facts: Mapping[str, Any]) -> str:
    """The name under which a value of ``metric`` goes: ``fid@digits,n=10000,test,1a2b3c4d``.

    ``facts`` say, in values that JSON has, all that the number depends on besides the samples themselves. The name ends
    with eight hexadecimal digits of their hash, so two values share a name only if they share their provenance. The
    ``seed``, by which repetitions of one measurement differ, is left out of it.
    """
    shown = [f"n={facts[name]}" if name == "n" else str(facts[name]) for name in SHOWN if name in facts]
    identity = {name: value for name, value in facts.items() if name != "seed"}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    return f"{metric}@{','.join([*shown, digest])}"


def metric_of(name: str) -> str:
    """The metric of a column: ``fid`` of ``fid@digits,n=10000,test,1a2b3c4d``, and of ``fid``."""
    return name.partition("@")[0]


def same_column(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether values of these two provenances may be compared: all facts are equal but the seed."""
    return column("", a) == column("", b)


def hash_of(tensors: Mapping[str, Tensor]) -> str:
    """Twelve hexadecimal digits of the SHA-256 of named tensors: names, types, shapes and bits, in any order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)};".encode())
        digest.update(plain.numpy().data)
    return digest.hexdigest()[:12]
