"""Unrolled GAN (Metz et al. 2017, arXiv:1611.02163), as functions and as a gankit plugin."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from gankit import UsageError, hookimpl

if TYPE_CHECKING:
    from gankit import GAN

Critic = Callable[..., Tensor]
Slots = tuple[Any, ...]


def adam_step(
    parameter: Tensor, gradient: Tensor, slots: Slots, *, lr: float, betas: tuple[float, float], eps: float
) -> tuple[Tensor, Slots]:
    """One update of ``torch.optim.Adam`` as a differentiable function of all three tensors.

    slots: exp_avg and exp_avg_sq, of the parameter's shape, and the number of updates made so far. Returns the new
    parameter and slots. Agrees with torch to rounding. exp_avg_sq has the smallest normal number added under its root,
    far below eps: at 0 the root's derivative is infinite, and a unit that never had a gradient would make everything NaN.
    """
    exp_avg, exp_avg_sq, step = slots
    beta1, beta2 = betas
    step = float(step) + 1
    correction = (1 - beta2**step) ** 0.5  # the root's, as a factor of numbers: as one of the tensor it costs a pass
    exp_avg = exp_avg.lerp(gradient, 1 - beta1)
    exp_avg_sq = exp_avg_sq.lerp(gradient.square(), 1 - beta2)
    denominator = (exp_avg_sq + torch.finfo(exp_avg_sq.dtype).tiny).sqrt() + correction * eps
    rate = lr * correction / (1 - beta1**step)
    return torch.addcdiv(parameter, exp_avg, denominator, value=-rate), (exp_avg, exp_avg_sq, step)


def sgd_step(parameter: Tensor, gradient: Tensor, slots: Slots, *, lr: float) -> tuple[Tensor, Slots]:
    """One update of plain gradient descent, theta - lr gradient, as a differentiable function; no slots."""
    return parameter - lr * gradient, slots


def unrolled_state(
    discriminator: nn.Module,
    objective: Callable[[Critic], Tensor],
    optimizer: torch.optim.Optimizer,
    k: int = 5,
    *,
    critic: Critic | None = None,
    second_order: bool = True,
    counts: Mapping[Tensor, float] | None = None,
) -> dict[str, Tensor]:
    """Parameters and buffers of the discriminator, by name, after k updates that it does not make.

    Arguments and errors as for :func:`unroll`, cost too. The parameters have a graph to whatever ``objective`` depends
    on besides them, unless ``second_order`` is False.
    """
    if k < 0:
        raise UsageError(f"k is a number of steps, 0 or more, not {k}")
    updates = _updates(optimizer)
    own = {name: p for name, p in discriminator.named_parameters() if p.requires_grad and p in updates}
    parameters = {name: p.detach().requires_grad_() for name, p in own.items()}
    counts = update_counts(optimizer) if counts is None else counts
    slots = {name: _slots(optimizer, p, counts) for name, p in own.items()}
    # clones, which the unrolled forwards may move: statistics of batch norm, singular vectors of spectral norm
    buffers = {name: b.detach().clone() for name, b in discriminator.named_buffers()}
    for _ in range(k):
        loss = objective(functional_critic(discriminator, {**parameters, **buffers}, critic))
        gradients = torch.autograd.grad(loss, [*parameters.values()], create_graph=second_order, allow_unused=True)
        for (name, p), gradient in zip(own.items(), gradients, strict=True):
            if gradient is None:  # as for the real optimiser, which skips what has no gradient
                continue
            parameters[name], slots[name] = updates[p](parameters[name], gradient, slots[name])
            if not second_order:
                parameters[name] = parameters[name].detach().requires_grad_()
    return {**parameters, **buffers}


def unroll(
    discriminator: nn.Module,
    objective: Callable[[Critic], Tensor],
    optimizer: torch.optim.Optimizer,
    k: int = 5,
    *,
    critic: Critic | None = None,
    second_order: bool = True,
    counts: Mapping[Tensor, float] | None = None,
) -> Critic:
    """The discriminator as it will be after k updates on ``objective``, as a function that G can be trained against.

        theta^0 = theta_D,   theta^{i+1} = theta^i - update(grad f(theta_G, theta^i)),   critic(x) = D(x; theta^k)

    Section 2 of arXiv:1611.02163. The gradient of a loss of this critic's logits holds the term that ordinary training
    misses, (d loss / d theta^k) (d theta^k / d theta_G): how D will answer to a change of G.

    discriminator: left exactly as it is: parameters, ``.grad``, buffers; copies of the buffers move along. Parameters that
        need no gradient or are not in the optimiser stay fixed.
    objective: D's whole loss (0-dim) as a function of a critic, on samples that carry G's graph; called k times. To follow
        the paper, G's loss must include the critic's logits of real samples, which depend on G through theta^k.
    optimizer: its rates, and for Adam its moments and step counts, are where the unrolled updates start; it is only read.
        ``torch.optim.Adam``, or ``torch.optim.SGD`` without momentum.
    critic: a function of inputs that calls the discriminator inside; default: the discriminator.
    second_order: False cuts theta^k off from G, so that G sees D's future but not its own influence on it.
    counts: :func:`update_counts` of the optimiser; without it they are read from it, for which a GPU is waited for once.

    Costs per step: one forward of the objective, one backward, and in the backward of the loss about twice as much again;
    memory grows with k, for the graphs of all steps are kept. Raises UsageError for another optimiser and for k < 0.
    """
    state = unrolled_state(
        discriminator, objective, optimizer, k, critic=critic, second_order=second_order, counts=counts
    )
    return functional_critic(discriminator, state, critic)


def functional_critic(discriminator: nn.Module, state: Mapping[str, Tensor], critic: Critic | None = None) -> Critic:
    """The critic with the given parameters and buffers in place of the discriminator's own; buffers move in place."""
    scorer = _Scorer(discriminator, critic or discriminator)
    named = {f"discriminator.{name}": tensor for name, tensor in state.items()}

    def score(*inputs: Tensor) -> Tensor:
        logits: Tensor = torch.func.functional_call(scorer, named, inputs)
        return logits

    return score


