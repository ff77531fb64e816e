import copy
import math
from collections.abc import Callable, Generator
from typing import Any

import gankit_unrolled
import pytest
import torch
from gankit_gradient_penalty import gradient_penalty
from gankit_unrolled import (
    Counts,
    Unrolled,
    adam_step,
    functional_critic,
    unroll,
    unrolled_state,
    update_counts,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import softplus

from gankit import GAN, Player, UsageError, View, hookimpl, networks
from gankit.contract import watched
from gankit.loop import d_terms, total, train, update
from gankit.plugins import create
from gankit.testing import run, tiny_gan


def plugins(*names: str, **options: Any) -> dict[str, object]:
    return create(names, options)[0]


# -- Adam ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 3e-7), (torch.float64, 1e-14)])
@pytest.mark.parametrize("betas", [(0.5, 0.999), (0.0, 0.9), (0.9, 0.99)])
def test_adam_is_torchs(fused: bool, dtype: torch.dtype, rtol: float, betas: tuple[float, float]) -> None:
    stream = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(50, generator=stream, dtype=dtype))
    optimizer = torch.optim.Adam([p], lr=1e-2, betas=betas, eps=1e-3, fused=fused)
    mine, slots = p.detach().clone(), (torch.zeros_like(p), torch.zeros_like(p), torch.zeros(()))
    for scale in (1.0, 1e-3, 10.0, 0.1):
        gradient = scale * torch.randn(50, generator=stream, dtype=dtype)
        p.grad = gradient.clone()
        optimizer.step()
        mine, slots = adam_step(mine, gradient, slots, lr=1e-2, betas=betas, eps=1e-3)
        torch.testing.assert_close(mine, p.detach(), rtol=rtol, atol=rtol)


def test_a_weight_that_never_had_a_gradient_makes_no_nan() -> None:
    gradient = torch.tensor([0.0, 1.0], requires_grad=True)
    zeros = torch.zeros(2)
    new, _ = adam_step(zeros, gradient, (zeros, zeros, torch.tensor(0.0)), lr=0.1, betas=(0.5, 0.999), eps=1e-8)
    (slope,) = torch.autograd.grad(new.sum(), gradient)
    assert new[0] == 0 and slope.isfinite().all()
    (naive,) = torch.autograd.grad((gradient.square() + 0).sqrt().sum(), gradient)
    assert naive.isnan().any()  # what this guards against


@pytest.mark.parametrize("fused", [True, False])
def test_counts_go_on_as_adams_own_do(fused: bool) -> None:
    layer = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(layer.parameters(), fused=fused)
    counts = Counts(optimizer)

    def step(*, bias: bool = True) -> None:
        optimizer.zero_grad()
        (layer(torch.ones(1, 2)) if bias else layer.weight).sum().backward()
        optimizer.step()

    assert counts() == {}
    step(bias=False)
    step()
    assert counts() == update_counts(optimizer) == {layer.weight: 2, layer.bias: 1}
    old = copy.deepcopy(optimizer.state_dict())
    step()
    step(bias=False)
    assert counts() == update_counts(optimizer) == {layer.weight: 4, layer.bias: 2}
    optimizer.load_state_dict(old)
    assert counts() == {layer.weight: 2, layer.bias: 1}
    optimizer.state.clear()
    step()
    assert counts() == {layer.weight: 1, layer.bias: 1}
    if fused:  # only to such does a GradScaler leave it to skip a step; it says so by this attribute
        optimizer.found_inf = torch.ones(())
        step()
        assert counts() == update_counts(optimizer) == {layer.weight: 1, layer.bias: 1}


# -- closed form ---------------------------------------------------------------------------------------------------

NUMBER = st.floats(-2, 2, allow_subnormal=False)


