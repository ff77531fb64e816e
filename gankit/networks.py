"""Generators, discriminators and encoders chosen by the shape of the data.

Three families: "mlp" for any shape, "dcgan" (arXiv 1511.06434) and "resnet" (arXiv 1802.05957, appendix B.4) for
square images. "auto" takes the MLP for vectors, a G of one latent with Fourier features of it, and DCGAN for images.
Images are (C, H, W) in [-1, 1].

A module is initialised from PyTorch's global random numbers while it is constructed and draws none afterwards, so
build it inside `torch.random.fork_rng()` with a seed. Module names are a file format: weights are saved under them.
"""

import copy
import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gankit.errors import UsageError
from gankit.options import closest

M = TypeVar("M", bound=nn.Module)

NETWORKS = ("auto", "mlp", "dcgan", "resnet")
LATENTS = ("normal", "uniform")
NORMS = ("none", "batch")
Hidden = Literal["joined", "dense", "products"]

MLP_WIDTH = 96  # of G and E; D is twice as wide, which the ring needs (docs/decisions/0005-the-recipe-for-the-plane.md)
MLP_DEPTH = 3
DCGAN_WIDTH = 32
RESNET_WIDTH = 64
SLOPE = 0.2  # of the leaky ReLU in image networks
DCGAN_STD = 0.02  # of the initial weights, as in the DCGAN paper


def generator(
    shape: Sequence[int],
    z_dim: int,
    *,
    network: str = "auto",
    width: int | None = None,
    depth: int | None = None,
) -> nn.Module:
    """Build G: z (B, z_dim) -> (B, *shape); images pass through tanh, vectors are unbounded.

    width: units per hidden layer (mlp, default 96), channels of the layer next to the image (dcgan, default 32)
    or channels of every block (resnet, default 64). depth: hidden layers, mlp only (default 3).
    "auto" makes vectors of one latent by `fourier_generator`: an MLP of one number is too smooth a path through many modes.
    `UsageError` for an unknown network, sizes below 1 or an image size that the network cannot make.
    """
    shape = _checked_shape(shape)
    _positive(z_dim=z_dim)
    family = _resolve(network, shape, width, depth)
    if family == "dcgan":
        return ConvGenerator(z_dim, shape, width or DCGAN_WIDTH)
    if family == "resnet":
        return ResidualGenerator(z_dim, shape, width or RESNET_WIDTH)
    if network == "auto" and z_dim == 1:
        return fourier_generator(shape, z_dim, width or MLP_WIDTH, depth or MLP_DEPTH)
    return MLP(z_dim, shape, width or MLP_WIDTH, depth or MLP_DEPTH, tanh=_is_image(shape))


def discriminator(
    shapes: Sequence[Sequence[int]],
    *,
    network: str = "auto",
    width: int | None = None,
    depth: int | None = None,
    norm: str = "none",
) -> nn.Module:
    """Build D: one input (B, *shape) for each of `shapes` -> logits (B,).

    The first shape is the data (packed data have more channels or features); further ones, such as a latent
    (z_dim,), are joined as vectors: the mlp concatenates everything at its input, image networks concatenate them to
    the flattened features and score both through one hidden layer of 4 * width units.
    width, depth: as for `generator`, but an mlp has 2 * width units per layer.
    norm: "none", or "batch" for the batch norm of the DCGAN paper, which makes a logit depend on the other samples and
    so rules out per-sample gradient penalties. Errors as for `generator`.
    """
    if not shapes:
        raise UsageError("a discriminator needs at least one input shape: give the shape of the data")
    first, *further = [_checked_shape(shape) for shape in shapes]
    network = _resolve(network, first, width, depth)
    _choice("norm", norm, NORMS)
    if norm == "batch" and network != "dcgan":
        raise UsageError(f'norm="batch" is an option of the dcgan discriminator, not of {network}: use norm="none"')
    joint = sum(math.prod(shape) for shape in further)
    if network == "mlp":
        features = math.prod(first) + joint
        return MLP(features, (), 2 * (width or MLP_WIDTH), depth or MLP_DEPTH, tanh=False)
    if network == "dcgan":
        width = width or DCGAN_WIDTH
        scorer = Scorer(ConvTrunk(first, width, norm), joint, 4 * width)
        return _init_dcgan(scorer)
    width = width or RESNET_WIDTH
    scorer = Scorer(ResidualTrunk(first, width), joint, 4 * width)
    return _init_resnet(scorer)


