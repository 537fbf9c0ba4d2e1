"""What every hook must keep, checked after each, or at last after the round's training.

A breach names the place and both counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import masks
from .budget import Budget
from .errors import RunError
from .functional import is_stacked
from .state import Aggregated, Carry, Frozen, Masks, Params, Readjusted, ServerState

OPEN = 64  # checks of clients between two looks at their counts


class ContractError(RunError):
    """A hook returned something that it must not."""


class Where(NamedTuple):
    """The place of a hook call, for messages."""

    method: str
    part: str
    slot: str
    hook: str
    round: int | None = None
    client: int | None = None

    def __str__(self) -> str:
        place = f"method {self.method}, part {self.part}, slot {self.slot}, hook {self.hook}"
        if self.round is not None:
            place += f", round {self.round}"
        if self.client is not None:
            place += f", client {self.client}"
        return place

    def breach(self, what: str) -> ContractError:
        return ContractError(f"{self}: {what}")


class Counter:
    """Gathers counts on the device, so that a whole check costs one transfer to the host."""

    def __init__(self) -> None:
        self.counts: list[Tensor] = []
        self.messages: list[str] = []

    def forbid(self, count: Tensor, message: str) -> None:
        """`count` must be 0; `{count}` in the message is replaced by what it was."""
        self.counts.append(count.to(torch.float64))
        self.messages.append(message)

    def verdict(self, where: Where) -> None:
        if self.counts:
            _judge([(where, self.messages, torch.stack(self.counts))])


@dataclass(frozen=True)
class Contracts:
    """The checks, against the shapes of the run's parameters."""

    template: Params
    prunable: tuple[str, ...]
    open: list[tuple[Where, list[str], Tensor]] = field(default_factory=list)
    """what was checked `later`, and is not looked at yet"""

    def settle(self) -> None:
        """Looks at everything that was checked `later`, in one transfer to the host."""
        found, self.open[:] = list(self.open), []
        if found:
            _judge(found)

    def parameters(self, where: Where, params: Any) -> None:
        """Names, shapes and dtypes kept."""
        _same_names(where, "parameters", params, self.template)
        for name, expected in self.template.items():
            _same_tensor(where, f"parameter {name!r}", params[name], expected.shape, expected.dtype)

    def mask(self, where: Where, mask: Any) -> None:
        """A bool mask for each prunable parameter, of its shape."""
        _same_names(where, "mask", mask, self.prunable)
        for name in self.prunable:
            _same_tensor(where, f"mask of {name!r}", mask[name], self.template[name].shape, torch.bool)

    def frozen(self, where: Where, frozen: Any, mask: Masks) -> None:
        """frozen ⊆ mask; unprunable parameters may be named too."""
        if not isinstance(frozen, dict):
            raise where.breach(f"frozen is {type(frozen).__name__}; expected a dict of masks")
        count = Counter()
        for name, entry in frozen.items():
            if name not in self.template:
                raise where.breach(f"frozen names {name!r}, which is no parameter")
            _same_tensor(where, f"frozen {name!r}", entry, self.template[name].shape, torch.bool)
            if name in mask:
                count.forbid(
                    (entry & ~mask[name]).count_nonzero(), f"{name!r}: {{count}} frozen weights off the mask"
                )
        count.verdict(where)

    def values(
        self,
        where: Where,
        params: Params,
        mask: Masks,
        frozen: Masks | None = None,
        held: Params | None = None,
        later: bool = False,
    ) -> None:
        """Zero off the mask, no NaN or infinity, frozen values bit-identical to `held`.

        `later`: a breach is raised by `settle`, so that the host need not wait for the counts now.
        """
        count = Counter()
        hint = "" if where.client is None else ", or faults.non_finite = 'drop'"
        # NaN if any entry is not finite, else 0
        finite = torch._foreach_mul(torch._foreach_norm(list(params.values()), 1), 0.0)
        for (name, value), total in zip(params.items(), finite, strict=True):
            trouble = f"parameter {name!r} holds NaN or infinity; a lower learning rate may help{hint}"
            count.forbid(total, trouble)
            if name in mask:
                off = (value.bool() > mask[name]).count_nonzero()
                count.forbid(
                    off,
                    f"{name!r}: {{count}} of {value.numel()} weights are not 0 off the mask (allowed: 0)",
                )
            if frozen and held and name in frozen:
                moved = ((value - held[name]).bool() & frozen[name]).count_nonzero()
                count.forbid(moved, f"{name!r}: {{count}} frozen values changed (allowed: 0)")
        if later:
            self.open.append((where, count.messages, torch.stack(count.counts)))
            if len(self.open) == OPEN:
                self.settle()
        else:
            count.verdict(where)

    def server_values(self, where: Where, params: Params, mask: Masks, frozen: Masks, held: Params) -> None:
        """`values`, of tensors that are masked or frozen anywhere (looks at the counts)."""
        active, fixed = masks.counted(mask, frozen)
        bound = {name: m for name, m in mask.items() if active[name] < m.numel()}
        self.values(where, params, bound, {name: f for name, f in frozen.items() if fixed[name]}, held)

    def decided(
        self, where: Where, decided: Frozen, state: ServerState, budget: Budget, promise: str
    ) -> None:
        """What a freeze policy made of the server's state; its mask meets the budget if it is a new one."""
        params = state.params if decided.params is None else decided.params
        self.parameters(where, params)
        self.mask(where, decided.mask)
        self.frozen(where, decided.frozen, decided.mask)
        self.values(where, params, decided.mask)
        if any(decided.mask[name] is not state.mask[name] for name in state.mask):
            self.budget(where, decided.mask, budget, promise)
        self.memory(where, decided.memory)

    def made(
        self, where: Where, made: Aggregated | Readjusted, state: ServerState, budget: Budget, promise: str
    ) -> None:
        """What a server hook made of the server's state."""
        self.parameters(where, made.params)
        self.mask(where, made.mask)
        self.frozen(where, state.frozen, made.mask)
        self.server_values(where, made.params, made.mask, state.frozen, state.params)
        self.budget(where, made.mask, budget, promise)
        self.memory(where, made.memory)

    def scores(self, where: Where, scores: Any) -> None:
        """A score for each prunable weight."""
        _same_names(where, "scores", scores, self.prunable)
        for name in self.prunable:
            _same_tensor(where, f"score of {name!r}", scores[name], self.template[name].shape, None)

    def stepped(self, where: Where, carry: Any, metrics: Any, buffers: Params) -> None:
        """A Carry with the model's buffers, and metrics that are 0-d tensors with "loss" among them."""
        if not isinstance(carry, Carry) or not isinstance(carry.state, dict):
            raise where.breach(f"carry is {_kind(carry)}; expected Carry(buffers, state)")
        _same_names(where, "carry.buffers", carry.buffers, buffers)
        for name, expected in buffers.items():
            _same_tensor(where, f"buffer {name!r}", carry.buffers[name], expected.shape, expected.dtype)
        if not isinstance(metrics, dict) or "loss" not in metrics:
            raise where.breach('metrics must be a dict that holds "loss"')
        for name, value in metrics.items():
            if not isinstance(value, Tensor) or value.dim():
                raise where.breach(f"metric {name!r} is {_kind(value)}; expected a 0-d tensor")

    def summed(self, where: Where, given: dict[str, Any], sums: Mapping[str, Tensor]) -> None:
        """Tensors by name, of the names and shapes of the clients before."""
        if sums:
            _same_names(where, "sums", given, sums)
        for name, value in given.items():
            if not isinstance(value, Tensor):
                raise where.breach(f"{name!r} is {_kind(value)}; expected a tensor")
            if sums and value.shape != sums[name].shape:
                shape = tuple(sums[name].shape)
                raise where.breach(f"{name!r} has shape {tuple(value.shape)}; clients before gave {shape}")

    def memory(self, where: Where, memory: Any) -> None:
        """Nested dicts of tensors and plain values, which a checkpoint can hold."""
        if not isinstance(memory, dict):
            raise where.breach(f"memory is {_kind(memory)}; expected a dict")
        for name, value in memory.items():
            if not isinstance(name, str):
                raise where.breach(f"memory has the key {name!r}; expected texts")
            if isinstance(value, dict):
                self.memory(where, value)
                continue
            plain = value if isinstance(value, list) else [value]
            if isinstance(value, Tensor) or all(isinstance(v, str | int | float | None) for v in plain):
                continue
            raise where.breach(
                f"memory[{name!r}] is {_kind(value)}; expected tensors, numbers, texts, lists of numbers or "
                "texts, or dicts of these"
            )

    def budget(self, where: Where, mask: Masks, budget: Budget, promise: str) -> None:
        """Active counts "exact"ly the budget's, or "at most"."""
        if promise != "none":
            self.budget_of(where, masks.active(mask), budget, promise)

    def budget_of(self, where: Where, counts: Mapping[str, int], budget: Budget, promise: str) -> None:
        """`budget`, of active weights that are counted already."""
        if promise == "none":
            return
        allowed: Mapping[str, int] = budget.counts or {"all layers": budget.total}
        given = counts if budget.counts else {"all layers": sum(counts.values())}
        for name, limit in allowed.items():
            if given[name] > limit or (promise == "exact" and given[name] != limit):
                raise where.breach(
                    f"{name!r} has {given[name]} active weights; the budget at sparsity "
                    f"{budget.sparsity:g} is {'' if promise == 'exact' else 'at most '}{limit} "
                    f"(the part's budget_promise is {promise!r})"
                )


