"""What the plugin's hooks must leave alone, read off the records."""

from __future__ import annotations

from gankit.conformance.bench import Bench, expect


def inputs_kept(bench: Bench) -> None:
    """Batch, view and logits are not edited in place: they belong to all plugins and to autograd.

    Mend: make new tensors (``x + 1``, ``x.clamp(...)``, ``x.clone()``), not ``x += 1`` or ``x.clamp_(...)``.
    """
    nothing(bench, "inputs", "edits in place")


def weights_kept(bench: Bench) -> None:
    """No hook but ``setup`` and ``post_step`` changes weights or buffers of a network.

    Mend: for a forward pass of your own use ``gankit.functional.extra_pass``, for changed weights
    ``torch.func.functional_call``; clip or average in ``post_step``.
    """
    nothing(bench, "weights", "changes", steps=2)  # in one step alone: set-up that waits for the first data


def g_weights_kept(bench: Bench) -> None:
    """After an update of D ``post_step`` leaves the trained weights of phase "g" alone: it is not they that moved.

    Mend: ``gan.parameters(phase)`` are those that moved; what is to happen once per step, or to G, waits for phase "g".
    """
    nothing(bench, "g_weights", "changes, after an update of D,")


def grads_kept(bench: Bench) -> None:
    """No ``.grad`` appears or changes inside a hook: the loop's own backward pass is the only one.

    Mend: return the term instead of calling ``.backward()``; ``torch.autograd.grad`` gives slopes and no ``.grad``.
    """
    nothing(bench, "grad", "touches")


def switches_kept(bench: Bench) -> None:
    """Training modes, requires_grad flags, gradient mode, defaults and threads are as they were after every hook.

    Mend: ``with torch.no_grad():`` around your own lines only, never around a ``yield``; ``gankit.structure.modes_kept``.
    """
    nothing(bench, "switch", "changes")


def global_random(bench: Bench) -> None:
    """No hook draws from a global random generator, of torch, numpy or Python: all plugins would share it.

    Mend: ``generator=gan.rng(self)``; for new layers ``with gan.initialising(self):``.
    """
    nothing(bench, "global", "advances")


def own_stream(bench: Bench) -> None:
    """Data, latents and other plugins' random numbers are the same with and without it.

    Mend: draw latents with ``gan.latent.draw(n, gan.rng(self))``; leave ``gan.next_real`` and ``gan.next_z`` to the loop.
    """
    nothing(bench, "stream", "")


def own_generator(bench: Bench) -> None:
    """Random numbers come from ``gan.rng(self)``, which the run seeds, saves and restores.

    Mend: pass ``generator=gan.rng(self)``; a generator of your own is not seeded by the run nor restored with it.
    """
    nothing(bench, "generator", "")


def no_waiting(bench: Bench) -> None:
    """No hook reads a tensor's value in every step: on a GPU each reading stops training until the device is done.

    Mend: keep it a tensor (``torch.where``, ``clamp``, ``detach()`` instead of ``if``, ``max``, ``.item()``).
    """
    nothing(bench, "wait", "waits for the device:", steps=2)


def any_device(bench: Bench) -> None:
    """New tensors are made on the device of the networks.

    Mend: ``device=x.device``, or ``torch.zeros_like(x)``, ``x.new_zeros(...)``.
    """
    nothing(bench, "device", "")


def no_growth(bench: Bench) -> None:
    """No hook leaves a hook on a module behind.

    Mend: ``handle = module.register_forward_hook(...)``, and ``handle.remove()`` in a ``finally``.
    """
    nothing(bench, "growth", "leaves")


def no_printing(bench: Bench) -> None:
    """Nothing is printed, which would tear the progress bar.

    Mend: return a metric from ``evaluate``, or a term; both are recorded.
    """
    nothing(bench, "print", "prints")


def nothing(bench: Bench, subject: str, verb: str, steps: int = 1) -> None:
    """Fail with the first note on a subject."""
    for record in bench.trained():
        text = record.found(subject, steps=steps)
        where, _, what = text.partition(": ")
        expect(not text, f"{where}: {verb} {what}".replace(":  ", ": "))
