"""The task of a run on its device: data, clients and the network."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from . import rng
from .budget import Layer
from .config import FederationConfig, RunConfig, SparsityConfig
from .data import Dataset, Pool
from .data.dataset import MARGIN, crop_flip
from .data.partition import PartitionRule
from .data.source import Source
from .errors import ConfigError, Problem, nearest
from .execution.workers import local_workers, own_device
from .layout import Layout, choose_layout
from .models.architecture import Architecture
from .state import Batch, Params
from .transfer import to_device


@dataclass(frozen=True)
class Task:
    """Data on the device as stored, clients as index lists, and the network as a template.

    The module's own parameters are never trained: a run hands it parameters by name.
    """

    dataset: Dataset
    partition: Pool
    model: nn.Module
    layers: tuple[Layer, ...]
    federation: FederationConfig
    seed: int
    device: torch.device
    layout: Layout
    augment: Literal["none", "crop-flip"] = "none"

    def initial(self) -> tuple[Params, Params]:
        """Parameters and buffers as the framework initialised them."""
        params = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        buffers = {name: b.detach().clone() for name, b in self.model.named_buffers()}
        return params, buffers

    def activations(self) -> int:
        """Numbers that the layers put out for one sample; measured without computing anything."""
        twin, total = copy.deepcopy(self.model).to("meta").eval(), 0

        def add(module: nn.Module, inputs: object, output: object) -> None:
            nonlocal total
            total += sum(t.numel() for t in tree_leaves(output) if isinstance(t, Tensor))

        for module in twin.modules():
            if not any(module.children()):
                module.register_forward_hook(add)
        with torch.no_grad():
            twin(torch.empty(1, *self.dataset.input_shape, device="meta"))
        return total

    def clients(self, round_: int) -> list[int]:
        """The clients sampled in a round, the same for every method of a seed."""
        stream = rng.generator(self.seed, "clients", round_)
        chosen = stream.choice(
            self.partition.clients, self.federation.clients_per_round, self.federation.replacement
        )
        return [int(client) for client in chosen]

    def batches(self, client: int, round_: int, epoch: int) -> list[Batch]:
        """A client's minibatches of one local epoch; the last may be short."""
        return self.samples([client], round_, epoch).split(self.federation.batch_size)

    def samples(self, clients: Sequence[int], round_: int, epoch: int) -> Batch:
        """All samples of one local epoch of these clients, augmented if the task says so.

        One client's after another's, each in the order of its minibatches.
        """
        each = [self.partition.train_of(client) for client in clients]
        if self.federation.shuffle:
            each = [
                rng.generator(self.seed, "batches", round_, client, epoch).permutation(own)
                for client, own in zip(clients, each, strict=True)
            ]
        chosen = to_device(np.concatenate(each), self.device)
        stored = self.dataset.train(chosen)
        if self.augment == "crop-flip":
            streams = [rng.number(self.seed, "augment", round_, client, epoch) for client in clients]
            sizes = [len(own) for own in each]
            places = np.stack([np.repeat(streams, sizes), np.concatenate([np.arange(n) for n in sizes])])
            stored = crop_flip(stored, *to_device(places, self.device))
        return Batch(self.dataset.normalise(stored), self.dataset.train_targets.index_select(0, chosen))

    def sample(self, count: int) -> Batch:
        """A sample of the pooled training data, the same for every method of a seed."""
        total = len(self.dataset.train_targets)
        drawn = rng.generator(self.seed, "probe").choice(total, min(count, total), replace=False)
        chosen = to_device(drawn, self.device)
        return Batch(self.dataset.normalise(self.dataset.train(chosen)), self.dataset.train_targets[chosen])

    def test_batches(self, size: int = 1000) -> Iterator[tuple[Tensor, Tensor]]:
        """The pooled test set."""
        inputs, targets = self.dataset.test_inputs, self.dataset.test_targets
        for x, y in zip(torch.split(inputs, size), torch.split(targets, size), strict=True):
            yield self.dataset.normalise(x), y


