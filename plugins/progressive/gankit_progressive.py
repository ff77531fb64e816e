"""Progressive growing (Karras et al. 2018, arXiv:1710.10196): networks, their parts, and a gankit plugin."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Generator as Yields
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d
from torch.nn.utils import parametrize

from gankit import Batch, Player, UsageError, hookimpl

if TYPE_CHECKING:
    from gankit import GAN

M = TypeVar("M", bound=nn.Module)

WIDTH = 16
GROWN_AFTER = 76_800  # 60 % of gankit's default run of 2000 steps of 64 images
SLOPE = 0.2  # of the leaky ReLU
HE = math.sqrt(2)  # gain of He's initializer

# -- where growth stands ---------------------------------------------------------------------------------------------


def schedule(shown: int, grown_after: int, doublings: int) -> tuple[int, float]:
    """Level and weight alpha of its new layers, when the discriminator has been shown ``shown`` real images.

    Section 2 and appendix A.1 of arXiv:1710.10196: level 0 (4 px) is trained for one phase, then each doubling takes two
    phases of the same length, one in which its layers are faded in, alpha rising linearly from 0 to 1, and one to settle.

    grown_after: images until the last fade-in has ended, ``2 * doublings`` phases; 0 is a network that never grows. The
        paper's phases are of 800,000 images. doublings: log2 of the final side over 4. Returns a level of 0..doublings and
        0 < alpha <= 1; alpha is 1 where nothing is faded in.
    """
    if shown >= grown_after:
        return doublings, 1.0
    position = 2 * doublings * shown  # in phases, times grown_after: whole numbers, so that no step depends on rounding
    level = -((grown_after - position) // (2 * grown_after))
    alpha = (position - (2 * level - 1) * grown_after) / grown_after if level else 1.0
    return level, min(alpha, 1.0)


def halved(images: Tensor, times: int = 1) -> Tensor:
    """(B, C, H, W) -> (B, C, H / 2^times, W / 2^times): the mean of 2 x 2 pixels, repeatedly, as fade-in of D needs it."""
    for _ in range(times):
        images = avg_pool2d(images, 2)
    return images


def doubled(images: Tensor, times: int = 1) -> Tensor:
    """(B, C, H, W) -> (B, C, H 2^times, W 2^times): each pixel repeated; :func:`halved` undoes it bit for bit."""
    return nn.functional.interpolate(images, scale_factor=2**times, mode="nearest") if times else images


def at_stage(images: Tensor, doublings: int, level: int, alpha: float = 1.0) -> Tensor:
    """Images as a generator in this stage could make them: same size, but only the detail of its level.

    images: (B, C, H, W) of side 4 * 2^doublings. They are averaged down to 4 * 2^level px, faded with their next coarser
    version, alpha fine + (1 - alpha) coarse (section 2 of arXiv:1710.10196, as the authors' code does), and each pixel is
    repeated up to the full size. In the last level with alpha = 1 they are returned as they are.
    """
    fine = halved(images, doublings - level)
    if alpha < 1:
        fine = torch.lerp(doubled(halved(fine)), fine, alpha)
    return doubled(fine, doublings - level)


# -- parts -----------------------------------------------------------------------------------------------------------


class Equalized(nn.Module):
    """The parametrization w -> scale w: what is stored and trained is w."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that acts."""
        return self.scale * weight

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The weight to store for one that is to act."""
        return weight / self.scale


def he_scale(layer: nn.Module, gain: float = HE) -> float:
    """gain / sqrt(fan_in), the standard deviation of He's initializer; fan_in: numbers that one output is made of.

    layer: nn.Linear or a (not transposed) convolution; ValueError for any other.
    """
    if not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        raise ValueError(f"He's constant is known for linear and convolutional layers, not for {type(layer).__name__}")
    return gain / math.sqrt(layer.weight[0].numel())


def equalize(layer: M, gain: float = HE, *, generator: torch.Generator | None = None) -> M:
    """Give a layer the equalized learning rate: it stores w ~ N(0, 1) and acts with c w, c = gain / sqrt(fan_in).

    Section 4.1 of arXiv:1710.10196. Under Adam every stored number moves by about the learning rate, so every acting weight
    moves by the same share of its layer's scale, however many inputs the layer has.

    layer: nn.Linear or a (not transposed) convolution, changed in place and returned, its weight drawn anew, its bias 0. The
        parameter ``weight`` is afterwards called ``parametrizations.weight.original``; ``gankit.networks.folded`` gives an
        ordinary copy. gain: He's sqrt(2) before a ReLU, 1 for an output layer. generator: source of the draw; default:
        torch's global one. ValueError for other layers and for one that is parametrized already.
    """
    scale = he_scale(layer, gain)
    if parametrize.is_parametrized(layer, "weight"):
        raise ValueError(f"the weight of this {type(layer).__name__} is parametrized already: equalize it before that")
    parametrize.register_parametrization(layer, "weight", Equalized(scale))
    nn.init.normal_(layer.parametrizations["weight"].original, generator=generator)  # type: ignore[index, union-attr]
    if isinstance(layer.bias, Tensor):
        nn.init.zeros_(layer.bias)
    return layer


def pixel_norm(x: Tensor, eps: float = 1e-8) -> Tensor:
    """b = a / sqrt(mean_j a_j^2 + eps): the vector of every pixel, over dimension 1, is brought to a mean square of 1.

    Section 4.2 of arXiv:1710.10196. x: (B, C, \\*rest), also latents (B, z_dim), which it puts on a hypersphere.
    """
    return x * (x.square().mean(1, keepdim=True) + eps).rsqrt()


class PixelNorm(nn.Module):
    """:func:`pixel_norm` as a module, without parameters."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, \\*rest) -> the same shape."""
        return pixel_norm(x)


def minibatch_stddev(x: Tensor, group: int = 0, eps: float = 1e-8) -> Tensor:
    """Add one constant channel: the standard deviation over samples, averaged over all features.

    Section 3 of arXiv:1710.10196: s = mean_j sqrt(var_i x_ij + eps), the variance over the samples i (divided by their
    number) of each feature j of each position, and every position of every sample gets s.

    x: (B, C, \\*rest). group: that many neighbouring samples share an s of their own (the authors' code: 4, and every M-th
    of a batch of 4 M, which is the same for samples in random order); 0, as in the paper: the whole batch is one group. A
    batch smaller than a group is one group. Returns (B, C + 1, \\*rest), where every sample has a graph to every other of
    its group. UsageError if the groups do not fill the batch.
    """
    n = len(x)
    size = min(group, n) or n
    if size < 1 or n % size:
        raise UsageError(f"groups of {group} samples for the minibatch standard deviation do not fill a batch of {n}: "
                         "give a group size that divides what the discriminator is shown")  # fmt: skip
    groups = x.reshape(n // size, size, *x.shape[1:])
    spread = (groups.var(1, correction=0) + eps).sqrt().flatten(1).mean(1)
    channel = spread.repeat_interleave(size).view(n, *(1,) * (x.dim() - 1)).expand(n, 1, *x.shape[2:])
    return torch.cat([x, channel], dim=1)


class MinibatchStddev(nn.Module):
    """:func:`minibatch_stddev` as a module, without parameters."""

    def __init__(self, group: int = 0) -> None:
        super().__init__()
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, \\*rest) -> (B, C + 1, \\*rest)."""
        return minibatch_stddev(x, self.group)


# -- networks --------------------------------------------------------------------------------------------------------


class Growing(nn.Module):
    """A network that is built in full and of which only the levels reached so far are used.

    ``growth`` is a buffer of two whole numbers, (images shown, images until fully grown): checkpoints, averaged and exported
    copies carry it. ``shown`` and ``grown_after`` are the same on the host, to be read without waiting for a GPU. Layers
    that are not in use yet, or any more, get no gradient.
    """

    growth: Tensor

    def __init__(self, shape: Sequence[int], grown_after: int) -> None:
        super().__init__()
        self.doublings = doublings_of(shape)
        self.shown, self.grown_after = 0, grown_after
        self.register_buffer("growth", torch.tensor([0, grown_after]))

    def stage(self) -> tuple[int, float]:
        """Level and alpha, by :func:`schedule`."""
        return schedule(self.shown, self.grown_after, self.doublings)

    def grow(self, images: int) -> None:
        """Count real images that the discriminator has been shown; call it with the same number on G, D and averages."""
        self.grow_to(self.shown + images, self.grown_after)

    def grow_to(self, shown: int, grown_after: int) -> None:
        """Set both numbers."""
        self.shown, self.grown_after = shown, grown_after
        self.growth[0], self.growth[1] = shown, grown_after

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self.shown, self.grown_after = self.growth.tolist()


class Generator(Growing):
    """G of the paper (its table 2): z (B, z_dim) -> (B, \\*shape), always of the full size, linear at its end.

    Below the last level every pixel of the level's image is repeated. During a fade-in the image is
    alpha toRGB(block(x)) + (1 - alpha) doubled(toRGB'(x)).

    shape: (C, S, S) with S = 8, 16, 32, ...; else UsageError. width: channels next to the image, doubled with every halving
    of the side up to 8 width. grown_after: see :func:`schedule`; 0: all levels from the start. equalized: :func:`equalize`,
    else He's initializer. pixel_norm: after every layer and on z. Weights come from torch's global generator.

    All layers but toRGB have He's gain. The authors' code gives the first, dense one a quarter of it, "to match the original
    Theano implementation", of which the paper says nothing. The pixel norm behind it undoes that: G begins with the same
    images, and all that is left is that there the layer's bias counts four times as much.
    """

    def __init__(
        self,
        shape: Sequence[int],
        z_dim: int,
        *,
        width: int = WIDTH,
        grown_after: int = GROWN_AFTER,
        equalized: bool = True,
        pixel_norm: bool = True,
    ) -> None:
        super().__init__(shape, grown_after)
        if pixel_norm and z_dim < 2:
            raise UsageError("pixel norm would leave nothing but the sign of a latent of one dimension: set z_dim, or "
                             "switch pixel_norm off")  # fmt: skip
        make = partial(_layer, equalized=equalized)
        norm = PixelNorm if pixel_norm else nn.Identity
        widths = _widths(self.doublings, width)
        self.blocks, self.to_image = nn.ModuleList(), nn.ModuleList()
        for level, channels in enumerate(widths):
            layers: OrderedDict[str, nn.Module] = OrderedDict()
            if level:
                layers["up"] = nn.Upsample(scale_factor=2, mode="nearest")
                layers["conv1"] = make(nn.Conv2d(widths[level - 1], channels, 3, padding=1))
            else:
                layers["latent_norm"] = norm()
                layers["dense"] = make(nn.Linear(z_dim, 16 * channels))
                layers["shape"] = nn.Unflatten(1, (channels, 4, 4))
            layers["activation1"] = nn.LeakyReLU(SLOPE)
            layers["norm1"] = norm()
            layers["conv2"] = make(nn.Conv2d(channels, channels, 3, padding=1))
            layers["activation2"] = nn.LeakyReLU(SLOPE)
            layers["norm2"] = norm()
            self.blocks.append(nn.Sequential(layers))
            self.to_image.append(make(nn.Conv2d(channels, shape[0], 1), gain=1.0))

    def render(self, z: Tensor, level: int, alpha: float = 1.0) -> Tensor:
        """z (B, z_dim) -> (B, \\*shape) in this stage, whatever has been shown."""
        x = z
        for i in range(level):
            x = self.blocks[i](x)
        images: Tensor = self.to_image[level](self.blocks[level](x))
        if alpha < 1:
            images = torch.lerp(doubled(self.to_image[level - 1](x)), images, alpha)
        return doubled(images, self.doublings - level)

    def forward(self, z: Tensor) -> Tensor:
        """z (B, z_dim) -> (B, \\*shape)."""
        return self.render(z, *self.stage())


class Discriminator(Growing):
    """D of the paper (its table 2): images (B, C, S, S) of the full size, averaged down to the level -> logits (B,).

    During a fade-in the features are alpha block(fromRGB(x)) + (1 - alpha) fromRGB'(halved(x)).

    shapes: of all inputs; further ones, such as a latent, are joined as vectors in front of the last hidden layer. The first
    is the image, with any number of channels (packs). width, grown_after, equalized, errors: as for :class:`Generator`.
    stddev_group: of :func:`minibatch_stddev`; 1 leaves it out.
    """

    def __init__(
        self,
        shapes: Sequence[Sequence[int]],
        *,
        width: int = WIDTH,
        grown_after: int = GROWN_AFTER,
        equalized: bool = True,
        stddev_group: int = 0,
    ) -> None:
        first, *further = shapes
        super().__init__(first, grown_after)
        make = partial(_layer, equalized=equalized)
        widths = _widths(self.doublings, width)
        self.inputs = len(shapes)
        self.from_image, self.blocks = nn.ModuleList(), nn.ModuleList()
        for level, channels in enumerate(widths):
            start = OrderedDict(conv=make(nn.Conv2d(first[0], channels, 1)), activation=nn.LeakyReLU(SLOPE))
            self.from_image.append(nn.Sequential(start))
            layers: OrderedDict[str, nn.Module] = OrderedDict()
            if level:
                layers["conv1"] = make(nn.Conv2d(channels, channels, 3, padding=1))
                layers["activation1"] = nn.LeakyReLU(SLOPE)
                layers["conv2"] = make(nn.Conv2d(channels, widths[level - 1], 3, padding=1))
                layers["activation2"] = nn.LeakyReLU(SLOPE)
                layers["down"] = nn.AvgPool2d(2)
            else:
                if stddev_group != 1:
                    layers["stddev"] = MinibatchStddev(stddev_group)
                layers["conv"] = make(nn.Conv2d(channels + (stddev_group != 1), channels, 3, padding=1))
                layers["activation"] = nn.LeakyReLU(SLOPE)
            self.blocks.append(nn.Sequential(layers))
        joint = sum(math.prod(shape) for shape in further)
        self.hidden = make(nn.Linear(16 * widths[0] + joint, widths[0]))
        self.activation = nn.LeakyReLU(SLOPE)
        self.out = make(nn.Linear(widths[0], 1), gain=1.0)

    def score(self, inputs: Sequence[Tensor], level: int, alpha: float = 1.0) -> Tensor:
        """Images (B, C, S, S), and the further inputs -> logits (B,) in this stage, whatever has been shown."""
        images, *further = inputs
        if len(inputs) != self.inputs:
            raise UsageError(f"this discriminator was built for {self.inputs} inputs, not for {len(inputs)}: give the "
                             "shapes of all its inputs")  # fmt: skip
        images = halved(images, self.doublings - level)
        x = self.from_image[level](images)
        if level:
            x = self.blocks[level](x)
        if alpha < 1:
            x = torch.lerp(self.from_image[level - 1](halved(images)), x, alpha)
        for i in range(level - 1, 0, -1):
            x = self.blocks[i](x)
        features = torch.cat([t.flatten(1) for t in (self.blocks[0](x), *further)], dim=1)
        logits: Tensor = self.out(self.activation(self.hidden(features)))
        return logits.squeeze(1)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Images (B, C, S, S), and the further inputs -> logits (B,)."""
        return self.score(inputs, *self.stage())


def doublings_of(shape: Sequence[int]) -> int:
    """k for images (C, S, S) of side S = 4 * 2^k, k >= 1; UsageError for all others."""
    if len(shape) != 3:
        raise UsageError(
            f"progressive growing is for images (channels, height, width), not for data of shape {shape}: leave it out"
        )
    height, width = shape[1:]
    k = max(1, round(math.log2(max(height, width) / 4)))
    if height != width or height != 4 << k:
        raise UsageError(f"progressive growing makes square images of 8, 16, 32, 64, ... pixels, not {height} x {width}: "
                         f"resize them, --image-size {4 << k}")  # fmt: skip
    return k


def _widths(doublings: int, width: int) -> list[int]:
    if width < 1:
        raise UsageError(f"width must be 1 or more, not {width}")
    return [width * min(2 ** (doublings - level), 8) for level in range(doublings + 1)]


def _layer(layer: M, gain: float = HE, *, equalized: bool) -> M:
    if equalized:
        return equalize(layer, gain)
    nn.init.normal_(layer.weight, std=he_scale(layer, gain))  # type: ignore[arg-type]
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


# -- plugin ----------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Progressive:
    """Grow G and D from 4 px, doubling the resolution and fading each new level in; brings both networks."""

    formula: ClassVar[str] = (
        "G: alpha toRGB(block(x)) + (1 - alpha) doubled(toRGB'(x));  D: the mirror image;  alpha: 0 -> 1 in each fade-in"
    )
    paper: ClassVar[str] = (
        "Karras et al. 2018, Progressive Growing of GANs, arXiv:1710.10196, sections 2 to 4, appendix A.1"
    )

    grown_after: Annotated[
        int,
        "real images D is shown until the last fade-in ends (paper: 1,600,000 per doubling); 0: grown from the start",
    ] = GROWN_AFTER
    width: Annotated[
        int | None, "channels next to the image, doubled down to 4 px up to 8 times; default: --width, or 16"
    ] = None
    equalized: Annotated[bool, "weights N(0, 1), scaled at run time by He's constant (equalized learning rate)"] = True
    pixel_norm: Annotated[bool, "normalise z and each pixel's feature vector in G"] = True
    stddev_group: Annotated[
        int, "samples whose spread D is told; 0: the whole batch, as in the paper; authors' code: 4; 1: it is not told"
    ] = 0
    drift: Annotated[
        float | None,
        "weight of E[D(x)^2] on real samples; default: 0.001 with the wasserstein loss, as in the paper, else 0",
    ] = None
    reset_adam: Annotated[bool, "forget Adam's moments when a fade-in starts or ends, as the authors' code does"] = (
        False
    )

    def __post_init__(self) -> None:
        if self.grown_after < 0 or self.stddev_group < 0:
            raise ValueError("grown_after and stddev_group must not be negative")
        if self.width is not None and self.width < 1:
            raise ValueError("width must be at least 1")
        if self.drift is not None and not 0 <= self.drift < math.inf:
            raise ValueError("drift must not be negative, infinite or NaN")

    @hookimpl
    def players(self, gan: GAN) -> dict[str, Player]:
        """The growing generator and discriminator, in place of the shipped ones, unless your own are growing ones."""
        doublings_of(gan.shape)
        asked = {name: gan.architecture.get(name) for name in ("network", "depth")}
        for name, value in asked.items():
            if value not in (None, "auto"):
                raise UsageError(f"progressive brings networks of its own, to which {name} {value} does not apply: "
                                 f"leave --{name} out")  # fmt: skip
        width = self.width or gan.architecture.get("width") or WIDTH
        settings: dict[str, Any] = {"width": width, "grown_after": self.grown_after, "equalized": self.equalized}
        brought = {
            "generator": Player(partial(Generator, pixel_norm=self.pixel_norm, **settings), "g"),
            "discriminator": Player(partial(Discriminator, stddev_group=self.stddev_group, **settings), "d"),
        }
        return {name: player for name, player in brought.items() if not isinstance(getattr(gan, name), Growing)}

    @hookimpl(wrapper=True, trylast=True)
    def sample(self, gan: GAN) -> Yields[None, Batch, Batch]:
        """Real samples without the detail G cannot make yet; innermost, so that all others see them like this."""
        batch = yield
        return batch._replace(real=at_stage(batch.real, gan.generator.doublings, *gan.generator.stage()))

    @hookimpl
    def pre_d_loss(self, gan: GAN, real_logits: Tensor) -> dict[str, Tensor] | None:
        """The term "progressive_drift" (appendix A.1), which keeps the critic's values near 0."""
        weight = self.drift
        if weight is None:
            weight = 0.001 if gan.loss.name == "wasserstein" else 0.0
        return {"progressive_drift": weight * real_logits.square().mean()} if weight else None

    @hookimpl
    @torch.no_grad()
    def post_step(self, gan: GAN, phase: str) -> None:
        """Count the images of D's update in all networks, averages included, which so never differ in their stage."""
        if phase == "g":
            return
        before = gan.generator.stage()
        shown, grown_after = gan.generator.shown + gan.batch_size, gan.generator.grown_after
        for network in gan.networks().values():
            if isinstance(network, Growing):
                network.grow_to(shown, grown_after)
        if self.reset_adam and _layers_in_use(*before) != _layers_in_use(*gan.generator.stage()):
            for optimizer in gan.optimizers.values():
                optimizer.state.clear()

    @hookimpl
    def evaluate(self, gan: GAN, step: int | None) -> dict[str, float] | None:
        """The side in pixels up to which G makes detail, and the weight alpha of its last doubling."""
        if step is None:  # of true samples
            return None
        level, alpha = gan.generator.stage()
        return {"resolution": float(4 << level), "fade_in": alpha}


def _layers_in_use(level: int, alpha: float) -> tuple[int, bool]:
    return level, alpha < 1
