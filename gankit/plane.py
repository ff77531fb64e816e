"""What a run records of 2-D data for its report: samples, and the value and gradient of D under them."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gankit.contract import watched
from gankit.errors import UsageError
from gankit.files import write_atomic
from gankit.functional import logit_per_sample
from gankit.gan import seeded
from gankit.pictures import Limits
from gankit.structure import evaluating

if TYPE_CHECKING:
    from gankit.gan import GAN

GRID = 48  # points a side at which D is looked at
ALONE = 64  # of them that are scored by themselves and among as many others

Array = np.ndarray[Any, np.dtype[np.float32]]


class Field(NamedTuple):
    """D on a grid of GRID x GRID points, row by row from below: logits (GRID, GRID), their gradients (GRID, GRID, 2).

    joint: whether D is shown more than the sample.
    """

    values: Array
    slopes: Array
    joint: bool


class Frame(NamedTuple):
    """One recorded moment: samples (N, 2), the limits of their picture, and D's field, or why there is none."""

    fake: Array
    limits: Limits
    field: Field | str


def wider(limits: Limits, factor: float = 1.15) -> Limits:
    """Limits around the same middle."""
    x_low, x_high, y_low, y_high = limits
    x, y = (factor - 1) / 2 * (x_high - x_low), (factor - 1) / 2 * (y_high - y_low)
    return (x_low - x, x_high + x, y_low - y, y_high + y)


def grid(limits: Limits, size: int = GRID) -> Tensor:
    """(size^2, 2) points that fill the limits, edges included: x changes first, both from low to high."""
    x_low, x_high, y_low, y_high = limits
    y, x = torch.meshgrid(torch.linspace(y_low, y_high, size), torch.linspace(x_low, x_high, size), indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], dim=1)


def critic_field(gan: GAN, limits: Limits) -> Field | str:
    """D's logit and its gradient with respect to x on a grid, as D is shown real samples; or why there is none.

    In a joint view the other arguments are those of a real sample there, z = E(x), and the gradient keeps them fixed.
    Where a point has no logit of its own, as under packing, the answer is a sentence. Evaluation mode; nothing moves, no
    random stream either.
    """
    points = grid(limits).to(gan.device)
    z = torch.zeros(len(points), *(gan.latent.shape or (gan.latent.dim,)), device=gan.device)
    modules = [player.module for player in gan.players.values()]
    with gan.streams_kept(), seeded(gan.seed, "field"), evaluating(*modules), gan.manager.meter.paused():
        try:
            with torch.no_grad():
                batch = gan.hook.sample(gan=gan, real=points, z=z, phase="d", step=gan.step)
                view = gan.hook.view(gan=gan, batch=batch, phase="d", step=gan.step)
        except UsageError:  # a plugin that cannot show so many, such as packs of 5
            return "D is not shown single samples here, so a single point has no value"
        shown = watched(view).real
        if shown[0].shape != points.shape:
            return "D is shown several samples at once here, so a single point has no value"
        with torch.no_grad():
            alone, among = (logit_per_sample(gan.discriminator(*(t[:n] for t in shown))) for n in (ALONE, 2 * ALONE))
        if not torch.allclose(alone, among[:ALONE], rtol=1e-3, atol=1e-3):
            return "D's value of a sample depends on the rest of its batch here, so a single point has none"
        logits = logit_per_sample(gan.discriminator(*shown))
        (slopes,) = torch.autograd.grad(logits.sum(), shown[0])
    return Field(_plain(logits.view(GRID, GRID)), _plain(slopes.view(GRID, GRID, 2)), len(shown) > 1)


def save_frame(gan: GAN, fake: Tensor, limits: Limits, path: Path) -> None:
    """Write samples (N, 2), and D's field within the limits of the true ones and a little beyond, to an .npz file."""
    limits = wider(limits)
    found = critic_field(gan, limits)
    arrays = {"why": np.array(found)} if isinstance(found, str) else found._asdict()
    _save(path, fake=_plain(fake), limits=np.array(limits), **arrays)


def load_frame(path: Path) -> Frame:
    """Undo :func:`save_frame`; UsageError if the file is broken."""
    with _reading(path), np.load(path) as arrays:
        low, high, bottom, top = arrays["limits"].tolist()
        if "why" in arrays:
            return Frame(arrays["fake"], (low, high, bottom, top), str(arrays["why"]))
        found = Field(arrays["values"], arrays["slopes"], bool(arrays["joint"]))
        return Frame(arrays["fake"], (low, high, bottom, top), found)


def save_reals(real: Tensor, path: Path) -> None:
    """Write true samples (N, 2) to an .npz file."""
    _save(path, real=_plain(real))


def load_reals(path: Path) -> Array:
    """Undo :func:`save_reals`; UsageError if the file is broken."""
    with _reading(path), np.load(path) as arrays:
        real: Array = arrays["real"]
    return real


def _plain(tensor: Tensor) -> Array:
    return tensor.detach().to("cpu", torch.float32).numpy()


def _save(path: Path, **arrays: Any) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_atomic(path, buffer.getvalue())


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
