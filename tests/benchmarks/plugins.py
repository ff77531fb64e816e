"""What each plugin costs: its step over the bare loop's, beside the floor, in one process, alternating.

    python tests/benchmarks/plugins.py [--only r1,packing] [--rounds 15] [--kind vector|image]

The floor is a hand-written loop on the same networks that does only what the method cannot avoid: the extra forwards and
backwards of its equation, without hooks, checks, or options. The last column is the plugin's step over the floor's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, mse_loss, softplus

from gankit import GAN, Latent, train
from gankit.plugins import create

OPTIONS = {"unrolled": {"k": 1}, "lecam": {"start": 0}, "progressive": {"grown_after": 0}}
FOR_IMAGES = ("progressive", "self_attention", "stacked", "virtual_batch_norm")
UNCOMPARED = ("diffaugment", "inception")  # their cost is their own operations: there is nothing to compare it with
Sides = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]


def build(name: str | None, kind: str) -> GAN:
    """The GAN of the ring's recipe, or DCGAN on 28 px, with one plugin on."""
    shape, batch, z_dim = ((2,), 128, 2) if kind == "vector" else ((1, 28, 28), 64, 64)
    if name == "progressive":
        shape = (1, 32, 32)
    plugins = create([name], {name: OPTIONS[name]} if name in OPTIONS else {})[0] if name else {}
    gan = GAN(
        generator=None,
        discriminator=None,
        shape=shape,
        latent=Latent(z_dim),
        batch_size=batch,
        plugins=plugins,
    )
    data = torch.rand(5000, *shape) * 2 - 1
    stream = torch.Generator().manual_seed(0)
    gan.next_real = lambda: data[torch.randint(len(data), (batch,), generator=stream)]
    return gan.build()


@dataclass
class Floor:
    """The least that a method adds to a hand-written loop; what is left out is that of a plain GAN."""

    show: Callable[[Tensor, Tensor, Tensor, str], Sides] = lambda real, fake, z, phase: ((real,), (fake,))
    make: Callable[[Tensor], Tensor] | None = None  # in the generator's place
    d: Callable[[Sides, Tensor, Tensor], Tensor] | None = None
    g: Callable[[Tensor, Tensor], Tensor] | None = None
    both_sides: bool = False  # G's loss scores the real side, too
    after_d: Callable[[], None] = lambda: None
    after_g: Callable[[], None] = lambda: None
    critic: Callable[[Sides], Callable[..., Tensor]] | None = None  # in G's update


def by_hand(gan: GAN, floor: Floor) -> Callable[[int], None]:
    """A loop without gankit, on the GAN's networks."""
    generator, discriminator = floor.make or gan.generator, gan.discriminator
    g_parameters, d_parameters = gan.parameters("g"), gan.parameters("d")
    g_optimizer, d_optimizer = gan.optimizers["g"], gan.optimizers["d"]

    def loop(steps: int) -> None:
        for _ in range(steps):
            real, z = gan.next_real(), gan.next_z()
            with torch.no_grad():
                sides = floor.show(real, generator(z), z, "d")
            if floor.d:
                for t in (*sides[0], *sides[1]):
                    t.requires_grad_()
            real_logits, fake_logits = discriminator(*sides[0]), discriminator(*sides[1])
            loss = softplus(-real_logits).mean() + softplus(fake_logits).mean()
            if floor.d:
                loss = loss + floor.d(sides, real_logits, fake_logits)
            loss.backward(inputs=d_parameters)
            d_optimizer.step()
            d_optimizer.zero_grad()
            floor.after_d()
            real, z = gan.next_real(), gan.next_z()
            fake = generator(z)
            sides = floor.show(real, fake, z, "g")
            critic = floor.critic(sides) if floor.critic else discriminator
            loss = softplus(-critic(*sides[1])).mean()
            if floor.both_sides:
                loss = loss + softplus(critic(*sides[0])).mean()
            if floor.g:
                loss = loss + floor.g(z, fake)
            loss.backward(inputs=g_parameters)
            g_optimizer.step()
            g_optimizer.zero_grad()
            floor.after_g()

    return loop


def slope(logits: Tensor, *inputs: Tensor) -> Tensor:
    """(B,) squared norms of the gradients with respect to all inputs."""
    gradients = torch.autograd.grad(logits.sum(), inputs, create_graph=True)
    return sum((g.flatten(1).square().sum(1) for g in gradients[1:]), start=gradients[0].flatten(1).square().sum(1))


def column(like: Tensor) -> Tensor:
    """(B, 1, ..., 1) uniform numbers."""
    return torch.rand(len(like), *(1,) * (like.dim() - 1))