def encoder(
    shape: Sequence[int],
    z_dim: int,
    *,
    latent: str = "normal",
    network: str = "auto",
    width: int | None = None,
    depth: int | None = None,
) -> nn.Module:
    """Build E: data (B, *shape) -> z (B, z_dim), onto the support of the latent distribution.

    latent: "normal" gives a linear output (a bounded one could not reach all of z), "uniform" tanh for z in (-1, 1).
    The dcgan encoder has batch norm, as in BiGAN (arXiv 1605.09782). width, depth, errors: as for `generator`.
    """
    shape = _checked_shape(shape)
    _positive(z_dim=z_dim)
    network = _resolve(network, shape, width, depth)
    _choice("latent", latent, LATENTS)
    tanh = latent == "uniform"
    if network == "dcgan":
        return _init_dcgan(Encoder(ConvTrunk(shape, width or DCGAN_WIDTH, "batch"), z_dim, tanh))
    if network == "resnet":
        return _init_resnet(Encoder(ResidualTrunk(shape, width or RESNET_WIDTH), z_dim, tanh))
    features = math.prod(shape)
    return MLP(features, (z_dim,), width or MLP_WIDTH, depth or MLP_DEPTH, tanh=tanh)


def folded(module: M) -> M:
    """Return a copy with ordinary weights: each parametrized one (spectral norm, ...) replaced by its value.

    It gives what the module gives in evaluation mode, bit for bit, under the ordinary names, and so loads without gankit
    and its plugins. The module itself is not touched. Norms made by torch's older hooks stay.
    """
    flat = copy.deepcopy(module)
    modes = [(m, m.training) for m in flat.modules()]
    flat.eval()  # else removing a spectral norm makes one more power iteration
    for layer in [m for m, _ in modes if parametrize.is_parametrized(m)]:
        # a deep copy shares its layers' classes with the original, and removing would take the weight from both
        shared = type(layer)
        own = {key: value for key, value in vars(shared).items() if key not in ("__dict__", "__weakref__")}
        layer.__class__ = type(shared.__name__, shared.__bases__, own)
        for name in list(layer.parametrizations):  # type: ignore[arg-type]
            parametrize.remove_parametrizations(layer, name, leave_parametrized=True)
    for m, training in modes:
        m.training = training
    return flat