class Scale(nn.Module):
    """x -> w x, for D and for G."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(value, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.w * x


@settings(deadline=None, max_examples=40)
@given(w=NUMBER, theta=NUMBER, x=NUMBER, z=NUMBER, lr=st.floats(0.01, 0.5), weight=st.floats(0, 1), k=st.integers(0, 4))
def test_sgd_on_a_wasserstein_game_has_this_gradient(
    w: float, theta: float, x: float, z: float, lr: float, weight: float, k: int
) -> None:
    d, g = Scale(w), Scale(theta)
    noise = torch.tensor([z - 0.5, z, z + 0.5], dtype=torch.float64)
    real, fake = torch.tensor([x, x], dtype=torch.float64), g(noise)

    def objective(critic: Callable[..., Tensor]) -> Tensor:
        slope = critic(torch.ones((), dtype=torch.float64))  # = w
        return critic(fake).mean() - critic(real).mean() + weight / 2 * slope**2

    critic = unroll(d, objective, torch.optim.SGD(d.parameters(), lr=lr), k)
    both, alone = (
        torch.autograd.grad(loss, g.w, retain_graph=True)[0].item()
        for loss in (critic(real).mean() - critic(fake).mean(), -critic(fake).mean())
    )
    # w_{i+1} = w_i - lr (theta z - x + weight w_i): a geometric series
    a = 1 - lr * weight
    series = sum(a**i for i in range(k))
    w_k, dw_k = a**k * w - lr * series * (theta * z - x), -lr * series * z
    assert critic(torch.ones(())).item() == pytest.approx(w_k, rel=1e-9, abs=1e-12)
    assert both == pytest.approx(-w_k * z + dw_k * (x - theta * z), rel=1e-9, abs=1e-12)
    assert alone == pytest.approx(-w_k * z - dw_k * theta * z, rel=1e-9, abs=1e-12)  # pulls to 0, not to x
    if k == 0:
        assert both == alone == pytest.approx(-w * z, abs=1e-12)
        return
    ahead = unroll(d, objective, torch.optim.SGD(d.parameters(), lr=lr), k, second_order=False)
    (first_order,) = torch.autograd.grad(ahead(real).mean() - ahead(fake).mean(), g.w)
    assert first_order.item() == pytest.approx(-w_k * z, rel=1e-9, abs=1e-12)


# -- finite differences --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["adam", "adam fresh", "sgd"])
@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_three_steps_match_finite_differences(kind: str, penalty: float) -> None:
    torch.manual_seed(0)
    d = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    g = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    real, z, u = (torch.randn(6, n, dtype=torch.float64) for n in (2, 3, 1))
    u = u.sigmoid()

    def objective(critic: Callable[..., Tensor], fake: Tensor | None = None) -> Tensor:
        fake = g(z) if fake is None else fake
        loss = softplus(-critic(real)).mean() + softplus(critic(fake)).mean()
        if penalty:
            mid = u * real + (1 - u) * fake
            mid = mid if mid.requires_grad else mid.requires_grad_()
            (slope,) = torch.autograd.grad(critic(mid).sum(), mid, create_graph=True)
            loss = loss + penalty * (slope.norm(dim=1) - 1).square().mean()
        return loss

    optimizer: torch.optim.Optimizer
    if kind == "sgd":
        optimizer = torch.optim.SGD(d.parameters(), lr=0.3)
    else:
        optimizer = torch.optim.Adam(d.parameters(), lr=0.05, betas=(0.5, 0.9), eps=1e-4)
        for _ in range(0 if kind == "adam fresh" else 2):  # moments and step counts of its own
            objective(d, torch.randn(6, 2, dtype=torch.float64)).backward(inputs=list(d.parameters()))
            optimizer.step()
            optimizer.zero_grad()

    def g_loss() -> Tensor:
        critic = unroll(d, objective, optimizer, 3)
        return softplus(critic(real)).mean() + softplus(-critic(g(z))).mean()

    weight = g[0].weight
    (gradient,) = torch.autograd.grad(g_loss(), weight)
    critic = unroll(d, objective, optimizer, 3, second_order=False)
    loss = softplus(critic(real)).mean() + softplus(-critic(g(z))).mean()
    (first_order,) = torch.autograd.grad(loss, weight)
    for i, j in [(0, 0), (1, 2), (3, 1)]:
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[i, j] += sign * 1e-5
            values.append(g_loss().item())
            with torch.no_grad():
                weight[i, j] -= sign * 1e-5
        expected = (values[0] - values[1]) / 2e-5
        assert gradient[i, j].item() == pytest.approx(expected, rel=1e-5, abs=1e-9)
    assert not torch.allclose(gradient, first_order, rtol=1e-3)


# -- against the real discriminator --------------------------------------------------------------------------------


def scene(gan: GAN) -> dict[str, Any]:
    batch = gan.hook.sample(gan=gan, real=gan.next_real(), z=gan.next_z(), phase="g", step=1)
    view = gan.hook.view(gan=gan, batch=batch, phase="g", step=1)
    return {"batch": batch, "view": watched(view), "step": 1}


@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("kind", ["vector", "image"])
def test_k_steps_are_k_steps_of_the_real_discriminator(before: int, k: int, kind: str) -> None:
    gan = tiny_gan(kind)
    for _ in range(before):
        update(gan, "d", 1)
    here = scene(gan)

    def objective(critic: Callable[..., Tensor]) -> Tensor:
        return total(d_terms(gan, critic, **here))

    ahead = unrolled_state(gan.discriminator, objective, gan.optimizers["d"], k)
    start = {name: p.detach().clone() for name, p in gan.discriminator.named_parameters()}
    for _ in range(k):
        torch.autograd.backward(objective(gan.discriminator), inputs=gan.parameters("d"))
        gan.optimizers["d"].step()
        gan.optimizers["d"].zero_grad()
    for name, p in gan.discriminator.named_parameters():
        moved = (p.detach() - start[name]).abs().max().item()
        assert moved > 1e-4  # a step of Adam is about 2e-4
        torch.testing.assert_close(ahead[name].detach(), p.detach(), rtol=2e-7, atol=1e-8 if k == 1 else 1e-6, msg=name)


def snapshot(gan: GAN) -> dict[str, Any]:
    state = copy.deepcopy(gan.optimizers["d"].state_dict())
    return {
        "tensors": {k: v.clone() for k, v in gan.discriminator.state_dict().items()},
        "grads": {k: None if p.grad is None else p.grad.clone() for k, p in gan.discriminator.named_parameters()},
        "optimizer": [(k, v) for s in state["state"].values() for k, v in s.items()],
        "groups": state["param_groups"],
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def batch_normed(shapes: tuple[tuple[int, ...], ...]) -> nn.Module:
    return networks.discriminator(shapes, width=8, norm="batch")


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("names", [[], ["spectral_norm"]])
def test_the_discriminator_is_left_as_it_is_bit_for_bit(optimizer: Any, second_order: bool, names: list[str]) -> None:
    plugin = Unrolled(3, optimizer, second_order=second_order)
    gan = tiny_gan("image", {"unrolled": plugin, **plugins(*names)}, discriminator=batch_normed)
    update(gan, "d", 1)
    for p in gan.parameters("d"):
        p.grad = torch.ones_like(p)
    before, g_before = snapshot(gan), [p.clone() for p in gan.parameters("g")]
    assert any("running_mean" in k for k in before["tensors"]) and before["optimizer"]
    update(gan, "g", 1)
    assert same(before, snapshot(gan))
    assert not same(g_before, gan.parameters("g"))


def test_unrolled_forwards_move_copies_of_the_statistics() -> None:
    torch.manual_seed(0)
    d = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    objective = lambda critic: critic(torch.ones(4, 2) + torch.rand(4, 2)).mean()  # noqa: E731
    state = unrolled_state(d, objective, torch.optim.SGD(d.parameters(), lr=0.1), 3)
    assert state["1.num_batches_tracked"] == 3 and d[1].num_batches_tracked == 0
    functional_critic(d, state)(torch.ones(4, 2))
    assert state["1.num_batches_tracked"] == 4


# -- the plugin ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vector", "image"])
@pytest.mark.parametrize("options", [{}, {"optimizer": "sgd"}, {"second_order": False}, {"both_sides": False}])
def test_it_trains(kind: str, options: dict[str, Any]) -> None:
    _, log = run({"unrolled": Unrolled(2, **options)}, kind=kind)
    plain = run({}, kind=kind)[1]
    assert log.updates[0] == plain.updates[0] and log.updates[1:] != plain.updates[1:]
    assert all(torch.tensor([*terms.values()]).isfinite().all() for *_, terms in log.updates)


def test_no_steps_change_no_bit() -> None:
    off, log = run({"unrolled": Unrolled(0)})
    plain, plain_log = run({})
    assert log.updates == plain_log.updates
    assert same(off.weights(), plain.weights())


@pytest.mark.parametrize("loss", ["saturating", "wasserstein", "relativistic"])
def test_g_plays_the_saddle_objective_on_both_sides(loss: str) -> None:
    gan = tiny_gan(plugins={"unrolled": Unrolled()}, loss=loss)
    r, f = torch.randn(5), torch.randn(5)
    assert gan.loss.g_sides == ("real_logits", "fake_logits")
    if loss != "relativistic":
        assert gan.loss.g(real_logits=r, fake_logits=f) == -gan.loss.d(r, f)
    if loss == "wasserstein":
        assert tiny_gan(plugins={"unrolled": Unrolled(both_sides=False)}, loss=loss).loss.g_sides == ("fake_logits",)


class Spy:
    """Counts evaluations of D's objective, and keeps the view of the G update."""

    def __init__(self) -> None:
        self.calls = 0

    @hookimpl
    def pre_d_loss(self, view: View) -> None:
        self.calls += 1

    @hookimpl
    def post_g_loss(self, critic: Callable[..., Tensor], view: View, fake_logits: Tensor) -> None:
        self.critic, self.view, self.fake_logits = critic, view, fake_logits


