"""The nine hooks: one test named after each, and one that holds specs, docs and tests together."""

import inspect
import re
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gankit
from gankit import GAN, Batch, Player, UsageError, View, hookimpl, hookspecs, networks
from gankit.loop import d_terms, total, update
from gankit.plugins import ContractError
from gankit.testing import run, tiny_gan

DOCS = Path(__file__).parents[1] / "docs" / "plugins" / "hooks"


def test_every_hook_has_a_spec_with_a_docstring_a_page_and_a_test() -> None:
    specs = [name for name, value in vars(hookspecs).items() if hasattr(value, "gankit_spec")]
    assert tuple(specs) == hookspecs.NAMES
    assert sorted(path.stem for path in DOCS.glob("*.md")) == sorted(["index", *specs])
    assert re.findall(r"^\| \[`(\w+)`\]\(\1\.md\) \|", (DOCS / "index.md").read_text(), re.MULTILINE) == specs
    for name in specs:
        page = (DOCS / f"{name}.md").read_text()
        signature = f"{name}{inspect.signature(getattr(hookspecs, name))}".replace("'", "")
        headings = re.findall(r"^#+ .+$", page, re.MULTILINE)
        assert headings == [f"# `{name}`", f"## `{signature}`", "## Example", "## Mistakes"]
        example, mistakes = page.split("## Example")[1].split("## Mistakes")
        assert f"def {name}(" in example
        assert "Error: " in mistakes
        assert len(inspect.getdoc(getattr(hookspecs, name)) or "") > 100
        assert f"test_{name}" in globals()


class Extra:
    """A second network of each phase, and a record of what the hooks saw."""

    def __init__(self, phase: str) -> None:
        self.phase = phase

    @hookimpl
    def players(self, gan: GAN) -> dict[str, Player]:
        assert gan.shape == (3,)
        assert gan.latent.dim == 4
        assert not gan.players  # networks come afterwards, for any of them may be a plugin's
        return {"extra": Player(nn.Linear(3, 1), self.phase)}

    @hookimpl
    def pre_d_loss(self, gan: GAN, batch: Batch) -> dict[str, Tensor] | None:
        return {"extra": gan.players["extra"].module(batch.real).square().mean()} if self.phase == "d" else None

    @hookimpl
    def post_g_loss(self, gan: GAN, batch: Batch) -> dict[str, Tensor] | None:
        return {"extra": gan.players["extra"].module(batch.fake).square().mean()} if self.phase == "g" else None


@pytest.mark.parametrize("phase", ["d", "g"])
def test_players(phase: str) -> None:
    gan, log = run({"extra": Extra(phase)}, steps=3)
    untrained = tiny_gan(plugins={"extra": Extra(phase)})
    assert list(gan.players) == ["generator", "extra", "discriminator"]
    assert gan.weights().keys() == {"generator", "extra", "discriminator"}
    weights = (g.players["extra"].module.weight for g in (gan, untrained))
    assert not torch.equal(*weights)
    assert ["extra" in terms for _, _, terms in log.updates] == [p == phase for p, _, _ in log.updates]


def test_players_of_one_name_are_refused() -> None:
    with pytest.raises(UsageError, match="'extra'"):
        tiny_gan(plugins={"one": Extra("g"), "two": Extra("g")})


class Bringer:
    """Networks in place of the shipped ones; the discriminator as a factory, for it depends on the view."""

    @hookimpl
    def players(self, gan: GAN) -> dict[str, Player]:
        def discriminator(shapes: tuple[tuple[int, ...], ...]) -> nn.Module:
            return networks.discriminator(shapes, width=5)

        return {"discriminator": Player(discriminator, "d"), "generator": Player(nn.Linear(4, 3), "g")}


def test_players_may_bring_generator_and_discriminator() -> None:
    class Doubled:
        @hookimpl(wrapper=True)
        def view(self) -> Generator[None, View, View]:
            view = yield
            return View(*((torch.cat(side * 2, 1),) for side in view))

    gan, _ = run({"bringer": Bringer(), "doubled": Doubled()})
    assert list(gan.players) == ["generator", "discriminator"]
    assert type(gan.generator) is nn.Linear
    assert gan.generator is gan.players["generator"].module
    assert gan.parameters("g") == [gan.generator.weight, gan.generator.bias]
    assert next(gan.discriminator.parameters()).shape == (10, 6)