class _Scorer(nn.Module):
    """A callable that uses the discriminator, as a module around it, so that ``functional_call`` can swap its tensors."""

    def __init__(self, discriminator: nn.Module, critic: Critic) -> None:
        super().__init__()
        self.discriminator = discriminator
        self.critic = (critic,)  # not as an attribute: a module there would be a second child

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.critic[0](*inputs)


Update = Callable[[Tensor, Tensor, Slots], tuple[Tensor, Slots]]


def _updates(optimizer: torch.optim.Optimizer) -> dict[Tensor, Update]:
    """The differentiable update of each of the optimiser's parameters."""

    def update_of(group: dict[str, Any]) -> Update:
        lr = float(group["lr"])
        extra = [name for name in ("weight_decay", "amsgrad", "maximize", "momentum") if group.get(name)]
        if extra:
            raise UsageError(f"unrolling knows no {extra[0]}: use an optimiser without it")
        if isinstance(optimizer, torch.optim.Adam):
            settings: dict[str, Any] = {"lr": lr, "betas": group["betas"], "eps": group["eps"]}
            return lambda p, gradient, slots: adam_step(p, gradient, slots, **settings)
        return lambda p, gradient, slots: sgd_step(p, gradient, slots, lr=lr)

    if type(optimizer) not in (torch.optim.Adam, torch.optim.SGD):
        raise UsageError(f"unrolling goes through Adam or SGD, not {type(optimizer).__name__}: use one of them")
    return {p: update for group in optimizer.param_groups for update in [update_of(group)] for p in group["params"]}


def _slots(optimizer: torch.optim.Optimizer, parameter: Tensor, counts: Mapping[Tensor, float]) -> Slots:
    if isinstance(optimizer, torch.optim.SGD):
        return ()
    if not (state := optimizer.state.get(parameter)):  # before its first step
        return torch.zeros_like(parameter), torch.zeros_like(parameter), 0
    return state["exp_avg"], state["exp_avg_sq"], counts[parameter]