def build(config: RunConfig) -> Task:
    """Loads the data, deals it to the clients and builds the network, all from the seed.

    Raises RunError for data that is missing and ConfigError for settings that the data cannot meet.
    """
    device = choose_device(config.execution.device)
    use_precision(config.execution.precision, device)
    federation = config.federation
    source = cast(Source, config.task.dataset)
    rule, architecture = cast(PartitionRule, config.task.partition), cast(Architecture, config.task.model)
    loaded = source.load(config.task.data_root, config.task.download)
    if config.task.augment == "crop-flip":
        _need_images(loaded)
    partition = rule.split(
        loaded.train_targets.numpy(),
        loaded.test_targets.numpy(),
        federation.clients,
        rng.generator(config.seed, "partition"),
    )
    if partition.clients < federation.clients_per_round:
        raise ConfigError(
            [
                Problem(
                    "federation.clients_per_round",
                    f"{federation.clients_per_round} clients a round, but only {partition.clients} of "
                    f"{federation.clients} have training and test samples under this partition; sample fewer",
                )
            ]
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng.key(config.seed, "weights")))
        model = architecture.build(loaded.input_shape, loaded.classes)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    layers = prunable_layers(model, config.sparsity)
    layout = choose_layout(config.execution.channels_last, model, device)
    return Task(
        loaded.to(device).arranged(layout),
        partition,
        model.to(device),
        layers,
        federation,
        config.seed,
        device,
        layout,
        config.task.augment,
    )


def _need_images(dataset: Dataset) -> None:
    """Refuses to crop and flip sound, and images that a crop could miss altogether."""
    height, width = dataset.input_shape[1:]
    if dataset.train_inputs.dtype != torch.uint8 or min(height, width) <= MARGIN:
        message = (
            f"'crop-flip' is for images of more than {MARGIN} pixels a side; {dataset.name} has inputs of "
            f"{height}x{width} in {str(dataset.train_inputs.dtype).removeprefix('torch.')}. Use 'none'"
        )
        raise ConfigError([Problem("task.augment", message)])


def choose_device(name: str) -> torch.device:
    """The device of a setting: "auto" takes a GPU if there is one."""
    if name == "auto":
        return own_device() if torch.cuda.is_available() else torch.device("cpu")
    if name.startswith("cuda") and local_workers() > 1:
        if name != "cuda":
            message = f"{name!r} for {local_workers()} workers; use 'cuda', which gives each its own"
            raise ConfigError([Problem("execution.device", message)])
        if torch.cuda.is_available():
            return own_device()
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        message = f"{name!r} cannot be used here: {reason}. Allowed: auto, cpu, cuda or cuda:N"
        raise ConfigError([Problem("execution.device", message)]) from None
    return device


def use_precision(setting: str, device: torch.device) -> None:
    """Lets this process's GPU round products and convolutions to TF32, or not."""
    if device.type == "cuda":
        with warnings.catch_warnings():  # newer releases name other settings, which older ones do not have
            warnings.simplefilter("ignore")
            torch.backends.cuda.matmul.allow_tf32 = setting != "float32"
            torch.backends.cudnn.allow_tf32 = setting != "float32"


def prunable_layers(model: nn.Module, sparsity: SparsityConfig) -> tuple[Layer, ...]:
    """The prunable parameters, in the model's order.

    "weights": the weight of every convolution and linear layer; "all": every parameter; else patterns as
    `fnmatch` reads them, each of which must match. Raises ConfigError if nothing is left.
    """
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    rule = sparsity.prunable
    if rule == ("all",):
        chosen = list(shapes)
    elif rule == ("weights",):
        chosen = [name for name in shapes if name.endswith("weight") and len(shapes[name]) > 1]
    else:
        for pattern in rule:
            if not any(fnmatchcase(name, pattern) for name in shapes):
                message = f"{pattern!r} matches no parameter. {nearest(pattern, shapes)}"
                raise ConfigError([Problem("sparsity.prunable", message)])
        chosen = [name for name in shapes if any(fnmatchcase(name, pattern) for pattern in rule)]
    if not chosen:
        raise ConfigError([Problem("sparsity.prunable", "the model has no such parameter")])

    def biases(name: str) -> int:
        bias = name.removesuffix("weight") + "bias"
        return shapes[bias][0] if name.endswith("weight") and bias in shapes and bias not in chosen else 0

    return tuple(Layer(name, shapes[name], biases(name)) for name in chosen)