@pytest.mark.parametrize("name", ["generator", "discriminator"])
def test_a_network_of_ones_own_and_one_of_a_plugin_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"brings the {name}, and so do you"):
        tiny_gan(plugins={"bringer": Bringer()}, **{name: nn.Linear(4, 3)})


def test_setup() -> None:
    class Setup:
        @hookimpl
        def setup(self, gan: GAN) -> None:
            assert set(gan.players) == {"generator", "discriminator"}
            assert not gan.optimizers  # parameters may still be replaced
            gan.optim["d"].lr = 0.5
            gan.discriminator.register_parameter("added", nn.Parameter(torch.ones(2)))

    gan = tiny_gan(plugins={"setup": Setup()})
    assert gan.optimizers["d"].param_groups[0]["lr"] == 0.5
    assert any(p.shape == (2,) for p in gan.parameters("d"))


def test_sample() -> None:
    seen = []

    class Sample:
        @hookimpl(wrapper=True)
        def sample(self, real: Tensor, z: Tensor, phase: str) -> Generator[None, Batch, Batch]:
            batch = yield
            assert batch.real is real
            assert batch.z is z
            seen.append((phase, batch.fake.requires_grad))
            return batch._replace(real=batch.real * 0, extra={"mark": batch.z})

        @hookimpl
        def pre_d_loss(self, batch: Batch, view: View) -> None:
            assert batch.extra["mark"] is batch.z
            assert not view.real[0].any()

    run({"sample": Sample()}, steps=1)
    assert seen[-2:] == [("d", False), ("g", True)]  # no graph to G in the discriminator's update


def test_view() -> None:
    shown = []

    class Pairs:
        @hookimpl(wrapper=True)
        def view(self, batch: Batch) -> Generator[None, View, View]:
            view = yield
            return View((*view.real, batch.z), (*view.fake, batch.z))

        @hookimpl
        def pre_d_loss(self, critic: Callable[..., Tensor], view: View, real_logits: Tensor) -> None:
            assert torch.equal(critic(*view.real), real_logits)
            slope = torch.autograd.grad(real_logits.sum(), view.real, create_graph=True)
            assert all(s.requires_grad for s in slope)
            shown.append([tuple(t.shape) for t in view.real])

    gan, _ = run({"pairs": Pairs()}, steps=1)
    assert shown == [[(8, 3), (8, 4)]]
    assert next(gan.discriminator.parameters()).shape[1] == 7  # the first layer fits what is shown


def test_critic() -> None:
    class Louder:
        @hookimpl(wrapper=True)
        def critic(
            self,
            gan: GAN,
            view: View,
            phase: str,
            d_objective: Callable[..., Tensor],
            batch: Batch,
            step: int,
        ) -> Generator[None, Callable[..., Tensor], Callable[..., Tensor]]:
            inner = yield
            assert inner is gan.discriminator
            expected = total(d_terms(gan, inner, batch, view, step))
            assert torch.equal(d_objective(inner), expected)  # the whole loss, with penalties, on this view
            assert d_objective(inner).requires_grad
            return inner if phase == "d" else lambda *inputs: inner(*inputs) + 100

    gan, log = run({"louder": Louder(), "constant": ConstantTerm()}, steps=1)
    assert log.updates[1][2]["adv"] < 1e-6  # softplus(-(logit + 100))
    assert gan.discriminator is not None


class ConstantTerm:
    @hookimpl
    def pre_d_loss(self, fake_logits: Tensor) -> dict[str, Tensor]:
        return {"three": fake_logits.mean() * 0 + 3}


