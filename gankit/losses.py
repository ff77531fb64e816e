"""Adversarial losses: pure functions of logits, and `Loss`, the value that groups a D loss with its G loss.

Every function takes logits of D (larger = more real) of any shape, such as (B,), (B, 1) or patches (B, 1, h, w),
and returns a scalar tensor: the mean is taken over everything. r stands for real_logits, f for fake_logits.
"""

import inspect
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial

from torch import Tensor
from torch.nn.functional import relu, softplus

from gankit.errors import UsageError
from gankit.options import closest

LossFunction = Callable[[Tensor, Tensor], Tensor]
BOTH_SIDES = ("real_logits", "fake_logits")


@dataclass(frozen=True)
class Loss:
    """An adversarial loss: what D minimises, what G minimises, and the form for joint (x, z) games.

    d: (real_logits, fake_logits) -> scalar, minimised by D.
    g: minimised by G; called with exactly the keyword arguments named in `g_sides`.
    mirrored: (real_logits, fake_logits) -> scalar, G's loss plus its mirror image on the real side; what G *and* an
        encoder minimise when both sides carry gradients (BiGAN, arXiv 1605.09782).
    real_target: what D regresses a real logit (least squares) or its sigmoid (logistic) to, for label smoothing;
        None where a single real logit has no target (the relativistic losses have one for differences only).
    """

    name: str
    d: LossFunction
    g: Callable[..., Tensor]
    g_sides: tuple[str, ...] = ("fake_logits",)
    _: KW_ONLY
    mirrored: LossFunction
    real_target: float | None = None

    def symmetric(self) -> "Loss":
        """Return the same loss with `mirrored` as G's loss on both sides; doing it twice changes nothing more."""
        return replace(self, g=self.mirrored, g_sides=BOTH_SIDES)


