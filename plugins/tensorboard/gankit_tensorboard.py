"""Losses by term, metrics and samples of a run for TensorBoard, as a gankit plugin."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
from torch import Tensor

from gankit import GAN, hookimpl, pictures

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Found = list[dict[str, float]]


@dataclass(eq=False)
class TensorBoard:
    """Log each term of both losses, the metrics and a picture of samples for TensorBoard; nothing else changes.

    Tags are ``d_loss/<term>``, ``g_loss/<term>`` (as they are in that step, of the last D update), ``metrics/<name>`` and
    ``samples``; what true data score is the text ``true data``. Values of a continued run take the place of those that were
    logged after the step it continues from.
    """

    formula: ClassVar[str] = "none: it looks on"
    paper: ClassVar[str] = "none: https://www.tensorflow.org/tensorboard"

    every: Annotated[int, "steps between two values of the losses; each reads them from the device"] = 50
    samples: Annotated[int, "how many are drawn for a picture; 0: none"] = 64
    folder: Annotated[str | None, "where to; default: tensorboard/ in the run's folder"] = None

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError("every must be at least 1")
        if self.samples < 0:
            raise ValueError("samples must not be negative")
        self._writer: SummaryWriter | None = None
        self._begun = False
        self._truth: dict[str, float] = {}
        self._d_terms: Mapping[str, Tensor] = {}

    @hookimpl
    def post_step(self, gan: GAN, terms: dict[str, Tensor], phase: str, step: int) -> None:
        """Begin at the first update; write both players' terms every ``every`` steps."""
        if not self._begun:
            self._begun = True
            self._writer = self._open(gan, step)
        if phase == "d":
            self._d_terms = terms
        elif self._writer and step % self.every == 0:
            for start, values in (("d_loss", self._d_terms), ("g_loss", terms)):
                for name, value in values.items():
                    self._writer.add_scalar(f"{start}/{name}", value.item(), step)
            self._writer.flush()  # an interrupted process ends without telling plugins

    @hookimpl(wrapper=True, tryfirst=True)
    def evaluate(self, gan: GAN, draw: Callable[[int], Tensor], step: int | None) -> Generator[None, Found, Found]:
        """Write all metrics, whoever computes them, and a picture."""
        found = yield
        values = {name: value for metrics in found for name, value in metrics.items()}
        if step is None:
            self._truth = values
        elif self._writer:
            for name, value in values.items():
                self._writer.add_scalar(f"metrics/{name}", value, step)
            if self.samples:
                self._writer.add_image("samples", picture(gan, draw(self.samples)), step, dataformats="HWC")
            self._writer.flush()
        return found

    def _open(self, gan: GAN, step: int) -> SummaryWriter | None:
        """A writer that drops what was logged from this step on before; None in all processes of a team but the first."""
        if gan.rank:
            return None
        folder = Path(self.folder) if self.folder else gan.folder and gan.folder / "tensorboard"
        if folder is None:
            warnings.warn("tensorboard logs nothing: there is no run's folder, so set its option folder", stacklevel=2)
            return None
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder), purge_step=step)
        if self._truth:
            rows = "".join(f"\n| {name} | {value:.6g} |" for name, value in self._truth.items())
            writer.add_text("true data", f"| metric | true data |\n|---|---|{rows}", 0)
        return writer


def picture(gan: GAN, fake: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Samples (N, \\*shape) as one picture (H, W, 3): a grid of images; points, over true ones where the data are known."""
    if fake.dim() == 4:
        return np.asarray(pictures.image_grid(fake))
    real = None if gan.data is None else gan.data.held_out(2500).cpu()
    limits = None if real is None else pictures.scatter_limits(real)
    return np.asarray(pictures.scatter(real, fake.cpu(), limits=limits))