class MLP(nn.Module):
    """Linear layers with ReLU: any number of inputs (B, ...), concatenated flat -> (B, *out_shape)."""

    def __init__(
        self,
        in_features: int,
        out_shape: tuple[int, ...],
        width: int,
        depth: int,
        *,
        tanh: bool,
    ) -> None:
        super().__init__()
        self.out_shape = out_shape
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i in range(depth):
            layers[f"hidden{i}"] = nn.Linear(in_features if i == 0 else width, width)
            layers[f"activation{i}"] = nn.ReLU()
        layers["out"] = nn.Linear(width, math.prod(out_shape))
        if tanh:
            layers["tanh"] = nn.Tanh()
        self.layers = nn.Sequential(layers)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return (B, *out_shape)."""
        out: Tensor = self.layers(_flat(inputs))
        return out.reshape(len(out), *self.out_shape)


class FourierFeatures(nn.Module):
    """A G of z and of sin and cos of the angles z W: (B, z_dim) -> what ``body`` makes of (B, z_dim + 2 n).

    What changes fast along a latent of few dimensions, such as a path through 25 modes, a network of z itself learns
    slowly; of Fourier features it learns it soon (Tancik et al. 2020, arXiv 2006.10739). frequencies: W, (z_dim, n), in
    radians per unit of z; they are not trained.

    points: (K, z_dim), or None. With them the angles are those of the point that is nearest to z, and G may jump from one
    cell to the next; the gradient with respect to z is that of the angles of z (straight through).
    """

    frequencies: Tensor
    points: Tensor | None

    def __init__(self, body: nn.Module, frequencies: Tensor, points: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("frequencies", frequencies)
        self.register_buffer("points", points)
        self.body = body

    def forward(self, z: Tensor) -> Tensor:
        """Return the samples of ``body``."""
        angles = self._place(z) @ self.frequencies
        out: Tensor = self.body(torch.cat([z, angles.sin(), angles.cos()], dim=1))
        return out

    def _place(self, z: Tensor) -> Tensor:
        if self.points is None:
            return z
        # by differences: by a product, which is faster, about one z in 100,000 gets the cell beside its own
        distances = torch.cdist(z.detach(), self.points, compute_mode="donot_use_mm_for_euclid_dist")
        return self.points[distances.argmin(dim=1)] + (z - z.detach())


def fourier_generator(
    shape: Sequence[int], z_dim: int, width: int = 128, depth: int = 3, octaves: int = 5
) -> nn.Module:
    """Build an MLP G of `FourierFeatures`, for latents of few dimensions: ``--generator gankit.networks:fourier_generator``.

    The angles are 2^k pi z, k < octaves, coordinate by coordinate.
    """
    _positive(z_dim=z_dim, width=width, depth=depth, octaves=octaves)
    frequencies = torch.kron(torch.eye(z_dim), math.pi * 2.0 ** torch.arange(octaves))
    body = MLP(z_dim * (1 + 2 * octaves), _checked_shape(shape), width, depth, tanh=False)
    return FourierFeatures(body, frequencies)


def spread_discriminator(
    shapes: Sequence[Sequence[int]], width: int = 128, depth: int = 3, spread: float = 6.0
) -> nn.Module:
    """Build an MLP D whose units bend all over the data: ``--discriminator gankit.networks:spread_discriminator``.

    The biases of its first layer are drawn from U(-spread, spread), those of the second from a third of that, instead of
    nearly 0. For vectors far from 0 with many coordinates, whose weights alone decide where a unit bends, and there put all
    bends at 0. spread: about the largest |w.x| of a unit at the start. The rest as for `discriminator` with an mlp.
    """
    _positive(width=width, depth=depth)
    network = discriminator(shapes, network="mlp", width=width, depth=depth)
    for name, bound in (("hidden0", spread), ("hidden1", spread / 3)):
        layer = getattr(network.layers, name, None)
        if isinstance(layer, nn.Linear):
            nn.init.uniform_(layer.bias, -bound, bound)
    return network


def deep_generator(shape: Sequence[int], z_dim: int, width: int = 32) -> nn.Module:
    """Build a DCGAN G that starts at 4 x 4: ``--generator gankit.networks:deep_generator``.

    A side that is no 4 * 2^k is cropped out of the next larger one, so that 28 px have three doublings instead of two; and
    the initial weights are PyTorch's instead of N(0, 0.02^2). z (B, z_dim) -> (B, C, H, W), with tanh; width: channels of
    the layer next to the image. Errors as for `generator`.
    """
    channels, side, _ = _square(shape)
    _positive(z_dim=z_dim, width=width)
    return Cropped(_reset(ConvGenerator(z_dim, (channels, _whole(side), _whole(side)), width)), side)


def disconnected_generator(
    shape: Sequence[int], z_dim: int, width: int = 32, features: int = 64, scale: float = 2.0, cells: int = 4096
) -> nn.Module:
    """Build a `deep_generator` that may jump: ``--generator gankit.networks:disconnected_generator``.

    For images of many separate kinds, some of them rare, and a latent of few dimensions (``--z-dim 4``). What a continuous G
    makes of a connected latent is connected, so that between two kinds it makes what is neither (Tanielian et al. 2020,
    Learning disconnected manifolds, arXiv 2006.04596). This G sees the `FourierFeatures` of the nearest of ``cells`` points,
    drawn once from N(0, I), so that it can change from one kind to the other between two cells; z itself it sees, too,
    for what varies within a kind.

    features: how many angles; their frequencies are drawn once from N(0, scale^2), in radians per unit of z. cells: of
    fewer, samples are cleaner and what is rare is found later (docs/decisions/0009-the-recipes-of-the-suites.md). The rest
    as for `deep_generator`.
    """
    _positive(z_dim=z_dim, width=width, features=features, cells=cells)
    if not scale > 0:
        raise UsageError(f"scale must be above 0, not {scale}")
    body = deep_generator(shape, z_dim + 2 * features, width)
    return FourierFeatures(body, scale * torch.randn(z_dim, features), torch.randn(cells, z_dim))


def deep_discriminator(shapes: Sequence[Sequence[int]], width: int = 32) -> nn.Module:
    """Build a DCGAN D that ends at 4 x 4, the counterpart of `deep_generator`: images are padded with zeros.

    Further inputs, width and errors as for `discriminator`.
    """
    return _deep(shapes, width, "joined")


def dense_discriminator(shapes: Sequence[Sequence[int]], width: int = 32) -> nn.Module:
    """Build a `deep_discriminator` that sees what occurs together: ``--discriminator gankit.networks:dense_discriminator``.

    A DCGAN D adds up what it finds at each place, so that for parts of the image farther apart than a last feature reaches
    (10 px after two convolutions, 22 after three) D(both) - D(one) - D(other) + D(neither) is exactly 0: it cannot learn
    which of them come together. Here two hidden layers of 8 * width units look at all places at once; of a single
    smaller one no unit may have its bend where the data are, and then D is additive once more.
    """
    return _deep(shapes, width, "dense")


def product_discriminator(shapes: Sequence[Sequence[int]], width: int = 32) -> nn.Module:
    """Build a `deep_discriminator` that multiplies what it sees: ``--discriminator gankit.networks:product_discriminator``.

    As `dense_discriminator`, but with one hidden layer of 8 * width products (a.h + b)(c.h + d) of the features h. What D
    makes of two distant parts together differs from the sum of both by a term of second order, which the weights can always
    change, wherever the data are; units that bend see it, and have its gradient, only where they bend.
    """
    return _deep(shapes, width, "products")


def _deep(shapes: Sequence[Sequence[int]], width: int, hidden: Hidden) -> nn.Module:
    first, *further = [_checked_shape(shape) for shape in shapes]
    channels, side, _ = _square(first)
    _positive(width=width)
    trunk = Padded(ConvTrunk((channels, _whole(side), _whole(side)), width, "none"), side)
    joint = sum(math.prod(shape) for shape in further)
    return _reset(Scorer(trunk, joint, (4 if hidden == "joined" else 8) * width, hidden))


class ConvGenerator(nn.Module):
    """DCGAN generator: linear to (width * 2^(k-1), s0, s0), then k transposed convolutions that double the side."""

    def __init__(self, z_dim: int, shape: tuple[int, ...], width: int) -> None:
        super().__init__()
        base, doublings = _base_and_doublings(shape)
        channels = width * 2 ** (doublings - 1)
        self.base_shape = (channels, base, base)
        self.project = nn.Linear(z_dim, math.prod(self.base_shape))
        layers: OrderedDict[str, nn.Module] = OrderedDict(norm0=nn.BatchNorm2d(channels), activation0=nn.ReLU())
        for i in range(1, doublings):
            # no bias in front of a batch norm, which would remove it
            layers[f"up{i}"] = nn.ConvTranspose2d(channels, channels // 2, 4, 2, 1, bias=False)
            channels //= 2
            layers[f"norm{i}"] = nn.BatchNorm2d(channels)
            layers[f"activation{i}"] = nn.ReLU()
        layers["out"] = nn.ConvTranspose2d(channels, shape[0], 4, 2, 1)
        layers["tanh"] = nn.Tanh()
        self.layers = nn.Sequential(layers)
        _init_dcgan(self)

    def forward(self, z: Tensor) -> Tensor:
        """Z (B, z_dim) -> images (B, C, H, W) in [-1, 1]."""
        images: Tensor = self.layers(self.project(z).unflatten(1, self.base_shape))
        return images


class ConvTrunk(nn.Module):
    """DCGAN discriminator without its last layer: k strided convolutions (4/2/1), (B, C, H, W) -> (B, features)."""

    def __init__(self, shape: tuple[int, ...], width: int, norm: str) -> None:
        super().__init__()
        base, halvings = _base_and_doublings(shape)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        inside, outside = shape[0], width
        for i in range(halvings):
            normed = norm == "batch" and i > 0
            layers[f"down{i}"] = nn.Conv2d(inside, outside, 4, 2, 1, bias=not normed)
            if normed:
                layers[f"norm{i}"] = nn.BatchNorm2d(outside)
            layers[f"activation{i}"] = nn.LeakyReLU(SLOPE)
            inside, outside = outside, outside * 2
        self.layers = nn.Sequential(layers)
        self.features = inside * base * base

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> (B, features)."""
        maps: Tensor = self.layers(x)
        return maps.flatten(1)