def versions(*groups: Mapping[str, Tensor]) -> list[int]:
    """Counts of in-place writes of every tensor; they grow when a hook writes where it must not."""
    plain = [group for group in groups if not is_stacked(group)]
    return [tensor._version for group in plain for tensor in group.values()]


def _judge(found: Sequence[tuple[Where, list[str], Tensor]]) -> None:
    """Raises the first breach: each count must be 0."""
    counts = iter(torch.cat([own for _, _, own in found]).tolist())
    for where, messages, _ in found:
        for message in messages:
            if (count := next(counts)) != 0:  # also true for NaN
                raise where.breach(message.replace("{count}", f"{count:.0f}"))


def _kind(value: Any) -> str:
    shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
    return f"{type(value).__name__}{shape}"


def _same_names(where: Where, what: str, given: Any, expected: Any) -> None:
    if not isinstance(given, dict):
        raise where.breach(f"{what} returned as {type(given).__name__}; expected a dict by parameter name")
    missing, unknown = [n for n in expected if n not in given], [n for n in given if n not in expected]
    if missing or unknown:
        raise where.breach(f"{what}: missing {missing or 'none'}, unknown {unknown or 'none'}")


def _same_tensor(where: Where, what: str, given: Any, shape: torch.Size, dtype: torch.dtype | None) -> None:
    if not isinstance(given, Tensor):
        raise where.breach(f"{what} is {type(given).__name__}; expected a tensor")
    if given.shape != shape or (dtype and given.dtype != dtype):
        raise where.breach(
            f"{what} has shape {tuple(given.shape)} and {given.dtype}; expected {tuple(shape)} and "
            f"{dtype or 'any number'}"
        )
