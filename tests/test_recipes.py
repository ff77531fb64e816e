"""What docs/recipes/ prints as plain PyTorch is what gankit computes."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gankit_r1 import R1
from gankit_r2 import R2
from torch import Tensor

from gankit import View, losses
from gankit.loop import d_terms, g_terms, total
from gankit.testing import tiny_gan

RECIPES = Path(__file__).parents[1] / "docs" / "recipes"


def snippet(page: str) -> dict[str, Any]:
    namespace: dict[str, Any] = {}
    exec(re.findall(r"^```python\n(.*?)^```", (RECIPES / page).read_text(), re.MULTILINE | re.DOTALL)[0], namespace)
    return namespace


@pytest.mark.parametrize("kind", ["vector", "image"])
@pytest.mark.parametrize("gamma", [10.0, 0.3])
def test_r3gan(kind: str, gamma: float) -> None:
    gan = tiny_gan(kind, {"r1": R1(weight=gamma), "r2": R2(weight=gamma)}, loss="relativistic")
    z, real = torch.randn(8, 4), torch.randn(8, *gan.shape)
    batch = gan.hook.sample(gan=gan, real=real, z=z, phase="g", step=1)
    view = View((real.clone().requires_grad_(),), (batch.fake,))
    d_loss, g_loss = (f(gan, gan.discriminator, batch, view, 1) for f in (d_terms, g_terms))
    assert set(d_loss) == {"adv", "r1", "r2"}
    assert set(g_loss) == {"adv"}

    def same(ours: Tensor, theirs: Tensor, module: torch.nn.Module) -> None:
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
        parameters = list(module.parameters())
        grads = [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in (ours, theirs)]
        for a, b in zip(*grads, strict=True):
            # the last bias cancels in a difference of logits and in a slope
            torch.testing.assert_close(*(torch.zeros(()) if g is None else g for g in (a, b)), rtol=1e-4, atol=1e-6)

    recipe = snippet("r3gan.md")
    d, g = (recipe[name] for name in ("r3gan_d_loss", "r3gan_g_loss"))
    same(total(d_loss), d(gan.discriminator, real, batch.fake, gamma=gamma), gan.discriminator)
    same(total(g_loss), g(gan.discriminator, real, batch.fake), gan.generator)


def test_the_weight_has_to_be_chosen_and_g_is_shown_both_sides() -> None:
    d: Callable[..., Tensor] = snippet("r3gan.md")["r3gan_d_loss"]
    assert d.__defaults__ is None  # there is no weight that fits all data
    assert losses.make("relativistic").g_sides == ("real_logits", "fake_logits")
