"""Local steps that keep coming in the same form run again from a recording, the same to the bit.

On a CPU, Python and autograd around a step's operations take 10 % of a small network's training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..recording import record
from ..state import Stepped
from .step import Given, Step

OFTEN = 16  # minibatches of a form before it is recorded, which takes as long as some ten steps
MOST = 8  # forms that are; short minibatches have many, and each comes rarely


@dataclass
class Recording:
    """A step of one form again."""

    again: Callable[[Given, float], Stepped]
    """the step, with a rate"""
    next: Hashable
    """the form of model, masks and keys with which the following step comes"""
    rate: float | None = None
    """the one with which it made the same as a step did, of other values than it was made with"""


@dataclass
class Replays:
    """The recordings of a local step with the numbers that it reads now, but for the rate (momentum, …)."""

    numbers: Any = None
    since: int = -1
    seen: Counter[Hashable] = field(default_factory=Counter)
    """minibatches by their form"""
    often: set[Hashable] = field(default_factory=set)
    recordings: dict[Hashable, Recording] = field(default_factory=dict)
    refused: str = ""
    """why the step cannot be recorded, once that was tried"""

    def of(self, step: Step, rate: float, numbers: Any, round_: int) -> Step:
        """The step for the minibatches of an epoch, from recordings where it pays.

        Numbers other than the rate that change with every round are not worth one; so the first round never
        has any.
        """
        if numbers != self.numbers:
            self.numbers, self.since = numbers, round_
            self.seen.clear()
            self.often.clear()
            self.recordings.clear()
        return step if self.refused or round_ == self.since else _Replaying(step, rate, self)

    def pays(self, batch: Hashable) -> bool:
        """Whether to record, by how many minibatches of this form there were."""
        self.seen[batch] += 1
        if self.seen[batch] > OFTEN and len(self.often) < MOST:
            self.often.add(batch)
        return batch in self.often and not self.refused


class _Replaying:
    """A step that is recorded when it comes, checked when it comes again, and then run from the recording.

    It is checked again for another rate, and taken as it is if that does not show as it should.
    """

    def __init__(self, step: Step, rate: float, replays: Replays) -> None:
        self.step, self.rate, self.replays = step, rate, replays
        self.unmoved: tuple[object, ...] = ()
        """what the next step is given if it follows the last one, whose recording knows its form"""
        self.next: Hashable = None

    def __call__(self, given: Given) -> Stepped:
        batch = _forms(given.batch)
        if not self.replays.pays(batch):
            self.unmoved = ()
            return self.step(given)
        model = self.following(given)
        recording = self.replays.recordings.get((model, batch))
        if recording is None:
            made = self.recorded(given, (model, batch))
        elif recording.rate == self.rate:
            made = recording.again(given, self.rate)
        else:
            made = self.checked(given, recording)
        self.unmoved = ()
        if recording is not None:
            self.unmoved = (made.params, made.carry, given.mask, given.trainable, given.anchor)
            self.next = recording.next
        return made

    def following(self, given: Given) -> Hashable:
        """The form of model, masks and keys; known without a look where the last step made the model."""
        now = (given.params, given.carry, given.mask, given.trainable, given.anchor)
        if self.unmoved and all(one is other for one, other in zip(now, self.unmoved, strict=True)):
            return self.next
        return _form(given)

    def recorded(self, given: Given, form: Hashable) -> Stepped:
        """Takes a step and records it."""
        made: Stepped
        try:
            made, again, self.replays.refused = record(self.step, given, self.rate)
        except Exception as error:  # what the step itself raises, it raises again
            self.replays.refused = f"{type(error).__name__}: {error}"
            made, again = self.step(given), None
        if again is not None:
            following = _form(given._replace(params=made.params, carry=made.carry))
            self.replays.recordings[form] = Recording(again, following)
        return made

    def checked(self, given: Given, recording: Recording) -> Stepped:
        """Takes a step, and looks whether its recording does the same."""
        made = self.step(given)
        if _same(made, recording.again(given, self.rate)):
            recording.rate = self.rate
        else:
            self.replays.refused = "its recording made something else"
        return made


def _forms(tensors: Iterable[Tensor]) -> Hashable:
    """Shapes, strides and types."""
    return tuple((t.shape, t.stride(), t.dtype) for t in tensors)


def _form(given: Given) -> Hashable:
    """Names, shapes, strides and types of all but the minibatch, and which of them are one tensor."""
    leaves, structure = pytree.tree_flatten((*given[:2], *given[3:]))
    places = {id(tensor): place for place, tensor in enumerate(leaves)}
    return structure, _forms(leaves), tuple(places[id(tensor)] for tensor in leaves)


def _same(one: Stepped, other: Stepped) -> bool:
    """Whether all tensors are equal, bit by bit."""
    (mine, my_names), (others, other_names) = pytree.tree_flatten(one), pytree.tree_flatten(other)
    return (
        my_names == other_names
        and _forms(mine) == _forms(others)
        and all(torch.equal(_bits(a), _bits(b)) for a, b in zip(mine, others, strict=True))
    )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)
