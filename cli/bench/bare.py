"""FedAvg as a plain PyTorch loop: what the engine is measured against."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ...core import rng
from ...core.config import RunConfig
from ...core.errors import ConfigError, Problem
from ...core.execution.workers import Workers
from ...core.layout import choose_layout
from ...core.loss import casting
from ...core.schedule import learning_rate
from ...core.state import Params
from ...core.task import Task
from ...core.transfer import to_device

CHUNK = 4096  # images that are normalised at once


class Bare:
    """Dense FedAvg with the engine's clients, batches and deal to workers, and nothing around it.

    One flat vector holds the client's parameters (and averaged buffers), another the gradients; a step is a
    pass and a few operations in place. Images are normalised once and for all. Dropout draws its own stream.
    """

    captures = False

    def __init__(self, config: RunConfig, task: Task, workers: Workers) -> None:
        if task.augment != "none":
            raise ConfigError([Problem("task.augment", "the plain loop of bench has none; set 'none'")])
        self.config, self.task, self.workers = config, task, workers
        self.last = choose_layout(config.execution.channels_last, task.model, task.device).channels_last
        arranged = [self.arranged(part) for part in torch.split(task.dataset.train_inputs, CHUNK)]
        self.inputs = torch.cat(arranged)
        self.module = copy.deepcopy(task.model).train()
        trained = list(self.module.parameters())
        averaged = [b for b in self.module.buffers() if b.is_floating_point()]
        parameters, everything = (sum(t.numel() for t in ts) for ts in (trained, [*trained, *averaged]))
        self.client = torch.zeros(everything, device=task.device)
        self.weights, self.gradient = self.client[:parameters], self.client.new_zeros(parameters)
        self.velocity = torch.zeros_like(self.gradient) if config.federation.momentum else None
        for tensor, place in zip([*trained, *averaged], self.places(self.client), strict=True):
            place.copy_(tensor)
            tensor.data = place
        for parameter, place in zip(trained, self.places(self.gradient), strict=True):
            parameter.requires_grad_(True)
            parameter.grad = place
        self.server = self.client.clone()

    def arranged(self, stored: Tensor) -> Tensor:
        """Inputs as they are kept: normalised, and with the channels as last dimension if these lie last."""
        inputs = self.task.dataset.normalise(stored)
        return inputs.permute(0, 2, 3, 1).contiguous() if self.last else inputs

    def places(self, flat: Tensor) -> Iterator[Tensor]:
        """Views of a flat vector as the module's tensors, in the layout of this run."""
        start = 0
        for tensor in [*self.module.parameters(), *self.module.buffers()]:
            if not tensor.is_floating_point() or start == len(flat):
                continue
            part, shape = flat[start : start + tensor.numel()], tensor.shape
            start += tensor.numel()
            if self.last and len(shape) == 4:
                yield part.view(shape[0], *shape[2:], shape[1]).permute(0, 3, 1, 2)
            else:
                yield part.view(shape)

    def tensors(self) -> Params:
        """The global parameters and averaged buffers by name."""
        named = [*self.module.named_parameters(), *self.module.named_buffers()]
        names = [name for name, tensor in named if tensor.is_floating_point()]
        return dict(zip(names, self.places(self.server), strict=True))

    def round(self, number: int) -> None:
        """One round: this worker's clients, and the mean over those of all workers."""
        clients = self.task.clients(number)
        samples = {client: len(self.task.partition.train_of(client)) for client in clients}
        total, everyone = torch.zeros_like(self.server), sum(samples[client] for client in clients)
        for client in self.workers.deal(clients, samples):
            self.client.copy_(self.server)
            self.train(client, number)
            total.add_(self.client, alpha=samples[client] / everyone)
        if self.workers.size > 1:
            dist.all_reduce(total)
        self.server = total

    def train(self, client: int, number: int) -> None:
        """One client's local epochs."""
        own, device = self.config.federation, self.task.device
        rate = learning_rate(
            own.learning_rate_schedule, own.learning_rate, own.learning_rate_final, number, own.rounds
        )
        if self.velocity is not None:
            self.velocity.zero_()
        for epoch in range(own.local_epochs):
            indices = self.task.partition.train_of(client)
            if own.shuffle:
                stream = rng.generator(self.config.seed, "batches", number, client, epoch)
                indices = stream.permutation(indices)
            chosen = to_device(np.ascontiguousarray(indices), device)
            inputs, targets = self.inputs.index_select(0, chosen), self.task.dataset.train_targets[chosen]
            if self.last:
                inputs = inputs.permute(0, 3, 1, 2)
            minibatches = torch.split(inputs, own.batch_size), torch.split(targets, own.batch_size)
            for x, y in zip(*minibatches, strict=True):
                self.step(x, y, rate)

    def step(self, inputs: Tensor, targets: Tensor, rate: float) -> None:
        """One step of SGD, in place."""
        own, weights, gradient = self.config.federation, self.weights, self.gradient
        gradient.zero_()
        self.loss(inputs, targets).backward()  # type: ignore[no-untyped-call]
        if own.weight_decay:
            gradient.add_(weights, alpha=own.weight_decay)
        if self.velocity is not None:
            gradient = self.velocity.mul_(own.momentum).add_(gradient)
        weights.add_(gradient, alpha=-rate)

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of a minibatch, in the run's precision."""
        module: nn.Module = self.module
        if self.config.execution.precision == "bfloat16":
            with casting(inputs.device.type, torch.bfloat16):
                return cross_entropy(module(inputs), targets)
        return cross_entropy(module(inputs), targets)
