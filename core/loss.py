"""The loss that local steps differentiate: model, effective parameters and penalties together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .dropout import KeyedDropout
from .functional import call, is_stacked
from .normalisation import OneSample
from .state import Batch, Carry, Masks, Params

EffectiveParams = Callable[[Params, Masks], Params]
Penalty = Callable[[Params, Params], Tensor]


@dataclass(frozen=True)
class ModelLoss:
    """Cross-entropy of a model in training mode, through `effective_params` and the penalty, if any.

    Targets of -100 (PyTorch's `ignore_index`) mark samples that fill up a batch and do not count. With
    `autocast` the model computes in that type, its parameters and the loss stay float32.
    """

    model: nn.Module
    effective_params: EffectiveParams | None = None
    penalty: Penalty | None = None
    autocast: torch.dtype | None = None

    def plain(
        self, weights: Params, buffers: Params, batch: Batch, key: Tensor | None = None
    ) -> tuple[Tensor, Params]:
        """Mean cross-entropy at effective weights, without the penalty, and the buffers after the pass.

        Dropout draws from `key`, if there is one, else from PyTorch's generator.
        """
        moved = {name: b.clone() for name, b in buffers.items()}  # layers write running statistics in place
        dropout = nullcontext() if key is None else KeyedDropout(key)
        cast = nullcontext() if self.autocast is None else casting(batch.inputs.device.type, self.autocast)
        alone = OneSample() if len(batch.targets) == 1 else nullcontext()
        with dropout, cast, alone:
            outputs = call(self.model, {**weights, **moved}, batch.inputs)
            value = cross_entropy(outputs, batch.targets)
        return value, moved

    def total(
        self,
        params: Params,
        mask: Masks,
        anchor: Params,
        buffers: Params,
        batch: Batch,
        key: Tensor | None = None,
    ) -> tuple[Tensor, Params]:
        """The training loss and the buffers after the pass."""
        value, moved = self.plain(self.weights(params, mask), buffers, batch, key)
        if self.penalty is not None:
            value = value + self.penalty(params, anchor)
        return value, moved

    def weights(self, params: Params, mask: Masks) -> Params:
        """What the layers use."""
        return params if self.effective_params is None else self.effective_params(params, mask)


@dataclass(frozen=True)
class ClientLoss:
    """The loss of one client: a `ModelLoss` with this client's mask and download.

    `key` is the stream of this step's dropout; None if the model has none.
    """

    of: ModelLoss
    mask: Masks
    anchor: Params
    key: Tensor | None = None

    def value_and_grad(self, params: Params, carry: Carry, batch: Batch) -> tuple[Tensor, Params, Carry]:
        """Loss (0-d), its gradient by parameter, dense, and the carry with the new buffers."""
        if is_stacked(params) or is_stacked(batch._asdict()):
            grads, (value, buffers) = torch.func.grad(self._with_aux, has_aux=True)(params, carry, batch)
            return value, grads, Carry(buffers, carry.state)
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        with torch.enable_grad():
            value, buffers = self.of.total(leaves, self.mask, self.anchor, carry.buffers, batch, self.key)
        grads = gradient(value, leaves)
        return value.detach(), grads, Carry({n: b.detach() for n, b in buffers.items()}, carry.state)

    def _with_aux(self, params: Params, carry: Carry, batch: Batch) -> tuple[Tensor, tuple[Tensor, Params]]:
        value, buffers = self.of.total(params, self.mask, self.anchor, carry.buffers, batch, self.key)
        return value, (value, buffers)

    @property
    def bare(self) -> ClientLoss:
        """The loss by the weights that layers use, without the penalty."""
        return replace(self, of=replace(self.of, effective_params=None, penalty=None))

    def penalty(self, params: Params) -> tuple[Tensor | float, Params]:
        """The penalty, 0-d, and its gradient by parameter; 0 and no gradient if there is none."""
        of = self.of.penalty
        if of is None:
            return 0.0, {}
        grads, value = torch.func.grad_and_value(of)(params, self.anchor)
        return value, grads

    def dense_grad(self, params: Params, carry: Carry, batches: Sequence[Batch]) -> Params:
        """Gradient of the plain loss by effective weight, masked positions included, mean over samples."""
        weights = {n: w.detach().requires_grad_() for n, w in self.of.weights(params, self.mask).items()}
        batch = Batch(*(torch.cat(field) for field in zip(*batches, strict=True)))
        with torch.enable_grad():
            value, _ = self.of.plain(weights, carry.buffers, batch, self.key)
        return gradient(value, weights)


@dataclass(frozen=True)
class Probe:
    """Loss and gradients on a sample of training data, for masks found before training."""

    of: ModelLoss
    buffers: Params
    batch: Batch
    key: Tensor | None = None

    def loss(self, params: Params) -> Tensor:
        """Mean cross-entropy, 0-d, differentiable by `params` (twice, for GraSP)."""
        with torch.enable_grad():
            return self.of.plain(params, self.buffers, self.batch, self.key)[0]

    def gradient(self, params: Params) -> Params:
        """Its gradient, dense, by parameter."""
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        return gradient(self.loss(leaves), leaves)


def casting(device: str, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Autocast without its cache, which would outlive a step that is captured or transformed."""
    return torch.autocast(device, dtype=dtype, cache_enabled=False)


def gradient(value: Tensor, leaves: Params) -> Params:
    """Gradient of a scalar by every leaf; zeros where it does not depend on one."""
    found = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, found, strict=True))
