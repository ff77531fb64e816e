"""Find and replace modules inside networks, one's own or the shipped: for plugins that change the architecture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gankit.errors import UsageError
from gankit.options import closest


def listing(root: nn.Module, limit: int = 40) -> str:
    """Names and types of the modules inside ``root``, for messages: "layers.down0 (Conv2d), ...", containers left out."""
    found = [f"{name} ({type(m).__name__})" for name, m in root.named_modules() if name and not any(m.children())]
    more = f", and {len(found) - limit} more" if len(found) > limit else ""
    return (", ".join(found[:limit]) or f"nothing but the {type(root).__name__} itself") + more


def named(root: nn.Module, name: str, network: str) -> nn.Module:
    """The module called ``name`` inside ``root``; UsageError with the nearest names if there is none.

    network: what messages call ``root``, such as "discriminator".
    """
    modules: dict[str, nn.Module] = dict(root.named_modules())
    if not name or name not in modules:
        raise UsageError(f"the {network} has no module called {name!r}{closest(name, modules)}; it has {listing(root)}")
    return modules[name]


def of_type(root: nn.Module, *types: type[nn.Module]) -> dict[str, nn.Module]:
    """The modules of these types inside ``root`` by name, each once, in its order; ``root`` itself is called ""."""
    return {name: module for name, module in root.named_modules() if isinstance(module, types)}


def replace(root: nn.Module, name: str, make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Put ``make(module)`` into the place of the module called ``name`` inside ``root``, and return it.

    Into all its places, if it has several names. It goes to the device of the old module and takes its training mode.
    Parameters of ``root`` change, so do it before the optimisers are made. ValueError for ``root`` itself (""), which only
    its owner can replace.
    """
    if not name:
        raise ValueError("the network itself cannot be replaced from inside")
    old = root.get_submodule(name)
    place = next((t.device for t in (*old.parameters(), *old.buffers(), *root.parameters())), torch.device("cpu"))
    homes = [(parent, child) for parent in root.modules() for child, m in parent._modules.items() if m is old]
    new = make(old).to(place)
    new.train(old.training)
    for parent, child in homes:
        setattr(parent, child, new)
    return new


@contextmanager
def modes_kept(*networks: nn.Module) -> Iterator[None]:
    """After the block, every module inside the networks is in training or not as it was before."""
    modes = [(m, m.training) for network in networks for m in network.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def evaluating(*networks: nn.Module) -> Iterator[None]:
    """The networks in evaluation mode, so that nothing in them moves; afterwards every module is in its own mode again."""
    with modes_kept(*networks):
        for network in networks:
            network.eval()
        yield


def calls(root: nn.Module, *inputs: Tensor) -> list[tuple[str, Any]]:
    """What each call of a module inside ``root`` returned, with its name, in the order in which they finish; root ("") last.

    One forward pass in evaluation mode; nothing moves. The outputs keep their graph where gradients are on. Modules that
    compute weights (parametrizations) are left out, and so is what happens while ``root`` calls itself.
    """
    found: list[tuple[str, Any]] = []
    running: list[nn.Module] = []  # of root, one in the other

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if len(running) == 1:
                found.append((name, output))
            if module is root:
                running.pop()

        return note

    named = [(name, m) for name, m in root.named_modules() if "parametrizations" not in name.split(".")]
    handles = [m.register_forward_hook(hook(name)) for name, m in named]
    handles.append(root.register_forward_pre_hook(lambda module, args: running.append(module), prepend=True))
    try:
        with evaluating(root):
            root(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


@torch.no_grad()
def output_shapes(root: nn.Module, *inputs: Tensor) -> dict[str, tuple[int, ...]]:
    """Shape (B, ...) of the tensor each module inside ``root`` returns, by name, in the order in which they finish.

    One forward pass in evaluation mode; nothing moves. Modules that return no tensor, or are not called, are left out; of
    one called several times the last output counts.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, output in calls(root, *inputs):
        if name and isinstance(output, Tensor):
            shapes.pop(name, None)
            shapes[name] = tuple(output.shape)
    return shapes