class Slopes(Spy):
    """How the critic ahead scores samples that G does not make changes with G, which is through the steps ahead alone.

    Of the critic at hand; of one unrolled by hand, with the objective written out; and of two by hand whose penalty is not
    all unrolled through.
    """

    stream: Tensor

    @hookimpl
    def post_g_loss(self, gan: GAN, critic: Callable[..., Tensor], view: View, fake_logits: Tensor) -> None:
        super().post_g_loss(critic, view, fake_logits)
        ahead = {"at hand": critic} | {how: self.by_hand(gan, view, how) for how in ("by hand", "cut off", "x cut off")}
        self.found = {
            how: torch.autograd.grad(score(*view.real).sum(), gan.parameters("g")[:1], retain_graph=True)[0]
            for how, score in ahead.items()
        }

    def by_hand(self, gan: GAN, view: View, how: str) -> Callable[..., Tensor]:
        points = torch.Generator()
        points.set_state(self.stream)

        def objective(critic: Callable[..., Tensor]) -> Tensor:
            penalty = gradient_penalty(critic, view.real, view.fake, detach=how == "x cut off", generator=points)
            adv = gan.loss.d(critic(*view.real), critic(*view.fake))
            return adv + 10 * (penalty.detach() if how == "cut off" else penalty)

        return unroll(gan.discriminator, objective, gan.optimizers["d"], 3)