class Cropped(nn.Module):
    """A generator of larger images, cut to the middle ``side`` pixels."""

    def __init__(self, body: nn.Module, side: int) -> None:
        super().__init__()
        self.body, self.side = body, side

    def forward(self, z: Tensor) -> Tensor:
        """Z (B, z_dim) -> images (B, C, side, side)."""
        images: Tensor = self.body(z)
        start = (images.shape[-1] - self.side) // 2
        return images[..., start : start + self.side, start : start + self.side]


class Padded(nn.Module):
    """The trunk of a discriminator of larger images, shown images of ``side`` pixels in the middle of zeros."""

    def __init__(self, body: ConvTrunk, side: int) -> None:
        super().__init__()
        self.body, self.features = body, body.features
        missing = _whole(side) - side
        self.margins = (missing // 2, missing - missing // 2) * 2

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> (B, features)."""
        features: Tensor = self.body(nn.functional.pad(x, self.margins))
        return features


class ResidualGenerator(nn.Module):
    """SNGAN generator: linear to (width, s0, s0), k residual blocks that double the side, norm, ReLU, 3x3, tanh."""

    def __init__(self, z_dim: int, shape: tuple[int, ...], width: int) -> None:
        super().__init__()
        base, doublings = _base_and_doublings(shape)
        self.base_shape = (width, base, base)
        self.project = nn.Linear(z_dim, math.prod(self.base_shape))
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i in range(doublings):
            layers[f"block{i}"] = UpBlock(width)
        layers["norm"] = nn.BatchNorm2d(width)
        layers["activation"] = nn.ReLU()
        layers["out"] = nn.Conv2d(width, shape[0], 3, padding=1)
        layers["tanh"] = nn.Tanh()
        self.layers = nn.Sequential(layers)
        _init_resnet(self)

    def forward(self, z: Tensor) -> Tensor:
        """Z (B, z_dim) -> images (B, C, H, W) in [-1, 1]."""
        images: Tensor = self.layers(self.project(z).unflatten(1, self.base_shape))
        return images


class UpBlock(nn.Module):
    """Residual block of SNGAN's generator: (B, width, s, s) -> (B, width, 2s, 2s)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.norm1 = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.shortcut = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return main path plus shortcut."""
        main = self.conv1(self.upsample(torch.relu(self.norm1(x))))
        main = self.conv2(torch.relu(self.norm2(main)))
        # a 1x1 convolution and nearest upsampling commute; this order is a quarter of the work
        out: Tensor = main + self.upsample(self.shortcut(x))
        return out


class ResidualTrunk(nn.Module):
    """SNGAN discriminator without its last layer and without norms: (B, C, H, W) -> (B, width).

    Blocks that halve the side until it is at most 8, two more that keep it, ReLU, pooling over positions: the sum
    divided by the root of their number. It has Lipschitz constant 1, where SNGAN's plain sum makes logits of +-15 at
    the start when D has no spectral norm.
    """

    def __init__(self, shape: tuple[int, ...], width: int) -> None:
        super().__init__()
        _base_and_doublings(shape)
        halvings = max(1, math.ceil(math.log2(shape[1] / 8)))
        blocks: OrderedDict[str, nn.Module] = OrderedDict()
        for i in range(halvings + 2):
            blocks[f"block{i}"] = DownBlock(shape[0] if i == 0 else width, width, downsample=i < halvings, first=i == 0)
        self.layers = nn.Sequential(blocks)
        self.features = width

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> (B, width)."""
        maps = torch.relu(self.layers(x))
        return maps.sum(dim=(2, 3)) / math.sqrt(maps[0, 0].numel())


class DownBlock(nn.Module):
    """Residual block of SNGAN's discriminator; the first one starts without ReLU, on the image itself."""

    def __init__(self, inside: int, outside: int, *, downsample: bool, first: bool) -> None:
        super().__init__()
        self.first = first
        self.conv1 = nn.Conv2d(inside, outside, 3, padding=1)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1)
        self.shortcut = nn.Conv2d(inside, outside, 1) if downsample else nn.Identity()
        self.pool = nn.AvgPool2d(2) if downsample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return main path plus shortcut."""
        main = self.conv1(x if self.first else torch.relu(x))
        main = self.pool(self.conv2(torch.relu(main)))
        # pooling and a 1x1 convolution commute; this order is a quarter of the work
        out: Tensor = main + self.shortcut(self.pool(x))
        return out


class Products(nn.Module):
    """Products of two affine maps, unit by unit: (B, n) -> (B, m)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.one = nn.Linear(in_features, out_features)
        self.two = nn.Linear(in_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, out_features)."""
        out: Tensor = self.one(x) * self.two(x)
        return out


class Scorer(nn.Module):
    """D of images: features of the first input, joined with all further inputs flat -> logits (B,).

    units: of a hidden layer. hidden: "joined", one if there are further inputs; "dense", always two; "products", always
    one of `Products`.
    """

    def __init__(
        self, trunk: ConvTrunk | ResidualTrunk | Padded, joint: int, units: int, hidden: Hidden = "joined"
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.joins = joint > 0
        features = trunk.features + joint
        self.joint: nn.Module | None = None
        if hidden == "dense":
            self.joint = nn.Sequential(nn.Linear(features, units), nn.LeakyReLU(SLOPE), nn.Linear(units, units))
        elif hidden == "products":
            self.joint = Products(features, units)
        elif joint:
            # one hidden layer, or D would be f(x) + w.z and could not see which z belongs to which x
            self.joint = nn.Linear(features, units)
        self.activation: nn.Module = nn.Identity() if hidden == "products" else nn.LeakyReLU(SLOPE)
        self.out = nn.Linear(units if self.joint else trunk.features, 1)

    def forward(self, x: Tensor, *joined: Tensor) -> Tensor:
        """Images (B, C, H, W) and the further inputs -> logits (B,)."""
        if joined and not self.joins:
            raise UsageError("this discriminator was built for one input: give the shapes of all its inputs")
        features = self.trunk(x)
        if self.joint is not None:
            features = self.activation(self.joint(_flat((features, *joined))))
        logits: Tensor = self.out(features)
        return logits.squeeze(1)


class Encoder(nn.Module):
    """E of images: features -> z (B, z_dim), with tanh for a uniform latent."""

    def __init__(self, trunk: ConvTrunk | ResidualTrunk, z_dim: int, tanh: bool) -> None:
        super().__init__()
        self.trunk = trunk
        self.out = nn.Linear(trunk.features, z_dim)
        self.tanh = tanh

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> z (B, z_dim)."""
        z: Tensor = self.out(self.trunk(x))
        return torch.tanh(z) if self.tanh else z