def logistic_d(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Cross entropy of D as a classifier: mean softplus(-r) + mean softplus(f). Goodfellow 2014, arXiv 1406.2661."""
    return softplus(-real_logits).mean() + softplus(fake_logits).mean()


def non_saturating_g(fake_logits: Tensor) -> Tensor:
    """Non-saturating G loss: mean softplus(-f). arXiv 1406.2661, section 3."""
    return softplus(-fake_logits).mean()


def non_saturating_mirrored(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """D's loss with the labels swapped: mean softplus(r) + mean softplus(-f). arXiv 1605.09782, section 3.5."""
    return softplus(real_logits).mean() + softplus(-fake_logits).mean()


def saturating_g(fake_logits: Tensor) -> Tensor:
    """Minimax G loss: -mean softplus(f). arXiv 1406.2661, eq. 1."""
    return -softplus(fake_logits).mean()


def saturating_mirrored(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Minimax with both sides: minus D's loss."""
    return -logistic_d(real_logits, fake_logits)


def least_squares_d(real_logits: Tensor, fake_logits: Tensor, *, a: float = 0.0, b: float = 1.0) -> Tensor:
    """Least squares: 1/2 mean (r - b)^2 + 1/2 mean (f - a)^2. arXiv 1611.04076, eq. 2."""
    return (real_logits - b).square().mean() / 2 + (fake_logits - a).square().mean() / 2


def least_squares_g(fake_logits: Tensor, *, c: float = 1.0) -> Tensor:
    """Least squares: 1/2 mean (f - c)^2. arXiv 1611.04076, eq. 2."""
    return (fake_logits - c).square().mean() / 2


def least_squares_mirrored(
    real_logits: Tensor, fake_logits: Tensor, *, a: float = 0.0, b: float = 1.0, c: float = 1.0
) -> Tensor:
    """Least squares on both sides: 1/2 mean (f - c)^2 + 1/2 mean (r - (a + b - c))^2.

    The real target is c reflected at the middle of a and b; for c = b it is a, D's loss with the labels swapped.
    """
    return least_squares_d(real_logits, fake_logits, a=c, b=a + b - c)


def wasserstein_d(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Wasserstein: mean f - mean r, for a D that is kept Lipschitz by other means. arXiv 1701.07875."""
    return fake_logits.mean() - real_logits.mean()


def wasserstein_g(fake_logits: Tensor) -> Tensor:
    """Wasserstein and hinge: -mean f. arXiv 1701.07875; 1802.05957, eq. 17."""
    return -fake_logits.mean()


def wasserstein_mirrored(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Wasserstein and hinge on both sides: mean r - mean f."""
    return real_logits.mean() - fake_logits.mean()


def hinge_d(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Hinge: mean relu(1 - r) + mean relu(1 + f). arXiv 1802.05957, eq. 16."""
    return relu(1 - real_logits).mean() + relu(1 + fake_logits).mean()


def relativistic_d(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Relativistic pairs (RGAN): mean softplus(-(r - f)). arXiv 1807.00734; the pairing loss of R3GAN, 2501.05441.

    Sample i of one side is paired with sample i of the other, so the shapes must be equal (else `UsageError`).
    """
    _require_pairs(real_logits, fake_logits)
    return softplus(fake_logits - real_logits).mean()


def relativistic_g(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Relativistic pairs with the roles swapped: mean softplus(-(f - r)). arXiv 1807.00734; 2501.05441."""
    return relativistic_d(fake_logits, real_logits)


def relativistic_average_d(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Relativistic average (RaGAN), logistic: mean softplus(-(r - mean f)) + mean softplus(f - mean r).

    arXiv 1807.00734, section 4: the sum of both terms, as the paper writes it. The author's code halves it; a weight
    next to it (a penalty, for one) then counts twice as much as here.
    """
    return logistic_d(real_logits - fake_logits.mean(), fake_logits - real_logits.mean())


def relativistic_average_g(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Relativistic average, roles swapped: mean softplus(-(f - mean r)) + mean softplus(r - mean f)."""
    return relativistic_average_d(fake_logits, real_logits)


def _require_pairs(real_logits: Tensor, fake_logits: Tensor) -> None:
    # (B,) against (B, 1) would broadcast to (B, B) and train, on the wrong loss
    if real_logits.shape != fake_logits.shape:
        raise UsageError(
            "the relativistic loss pairs each real with one fake logit: give logits of equal shape, "
            f"not {tuple(real_logits.shape)} and {tuple(fake_logits.shape)}"
        )


def non_saturating() -> Loss:
    """Build the standard GAN with the non-saturating G loss (the default of gankit)."""
    return Loss("non_saturating", logistic_d, non_saturating_g, mirrored=non_saturating_mirrored, real_target=1.0)


def saturating() -> Loss:
    """Build the original minimax GAN."""
    return Loss("saturating", logistic_d, saturating_g, mirrored=saturating_mirrored, real_target=1.0)


def least_squares(*, a: float = 0.0, b: float = 1.0, c: float = 1.0) -> Loss:
    """Build LSGAN: D sends fakes to a and reals to b, G sends fakes to c (arXiv 1611.04076).

    a=-1, b=1, c=0 is the Pearson chi^2 divergence (section 3.2.2 there). `UsageError` unless a < b and a < c.
    """
    if not (a < b and a < c):
        raise UsageError(f"least_squares needs a < b and a < c (larger logits mean more real), not a={a}, b={b}, c={c}")
    return Loss(
        "least_squares",
        partial(least_squares_d, a=a, b=b),
        partial(least_squares_g, c=c),
        mirrored=partial(least_squares_mirrored, a=a, b=b, c=c),
        real_target=b,
    )


def wasserstein() -> Loss:
    """Build WGAN; combine it with a constraint on D (clipping, a gradient penalty, spectral norm)."""
    return Loss("wasserstein", wasserstein_d, wasserstein_g, mirrored=wasserstein_mirrored)


def hinge() -> Loss:
    """Build the hinge loss of SNGAN, SAGAN and BigGAN."""
    return Loss("hinge", hinge_d, wasserstein_g, mirrored=wasserstein_mirrored)


def relativistic() -> Loss:
    """Build the relativistic pairing loss (RGAN, R3GAN)."""
    return Loss("relativistic", relativistic_d, relativistic_g, BOTH_SIDES, mirrored=relativistic_g)


def relativistic_average() -> Loss:
    """Build the relativistic average loss (RaGAN)."""
    return Loss(
        "relativistic_average",
        relativistic_average_d,
        relativistic_average_g,
        BOTH_SIDES,
        mirrored=relativistic_average_g,
    )


LOSSES: dict[str, Callable[..., Loss]] = {
    builder.__name__: builder
    for builder in (
        non_saturating,
        saturating,
        least_squares,
        wasserstein,
        hinge,
        relativistic,
        relativistic_average,
    )
}
"""Builders by name; the keyword parameters of a builder are the options of that loss."""


def make(name: str, **options: float) -> Loss:
    """Build the loss called `name` ("least_squares" or "least-squares") with its options, e.g. a=-1, b=1, c=0.

    `UsageError` for a name or an option that does not exist, with the closest one that does.
    """
    key = name.replace("-", "_")
    if key not in LOSSES:
        raise UsageError(f"there is no loss {name!r}{closest(key, LOSSES)}: choose from {', '.join(LOSSES)}")
    known = inspect.signature(LOSSES[key]).parameters
    for option in options:
        if option not in known:
            choices = f"its options are {', '.join(known)}" if known else "it has no options"
            raise UsageError(f"loss {name!r} has no option {option!r}{closest(option, known)}: {choices}")
    return LOSSES[key](**options)
