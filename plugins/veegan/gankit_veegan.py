"""VEEGAN (Srivastava et al. 2017, arXiv:1705.07761): its distance in latent space as a function, and a gankit plugin."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from gankit import Batch, Player, UsageError, View, hookimpl
from gankit.checks import need_logistic_loss
from gankit.joint import encode, make_encoder, pairs
from gankit.losses import wasserstein_g, wasserstein_mirrored

if TYPE_CHECKING:
    from gankit import GAN


def latent_distance(z: Tensor, reconstruction: Tensor, distance: str = "l2") -> Tensor:
    """Mean over the batch of d(z, F(G(z))), the autoencoder loss over latents of arXiv:1705.07761, section 3.

    "l2": d(a, b) = ||a - b||_2^2, summed over the latent's coordinates. "cosine": d(a, b) = 1 - a.b / (||a|| ||b||),
    between 0 and 2, blind to lengths (with one coordinate it compares signs only, and has no gradient).

    z, reconstruction: (B, \\*latent) each, one vector per sample whatever the shape. Returns a 0-dim tensor with a graph to
    both. No critic forward. Raises ValueError if the shapes differ or the distance is unknown.
    """
    if z.shape != reconstruction.shape:
        raise ValueError(f"a reconstruction has the shape of z, {tuple(z.shape)}, not {tuple(reconstruction.shape)}")
    z, reconstruction = z.flatten(1), reconstruction.flatten(1)
    if distance == "l2":
        return (z - reconstruction).square().sum(1).mean()
    if distance == "cosine":
        return (1 - cosine_similarity(z, reconstruction, dim=1)).mean()
    raise ValueError(f"distance is 'l2' or 'cosine', not {distance!r}")


@dataclass(eq=False)
class VEEGAN:
    """Train a reconstructor F that maps data to latents, so that a generator that drops modes cannot be undone.

    The critic tells (x, F(x)) from (G(z), z) as a logistic classifier, so its logit is the log ratio of the two joint
    densities. gankit's logit is large on real pairs, the paper's on generated ones: D_paper = -D. G minimises
    mean D_paper(G(z), z) = -mean D(G(z), z) plus the distance d(z, F(G(z))), and F that distance and, by default, the
    same ratio on its own side, +mean D(x, F(x)).

    Sources differ on F. Its first poster says that F learns "within the KL term", through D on (x, F(x)), and from the
    distance: ``reconstructor_loss="joint"``, the default. The paper's algorithm listing and the authors' notebook for the
    grid give F the gradient of the distance alone: ``reconstructor_loss="reconstruction"``. The notebook takes F(x) for the
    mean of a normal p(z | x) of variance 1: d is half the squared norm, ``weight=0.5``, and D sees codes drawn from
    it, ``noise=1``.

    The plugin replaces G's adversarial loss, whatever ``--loss`` says about G: the mean logit is VEEGAN's. D's loss has
    to be the logistic one, or a logit is no log ratio; others are refused (``--allow veegan-loss`` keeps D's loss).
    """

    formula: ClassVar[str] = (
        "D: logistic loss of (x, F(x)) real against (G(z), z) fake;  "
        "G and F: [mean D(x, F(x))] - mean D(G(z), z) + weight * mean d(z, F(G(z)))"
    )
    paper: ClassVar[str] = (
        "Srivastava et al. 2017, VEEGAN: Reducing Mode Collapse in GANs using Implicit Variational Learning, "
        "arXiv:1705.07761, section 3"
    )

    weight: Annotated[float, "weight of the distance d(z, F(G(z))); the paper has none, that is 1"] = 1.0
    distance: Annotated[Literal["l2", "cosine"], "d: squared l2 norm in latent space, or 1 - cosine"] = "l2"
    reconstructor_loss: Annotated[
        Literal["joint", "reconstruction"], "F learns through D on (x, F(x)) and from d, or from d alone"
    ] = "joint"
    noise: Annotated[
        float, "standard deviation of the noise on the codes F(x) that D sees; the authors' notebook has 1"
    ] = 0.0
    reconstructor: Annotated[str | None, "your own F: module:factory or file.py:factory(shape, z_dim)"] = None

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise ValueError("weight must not be negative, infinite or NaN")
        if not 0 <= self.noise < math.inf:
            raise ValueError("noise must not be negative, infinite or NaN")
        if self.distance not in ("l2", "cosine"):
            raise ValueError(f"distance is 'l2' or 'cosine', not {self.distance!r}")
        if self.reconstructor_loss not in ("joint", "reconstruction"):
            raise ValueError(f"reconstructor_loss is 'joint' or 'reconstruction', not {self.reconstructor_loss!r}")
        if self.reconstructor_loss == "reconstruction" and self.weight == 0:
            raise ValueError("weight must be positive where F learns from the reconstruction alone")

    @hookimpl
    def players(self, gan: GAN) -> dict[str, Player]:
        """F, which maps a sample to a latent; its range is the prior's: tanh for a uniform latent, linear for a normal."""
        return {"reconstructor": Player(make_encoder(gan, self.reconstructor, name="reconstructor"), "g")}

    @hookimpl(wrapper=True)
    def setup(self, gan: GAN) -> Generator[None, list[None], list[None]]:
        """Set G's loss to the mean logit, before others change it (unrolling has it act on both sides), and refuse a second
        encoder; afterwards refuse losses whose logit is no log ratio, such as smoothed ones.
        """
        if "encoder" in gan.players:
            raise UsageError(
                "veegan and the other plugin bring a network from samples to latents each, and the critic compares one: "
                "switch one of them off"
            )
        if self.distance == "cosine" and gan.latent.dim == 1:
            raise UsageError("the cosine of one coordinate is its sign and trains nothing: use -o veegan.distance=l2")
        gan.loss = replace(gan.loss, g=wasserstein_g, g_sides=("fake_logits",), mirrored=wasserstein_mirrored)
        if self.reconstructor_loss == "joint":
            gan.loss = gan.loss.symmetric()
        found = yield
        need_logistic_loss(gan, "veegan")
        return found

    @hookimpl(wrapper=True)
    def sample(self, gan: GAN) -> Generator[None, Batch, Batch]:
        """Add the code of the real samples, ``extra["code"]``, F(x) and noise; without a graph where D is not to train F."""
        batch = yield
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.reconstructor_loss == "joint"):
            code = encode(gan.players["reconstructor"].module, batch.real, batch.z, name="reconstructor")
        if self.noise:
            code = code + self.noise * torch.empty_like(code).normal_(generator=gan.rng(self))
        return batch._replace(extra={**batch.extra, "code": code})

    @hookimpl(wrapper=True)
    def view(self, batch: Batch) -> Generator[None, View, View]:
        """Pairs: (x, F(x)) on the real side, (G(z), z) on the fake one."""
        view = yield
        return pairs(view, batch.extra["code"], batch.z)

    @hookimpl
    def post_g_loss(self, gan: GAN, batch: Batch) -> dict[str, Tensor] | None:
        """The term "veegan", weight * mean d(z, F(G(z))), which trains G and F; sample by sample also under packing."""
        if self.weight == 0:
            return None
        reconstruction = gan.players["reconstructor"].module(batch.fake)
        return {"veegan": self.weight * latent_distance(batch.z, reconstruction, self.distance)}
