"""What lies between latents, and which latent is nearest to a sample: interpolation and IvOM.

IvOM, inference via optimization, tells of lost modes without knowing any: a real sample that G cannot make keeps a residual
(Metz et al. 2016, Unrolled GANs, arXiv 1611.02163, section 3.4; Srivastava et al. 2017, VEEGAN, arXiv 1705.07761, section
4).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gankit import pictures
from gankit.config import Device
from gankit.errors import UsageError
from gankit.gan import GAN, Latent, derive_seed, seeded
from gankit.joint import CHUNK, has_encoder, reconstruct
from gankit.provenance import column, hash_of
from gankit.run import Reporter, load, read_data
from gankit.rundir import RunDir
from gankit.structure import evaluating

STEPS, RESTARTS, RATE = 200, 3, 0.1
SHOWN, ACROSS = 32, 8  # samples in the picture of an inversion, and in one row of it
PATH = 200  # points between two latents where samples are points


class Nearest(NamedTuple):
    """What IvOM found: z (N, \\*latent), and the residual of each sample (N,)."""

    z: Tensor
    residuals: Tensor


def ivom(
    network: nn.Module,
    x: Tensor,
    latent: Latent,
    *,
    steps: int = STEPS,
    restarts: int = RESTARTS,
    rate: float = RATE,
    generator: torch.Generator,
) -> Nearest:
    """The latents whose samples are nearest to x: min over z of mean_f (G(z) - x)_f^2, f over pixels or coordinates.

    network: G, from z to samples like x; put in evaluation mode meanwhile. Its parameters and their ``grad`` stay as they
        are. x: (N, ...). generator: for the starts, on the device of x and of G.
    steps, restarts, rate: Adam's from each of so many draws of the prior; its rate falls from ``rate`` to 0 along half a
        cosine. Adam treats each coordinate for itself, so no sample's result depends on another. Of all points met, the
        best counts. Under a uniform prior z stays in [-1, 1]; under a normal one it is free, as in the papers.

    The residual is in the data's own scale: images are in [-1, 1], and it is 4 times that of images in [0, 1]. It is an
    upper bound of the true minimum, so compare only what was found with the same steps and restarts. Costs
    restarts * (steps + 1) passes through G. UsageError for numbers below 1 or samples that G does not make.
    """
    if min(steps, restarts) < 1 or rate <= 0:
        raise UsageError(
            f"IvOM needs at least one step and one restart and a positive rate, not {steps}, {restarts}, {rate}"
        )
    starts = [latent.draw(len(x), generator) for _ in range(restarts)]
    nearest = Nearest(torch.zeros_like(starts[0]), torch.full((len(x),), math.inf, device=x.device))
    with evaluating(network), torch.enable_grad():
        for start in starts:
            for rows in torch.split(torch.arange(len(x), device=x.device), CHUNK):
                z, residuals = _descend(network, x[rows], start[rows], steps, rate, latent.kind == "uniform")
                better = residuals < nearest.residuals[rows]
                nearest.z[rows[better]], nearest.residuals[rows[better]] = z[better], residuals[better]
    return nearest


def _descend(network: nn.Module, x: Tensor, z: Tensor, steps: int, rate: float, bounded: bool) -> Nearest:
    """Adam from one start for each sample; the best of all points met."""
    z = z.clone().requires_grad_()
    optimizer = torch.optim.Adam([z], lr=rate)
    best = Nearest(z.detach().clone(), torch.full((len(x),), math.inf, device=x.device))
    for step in range(steps + 1):
        fake = network(z)
        if fake.shape != x.shape:
            raise UsageError(f"the generator makes {tuple(fake.shape[1:])}, and the samples are {tuple(x.shape[1:])}")
        residuals = (fake - x).square().flatten(1).mean(1)
        found = residuals.detach()
        better = found < best.residuals
        best.z[better], best.residuals[better] = z.detach()[better], found[better]
        if step == steps:
            break
        (z.grad,) = torch.autograd.grad(residuals.sum(), z)
        optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.step()
        if bounded:
            z.data.clamp_(-1, 1)
    return best


def interpolate_latents(start: Tensor, end: Tensor, count: int, kind: str) -> Tensor:
    """``count`` latents from each start to its end, both included: (R, \\*latent) twice -> (R, count, \\*latent).

    kind "uniform": on the straight line, which stays inside the cube. "normal": on the great circle (White 2016, arXiv
    1609.04468), z(t) = [sin((1 - t) w) start + sin(t w) end] / sin w with w the angle between the two, since a normal
    prior in many dimensions lies near a sphere, and the middle of a line is far inside it; on the line where w is nearly 0
    or pi and in one dimension. UsageError for fewer than 2 points or unequal shapes.
    """
    if count < 2 or start.shape != end.shape:
        raise UsageError(
            f"an interpolation needs 2 points or more between latents of one shape, not {count} between "
            f"{tuple(start.shape)} and {tuple(end.shape)}"
        )
    a, b = (z.double().flatten(1).unsqueeze(1) for z in (start, end))
    t = torch.linspace(0, 1, count, dtype=torch.float64, device=start.device).unsqueeze(1)
    z = (1 - t) * a + t * b
    if kind == "normal":
        cosine = (a * b).sum(2, keepdim=True) / (a.norm(dim=2, keepdim=True) * b.norm(dim=2, keepdim=True))
        angle = cosine.clamp(-1, 1).acos()
        circle = (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / angle.sin()
        z = torch.where(angle.sin() > 1e-4, circle, z)
    return z.to(start.dtype).reshape(len(start), count, *start.shape[1:])


class Measured(NamedTuple):
    """Means over samples by column, what each depends on, and what they are means of."""

    metrics: dict[str, float]
    provenance: dict[str, dict[str, object]]
    nearest: Nearest
    reconstruction: Tensor | None


def measured(
    gan: GAN, x: Tensor, data: str, *, steps: int = STEPS, restarts: int = RESTARTS, seed: int = 0
) -> Measured:
    """The mean residual of IvOM, ``ivom@...``, and where there is an encoder the mean error of G(E(x)).

    x: held-out samples (N, \\*shape) on the GAN's device; data: the name of their data set, part of the columns' names.
    The averaged G is asked where there is one. See :func:`ivom` for steps and restarts; seed: of its starts, and of the
    noise that a network draws from torch's global generator.
    """
    # other numbers than the starts have, which are from the same seed
    with seeded(seed, "invert", "noise"):
        stream = torch.Generator(gan.device).manual_seed(derive_seed(seed, "invert"))
        nearest = ivom(gan.sampled, x, gan.latent, steps=steps, restarts=restarts, generator=stream)
        reconstruction = reconstruct(gan, x) if has_encoder(gan) else None
    facts: dict[str, object] = {"n": len(x), "split": "test", "data": data, "reference": hash_of({"x": x})}
    abouts = {"ivom": facts | {"steps": steps, "restarts": restarts, "rate": RATE}}
    values = {"ivom": nearest.residuals.mean().item()}
    if reconstruction is not None:
        abouts["reconstruction_error"] = facts
        values["reconstruction_error"] = (reconstruction - x).square().mean().item()
    names = {metric: column(metric, about) for metric, about in abouts.items()}
    return Measured(
        {names[metric]: value for metric, value in values.items()},
        {names[metric]: about for metric, about in abouts.items()},
        nearest,
        reconstruction,
    )


# -- recorded runs -------------------------------------------------------------------------------------------------


def interpolate(
    run: RunDir,
    reporter: Reporter,
    to: str | None = None,
    rows: int = 8,
    columns: int | None = None,
    seed: int = 0,
    checkpoint: str | None = None,
    device: Device = "auto",
) -> Path:
    """``gankit interpolate``: a picture of what lies between pairs of latents, one pair a row, and its path.

    Images become a grid, other samples points along the paths above true ones. columns: latents of a row, both ends
    included; by default 10, for points 200.
    """
    path = _png(to, run.path / "interpolation.png")
    gan, config = load(run, checkpoint, device)
    columns = columns or (10 if len(gan.shape) == 3 else PATH)
    stream = torch.Generator(gan.device).manual_seed(derive_seed(seed, "interpolate"))
    start, end = gan.latent.draw(rows, stream), gan.latent.draw(rows, stream)
    z = interpolate_latents(start, end, columns, gan.latent.kind).flatten(0, 1)
    fake = torch.cat([gan.generate(part) for part in torch.split(z, CHUNK)]).cpu()
    if len(gan.shape) == 3:
        made = pictures.image_grid(fake, columns)
    else:
        real = read_data(config, reporter).held_out(2500)
        title = f"step {gan.step}: paths between {rows} pairs of latents"
        made = pictures.scatter(real, fake, title=title, limits=pictures.scatter_limits(real))
    pictures.save_png(made, path)
    return path


@dataclass
class Inversion:
    """What ``gankit invert`` found.

    metrics, provenance: means over the samples, by column. variance: the residual that their mean image would leave.
    worst: the largest residual.
    """

    step: int
    metrics: dict[str, float]
    provenance: dict[str, dict[str, object]]
    variance: float
    worst: float
    picture: Path


def invert(
    run: RunDir,
    reporter: Reporter,
    n: int = 64,
    steps: int = STEPS,
    restarts: int = RESTARTS,
    seed: int = 0,
    to: str | None = None,
    checkpoint: str | None = None,
    device: Device = "auto",
) -> Inversion:
    """``gankit invert``: IvOM of n held-out samples, and the error of G(E(x)) where the run has an encoder.

    The picture shows the samples that G misses most, worst first, each above the nearest G(z), and above G(E(x)).
    """
    path = _png(to, run.path / "inversion.png")
    gan, config = load(run, checkpoint, device)
    data = read_data(config, reporter)
    x = data.held_out(n).to(gan.device)
    found = measured(gan, x, data.name, steps=steps, restarts=restarts, seed=seed)
    residuals = found.nearest.residuals
    nearest = torch.cat([gan.generate(part) for part in torch.split(found.nearest.z, CHUNK)])
    shown = {"x": x, "nearest G(z)": nearest}
    if found.reconstruction is not None:
        shown["G(E(x))"] = found.reconstruction
    order = residuals.argsort(descending=True).cpu()
    if data.is_image:
        worst = [images.cpu()[order[:SHOWN]] for images in shown.values()]
        blocks = zip(*(torch.split(images, ACROSS) for images in worst), strict=True)
        grids = [pictures.image_grid(torch.cat(rows), len(rows[0])) for rows in blocks]
        made = pictures.stacked(grids, f"worst first; each block: {', '.join(shown)}")
    else:
        made = pictures.scatter(x.cpu(), shown["nearest G(z)"].cpu(), title=f"step {gan.step}: x and its nearest G(z)")
    pictures.save_png(made, path)
    return Inversion(
        step=gan.step,
        metrics=found.metrics,
        provenance=found.provenance,
        variance=(x - x.mean(0)).square().mean().item(),
        worst=residuals.max().item(),
        picture=path,
    )


def _png(to: str | None, default: Path) -> Path:
    path = Path(to) if to else default
    if path.suffix != ".png":
        raise UsageError(f"the picture goes to a .png file, not {path.name!r}")
    return path