def floor_of(name: str, gan: GAN) -> Floor:
    """The floor of one plugin."""
    D, G = gan.discriminator, gan.generator
    encoder = next((p.module for n, p in gan.players.items() if n not in ("generator", "discriminator")), None)

    def between(sides: Sides, *_: Tensor) -> Tensor:
        real, fake = sides[0][0].detach(), sides[1][0].detach()
        u = column(real)
        x = (u * real + (1 - u) * fake).requires_grad_()
        return 10 * (slope(D(x), x).sqrt() - 1).square().mean()

    def around(sides: Sides, *_: Tensor) -> Tensor:
        real = sides[0][0].detach()
        x = (real + 0.5 * real.std() * torch.randn_like(real)).requires_grad_()
        return 10 * (slope(D(x), x).sqrt() - 1).square().mean()

    def pairs(real: Tensor, fake: Tensor, z: Tensor, phase: str) -> Sides:
        assert encoder is not None
        return (real, encoder(real)), (fake, z)

    def pairwise(sides: Sides, *_: Tensor) -> Tensor:
        real, code = (t.detach() for t in sides[0])
        with torch.no_grad():
            rebuilt = G(code)
        u = column(real)
        x = (u * real + (1 - u) * rebuilt).requires_grad_()
        (gradient,) = torch.autograd.grad(D(x, code).sum(), x, create_graph=True)
        way = real - rebuilt
        target = way / way.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, *(1,) * (way.dim() - 1))
        return (gradient - target).square().mean()

    def packed(real: Tensor, fake: Tensor, z: Tensor, phase: str) -> Sides:
        return tuple((t.reshape(len(t) // 2, 2 * t.shape[1], *t.shape[2:]),) for t in (real, fake))  # type: ignore[return-value]

    def consistent(sides: Sides, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        real = sides[0][0]
        moved = real + 0.01 * torch.randn_like(real) if real.dim() == 2 else real.roll((2, 1), (2, 3)).flip(3)
        return 10 * (D(moved) - real_logits).square().mean()

    def clip() -> None:
        with torch.no_grad():
            torch._foreach_clamp_max_(gan.parameters("d"), 0.01)
            torch._foreach_clamp_min_(gan.parameters("d"), -0.01)

    features: list[Tensor] = []
    last = [m for m in D.modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1]

    def matching(z: Tensor, fake: Tensor) -> Tensor:
        handle = last.register_forward_pre_hook(lambda m, inputs: features.append(inputs[0]))
        with torch.no_grad():
            D(gan.next_real())
        D(fake)
        handle.remove()
        real_features, fake_features = features
        features.clear()
        return (real_features.mean(0) - fake_features.mean(0)).square().sum()

    def seeking(z: Tensor, fake: Tensor) -> Tensor:
        z2 = torch.randn_like(z)
        return 1 / ((fake - G(z2)).abs().mean() / (z - z2).abs().mean() + 1e-5)

    means = {phase: [p.detach().clone() for p in gan.parameters(phase)] for phase in ("d", "g")}

    def history(phase: str) -> Tensor:
        pairs = zip(gan.parameters(phase), means[phase], strict=True)
        return torch.stack([mse_loss(p, mean, reduction="sum") for p, mean in pairs]).sum()

    @torch.no_grad()  # the mean over history has to be kept, too
    def remember(phase: str) -> None:
        torch._foreach_lerp_(means[phase], gan.parameters(phase), 0.01)

    state = gan.optimizers["d"].state

    def adam(p: Tensor, gradient: Tensor, s: dict[str, Tensor]) -> Tensor:
        """The step that D's own Adam would make; 1e-37, for dead units' gradients are 0, where a root's slope is infinite.

        D's moments and their corrections are no luxury: with the gradient alone it is another update than D's.
        """
        step = s["step"].item() + 1
        exp_avg = s["exp_avg"].lerp(gradient, 0.5)
        root = (s["exp_avg_sq"].lerp(gradient.square(), 0.001) + 1e-37).sqrt()
        correction = (1 - 0.999**step) ** 0.5
        return torch.addcdiv(p, exp_avg, root + 1e-8 * correction, value=-2e-4 * correction / (1 - 0.5**step))

    def unrolled(sides: Sides) -> Callable[..., Tensor]:
        own = {n: p.detach().requires_grad_() for n, p in D.named_parameters()}

        def score(*inputs: Tensor) -> Tensor:
            return torch.func.functional_call(D, own, inputs)

        loss = softplus(-score(*sides[0])).mean() + softplus(score(*sides[1])).mean()
        gradients = torch.autograd.grad(loss, [*own.values()], create_graph=True)
        after = {
            name: adam(own[name], g, state[p]) for (name, p), g in zip(D.named_parameters(), gradients, strict=True)
        }
        return lambda *inputs: torch.func.functional_call(D, after, inputs)

    small: dict[str, Tensor] = {}
    small_critic = gan.players["discriminator_small"].module if name == "stacked" else D

    def both_stages(z: Tensor) -> Tensor:
        small["fake"], full = G.stages(z)
        return full

    def beside_small(real: Tensor, fake: Tensor, z: Tensor, phase: str) -> Sides:
        small["real"] = avg_pool2d(real, 2)
        pairs = ((real, small["real"]), (fake, small["fake"].detach()))
        return tuple((torch.cat([x, interpolate(s, scale_factor=2.0)], 1),) for x, s in pairs)  # type: ignore[return-value]

    def small_d(*_: object) -> Tensor:
        return softplus(-small_critic(small["real"])).mean() + softplus(small_critic(small["fake"].detach())).mean()

    floors = {
        "gradient_penalty": Floor(d=between),
        "dragan": Floor(d=around),
        "r1": Floor(d=lambda sides, real, fake: 5 * slope(real, *sides[0]).mean()),
        "r2": Floor(d=lambda sides, real, fake: 5 * slope(fake, *sides[1]).mean()),
        "consistency": Floor(d=consistent),
        "lecam": Floor(d=lambda sides, real, fake: (real - 0.1).square().mean() + (fake + 0.1).square().mean()),
        "label_smoothing": Floor(d=lambda sides, real, fake: 0.1 * real.mean()),
        "weight_clipping": Floor(after_d=clip),
        "packing": Floor(show=packed),
        "bigan": Floor(show=pairs, both_sides=True),
        "pairwise_gp": Floor(show=pairs, both_sides=True, d=pairwise),
        "veegan": Floor(show=pairs, both_sides=True, g=lambda z, fake: (encoder(fake) - z).square().sum(1).mean()),
        "feature_matching": Floor(g=matching),
        "mode_seeking": Floor(g=seeking),
        "historical_averaging": Floor(
            d=lambda *_: history("d"),
            g=lambda *_: history("g"),
            after_d=lambda: remember("d"),
            after_g=lambda: remember("g"),
        ),
        "stacked": Floor(
            make=both_stages,
            show=beside_small,
            d=small_d,
            g=lambda z, fake: softplus(-small_critic(small["fake"])).mean(),
        ),
        "unrolled": Floor(critic=unrolled, both_sides=True),
    }
    return floors.get(
        name, Floor()
    )  # other networks or rates, no further work: spectral_norm, ttur, self_attention, ...


def compare(name: str, kind: str, rounds: int, steps: int) -> None:
    """One line: plugin and floor over the bare loop, and the plugin over its floor."""
    bare, ours, theirs = build(None, kind), build(name, kind), build(name, kind)
    hand = by_hand(theirs, floor_of(name, theirs))
    sides: dict[str, Callable[[], None]] = {
        "bare": lambda: train(bare, bare.step + steps),
        "plugin": lambda: train(ours, ours.step + steps),
        "floor": lambda: hand(steps),
    }
    times: dict[str, list[float]] = {side: [] for side in sides}
    for act in sides.values():
        act()
    for round_ in range(rounds):
        for side, act in [*sides.items()][:: 1 if round_ % 2 else -1]:
            started = time.perf_counter()
            act()
            times[side].append((time.perf_counter() - started) / steps)
    ms = {side: 1000 * statistics.median(seen) for side, seen in times.items()}
    over = statistics.median(p / f for p, f in zip(times["plugin"], times["floor"], strict=True))
    print(
        f"{name:<22}{kind:<8}bare {ms['bare']:7.2f} ms   plugin {ms['plugin'] / ms['bare']:5.2f}   "
        f"floor {ms['floor'] / ms['bare']:5.2f}   plugin/floor {over:5.2f}",
        flush=True,
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="plugins, by comma")
    parser.add_argument("--kind", choices=["vector", "image"])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    from gankit.plugins import available

    for kind in [options.kind] if options.kind else ["vector", "image"]:
        for name in options.only.split(",") if options.only else available():
            if name in UNCOMPARED or (kind == "vector" and name in FOR_IMAGES):
                continue
            compare(name, kind, options.rounds, 20 if kind == "vector" else 3)


if __name__ == "__main__":
    main()