def update_counts(optimizer: torch.optim.Optimizer) -> dict[Tensor, float]:
    """How often Adam has updated each parameter, by its own count; on a GPU this waits for it, once for all of them."""
    return _values(_steps(optimizer))


def _steps(optimizer: torch.optim.Optimizer) -> dict[Tensor, Tensor]:
    return {p: state["step"] for p, state in optimizer.state.items() if "step" in state}


def _values(steps: Mapping[Tensor, Tensor]) -> dict[Tensor, float]:
    return dict(zip(steps, torch.stack([*steps.values()]).tolist(), strict=True)) if steps else {}


class Counts:
    """:func:`update_counts` of an optimiser as it goes on, without waiting: read at first, then counted along.

    They are read again when the optimiser's state is another, as after loading, and when a GradScaler may have skipped a
    step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self._steps: dict[Tensor, Tensor] = {}  # Adam's own counts, of which these are the values
        self._values: dict[Tensor, float] = {}
        optimizer.register_step_post_hook(self._stepped)

    def __call__(self) -> Mapping[Tensor, float]:
        """The counts of now."""
        steps = _steps(self.optimizer)
        if any(self._steps.get(p) is not step for p, step in steps.items()):
            self._steps, self._values = steps, _values(steps)
        return self._values

    def _stepped(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if getattr(optimizer, "found_inf", None) is not None:
            self._steps = {}
        for p in self._values:
            self._values[p] += p.grad is not None


@dataclass(eq=False)
class Unrolled:
    """Train G against the discriminator as it will be after ``k`` more steps, through which G's gradient flows."""

    formula: ClassVar[str] = (
        "G: loss under theta^k,  theta^0 = theta_D,  theta^{i+1} = theta^i - Adam(grad d_loss(theta^i))"
    )
    paper: ClassVar[str] = "Metz et al. 2017, Unrolled Generative Adversarial Networks, arXiv:1611.02163, section 2"

    k: Annotated[int, "steps of the discriminator that G looks ahead; 0 is no unrolling"] = 5
    optimizer: Annotated[Literal["adam", "sgd"], "adam: as D's own goes on; sgd: plain gradient steps"] = "adam"
    lr: Annotated[float | None, "rate of sgd; default: D's current one"] = None
    second_order: Annotated[bool, "let G's gradient flow through the k steps, as in the paper"] = True
    both_sides: Annotated[bool, "G's loss on the real side, too, which depends on G through the k steps"] = True

    def __post_init__(self) -> None:
        self.counts: Counts | None = None
        if self.k < 0:
            raise ValueError("k must not be negative")
        if self.optimizer not in ("adam", "sgd"):
            raise ValueError(f"optimizer is 'adam' or 'sgd', not {self.optimizer!r}")
        if self.lr is not None and self.optimizer == "adam":
            raise ValueError("lr is the rate of optimizer=sgd; adam takes D's own, --lr-d")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise ValueError("lr must be positive and finite")

    @hookimpl
    def setup(self, gan: GAN) -> None:
        """Give G the loss of both sides: under theta^k the real logits depend on G as well."""
        if self.k and self.both_sides:
            gan.loss = gan.loss.symmetric()

    @hookimpl(wrapper=True, tryfirst=True)
    def critic(self, gan: GAN, phase: str, d_objective: Callable[[Critic], Tensor]) -> Generator[None, Critic, Critic]:
        """In phase "g", the critic k steps ahead; outermost, so that it unrolls what other plugins make of the critic."""
        critic = yield
        if phase == "d" or not self.k:
            return critic
        optimizer, counts = gan.optimizers["d"], None
        if self.optimizer == "sgd":
            lr = optimizer.param_groups[0]["lr"] if self.lr is None else self.lr
            optimizer = torch.optim.SGD(gan.parameters("d"), lr=lr)
        elif type(optimizer) is torch.optim.Adam:  # others are refused below
            if self.counts is None or self.counts.optimizer is not optimizer:
                self.counts = Counts(optimizer)
            counts = self.counts()
        return unroll(
            gan.discriminator, d_objective, optimizer, self.k,
            critic=critic, second_order=self.second_order, counts=counts,
        )  # fmt: skip
