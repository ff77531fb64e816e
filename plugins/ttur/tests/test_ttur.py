import math

import numpy as np
import pytest
import torch
from gankit_ttur import PRESETS, TTUR, settings
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from gankit import GAN, Optim, UsageError
from gankit.loop import train
from gankit.plugins import create
from gankit.testing import run, tiny_gan
from gankit.training import LinearDecay


def rates(gan: GAN) -> dict[str, tuple[float, tuple[float, float], float]]:
    """What the optimisers really use."""
    groups = {phase: gan.optimizers[phase].param_groups[0] for phase in "dg"}
    return {phase: (g["lr"], tuple(g["betas"]), g["eps"]) for phase, g in groups.items()}


PUBLISHED = {  # discriminator, generator, betas
    "sagan": (4e-4, 1e-4, (0.0, 0.9)),
    "wgan_gp": (3e-4, 1e-4, (0.0, 0.9)),
    "dcgan_celeba": (1e-5, 5e-4, (0.5, 0.999)),
    "dcgan_cifar10": (1e-4, 5e-4, (0.5, 0.999)),
    "dcgan_svhn": (1e-5, 1e-4, (0.5, 0.999)),
    "dcgan_lsun": (1e-5, 1e-4, (0.5, 0.999)),
}


def test_every_preset_is_known_here() -> None:
    assert PRESETS.keys() == PUBLISHED.keys()


@pytest.mark.parametrize("preset", PUBLISHED)
def test_the_optimisers_get_the_published_pair(preset: str) -> None:
    lr_d, lr_g, betas = PUBLISHED[preset]
    gan = tiny_gan(plugins={"ttur": TTUR(preset)})  # type: ignore[arg-type]
    assert rates(gan) == {"d": (lr_d, betas, 1e-8), "g": (lr_g, betas, 1e-8)}
    for phase, lr in (("d", lr_d), ("g", lr_g)):
        optimizer = torch.optim.Adam([torch.zeros(1)], **vars(settings(preset)[phase]))
        assert optimizer.param_groups[0]["lr"] == lr and optimizer.param_groups[0]["betas"] == betas


def test_the_first_steps_are_as_long_as_the_rates() -> None:
    """Adam's first step is lr * sign(gradient): a check that the rates reach the right network."""
    start = tiny_gan(plugins={"ttur": TTUR()})
    before = {p: [t.detach().clone() for t in start.parameters(p)] for p in "dg"}
    train(start, 1)
    for phase, lr in (("d", 4e-4), ("g", 1e-4)):
        moved = max((a - b).abs().max().item() for a, b in zip(before[phase], start.parameters(phase), strict=True))
        assert moved == pytest.approx(lr, rel=1e-3)


RATE = st.one_of(st.none(), st.floats(1e-6, 1e-2))
BETA = st.one_of(st.none(), st.floats(0, 0.999))


@hypothesis_settings(deadline=None, max_examples=20)
@given(preset=st.sampled_from([*PUBLISHED, "none"]), lr_d=RATE, lr_g=RATE, beta1=BETA, beta2=BETA)
def test_options_win_over_the_preset_and_the_preset_over_the_run(preset, lr_d, lr_g, beta1, beta2) -> None:  # type: ignore[no-untyped-def]
    own = {"d": Optim(7e-5, (0.3, 0.7), 1e-7), "g": Optim(6e-5, (0.2, 0.6), 1e-6)}
    gan = tiny_gan(plugins={"ttur": TTUR(preset, lr_d, lr_g, beta1, beta2)}, optim=dict(own))
    for phase, option in (("d", lr_d), ("g", lr_g)):
        lr, betas = own[phase].lr, own[phase].betas
        if preset != "none":
            lr, betas = PUBLISHED[preset][phase == "g"], PUBLISHED[preset][2]
        wanted = (
            lr if option is None else option,
            (betas[0] if beta1 is None else beta1, betas[1] if beta2 is None else beta2),
            own[phase].eps,  # nobody's business
        )
        assert rates(gan)[phase] == wanted


def test_doing_nothing_changes_no_bit() -> None:
    idle, log = run({"ttur": TTUR("none")})
    plain, plain_log = run({})
    assert log.updates == plain_log.updates
    assert all(map(torch.equal, idle.parameters("g"), plain.parameters("g")))


@pytest.mark.parametrize("kind", ["vector", "image"])
def test_it_is_what_the_plain_settings_do(kind: str) -> None:
    plugin, log = run({"ttur": TTUR("sagan")}, kind=kind)
    flags = {"d": Optim(4e-4, (0.0, 0.9)), "g": Optim(1e-4, (0.0, 0.9))}
    plain, plain_log = run({}, kind=kind, optim=flags)
    assert log.updates == plain_log.updates != run({}, kind=kind)[1].updates
    assert all(np.isfinite(v) for *_, terms in log.updates for v in terms.values())
    assert all(map(torch.equal, plugin.parameters("d"), plain.parameters("d")))


def test_a_linear_decay_starts_from_these_rates() -> None:
    gan, _ = run({"ttur": TTUR("sagan"), "decay": LinearDecay(0.5, 4)}, steps=3)
    assert rates(gan)["d"][0] == pytest.approx(4e-4 / 2) and rates(gan)["g"][0] == pytest.approx(1e-4 / 2)


def test_one_gan_does_not_change_another() -> None:
    before = dict(PRESETS)
    tiny_gan(plugins={"ttur": TTUR("sagan", lr_d=1.0)})
    assert before == PRESETS
    assert rates(tiny_gan(plugins={"ttur": TTUR("sagan")}))["d"][0] == 4e-4


def test_what_it_refuses() -> None:
    with pytest.raises(UsageError, match="no pair of rates 'sgan': choose from sagan"):
        settings("sgan")
    with pytest.raises(UsageError, match=r"ttur.preset must be sagan\|"):
        create(["ttur"], {"ttur": {"preset": "sgan"}})
    for bad in ({"lr_d": 0.0}, {"lr_g": -1.0}, {"lr_g": math.nan}, {"lr_d": math.inf}, {"beta1": 1.0}, {"beta2": -0.1}):
        with pytest.raises(ValueError, match="must be"):
            TTUR(**bad)  # type: ignore[arg-type]
