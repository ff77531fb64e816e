"""Networks of the papers' own experiments, for suites that repeat them: ``--generator gankit.protocols:pacgan_generator``.

Sizes and initial weights are those of the authors' published code where it differs from the text (each docstring says so).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional, init


class Maxout(nn.Module):
    """The largest of ``pieces`` affine maps, unit by unit (Goodfellow et al. 2013, arXiv 1302.4389): (B, n) -> (B, m)."""

    def __init__(self, in_features: int, out_features: int, pieces: int) -> None:
        super().__init__()
        self.pieces = pieces
        self.linear = nn.Linear(in_features, out_features * pieces)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, out_features)."""
        out: Tensor = self.linear(x).unflatten(1, (-1, self.pieces)).amax(2)
        return out


class Logits(nn.Module):
    """Joins a critic's inputs flat and squeezes its output: any number of (B, ...) -> (B,)."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return one logit per sample."""
        out: Tensor = self.body(torch.cat([x.flatten(1) for x in inputs], 1)).flatten()
        return out


def _normal(module: nn.Module, std: float) -> nn.Module:
    """Weights N(0, std), biases 0, in linear and convolutional layers."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            init.normal_(layer.weight, std=std)
            if layer.bias is not None:
                init.zeros_(layer.bias)
    return module


# -- PacGAN on Gaussians -------------------------------------------------------------------------------------------


def _normed_layers(features: int, width: int, hidden: int, out: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for i in range(hidden):
        layers += [
            nn.Linear(features if i == 0 else width, width, bias=False),
            nn.BatchNorm1d(width, momentum=0.05),
            nn.ReLU(),
        ]
    return [*layers, nn.Linear(width, out)]


def pacgan_generator(shape: Sequence[int], z_dim: int, width: int = 400) -> nn.Module:
    """PacGAN's G for rings and grids: four hidden layers of 400 with batch norm and ReLU, without biases but the last.

    As in the authors' ``pacgan_task.py``: weights N(0, 0.02), running statistics that move by 0.05 a step.
    """
    layers = _normed_layers(z_dim, width, 4, math.prod(shape))
    return _normal(nn.Sequential(*layers, nn.Unflatten(1, tuple(shape))), 0.02)


def pacgan_discriminator(shapes: Sequence[Sequence[int]], width: int = 200, pieces: int = 5) -> nn.Module:
    """PacGAN's D for rings and grids: three layers of 200 maxout units with five pieces, weights N(0, 0.02)."""
    features = sum(math.prod(shape) for shape in shapes)
    layers = [Maxout(features if i == 0 else width, width, pieces) for i in range(3)]
    return _normal(Logits(nn.Sequential(*layers, nn.Linear(width, 1))), 0.02)


class Noised(nn.Module):
    """What ``body`` makes of x and as many N(0, 1) numbers beside it, drawn anew in every pass: (B, ...) -> (B, m).

    An encoder that draws its code. The numbers come from PyTorch's global generator, as those of dropout do.
    """

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, m)."""
        flat = x.flatten(1)
        out: Tensor = self.body(torch.cat([flat, torch.randn_like(flat)], 1))
        return out


def ali_encoder(shape: Sequence[int], z_dim: int, width: int = 400) -> nn.Module:
    """ALI's E in PacGAN's comparison: two hidden layers of 400 as those of `pacgan_generator`, of x and as much noise.

    As in the authors' ``2DGrid_ALI/pacgan_task.py``; its ``COVConditional``, a network of x and noise by its sizes, is in
    no published copy of ALI's code that we found.
    """
    return _normal(Noised(nn.Sequential(*_normed_layers(2 * math.prod(shape), width, 2, z_dim))), 0.02)


# -- unrolled GAN on the ring --------------------------------------------------------------------------------------


def _tanh_mlp(features: int, out: int) -> nn.Sequential:
    body = nn.Sequential(nn.Linear(features, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, out))
    for layer in body:
        if isinstance(layer, nn.Linear):
            init.orthogonal_(layer.weight, gain=1.4)
            init.zeros_(layer.bias)
    return body


def unrolled_generator(shape: Sequence[int], z_dim: int) -> nn.Module:
    """G of the unrolled GAN's public notebook: two hidden layers of 128 tanh, orthogonal weights with gain 1.4.

    Its author says that the notebook differs from the paper.
    """
    return nn.Sequential(_tanh_mlp(z_dim, math.prod(shape)), nn.Unflatten(1, tuple(shape)))


def unrolled_discriminator(shapes: Sequence[Sequence[int]]) -> nn.Module:
    """D of the unrolled GAN's public notebook: as its G."""
    return Logits(_tanh_mlp(sum(math.prod(shape) for shape in shapes), 1))


# -- VEEGAN on the grid --------------------------------------------------------------------------------------------