def _flat(inputs: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.flatten(1) for x in inputs], dim=1) if len(inputs) > 1 else inputs[0].flatten(1)


def _init_dcgan(module: M) -> M:
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(layer.weight, 0.0, DCGAN_STD)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return module


def _reset(module: M) -> M:
    """With the initial weights of PyTorch's own layers."""
    for layer in module.modules():
        if callable(reset := getattr(layer, "reset_parameters", None)):
            reset()
    return module


def _init_resnet(module: M) -> M:
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            residual = name.endswith(("conv1", "conv2"))
            nn.init.xavier_uniform_(layer.weight, gain=math.sqrt(2) if residual else 1.0)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return module


def _is_image(shape: tuple[int, ...]) -> bool:
    return len(shape) == 3


def _square(shape: Sequence[int]) -> tuple[int, ...]:
    shape = _checked_shape(shape)
    if not _is_image(shape) or shape[1] != shape[2]:
        raise UsageError(f"a deep_generator or deep_discriminator is for square images (C, H, H), not {shape}")
    return shape


def _whole(side: int) -> int:
    """The smallest 4 * 2^k, k >= 1, that is no less than a side."""
    return int(4 * 2 ** max(1, math.ceil(math.log2(side / 4))))


def _base_and_doublings(shape: tuple[int, ...]) -> tuple[int, int]:
    """Split the side of a square image into s0 * 2^k, s0 in 3..7, k >= 1."""
    side, k = shape[1], 0
    # 6 * 2^k is also 3 * 2^(k+1): stop at 6, and halve it only for a 6 px image, which has no other k >= 1
    while side % 2 == 0 and (side > 7 or k == 0):
        side //= 2
        k += 1
    if shape[1] != shape[2] or k == 0 or not 3 <= side <= 7:
        raise UsageError(
            f"the convolutional networks make square images with a side of 3, 4, 5, 6 or 7 times 2, 4, 8, ... "
            f"(16, 24, 28, 32, 48, 64, 96, 128, ...), not {shape[1]} x {shape[2]}: resize them, for example with "
            "--image-size 32, or choose --network mlp"
        )
    return side, k


def _resolve(network: str, shape: tuple[int, ...], width: int | None, depth: int | None) -> str:
    """Return "mlp", "dcgan" or "resnet" after checking that it fits the data and the sizes."""
    _choice("network", network, NETWORKS)
    if network == "auto":
        network = "dcgan" if _is_image(shape) else "mlp"
    _positive(**{name: value for name, value in (("width", width), ("depth", depth)) if value is not None})
    if network == "mlp":
        return network
    if not _is_image(shape):
        raise UsageError(
            f"network {network!r} is for images (channels, height, width), not for data of shape {shape}: "
            "choose --network mlp"
        )
    if depth is not None:
        raise UsageError(
            f"the depth of network {network!r} follows from the image size: leave depth out, or set the width"
        )
    return network


def _checked_shape(shape: Sequence[int]) -> tuple[int, ...]:
    shape = tuple(shape)
    if not shape or min(shape) < 1:
        raise UsageError(
            f"a shape must be (features,) or (channels, height, width) with sizes of 1 or more, not {shape}"
        )
    return shape


def _positive(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise UsageError(f"{name} must be 1 or more, not {value}")


def _choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"there is no {what} {value!r}{closest(value, choices)}: choose from {', '.join(choices)}")
