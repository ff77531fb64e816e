"""Label smoothing for the discriminator (Salimans et al. 2016, arXiv:1606.03498), as functions and a gankit plugin."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar

from torch import Tensor
from torch.nn.functional import softplus

from gankit import UsageError, hookimpl, losses

if TYPE_CHECKING:
    from gankit import GAN


def smoothed_logistic_d(
    real_logits: Tensor, fake_logits: Tensor, *, real_target: float = 0.9, fake_target: float = 0.0
) -> Tensor:
    """D's cross entropy with soft targets t for real and s for fake samples, in logits r and f.

        mean [softplus(-r) + (1 - t) r] + mean [softplus(f) - s f]

    which is the binary cross entropy of sigmoid(r) with t and of sigmoid(f) with s; section 3.4 of arXiv:1606.03498 with
    t = 0.9, s = 0. The best D is (t p_data + s p_model) / (p_data + p_model).

    real_logits, fake_logits: any shapes, larger = more real; the mean is taken over everything. Returns a 0-dim tensor. With
    t = 1 and s = 0 this is ``gankit.losses.logistic_d``, bit for bit. Costs nothing.
    """
    real = softplus(-real_logits)
    fake = softplus(fake_logits)
    if real_target != 1:
        real = real + (1 - real_target) * real_logits
    if fake_target != 0:
        fake = fake - fake_target * fake_logits
    return real.mean() + fake.mean()


def smoothed(loss: losses.Loss, *, real_target: float = 0.9, fake_target: float = 0.0) -> losses.Loss:
    """The same adversarial loss with soft targets for D; G's loss stays as it is.

    real_target, fake_target: probabilities of being real, 0 <= fake_target < real_target <= 1. Logistic losses get
    :func:`smoothed_logistic_d`. Least squares, whose D sends fakes to a and reals to b, gets the targets
    a + t (b - a) and a + s (b - a): like the cross entropy, it then has the gradient of labels that are flipped with
    probability 1 - t on the real and s on the fake side. The paper has the logistic case only.

    Raises UsageError for other losses, whose D has no targets, and for targets out of range.
    """
    if not 0 <= fake_target < real_target <= 1:
        raise UsageError(
            f"targets are probabilities with fake_target below real_target, not real {real_target} and fake {fake_target}"
        )
    if loss.d is losses.logistic_d:
        d = partial(smoothed_logistic_d, real_target=real_target, fake_target=fake_target)
        return replace(loss, d=d, real_target=real_target)
    if loss.real_target is not None and isinstance(loss.d, partial) and loss.d.func is losses.least_squares_d:
        a, b = loss.d.keywords["a"], loss.d.keywords["b"]
        # convex combinations: exact at 0 and 1
        real, fake = ((1 - t) * a + t * b for t in (real_target, fake_target))
        return replace(loss, d=partial(losses.least_squares_d, a=fake, b=real), real_target=real)
    raise UsageError(
        f"label smoothing needs a loss whose D has targets, and {loss.name} has none: "
        f"use --loss non_saturating, saturating or least_squares"
    )


@dataclass(eq=False)
class LabelSmoothing:
    """Ask the discriminator for 0.9 instead of 1 on real samples, so that it is never rewarded for being certain."""

    formula: ClassVar[str] = "D: mean [softplus(-D(x)) + (1 - t) D(x)] + mean [softplus(D(G(z))) - s D(G(z))]"
    paper: ClassVar[str] = "Salimans et al. 2016, Improved Techniques for Training GANs, arXiv:1606.03498, section 3.4"

    real_target: Annotated[float, "t: D's target on real samples, 1 is no smoothing"] = 0.9
    fake_target: Annotated[float, "s: D's target on generated samples; the paper warns of more than 0"] = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.fake_target < self.real_target <= 1:
            raise ValueError("0 <= fake_target < real_target <= 1 must hold")

    @hookimpl
    def setup(self, gan: GAN) -> None:
        """Replace D's loss; refuse a loss without targets."""
        gan.loss = smoothed(gan.loss, real_target=self.real_target, fake_target=self.fake_target)
