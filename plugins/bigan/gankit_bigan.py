"""BiGAN / ALI as a gankit plugin: an encoder trained with the generator, and a critic of pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gankit.joint import Joint


@dataclass(eq=False)
class BiGAN(Joint):
    """Train an encoder E with G: the critic tells (x, E(x)) from (G(z), z). All of it is :class:`gankit.joint.Joint`."""

    formula: ClassVar[str] = (
        "D: loss of (x, E(x)) real against (G(z), z) fake;  G and E: the same with the roles swapped"
    )
    paper: ClassVar[str] = "Donahue et al. 2017, Adversarial Feature Learning, arXiv:1605.09782, eq. 3"