def test_pre_d_loss() -> None:
    class Decay:
        """weight / 2 ||theta_D||^2, whose gradient is weight theta_D."""

        @hookimpl
        def pre_d_loss(self, gan: GAN, step: int) -> dict[str, Tensor] | None:
            if step == 2:
                return None
            return {"decay": sum((p.square().sum() for p in gan.discriminator.parameters()), torch.zeros(())) / 2}

    gradients: dict[bool, list[Tensor]] = {}
    for on in (False, True):
        gan = tiny_gan(plugins={"decay": Decay()} if on else {})
        gan.optimizers["d"] = torch.optim.SGD(gan.parameters("d"), lr=1.0)
        before = [p.detach().clone() for p in gan.parameters("d")]
        update(gan, "d", 1)
        gradients[on] = [b - p.detach() for b, p in zip(before, gan.parameters("d"), strict=True)]
    for plain, added, parameter in zip(gradients[False], gradients[True], before, strict=True):
        torch.testing.assert_close(added, plain + parameter)

    _, log = run({"decay": Decay()}, steps=2)
    assert [sorted(terms) for _, _, terms in log.updates] == [["adv", "decay"], ["adv"], ["adv"], ["adv"]]


def test_post_g_loss() -> None:
    class Size:
        @hookimpl
        def post_g_loss(
            self, batch: Batch, fake_logits: Tensor, g_loss: Tensor, real_logits: Tensor | None
        ) -> dict[str, Tensor]:
            torch.testing.assert_close(g_loss, nn.functional.softplus(-fake_logits).mean())
            assert real_logits is None
            return {"size": batch.fake.square().mean()}

    def after(plugins: dict[str, object]) -> tuple[list[Tensor], list[Tensor]]:
        gan = tiny_gan(plugins=plugins)
        update(gan, "g", 1)
        return gan.parameters("g"), gan.parameters("d")

    (g, d), (g_size, d_size) = after({}), after({"size": Size()})
    assert any(not torch.equal(a, b) for a, b in zip(g, g_size, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(d, d_size, strict=True))


def test_post_step() -> None:
    class Clip:
        calls: list[tuple[str, int, list[str]]] = []

        @hookimpl
        @torch.no_grad()
        def post_step(self, gan: GAN, terms: dict[str, Tensor], phase: str, step: int) -> None:
            assert not any(t.requires_grad for t in terms.values())
            self.calls.append((phase, step, list(terms)))
            if phase == "d":
                for p in gan.parameters("d"):
                    p.clamp_(-0.01, 0.01)

    gan, _ = run({"clip": Clip()}, steps=2, d_steps=3)
    assert [(phase, step) for phase, step, _ in Clip.calls] == [
        *[("d", 1)] * 3,
        ("g", 1),
        *[("d", 2)] * 3,
        ("g", 2),
    ]
    assert all(p.abs().max() <= 0.01 for p in gan.parameters("d"))


def test_evaluate() -> None:
    class Mean:
        @hookimpl
        def evaluate(self, draw: Callable[[int], Tensor], step: int) -> dict[str, float]:
            x = draw(50)
            assert x.shape == (50, 3)
            assert not x.requires_grad
            assert torch.equal(draw(50), x)
            return {"mean": x.mean().item(), "step": step}

    from gankit.training import measure

    gan = tiny_gan(plugins={"mean": Mean()})
    before = gan.stream("latent").get_state()
    assert measure(gan) == measure(gan)
    assert torch.equal(gan.stream("latent").get_state(), before)  # training's random numbers are not touched


def _one(hook: str, value: Any, **options: Any) -> object:
    """A plugin whose ``hook`` returns ``value`` (a callable is called)."""
    if options.get("wrapper"):

        def implementation(self: object) -> Generator[None, Any, Any]:
            yield
            return value

    else:

        def implementation(self: object) -> Any:  # type: ignore[misc]
            return value

    return type("Plugin", (), {hook: hookimpl(**options)(implementation)})()


BROKEN = [
    ("players", [1], {}),
    ("setup", 3, {}),
    ("sample", 3, {}),
    ("sample", Batch(torch.zeros(8, 3), torch.zeros(8, 2), torch.zeros(8, 4)), {}),
    ("sample", None, {"wrapper": True}),
    ("view", (torch.zeros(8, 3), torch.zeros(8, 3)), {}),
    ("view", View((torch.zeros(8, 3),), (torch.zeros(4, 3),)), {}),
    ("view", View((torch.zeros(8, 3),), ()), {"wrapper": True}),
    ("critic", 3, {}),
    ("pre_d_loss", torch.zeros(()), {}),
    ("pre_d_loss", {"x": 1.0}, {}),
    ("pre_d_loss", {"x": torch.zeros(2, requires_grad=True)}, {}),
    ("pre_d_loss", {"x": torch.zeros(())}, {}),  # cut off: trains nothing
    ("pre_d_loss", {"adv": torch.zeros((), requires_grad=True)}, {}),
    ("pre_d_loss", {1: torch.zeros((), requires_grad=True)}, {}),
    ("post_g_loss", {"x": torch.zeros((), dtype=torch.long)}, {}),
    ("post_step", 3, {}),
    ("evaluate", {"x": "high"}, {}),
]


@pytest.mark.parametrize(("hook", "value", "options"), BROKEN, ids=[f"{h}-{i}" for i, (h, _, _) in enumerate(BROKEN)])
def test_a_wrong_value_is_refused_with_the_plugins_name(hook: str, value: Any, options: dict[str, Any]) -> None:
    from gankit.training import measure

    with pytest.raises(ContractError, match=f"plugin 'broken', hook {hook}"):
        measure(run({"broken": _one(hook, value, **options)}, steps=1)[0])


def test_two_plugins_cannot_use_one_term_name() -> None:
    with pytest.raises(ContractError, match="'second'.*'three' is already used by 'first'"):
        run({"first": ConstantTerm(), "second": ConstantTerm()}, steps=1)


def test_a_wrapper_may_pass_on_and_add_terms() -> None:
    class Doubles:
        @hookimpl(wrapper=True)
        def pre_d_loss(self) -> Generator[None, list[dict[str, Tensor]], list[dict[str, Tensor]]]:
            results = yield
            return [{name: 2 * term for name, term in result.items()} for result in results]

    _, log = run({"doubles": Doubles(), "constant": ConstantTerm()}, steps=1)
    assert log.updates[0][2]["three"] == 6


def test_a_misspelt_hook_argument_or_marker_is_refused_at_load() -> None:
    class Hook:
        @hookimpl
        def pre_d_los(self) -> None: ...

    class Argument:
        @hookimpl
        def pre_d_loss(self, real_logit: Tensor) -> None: ...

    class Default:
        @hookimpl
        def post_step(self, step: int = 1) -> None: ...

    class Marker:
        def pre_d_loss(self) -> None: ...

    class Nothing:
        pass

    for plugin, message in [
        (Hook(), "did you mean 'pre_d_loss'"),
        (Argument(), "no argument 'real_logit'.*did you mean 'real_logits'"),
        (Marker(), "carries @gankit.hookimpl"),
        (Default(), "the argument 'step' must not have a default"),
        (Nothing(), "implements no hook"),
        (ConstantTerm, "give an instance"),
        (dataclass(type("Equal", (ConstantTerm,), {}))(), "eq=False"),
    ]:
        with pytest.raises(ContractError, match=message):
            tiny_gan(plugins={"p": plugin})


def test_an_error_keeps_its_type_and_names_the_plugin_that_raised_it() -> None:
    class Passing:
        """Wrappers of a hook in which another plugin fails."""

        @hookimpl(wrapper=True)
        def view(self) -> Generator[None, View, View]:
            return (yield)

        @hookimpl(wrapper=True)
        def pre_d_loss(self) -> Generator[None, Any, Any]:
            return (yield)

    class Fails:
        def __init__(self, hook: str, when: str) -> None:
            self.hook, self.when = hook, when

        @hookimpl(wrapper=True)
        def view(self) -> Generator[None, View, View]:
            if (self.hook, self.when) == ("view", "before"):
                raise MemoryError("boom")
            view = yield
            if (self.hook, self.when) == ("view", "after"):
                raise MemoryError("boom")
            return view

        @hookimpl
        def pre_d_loss(self) -> None:
            if self.hook == "pre_d_loss":
                raise MemoryError("boom")

    for hook, when in [("view", "before"), ("view", "after"), ("pre_d_loss", "")]:
        with pytest.raises(MemoryError) as caught:
            run({"passing": Passing(), "culprit": Fails(hook, when), "other": Passing()}, steps=1)
        assert caught.value.__notes__ == [f"in plugin 'culprit', hook '{hook}'"]

    class BadGenerator(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            raise MemoryError("the user's own network")

    with pytest.raises(MemoryError) as caught:
        run({"passing": Passing()}, steps=1, generator=BadGenerator())
    assert not hasattr(caught.value, "__notes__")  # no plugin's fault


def test_plugins_act_in_their_order_and_before_the_core() -> None:
    order: list[str] = []

    class Says:
        def __init__(self, name: str) -> None:
            self.name = name

        @hookimpl
        def post_step(self) -> None:
            order.append(self.name)

        @hookimpl(wrapper=True)
        def view(self) -> Generator[None, View, View]:
            order.append(f"{self.name}-in")
            view = yield
            order.append(f"{self.name}-out")
            return view

    gan = tiny_gan(plugins={"a": Says("a"), "b": Says("b")}, core={"c": Says("c")})
    order.clear()
    update(gan, "d", 1)
    assert order == ["a-in", "b-in", "c-in", "c-out", "b-out", "a-out", "a", "b", "c"]


def deprecate(monkeypatch: pytest.MonkeyPatch, hook: str, **marks: Any) -> None:
    """Mark a hook of gankit's, or an argument of it, as its next release would."""
    spec = getattr(hookspecs, hook)
    monkeypatch.setattr(spec, "gankit_spec", {**spec.gankit_spec, **marks})


class Level:
    """A term of the fake logits and one of the real ones, in two hooks."""

    @hookimpl
    def pre_d_loss(self, fake_logits: Tensor) -> dict[str, Tensor]:
        return {"level": fake_logits.square().mean()}

    @hookimpl
    def post_g_loss(self, fake_logits: Tensor) -> dict[str, Tensor]:
        return {"level": fake_logits.square().mean()}


def test_a_deprecated_argument_warns_whoever_asks_for_it_by_name_and_still_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, before = run({"level": Level(), "constant": ConstantTerm()}, steps=2)
    renamed = FutureWarning("hook post_g_loss: ask for 'fake_scores'; 'fake_logits' goes with gankit 0.4")
    deprecate(monkeypatch, "post_g_loss", warn_on_impl_args={"fake_logits": renamed})
    with pytest.warns(FutureWarning) as warned:
        _, after = run({"level": Level(), "constant": ConstantTerm()}, steps=2)
    (warning,) = warned
    assert str(warning.message) == f"plugin 'level': {renamed}"
    assert warning.filename == __file__  # and the line of the method
    assert before.updates == after.updates


def test_a_deprecated_hook_warns_whoever_implements_it_and_still_works(monkeypatch: pytest.MonkeyPatch) -> None:
    _, before = run({"level": Level()}, steps=2)
    deprecate(
        monkeypatch, "pre_d_loss", warn_on_impl=FutureWarning("hook pre_d_loss goes with gankit 0.4: use d_terms")
    )
    with pytest.warns(FutureWarning) as warned:
        _, after = run({"level": Level()}, steps=2)
    assert [str(w.message) for w in warned] == ["plugin 'level': hook pre_d_loss goes with gankit 0.4: use d_terms"]
    assert before.updates == after.updates


def test_the_command_line_tells_of_a_deprecation_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    from gankit.cli import main

    deprecate(
        monkeypatch, "critic", warn_on_impl_args={"d_objective": FutureWarning("hook critic: no more d_objective")}
    )
    result = CliRunner().invoke(main, ["explain", "--plugin", "unrolled"])
    assert result.exit_code == 0
    assert "warning: plugin 'unrolled': hook critic: no more d_objective\n" in result.output


def test_public_names_resolve() -> None:
    assert all(hasattr(gankit, name) for name in gankit.__all__)
    with pytest.raises(AttributeError):
        gankit.nonsense  # noqa: B018