def test_penalties_are_unrolled_through() -> None:
    def smooth() -> nn.Module:  # the slope of a leaky ReLU hardly depends on where it is asked for
        return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

    spy, penalty = Slopes(), plugins("gradient_penalty")
    gan = tiny_gan(plugins={"unrolled": Unrolled(3), **penalty, "spy": spy}, discriminator=smooth)
    update(gan, "d", 1)
    assert spy.calls == 1
    spy.stream = gan.rng(penalty["gradient_penalty"]).get_state()
    update(gan, "g", 1)
    assert spy.calls == 1 + 3
    found = spy.found
    torch.testing.assert_close(found["at hand"], found["by hand"], rtol=1e-4, atol=1e-8)
    for wrong in ("cut off", "x cut off"):
        assert (found[wrong] - found["by hand"]).norm() > 0.01 * found["by hand"].norm()


@pytest.mark.parametrize(
    "names",
    [
        ["bigan"],
        ["pairwise_gp", "packing"],
        ["packing", "gradient_penalty"],
        ["spectral_norm", "gradient_penalty"],
        ["packing", "bigan", "spectral_norm"],
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_it_goes_with(names: list[str], first: bool) -> None:
    unrolled = {"unrolled": Unrolled(2)}
    others = plugins(*names)
    spy = Spy()
    _, log = run({**(unrolled | others if first else others | unrolled), "spy": spy}, steps=2)
    assert all(torch.tensor([*terms.values()]).isfinite().all() for *_, terms in log.updates)
    assert spy.fake_logits.shape == ((4,) if "packing" in names else (8,))


def test_what_other_plugins_make_of_the_critic_is_unrolled_too() -> None:
    class Temperature:
        @hookimpl(wrapper=True)
        def critic(self) -> Generator[None, Callable[..., Tensor], Callable[..., Tensor]]:
            critic = yield
            return lambda *inputs: critic(*inputs) / 2

    class Halved(nn.Module):
        def __init__(self, shapes: Any) -> None:
            super().__init__()
            self.inner = networks.discriminator(shapes, width=8)

        def forward(self, *inputs: Tensor) -> Tensor:
            return self.inner(*inputs) / 2

    for order in (("t", "u"), ("u", "t")):
        named: dict[str, object] = {"t": Temperature(), "u": Unrolled(3)}
        wrapped = run({name: named[name] for name in order})[1]
        built_in = run({"u": Unrolled(3)}, discriminator=lambda shapes: Halved(shapes))[1]
        assert wrapped.updates == built_in.updates


def test_other_players_of_phase_d_stay_where_they_are() -> None:
    class Second:
        @hookimpl
        def players(self) -> dict[str, Player]:
            return {"second": Player(nn.Linear(3, 1), "d")}

        @hookimpl
        def pre_d_loss(self, gan: GAN, view: View) -> dict[str, Tensor]:
            second: nn.Module = gan.players["second"].module
            seen.append(second(torch.ones(1, 3)).item())
            return {"second": softplus(second(view.fake[0])).mean()}

    seen: list[float] = []
    gan, _ = run({"second": Second(), "unrolled": Unrolled(2)}, steps=1)
    weight = gan.players["second"].module.weight.clone()
    assert len(seen) == 3 and seen[0] != seen[1]  # before D's update, then twice ahead of it
    update(gan, "g", 2)
    assert seen[1:] == seen[1:2] * 4  # in the second step ahead it is where it was in the first
    assert torch.equal(gan.players["second"].module.weight, weight)


def test_sgd_takes_the_current_rate_of_d_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    def record(d: nn.Module, objective: object, optimizer: torch.optim.Optimizer, k: int, **_: object) -> nn.Module:
        assert type(optimizer) is torch.optim.SGD
        seen.append(optimizer.param_groups[0]["lr"])
        return d

    monkeypatch.setattr(gankit_unrolled, "unroll", record)
    for lr in (None, 0.25):
        gan = tiny_gan(plugins={"unrolled": Unrolled(1, "sgd", lr)})
        gan.optimizers["d"].param_groups[0]["lr"] = 0.125  # as a decay would
        update(gan, "g", 1)
    assert seen == [0.125, 0.25]


def test_what_cannot_be_unrolled_is_refused() -> None:
    d = nn.Linear(2, 1)
    for optimizer, words in [
        (torch.optim.RMSprop(d.parameters()), "not RMSprop"),
        (torch.optim.AdamW(d.parameters()), "not AdamW"),
        (torch.optim.Adam(d.parameters(), amsgrad=True), "knows no amsgrad"),
        (torch.optim.Adam(d.parameters(), weight_decay=0.1), "knows no weight_decay"),
        (torch.optim.SGD(d.parameters(), lr=1.0, momentum=0.9), "knows no momentum"),
    ]:
        with pytest.raises(UsageError, match=words):
            unroll(d, lambda critic: critic(torch.ones(1, 2)).sum(), optimizer, 1)
    with pytest.raises(UsageError, match="0 or more, not -1"):
        unroll(d, lambda critic: critic(torch.ones(1, 2)).sum(), torch.optim.SGD(d.parameters(), lr=1.0), -1)
    for bad in ({"k": -1}, {"lr": 0.1}, *({"lr": lr, "optimizer": "sgd"} for lr in (-1.0, math.nan, math.inf))):
        with pytest.raises(ValueError, match="must|rate"):
            Unrolled(**bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="optimizer is 'adam' or 'sgd', not 'sdg'"):
        Unrolled(optimizer="sdg", lr=0.1)  # type: ignore[arg-type]


def test_parameters_that_are_not_trained_stay_fixed() -> None:
    d = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1), nn.Linear(2, 1))
    d[0].requires_grad_(False)
    optimizer = torch.optim.Adam([*d[1].parameters(), *d[2].parameters()])
    state = unrolled_state(
        d, lambda critic: critic(torch.ones(1, 2)).sum(), optimizer, 1, critic=lambda x: d[1](d[0](x))
    )
    assert "0.weight" not in state and not torch.equal(state["1.weight"], d[1].weight)
    assert torch.equal(state["2.weight"], d[2].weight)  # no gradient, no step


def test_same_seed_same_terms_and_a_continued_run_takes_the_same_next_step() -> None:
    settings = {"unrolled": Unrolled(2), **plugins("gradient_penalty")}
    first, log = run(settings, steps=2)
    assert run({"unrolled": Unrolled(2), **plugins("gradient_penalty")}, steps=2)[1].updates == log.updates
    second = tiny_gan(plugins={"unrolled": Unrolled(2), **plugins("gradient_penalty")})
    second.load_weights(first.weights())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for gan in (first, second):
        gan.next_real = lambda: torch.full((8, 3), 0.5)
        train(gan, 3)
    assert same(first.weights(), second.weights())
