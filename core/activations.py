"""Pruned activations: layers keep only their largest inputs for the weight gradient.

During the forward pass a mode replaces convolutions and linear layers, wherever the model calls them, by
functions with the same output and the same gradients for input and bias; the gradient of the weight is
taken with the inputs of magnitude at or above a threshold, the k-th largest of the layer's whole minibatch.
Only those are stored for the backward pass. The model's modules stay as they are.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear, pad
from torch.overrides import TorchFunctionMode

from .ledger import PassDensity
from .loss import ClientLoss, ModelLoss
from .recording import operation
from .schedule import share
from .selection import by_numpy, keep_from, kth_largest, readable
from .state import Batch, Carry, Params

FLOOR = 1e-7  # fraction of the inputs that a layer without weights keeps
_UNSET = -1.0  # no magnitude
_PREFIX = "threshold/"


def layers(params: Params) -> list[str]:
    """Names of the weights of convolutions and linear layers: matrices and what has more dimensions."""
    return [name for name, p in params.items() if p.dim() > 1]


def pass_densities(
    params: Params, density: Mapping[str, float], inputs: float | None = None
) -> dict[str, PassDensity]:
    """For the hook of this name: layers keep the fraction `inputs`, or that of the weights they use."""
    return {
        name: PassDensity(density[name], max(density[name] if inputs is None else inputs, FLOOR))
        for name in layers(params)
        if name in density
    }


def unset(params: Params) -> Params:
    """Thresholds of convolutions, for `carry.state["threshold"]`: the first minibatch sets them."""
    return {name: p.new_full((), _UNSET) for name, p in params.items() if p.dim() > 2}


def value_and_grad(
    loss: ClientLoss,
    params: Params,
    carry: Carry,
    batch: Batch,
    pruned: Iterable[str],
    density: float | None = None,
) -> tuple[Tensor, Params, Carry]:
    """`loss.value_and_grad` with the inputs of the layers `pruned` (names of weights) pruned.

    A layer keeps the fraction `density` of its inputs (and equals of the last), or, if that is None, as large
    a fraction as is not 0 among the weights that it uses. Layers in `carry.state["threshold"]` use the
    threshold there again once it is set.
    """
    of = loss.of
    pruning = _PrunedLoss(of.model, of.effective_params, of.penalty, of.autocast, frozenset(pruned), density)
    held = carry.state.get("threshold", {})
    # among the buffers, thresholds go into and out of the differentiated function as values
    buffers = {**carry.buffers, **{f"{_PREFIX}{name}": t for name, t in held.items()}}
    value, grads, after = replace(loss, of=pruning).value_and_grad(params, Carry(buffers, carry.state), batch)
    state = {**carry.state, "threshold": {name: after.buffers[f"{_PREFIX}{name}"] for name in held}}
    moved = {name: after.buffers[name] for name in carry.buffers}
    return value, grads, Carry(moved, state if held else carry.state)


@dataclass(frozen=True)
class _PrunedLoss(ModelLoss):
    """The loss of a model whose layers prune their inputs; thresholds are among the buffers."""

    pruned: frozenset[str] = frozenset()
    density: float | None = None

    def plain(
        self, weights: Params, buffers: Params, batch: Batch, key: Tensor | None = None
    ) -> tuple[Tensor, Params]:
        held = {n.removeprefix(_PREFIX): b for n, b in buffers.items() if n.startswith(_PREFIX)}
        own = {n: b for n, b in buffers.items() if not n.startswith(_PREFIX)}
        names = {id(weights[name]): name for name in self.pruned}  # a layer is called with this very tensor
        with Pruning(names, held, self.density) as mode:
            value, moved = super().plain(weights, own, batch, key)
        return value, moved | {f"{_PREFIX}{name}": t for name, t in mode.thresholds.items()}


class Pruning(TorchFunctionMode):
    """Replaces the layers whose weights are in `names`, by identity; `thresholds` moves with the calls."""

    def __init__(self, names: Mapping[int, str], thresholds: Params, density: float | None = None) -> None:
        super().__init__()
        self.names, self.thresholds, self.density = names, dict(thresholds), density

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is linear:
            return self.linear(*args, **(kwargs or {}))
        if func in (torch.conv1d, torch.conv2d, torch.conv3d):
            return self.convolution(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        name = self.names.get(id(weight))
        if name is None:
            return linear(input, weight, bias)
        kept = self.kept(name, input, weight)
        if readable(input, weight):
            out, saved = saving(kept, input, lambda: linear(input, weight, bias))
            if saved:
                return out
        return _Linear.apply(input, kept, weight, bias)

    def convolution(
        self,
        func: Callable[..., Any],
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Any:
        name, size = self.names.get(id(weight)), weight.shape[2:]
        if name is None:
            return func(input, weight, bias, stride, padding, dilation, groups)
        kept, steps = self.kept(name, input, weight), _each(dilation, len(size))
        if isinstance(padding, str):
            total = [step * (k - 1) if padding == "same" else 0 for step, k in zip(steps, size, strict=True)]
            sides = [side for width in reversed(total) for side in (width // 2, width - width // 2)]
            input, kept, padding = pad(input, sides), pad(kept, sides), 0
        if readable(input, weight):
            arguments = (input, weight, bias, stride, padding, dilation, groups)
            out, saved = saving(kept, input, lambda: func(*arguments))
            if saved:
                return out
        geometry = (_each(stride, len(size)), _each(padding, len(size)), steps, groups)
        return _Convolution.apply(input, kept, weight, bias, *geometry)

    def kept(self, name: str, inputs: Tensor, weight: Tensor) -> Tensor:
        """The inputs of a layer that count in the gradient of its weight, others 0."""
        held = self.thresholds.get(name)
        kept, moved = largest_inputs(inputs.detach(), weight.detach(), held, self.density)
        if moved is not None:
            self.thresholds[name] = moved
        return kept


@operation
def largest_inputs(
    inputs: Tensor, weight: Tensor, held: Tensor | None, density: float | None
) -> tuple[Tensor, Tensor | None]:
    """The inputs that a layer keeps, others 0, and the threshold that it holds from now on.

    `held` is the threshold so far, 0-d: below 0 if it is still open; None for a layer that takes a new one
    each time, which also holds None from now on.
    """
    if readable(inputs, weight):
        return _largest_on_host(inputs, weight, held, density)
    if inputs.is_cpu and inputs.dtype != torch.bfloat16 and not torch.compiler.is_compiling():
        kept, moved = _Stacked.apply(inputs, weight, held, density)
        return kept, None if held is None else moved
    least, held = threshold(inputs, weight, held, density)
    return torch.where(inputs.abs() >= least, inputs, 0.0), held


def _largest_on_host(
    inputs: Tensor, weight: Tensor, held: Tensor | None, density: float | None
) -> tuple[Tensor, Tensor | None]:
    """`largest_inputs` of one client, by numpy, which takes half the time of torch's small operations."""
    if not by_numpy(inputs):
        # float32 holds every bfloat16
        kept, moved = _largest_on_host(inputs.float(), weight, held, density)
        return kept.to(inputs.dtype), moved
    values = inputs.numpy()
    least = values.dtype.type(_UNSET if held is None else held.item())
    if least < 0:
        # NaN counts, and the contracts speak of it
        nonzero, size = int(np.count_nonzero(weight.bool().numpy())), weight.numel()
        ordered = np.abs(values).ravel("K")
        ordered.sort()
        least = ordered[values.size - kept_count(nonzero, values.size, size, density)]
        # a dense layer prunes nothing, and leaves its threshold open
        if held is not None and nonzero < size:
            held = held.new_tensor(least)
    return keep_from(inputs, least), held


