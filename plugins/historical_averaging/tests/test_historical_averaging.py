"""Historical averaging against the definition over a recorded history, and in the game it was made for."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from gankit_historical_averaging import HistoricalAveraging, historical_averaging, running_means
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gankit import GAN, UsageError, hookimpl, train
from gankit.loop import total
from gankit.options import build
from gankit.testing import run, tiny_gan


@given(st.integers(0, 2**31), st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_the_running_mean_and_the_term_are_the_definition(seed: int, t: int) -> None:
    stream = torch.Generator().manual_seed(seed)
    history = [
        [torch.randn(shape, generator=stream, dtype=torch.float64) for shape in ((3, 2), (4,), ())] for _ in range(t)
    ]
    means: list[Tensor] = []
    for i, values in enumerate(history, 1):
        means = running_means(means, values, i)
    theta = [torch.randn_like(value, requires_grad=True) for value in history[0]]
    term = historical_averaging(theta, means)
    true = [np.mean([values[k].numpy() for values in history], axis=0) for k in range(3)]
    expected = sum(((p.detach().numpy() - m) ** 2).sum() for p, m in zip(theta, true, strict=True))
    assert term.item() == pytest.approx(expected, rel=1e-10)
    for gradient, p, m in zip(torch.autograd.grad(term, theta), theta, true, strict=True):
        np.testing.assert_allclose(gradient.numpy(), 2 * (p.detach().numpy() - m), rtol=1e-10)


def test_it_is_a_sum_and_the_mean_is_held_fixed() -> None:
    theta = [torch.tensor([1.0, 3.0], requires_grad=True), torch.tensor([[2.0]], requires_grad=True)]
    assert historical_averaging(theta, [torch.zeros(2), torch.zeros(1, 1)]).item() == 1 + 9 + 4
    moving = torch.tensor([1.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(historical_averaging([moving], [0.5 * moving]), moving)
    assert gradient.item() == 1  # 2 (1 - 0.5); 0.5 if the mean were differentiated, too
    assert gradient.item() != torch.autograd.grad((moving - 0.5 * moving).square().sum(), moving)[0].item()


@pytest.mark.parametrize(("theta", "means"), [([torch.ones(2)], []), ([torch.ones(2)], [torch.ones(1)]), ([], [])])
def test_what_does_not_match_is_refused(theta: list[Tensor], means: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="same shapes"):
        historical_averaging(theta, means)


class Recorder:
    """Keeps every phase's weights after each update, and the terms."""

    def __init__(self) -> None:
        self.history: dict[str, list[list[Tensor]]] = {"d": [], "g": []}
        self.terms: dict[str, list[dict[str, float]]] = {"d": [], "g": []}

    @hookimpl
    def post_step(self, gan: GAN, terms: dict[str, Tensor], phase: str) -> None:
        self.history[phase].append([p.detach().clone() for p in gan.parameters(phase)])
        self.terms[phase].append({name: term.item() for name, term in terms.items()})


@pytest.mark.parametrize("kind", ["vector", "image"])
def test_each_players_term_is_the_distance_to_the_mean_of_its_own_history(kind: str) -> None:
    recorder = Recorder()
    run({"ha": HistoricalAveraging(weight_d=2, weight_g=0.5), "recorder": recorder}, kind=kind, steps=4, d_steps=2)
    for phase, weight, updates in (("d", 2, 8), ("g", 0.5, 4)):
        history, terms = recorder.history[phase], recorder.terms[phase]
        assert len(history) == updates
        assert "historical_averaging" not in terms[0]
        for t in range(1, updates):
            mean = [np.mean([values[k].numpy() for values in history[:t]], axis=0) for k in range(len(history[0]))]
            squares = [((p.numpy() - m) ** 2).sum() for p, m in zip(history[t - 1], mean, strict=True)]
            assert terms[t]["historical_averaging"] == pytest.approx(weight * sum(squares), rel=1e-3, abs=1e-7)
        assert terms[2]["historical_averaging"] > 0


