"""Stacked GANs (StackGAN, arXiv:1612.03242; SGAN, arXiv:1612.04357), as modules and functions and as a gankit plugin."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate

from gankit import Batch, Player, UsageError, View, hookimpl, losses, networks
from gankit.checks import spectral_norms
from gankit.functional import extra_pass
from gankit.gan import call_with_accepted, need_module
from gankit.plugins import load_object

if TYPE_CHECKING:
    from gankit import GAN

BLOCKS = 2  # residual blocks of the shipped second stage


def down(x: Tensor) -> Tensor:
    """Images of half the side, (B, C, H, W) -> (B, C, H/2, W/2): each pixel is the mean of a block of 2 x 2.

    Differentiable; values stay in the range of x. Raises ValueError for other shapes and for odd sides.
    """
    if x.dim() != 4 or x.shape[2] % 2 or x.shape[3] % 2:
        raise ValueError(f"images (B, C, H, W) with even sides can be halved, not a tensor of shape {tuple(x.shape)}")
    return avg_pool2d(x, 2)


def beside(x: Tensor, small: Tensor) -> Tensor:
    """Each image with a small one behind it as further channels: (B, C, 2h, 2w), (B, c, h, w) -> (B, C + c, 2h, 2w).

    Every pixel of the small image becomes a block of 2 x 2 equal ones, so that a convolution sees both at one place. Raises
    ValueError if the small image has not half the side.
    """
    if x.dim() != 4 or small.dim() != 4 or x.shape[2:] != (2 * small.shape[2], 2 * small.shape[3]):
        raise ValueError(f"{tuple(small.shape)} is not half the side of {tuple(x.shape)}")
    return torch.cat([x, interpolate(small, scale_factor=2, mode="nearest")], dim=1)


def consistency_penalty(full: Tensor, small: Tensor) -> Tensor:
    """mean (down(full) - small)^2 over everything: the second stage is to refine the small image, not to replace it.

    The conditional loss of SGAN (arXiv:1612.04357, section 3): the encoder from one level of the stack to the one above is
    :func:`down`, the distance the squared Euclidean one. full: (B, C, 2h, 2w). small: (B, C, h, w). Returns a 0-dim tensor
    with a graph to both. No critic forward. Raises ValueError for other shapes.
    """
    halved = down(full)
    if halved.shape != small.shape:
        raise ValueError(f"{tuple(small.shape)} is not half the side of {tuple(full.shape)}")
    return (halved - small).square().mean()


class StackedGenerator(nn.Module):
    """Two generators in a row: z = (z1, z2) -> small image G1(z1) -> full image G2(G1(z1), z2).

    stage1: a module from z1 (B, z_dim - noise) to small images (B, C, H/2, W/2). stage2: a module of two arguments, small
    images and z2 (B, noise), to images (B, C, H, W). noise: how many coordinates of z, the last ones, are z2. joint: False
    cuts the graph between the stages, so that no loss of the full image trains stage 1; in evaluation mode, in which nothing
    trains, the full image depends on all of z.

    Its weights are called ``stage1.*`` and ``stage2.*``.
    """

    def __init__(self, stage1: nn.Module, stage2: nn.Module, noise: int, *, joint: bool = False) -> None:
        super().__init__()
        self.stage1 = stage1
        self.stage2 = stage2
        self.noise = noise
        self.joint = joint

    def given(self, small: Tensor) -> Tensor:
        """The small image as stage 2 gets it: without its graph while stages train that are not joint."""
        return small.detach() if self.training and not self.joint else small

    def stages(self, z: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Both images of z (B, z_dim): small (B, C, H/2, W/2), with its graph to stage 1, and full (B, C, H, W).

        given: small images for stage 2 to refine in place of those of stage 1.
        """
        images: tuple[Tensor, Tensor] = self(z, given, True)  # a call, so that hooks of the module act
        return images

    def forward(self, z: Tensor, given: Tensor | None = None, both: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Z (B, z_dim) -> full images (B, C, H, W), or both as :meth:`stages` does."""
        cut = z.shape[1] - self.noise
        small: Tensor = self.stage1(z[:, :cut])
        full: Tensor = self.stage2(self.given(small) if given is None else given, z[:, cut:])
        return (small, full) if both else full


class Block(nn.Module):
    """Residual block that keeps its shape: norm, ReLU, 3x3 convolution, twice, and a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1, bias=False)),
            *(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the shape of x."""
        out: Tensor = x + self.layers(x)
        return out


class Refiner(nn.Module):
    """The shipped second stage: a small image and noise -> an image of twice the side in [-1, 1].

    A 3x3 convolution of the small image plus the noise, brought to as many maps by a linear layer; residual blocks at the
    small side; pixels doubled and a 3x3 convolution of half as many maps; one more and tanh.

    shape: (C, H, W) of the full image, with even sides. z_dim: coordinates of z2, 0 for none. width: maps at the small side.
    """

    def __init__(self, shape: tuple[int, ...], z_dim: int, width: int) -> None:
        super().__init__()
        channels, height, side = shape
        self.maps = (width, height // 2, side // 2)
        self.image = nn.Conv2d(channels, width, 3, padding=1)
        self.noise = nn.Linear(z_dim, width * self.maps[1] * self.maps[2]) if z_dim else None
        last = max(width // 2, 1)
        self.layers = nn.Sequential(
            *(Block(width) for _ in range(BLOCKS)),
            *(nn.BatchNorm2d(width), nn.ReLU()),
            # as in StackGAN; a transposed convolution left a checkerboard that D lives on
            *(nn.Upsample(scale_factor=2), nn.Conv2d(width, last, 3, padding=1, bias=False)),
            *(nn.BatchNorm2d(last), nn.ReLU(), nn.Conv2d(last, channels, 3, padding=1), nn.Tanh()),
        )
        for layer in self.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, networks.DCGAN_STD)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, small: Tensor, z2: Tensor) -> Tensor:
        """Small images (B, C, H/2, W/2) and noise (B, noise) -> images (B, C, H, W)."""
        maps = self.image(small)
        if self.noise is not None:
            maps = maps + self.noise(z2).unflatten(1, self.maps)
        images: Tensor = self.layers(maps)
        return images


def _network(name: str, own: str | None, shipped: Callable[..., nn.Module], **known: Any) -> nn.Module:
    """The user's network, ``module:factory``, or the shipped one; either asks by name for any of ``known``."""
    try:
        made = call_with_accepted(load_object(own)[0] if own else shipped, **known)
    except UsageError as error:
        raise UsageError(f"the {name} of stacked, {known['shape']}: {error}") from error
    return need_module(name, own, made)


@dataclass(eq=False)
class Stacked:
    """Two GANs in a row: the first makes a small image, the second the full one from it, each with a critic of its own.

    Brings the players "generator", a :class:`StackedGenerator`, and "discriminator_small", the critic of the small images;
    the critic of the full images is the discriminator as always. The small pair enters as the terms "stacked_d" and
    "stacked_g", with the run's loss or ``small_loss``. ``batch.extra`` holds "small_real" and "small_fake" (with its graph).

    StackGAN trains stage 2 on a finished stage 1; the authors' code of SGAN trains both at once, each on its own loss:
    ``joint=False``. In StackGAN++ (arXiv:1710.10916) all losses train all stages: ``joint=True``. StackGAN's first phase, in
    which nothing but stage 1 is trained, would need a loop of its own; ``warmup`` is that of SGAN: both stages are trained
    from the start, but apart, stage 2 on true small images.
    """

    formula: ClassVar[str] = (
        "G(z) = G2(G1(z1), z2);  loss of D(x, down x) against D(G(z), G1(z1)) + loss of D1(down x) against D1(G1(z1)) "
        "+ consistency * mean (down G(z) - G1(z1))^2"
    )
    paper: ClassVar[str] = (
        "Zhang et al. 2017, StackGAN, arXiv:1612.03242; Huang et al. 2017, Stacked Generative Adversarial Networks, "
        "arXiv:1612.04357"
    )

    noise: Annotated[int | None, "coordinates of z, the last ones, for stage 2; default: a quarter of them"] = None
    paired: Annotated[bool, "D sees a full image together with its small one, and so whether they belong together"] = (
        True
    )
    joint: Annotated[bool, "the losses of the full image train stage 1, too (StackGAN++)"] = False
    warmup: Annotated[int, "first steps, in which stage 2 is given true small images (SGAN)"] = 0
    consistency: Annotated[float, "weight of mean (down G2 - G1)^2; SGAN's conditional loss, whose weight is 1"] = 0.0
    small_loss: Annotated[str | None, "loss of the small pair; default: the run's"] = None
    stage1: Annotated[str | None, "your own: module:factory or file.py:factory(shape, z_dim), of the small image"] = (
        None
    )
    stage2: Annotated[
        str | None, "your own: module:factory or file.py:factory(shape, z_dim), of small image and z2"
    ] = None
    discriminator_small: Annotated[str | None, "your own: module:factory or file.py:factory(shapes)"] = None

    def __post_init__(self) -> None:
        if min(self.noise or 0, self.warmup, self.consistency) < 0:
            raise ValueError("noise, warmup and consistency must not be negative")
        self._small_loss = None if self.small_loss is None else losses.make(self.small_loss)

    @hookimpl
    def players(self, gan: GAN) -> dict[str, Player]:
        """The generator of two stages, and the critic of the small images; both as factories."""
        if len(gan.shape) != 3:
            raise UsageError(f"stacked refines small images, and these are data of shape {gan.shape}: leave it out")
        channels, height, width = gan.shape
        if height % 2 or width % 2:
            raise UsageError(
                f"stacked makes images of half the side first, and {height} x {width} is odd: resize them, for example with "
                "--image-size 32"
            )
        noise = max(1, gan.latent.dim // 4) if self.noise is None else self.noise
        if noise >= gan.latent.dim:
            raise UsageError(
                f"stacked needs coordinates of z for stage 1, and all {gan.latent.dim} are stage 2's ({noise}): set --z-dim "
                "or -o stacked.noise"
            )
        small = (channels, height // 2, width // 2)
        return {
            "generator": Player(partial(self._generator, gan, small, noise), "g"),
            "discriminator_small": Player(partial(self._discriminator_small, gan, small), "d"),
        }

    def _generator(self, gan: GAN, small: tuple[int, ...], noise: int) -> StackedGenerator:
        of_small, maps = _sizes(gan.architecture)
        z_dim, latent = gan.latent.dim - noise, gan.latent.kind
        shipped = partial(networks.generator, **of_small)
        stage1 = _network("stage1", self.stage1, shipped, shape=small, z_dim=z_dim, latent=latent)
        refiner = partial(Refiner, width=maps)
        stage2 = _network("stage2", self.stage2, refiner, shape=gan.shape, z_dim=noise, latent=latent)
        if self.stage1:
            with torch.no_grad():
                made = tuple(stage1.to(gan.device).eval()(torch.zeros(2, z_dim, device=gan.device)).shape[1:])
            stage1.train()
            if made != small:
                raise UsageError(f"the stage1 of stacked makes images of shape {made}, half the data's side is {small}")
        return StackedGenerator(stage1, stage2, noise, joint=self.joint)

    def _discriminator_small(self, gan: GAN, small: tuple[int, ...]) -> nn.Module:
        shipped = partial(_doubling_critic, gan.shape, gan.architecture)
        return _network("discriminator_small", self.discriminator_small, shipped, shapes=(small,), shape=small)

    @hookimpl(trylast=True)
    def setup(self, gan: GAN) -> None:
        """Refuse what cannot work with two pairs, once the others have set up the networks."""
        learners = [name for name, p in gan.players.items() if p.phase == "g" and name != "generator"]
        if self.warmup and learners:
            raise UsageError(
                f"in stacked's warm-up stage 2 refines true small images, which no latent made, and the {learners[0]} "
                "learns from samples beside their latents: use -o stacked.warmup=0"
            )
        if self._loss(gan).name == "wasserstein" and not spectral_norms(gan.players["discriminator_small"].module):
            gan.refuse(
                "stacked-wasserstein",
                "the Wasserstein loss needs both critics held from getting steep, and a gradient penalty holds that of the "
                "full images: give the small pair another loss, -o stacked.small_loss=hinge, or use spectral_norm, or "
                "weight_clipping, which clips both",
            )

    def _loss(self, gan: GAN) -> losses.Loss:
        return self._small_loss or gan.loss

    @hookimpl
    def sample(self, gan: GAN, real: Tensor, z: Tensor, step: int) -> Batch:
        """One run of both stages; in the warm-up stage 2 runs on the true small images."""
        generator: StackedGenerator = gan.generator
        small_real = down(real)
        warm = 0 < step <= self.warmup
        small_fake, fake = generator.stages(z, small_real if warm else None)
        given = small_real if warm else generator.given(small_fake)
        extra = {"small_real": small_real, "small_fake": small_fake, "small_given": given, "small_z": z}
        return Batch(real, fake, z, extra)

    @hookimpl(wrapper=True, trylast=True)
    def view(self, gan: GAN, batch: Batch, step: int) -> Generator[None, View, View]:
        """Each image beside its small one, as further channels; innermost, so that others treat the two as one image."""
        view = yield
        if step == 0:  # while D is built
            _small(batch)
        if not self.paired:
            return view
        (x, *others), (fake, *fake_others) = view
        shown = beside(x, down(x)), beside(fake, self._given(gan, batch))
        return View((shown[0], *others), (shown[1], *fake_others))

    def _given(self, gan: GAN, batch: Batch) -> Tensor:
        """What stage 2 was given for this batch; of a batch that another plugin made, of its latents."""
        generator: StackedGenerator = gan.generator
        if batch.extra.get("small_z") is batch.z:
            return batch.extra["small_given"]
        small, _ = extra_pass(generator, batch.z, None, True)  # type: ignore[arg-type]
        return generator.given(small)

    @hookimpl
    def pre_d_loss(self, gan: GAN, batch: Batch) -> dict[str, Tensor]:
        """The term "stacked_d", the small critic's loss; in G's update, where D is looked ahead, its buffers stay."""
        real, fake = _small(batch)
        critic = gan.players["discriminator_small"].module
        score = partial(extra_pass, critic) if fake.requires_grad else critic
        return {"stacked_d": self._loss(gan).d(score(real), score(fake))}

    @hookimpl
    def post_g_loss(self, gan: GAN, batch: Batch) -> dict[str, Tensor]:
        """The terms "stacked_g", which trains stage 1, and "stacked_consistency", where its weight is not 0."""
        sides = dict(zip(losses.BOTH_SIDES, _small(batch), strict=True))
        loss, critic = self._loss(gan), gan.players["discriminator_small"].module
        terms = {"stacked_g": loss.g(**{name: critic(sides[name]) for name in loss.g_sides})}
        if self.consistency:
            penalty = consistency_penalty(batch.fake, batch.extra["small_given"])
            terms["stacked_consistency"] = self.consistency * penalty
        return terms


def _small(batch: Batch) -> tuple[Tensor, Tensor]:
    """The small images of both sides."""
    if "small_fake" not in batch.extra:
        raise UsageError(
            "stacked draws the samples of its two stages, and another plugin draws them itself: leave one out"
        )
    return batch.extra["small_real"], batch.extra["small_fake"]


def _doubling_critic(full: tuple[int, ...], architecture: Mapping[str, Any]) -> nn.Module:
    """The shipped critic of full images, on small ones whose pixels are doubled.

    At half the side the family "dcgan" would have one layer less, a single convolution for 14 pixels, which tells nothing
    apart. On doubled pixels its first layer is a 3x3 convolution that keeps the side.
    """
    return nn.Sequential(nn.Upsample(scale_factor=2), networks.discriminator((full,), **architecture))


def _sizes(architecture: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """What the networks of the small images are built with, and the maps of the second stage.

    The family "dcgan" halves its maps with each doubling of the side: those of the small images get what the full-size
    network would have there. The second stage is convolutional whatever the family; an mlp's width is no number of maps.
    """
    family, width = architecture.get("network") or "auto", architecture.get("width")
    if family == "mlp":
        return dict(architecture), networks.DCGAN_WIDTH
    maps = width or networks.DCGAN_WIDTH
    return {**architecture, "width": width if family == "resnet" else 2 * maps}, maps