def _relu_mlp(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inside, outside in pairwise(sizes):
        linear = nn.Linear(inside, outside)
        init.xavier_uniform_(linear.weight)  # as tf.slim's layers, which the notebook is written in
        init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def veegan_generator(shape: Sequence[int], z_dim: int) -> nn.Module:
    """G of VEEGAN's public notebook for the grid: two hidden layers of 128 ReLU.

    The notebook appends one more coordinate to z, noise that is not reconstructed; it is left out here.
    """
    return nn.Sequential(_relu_mlp(z_dim, 128, 128, math.prod(shape)), nn.Unflatten(1, tuple(shape)))


def veegan_discriminator(shapes: Sequence[Sequence[int]]) -> nn.Module:
    """D of VEEGAN's public notebook: one hidden layer of 128 ReLU on all its inputs joined."""
    return Logits(_relu_mlp(sum(math.prod(shape) for shape in shapes), 128, 1))


def veegan_reconstructor(shape: Sequence[int], z_dim: int) -> nn.Module:
    """F of VEEGAN's public notebook, the mean of p(z | x): two hidden layers of 128 ReLU, (B, *shape) -> (B, z_dim)."""
    return nn.Sequential(nn.Flatten(), _relu_mlp(math.prod(shape), 128, 128, z_dim))


# -- DCGANs with TensorFlow's padding, for stacked MNIST -----------------------------------------------------------


class SameConv(nn.Module):
    """A convolution of stride 2 whose output side is half the input's, rounded up, padded as TensorFlow's "SAME"."""

    def __init__(self, channels: int, out_channels: int, kernel: int = 5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels, kernel, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, s, s) -> (B, C', ceil(s / 2), ceil(s / 2))."""
        before, after = _same_padding(x.shape[-1], self.conv.kernel_size[0])
        out: Tensor = self.conv(functional.pad(x, (before, after, before, after)))
        return out


class SameDeconv(nn.Module):
    """The transpose of :class:`SameConv`, to a given side."""

    def __init__(self, channels: int, out_channels: int, side: int, kernel: int = 5) -> None:
        super().__init__()
        self.side = side
        self.deconv = nn.ConvTranspose2d(channels, out_channels, kernel, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ceil(side / 2), ceil(side / 2)) -> (B, C', side, side)."""
        before, _ = _same_padding(self.side, self.deconv.kernel_size[0])
        out: Tensor = self.deconv(x)[..., before : before + self.side, before : before + self.side]
        return out


def _same_padding(side: int, kernel: int) -> tuple[int, int]:
    total = max((math.ceil(side / 2) - 1) * 2 + kernel - side, 0)
    return total // 2, total - total // 2


def _same_deconvs(z_dim: int, widths: Sequence[int], side: int, kernel: int) -> list[nn.Module]:
    """A linear layer, then batch norm, ReLU and a transposed convolution from each width to the next, up to ``side``."""
    sides = [side]
    for _ in widths[1:]:
        sides.insert(0, math.ceil(sides[0] / 2))
    layers: list[nn.Module] = [
        nn.Linear(z_dim, widths[0] * sides[0] ** 2),
        nn.Unflatten(1, (widths[0], sides[0], sides[0])),
    ]
    for (inside, outside), reached in zip(pairwise(widths), sides[1:], strict=True):
        layers += [nn.BatchNorm2d(inside), nn.ReLU(), SameDeconv(inside, outside, reached, kernel)]
    return layers


def _same_convs(widths: Sequence[int], side: int, kernel: int, leak: float, *, plain: int) -> nn.Module:
    """Convolutions from each width to the next, with batch norm in all but the first ``plain``, and a linear layer."""
    layers: list[nn.Module] = []
    for i, (inside, outside) in enumerate(pairwise(widths)):
        layers.append(SameConv(inside, outside, kernel))
        if i >= plain:
            layers.append(nn.BatchNorm2d(outside))
        layers.append(nn.LeakyReLU(leak))
        side = math.ceil(side / 2)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * side**2, 1), nn.Flatten(0))


def dcgan_same_generator(shape: Sequence[int], z_dim: int, width: int = 64) -> nn.Module:
    """G of PacGAN's stacked-MNIST experiment: the DCGAN of its TensorFlow code, 5x5 kernels, sides halved and rounded up."""
    channels, side, _ = shape
    layers = _same_deconvs(z_dim, [width * 8, width * 4, width * 2, width, channels], side, 5)
    return _normal(nn.Sequential(*layers, nn.Tanh()), 0.02)


def dcgan_same_discriminator(shapes: Sequence[Sequence[int]], width: int = 64) -> nn.Module:
    """D of PacGAN's stacked-MNIST experiment: four convolutions with batch norm from the second on."""
    ((channels, side, _),) = shapes
    return _normal(_same_convs([channels, width, width * 2, width * 4, width * 8], side, 5, 0.2, plain=1), 0.02)


def small_dcgan_generator(shape: Sequence[int], z_dim: int) -> nn.Module:
    """G of the unrolled GAN's stacked-MNIST experiment as PacGAN's authors repeat it: 3x3 kernels, 64 to 8 channels.

    A linear layer to 4 x 4, three transposed convolutions, to 7, 14 and 28 px, batch norm and ReLU after each, and a
    convolution of stride 1 with tanh. Their code, ``unrolled_GAN_experiment``, takes its layers from the ``ops.py`` of
    carpedm20/DCGAN-tensorflow: weights N(0, 0.02), in convolutions cut off at two deviations, which ours are not.
    """
    channels, side, _ = shape
    layers = _same_deconvs(z_dim, [64, 32, 16, 8], side, 3)
    last = [nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, channels, 3, padding=1), nn.Tanh()]
    return _normal(nn.Sequential(*layers, *last), 0.02)


def small_dcgan_discriminator(shapes: Sequence[Sequence[int]], width: int = 2) -> nn.Module:
    """D to `small_dcgan_generator`: three convolutions of width, 2 width, 4 width channels with batch norm, leak 0.3.

    The papers' "D is 1/4 the size of G" has width 2, "1/2" width 4.
    """
    ((channels, side, _),) = shapes
    return _normal(_same_convs([channels, width, width * 2, width * 4], side, 3, 0.3, plain=0), 0.02)