def test_it_calms_the_game_x_times_y_that_plain_gradient_descent_leaves() -> None:
    # section 3.3: gradient descent on the value x y, minimised by x and maximised by y, spirals away from (0, 0)
    def play(weight: float) -> float:
        theta = [torch.ones(1, requires_grad=True), torch.zeros(1, requires_grad=True)]
        means: list[list[Tensor]] = [[], []]
        for t in range(1, 1001):
            x, y = theta
            losses = [x * y, -x * y]
            for k in range(2):
                if t > 1:
                    losses[k] = losses[k] + weight * historical_averaging([theta[k]], means[k])
            gradients = [torch.autograd.grad(loss.sum(), p)[0] for loss, p in zip(losses, theta, strict=True)]
            with torch.no_grad():
                for k in range(2):
                    theta[k] -= 0.1 * gradients[k]
                    means[k] = running_means(means[k], [theta[k]], t)
        return sum(p.item() ** 2 for p in theta) ** 0.5

    assert play(0) > 100
    assert play(1) < 0.5


def test_weight_zero_is_bit_identical_and_keeps_nothing() -> None:
    off = HistoricalAveraging(weight_d=0, weight_g=0)
    results = [run({"ha": off, "recorder": Recorder()})[0], run({"recorder": Recorder()})[0]]
    assert off.counts == {"d": 0, "g": 0}
    for name, state in results[0].weights().items():
        assert all(torch.equal(value, results[1].weights()[name][key]) for key, value in state.items())
    half, log = run({"ha": HistoricalAveraging(weight_d=0)})
    assert {phase for phase, _, terms in log.updates if "historical_averaging" in terms} == {"g"}
    assert half.step == 3


def test_looking_at_the_loss_again_changes_no_state() -> None:
    plugin = HistoricalAveraging()
    gan = tiny_gan(plugins={"ha": plugin})
    train(gan, 2)
    before = deepcopy(plugin.state_dict())
    for _ in range(3):  # as unrolling does
        plugin.pre_d_loss(gan=gan)
    after = plugin.state_dict()
    assert after["counts"] == before["counts"]
    assert all(torch.equal(a, b) for a, b in zip(after["means"]["d"], before["means"]["d"], strict=True))


def test_a_parameter_that_changes_shape_starts_the_average_anew() -> None:
    plugin = HistoricalAveraging()
    gan = tiny_gan(plugins={"ha": plugin})
    train(gan, 3)
    out = gan.discriminator.layers.out
    out.bias = torch.nn.Parameter(torch.zeros(2))
    gan.make_optimizers()
    assert plugin.pre_d_loss(gan=gan) is None
    assert plugin.post_g_loss(gan=gan) is not None
    plugin.post_step(gan=gan, phase="d")
    assert plugin.counts == {"d": 1, "g": 3}
    assert total(plugin.pre_d_loss(gan=gan)).item() == 0


def test_negative_weights_are_refused() -> None:
    with pytest.raises(UsageError, match="must not be negative"):
        build(HistoricalAveraging, {"weight_g": -1}, "historical_averaging")
    for bad in ({"weight_d": math.nan}, {"weight_g": math.nan}, {"weight_g": math.inf}):
        with pytest.raises(ValueError, match="must not be negative, infinite or NaN"):
            HistoricalAveraging(**bad)


def test_a_restored_run_takes_the_same_next_step_and_the_same_seed_the_same_terms() -> None:
    gan, other = (tiny_gan(plugins={"ha": HistoricalAveraging()}) for _ in range(2))
    train(gan, 4)
    other.load_weights(deepcopy(gan.weights()))
    fresh = tiny_gan(plugins={"ha": HistoricalAveraging()})
    fresh.load_weights(deepcopy(gan.weights()))
    state: Any = deepcopy(gan.state_dict())
    nothing = fresh.state_dict()["plugins"]["ha"]
    fresh.load_state_dict(deepcopy({**state, "plugins": {**state["plugins"], "ha": nothing}}))
    other.load_state_dict(state)
    for each in (gan, other, fresh):
        each.next_real = lambda: torch.linspace(-1, 1, 24).view(8, 3)
        train(each, 5)
    for name, weights in gan.weights().items():
        assert all(torch.equal(value, other.weights()[name][key]) for key, value in weights.items())
        # with all but the plugin's state it is another step
        assert not all(torch.equal(value, fresh.weights()[name][key]) for key, value in weights.items())
    assert run({"ha": HistoricalAveraging()})[1].updates == run({"ha": HistoricalAveraging()})[1].updates
