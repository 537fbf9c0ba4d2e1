"""The local step as a function of tensors alone, which can be stacked, compiled and captured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import rng
from ..compose import Hook
from ..contracts import Where
from ..errors import FedsparseError, RunError
from ..loss import ClientLoss, ModelLoss
from ..registry import describe
from ..state import Batch, Carry, Clock, Masks, Params, Stepped


class Given(NamedTuple):
    """Every tensor that a step reads; `keys` are those of its random streams, by purpose."""

    params: Params
    carry: Carry
    batch: Batch
    mask: Masks
    trainable: Masks
    anchor: Params
    keys: dict[str, Tensor]


class Settings(NamedTuple):
    """Every number that a step reads, the same for an epoch."""

    lr: float
    momentum: float
    weight_decay: float
    target: float
    clock: Clock

    def taken(self, hook: Hook) -> dict[str, Any]:
        """Those that the hook asks for."""
        return {name: value for name, value in self._asdict().items() if name in hook.takes}


Step = Callable[[Given], Stepped]

IGNORED = -100  # target of a sample that fills up: `ignore_index` of the loss


def filled(batch: Batch, size: int) -> Batch:
    """The minibatch with samples that do not count behind its own, up to `size` of them."""
    x, y = batch
    short = size - len(y)
    if not short:
        return batch
    return Batch(pad(x, (0, 0) * (x.dim() - 1) + (0, short)), pad(y, (0, short), value=IGNORED))


def offered(given: Given, loss: ModelLoss, numbers: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that `local_step` may ask for."""
    return {
        **numbers,
        "loss": ClientLoss(loss, given.mask, given.anchor, given.keys.get("dropout")),
        "params": given.params,
        "carry": given.carry,
        "batch": given.batch,
        "trainable": given.trainable,
        "anchor": given.anchor,
        "key": given.keys.get("step"),
    }


def stacked(step: Step, own_masks: bool) -> Step:
    """The step of many clients at once; `own_masks`: masks have the client as first dimension, too."""
    owned = 0 if own_masks else None
    return torch.func.vmap(step, in_dims=(Given(0, 0, 0, owned, owned, None, 0),), randomness="different")  # type: ignore[arg-type]


def compiled(hook: Hook, loss: ModelLoss, settings: Settings, place: Where) -> Step:
    """The whole step through `torch.compile`, which raises RunError where that fails.

    Every new shape and number compiles anew, so that it is for tensors at fixed places.
    """
    # what a stream's key is folded with is known while compiling
    torch.compiler.assume_constant_result(rng.number)  # type: ignore[no-untyped-call]
    function, takes, numbers = hook.function, hook.takes, settings.taken(hook)

    def step(given: Given) -> Stepped:
        arguments = offered(given, loss, numbers)
        stepped: Stepped = function(**{name: arguments[name] for name in takes})
        return stepped

    fast = torch.compile(step, fullgraph=True)

    def run(given: Given) -> Stepped:
        try:
            stepped: Stepped = fast(given)
        except FedsparseError:
            raise
        except Exception as error:
            reason = describe(error).partition("\n")[0]
            raise RunError(
                f"{place}: the step cannot be compiled, or failed: {reason}. execution.compile = false "
                "runs it as it is"
            ) from error
        return stepped

    return run