@operation
def _largest_of_each(
    inputs: Tensor, weights: Tensor, held: Tensor | None, density: float | None
) -> tuple[Tensor, Tensor]:
    """`largest_inputs` of stacked clients by numpy, and the thresholds of all."""
    values, clients, size = inputs.numpy(), len(inputs), weights[0].numel()
    before = np.full(clients, _UNSET, values.dtype) if held is None else held.numpy()
    least = after = before
    if (before < 0).any():
        nonzero = np.count_nonzero(weights.bool().numpy().reshape(clients, size), axis=1)
        ordered = np.abs(values).reshape(clients, -1)
        ordered.sort(axis=1)
        total = ordered.shape[1]
        found = ordered[range(clients), total - kept_count(nonzero, total, size, density)]
        least = np.where(before < 0, found, before)
        after = np.where((before < 0) & (nonzero == size), before, least)
    return keep_from(inputs, least), torch.from_numpy(after.copy())


class _Stacked(torch.autograd.Function):
    """`largest_inputs` of stacked clients on a CPU; also returns a threshold where none is held."""

    @staticmethod
    def forward(
        inputs: Tensor, weight: Tensor, held: Tensor | None, density: float | None
    ) -> tuple[Tensor, Tensor]:
        kept, moved = _largest_on_host(inputs, weight, held, density)
        return kept, inputs.new_full((), _UNSET) if moved is None else moved.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, inputs: Tensor, weight: Tensor, held: Tensor | None, density: float | None
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        def of_all(tensor: Tensor, dim: int | None) -> Tensor:
            return tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)

        inputs, weight = of_all(inputs, in_dims[0]), of_all(weight, in_dims[1])
        held = None if held is None else of_all(held, in_dims[2])
        if readable(inputs, weight, *([] if held is None else [held])):
            return _largest_of_each(inputs, weight, held, density), (0, 0)
        # of another transformation
        own = [None] * len(inputs) if held is None else list(held)
        each = [_Stacked.apply(*one, density) for one in zip(inputs, weight, own, strict=True)]
        kept, moved = zip(*each, strict=True)
        return (torch.stack(kept), torch.stack(moved)), (0, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        return None, None, None, None


def threshold(
    inputs: Tensor, weight: Tensor, held: Tensor | None, density: float | None
) -> tuple[Tensor, Tensor | None]:
    """The least magnitude that a layer keeps, 0-d, and what it holds from now on; looks at no value."""
    total, size = inputs.numel(), weight.numel()
    nonzero = weight.count_nonzero()
    least = kth_largest(inputs.abs(), kept_count(nonzero, total, size, density))
    if held is not None:
        least = torch.where(held >= 0, held, least)
        held = torch.where(nonzero < size, least, held)
    return least, held


def kept_count(nonzero: Any, total: int, size: int, density: float | None) -> Any:
    """How many of `total` inputs a layer keeps, by its weights (an int, or ints in an array or a tensor)."""
    floor = math.ceil(FLOOR * total)
    if density is not None:
        return max(total - share(total, 1 - density), floor)
    count = (nonzero * total + size - 1) // size  # ceil(density of the weight · total), in integers
    if isinstance(count, int):
        return max(count, floor)
    return count.clamp_min(floor) if isinstance(count, Tensor) else np.maximum(count, floor)


def saving(kept: Tensor, inputs: Tensor, layer: Callable[[], Any]) -> tuple[Any, bool]:
    """A layer's output, and whether it saved `kept` for its backward pass in place of `inputs`.

    Only the gradient of the weight looks at it. Not under vmap or grad; a layer that saves a copy of its
    inputs (in another type or order) is not helped.
    """
    place, found = (inputs.data_ptr(), inputs.numel(), inputs.dtype), []

    def save(saved: Tensor) -> Tensor:
        if (saved.data_ptr(), saved.numel(), saved.dtype) != place or not saved.is_floating_point():
            return saved
        found.append(saved)
        return kept.view(saved.shape)

    with torch.autograd.graph.saved_tensors_hooks(save, lambda saved: saved):
        return layer(), bool(found)


class _Layer(torch.autograd.Function):
    """A layer whose gradient of the weight uses `kept` instead of `inputs`."""

    def __init_subclass__(cls) -> None:
        # `apply` asks for it at each call, and finding it takes longer than a small layer
        cls.forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]


