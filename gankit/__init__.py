"""gankit: GAN regularizers that are proven right, combine, and work in any PyTorch loop.

The public names are loaded on first use, so that ``import gankit`` and ``gankit --help`` stay free of torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from gankit.attached import attach
    from gankit.contract import Batch, Player, View
    from gankit.errors import UsageError
    from gankit.gan import GAN, Latent, Optim
    from gankit.hookspecs import hookimpl
    from gankit.loop import train

_HOMES = {
    "Batch": "contract",
    "GAN": "gan",
    "Latent": "gan",
    "Optim": "gan",
    "Player": "contract",
    "UsageError": "errors",
    "View": "contract",
    "attach": "attached",
    "hookimpl": "hookspecs",
    "train": "loop",
}

__all__ = ["GAN", "Batch", "Latent", "Optim", "Player", "UsageError", "View", "attach", "hookimpl", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gankit' has no attribute {name!r}")
    return getattr(import_module(f"gankit.{_HOMES[name]}"), name)