class _Linear(_Layer):
    """A linear layer."""

    generate_vmap_rule = True

    @staticmethod
    def forward(inputs: Tensor, kept: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear(inputs, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        _, kept, weight, bias = inputs
        ctx.save_for_backward(kept, weight)
        ctx.biased = bias is not None

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        kept, weight = (saved.to(grad.dtype) for saved in ctx.saved_tensors)  # autocast's, if any
        flat = grad.reshape(-1, grad.shape[-1])
        by_weight = flat.T @ kept.reshape(-1, kept.shape[-1])
        return grad @ weight, None, by_weight, flat.sum(0) if ctx.biased else None


class _Convolution(_Layer):
    """A convolution in any number of dimensions."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        inputs: Tensor,
        kept: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        groups: int,
    ) -> Tensor:
        flat = [0] * len(stride)
        return torch.convolution(inputs, weight, bias, stride, padding, dilation, False, flat, groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        _, kept, weight, bias, *ctx.geometry = inputs
        ctx.save_for_backward(kept, weight)
        ctx.biases = None if bias is None else [weight.shape[0]]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        kept, weight = (saved.to(grad.dtype) for saved in ctx.saved_tensors)
        *sizes, groups = ctx.geometry
        # the gradient of the input does not depend on the input: one call gives all three
        wanted = [ctx.needs_input_grad[0], True, ctx.biases is not None]
        found = torch.ops.aten.convolution_backward(
            grad, kept, weight, ctx.biases, *sizes, False, [0] * len(sizes[0]), groups, wanted
        )
        return found[0], None, found[1], found[2], None, None, None, None


def _each(value: Any, dimensions: int) -> list[int]:
    """One number a dimension."""
    numbers = [value] if isinstance(value, int) else list(value)
    return numbers * dimensions if len(numbers) == 1 else numbers
