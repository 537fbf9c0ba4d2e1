"""Local steps that keep coming in the same form run again from a recording, the same to the bit.

On a CPU, Python and autograd around its operations take a tenth of a small network's step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..recording import Script, record
from ..state import Stepped
from .step import Given, Step

OFTEN = 16  # minibatches of a form before it is recorded, which takes as long as some ten steps
PAYS = 4  # steps of a form in a round that pay for reading its numbers anew, which takes as long as two steps
MOST = 8  # forms of minibatches that are recorded; short ones have many, and each comes rarely
RECORDINGS = 32  # of all forms of minibatch, model and masks
CHANGES = 4  # of what a step does with its numbers, after which it runs as it is


@dataclass
class Recording:
    """A step of one form again."""

    again: Script
    next: Hashable
    """the form of model, masks and keys with which the following step comes"""
    numbers: dict[Hashable, list[float]]
    """those of its operations, by the settings that they come from"""
    trusted: bool = False
    """whether it made the same as a step did, of other values than it was made with"""
    now: int = 0
    """steps of this form in this round"""
    usual: float = 0
    """those of the round before, for each of its settings"""


@dataclass
class Replays:
    """The recordings of a local step."""

    round: int = -1
    first: bool = True
    seen: Counter[Hashable] = field(default_factory=Counter)
    """minibatches by their form"""
    settings: set[Hashable] = field(default_factory=set)
    """of this round"""
    often: set[Hashable] = field(default_factory=set)
    recordings: dict[Hashable, Recording] = field(default_factory=dict)
    changes: int = 0
    """recordings that other numbers put an end to"""
    refused: str = ""
    """why the step cannot be recorded, once that was tried"""

    def of(self, step: Step, numbers: Mapping[str, Any], round_: int, stacked: bool = False) -> Step:
        """The step for the minibatches of an epoch, from recordings where it pays: never in the first round.

        `numbers` are what the step reads besides tensors, such as its rate. They may change.
        """
        if self.refused:
            return step
        if round_ != self.round:
            self.begin(round_)
        settings = tuple(numbers.items())
        self.settings.add(settings)
        return step if self.first else _Replaying(step, self, settings, stacked)

    def begin(self, round_: int) -> None:
        """Counts anew; forgets numbers that the last round did not use."""
        self.first = self.round == -1
        self.round = round_
        for recording in self.recordings.values():
            recording.numbers = {at: n for at, n in recording.numbers.items() if at in self.settings}
            recording.usual, recording.now = recording.now / max(len(self.settings), 1), 0
        self.settings.clear()

    def clear(self) -> None:
        """Forgets all recordings."""
        self.seen.clear()
        self.often.clear()
        self.recordings.clear()

    def refuse(self, why: str) -> None:
        """From now on the step runs as it is."""
        self.refused = why
        self.clear()

    def count(self, batch: Hashable) -> bool:
        """Counts a minibatch of this form; whether there were so many that a recording pays."""
        self.seen[batch] += 1
        if self.seen[batch] > OFTEN and len(self.often) < MOST:
            self.often.add(batch)
        return batch in self.often and not self.refused


class _Replaying:
    """A step that is recorded when it comes, checked when it comes again, and then run from the recording.

    What trains is a plain step's result until then, or that of the same operations while they are read.
    """

    def __init__(self, step: Step, replays: Replays, settings: Hashable, stacked: bool) -> None:
        self.step, self.replays, self.settings, self.stacked = step, replays, settings, stacked
        self.unmoved: tuple[object, ...] = ()
        """what the next step is given if it follows the last one, whose recording knows its form"""
        self.next: Hashable = None

    def __call__(self, given: Given) -> Stepped:
        batch, unmoved, self.unmoved = _forms(given.batch), self.unmoved, ()
        if not self.replays.count(batch):
            return self.step(given)
        form = (self.stacked, self.following(given, unmoved), batch)
        recording = self.replays.recordings.get(form)
        if recording is None:
            return self.recorded(given, form)
        recording.now += 1
        if self.settings not in recording.numbers:
            if recording.usual < PAYS:
                return self.step(given)
            return self.read(given, form, recording)
        made = self.again(given, recording) if recording.trusted else self.checked(given, recording)
        self.unmoved = (made.params, made.carry, given.mask, given.trainable, given.anchor)
        self.next = recording.next
        return made

    def following(self, given: Given, unmoved: tuple[object, ...]) -> Hashable:
        """The form of model, masks and keys; known without a look where the last step made the model."""
        now = (given.params, given.carry, given.mask, given.trainable, given.anchor)
        # nobody writes into these dicts
        if unmoved and all(one is other for one, other in zip(now, unmoved, strict=True)):
            return self.next
        return _form(given)

    def again(self, given: Given, recording: Recording) -> Stepped:
        """A step from its recording."""
        try:
            return cast(Stepped, recording.again(given, recording.numbers[self.settings]))
        except Exception:  # the step says better what is wrong
            return self.step(given)

    def recorded(self, given: Given, form: Hashable) -> Stepped:
        """Takes a step, and another one to record it."""
        made = self.pure(given)
        if self.replays.refused or len(self.replays.recordings) == RECORDINGS:
            return made
        again: Script | None = None
        twin = made
        try:
            with torch.random.fork_rng([]):
                twin, again, refused = record(self.step, _apart(given))
        except Exception as error:
            refused = f"{type(error).__name__}: {error}"
        if again is None:
            self.replays.refuse(refused)
        elif not _same(made, twin):  # an operation that takes another way while it is recorded
            self.replays.refuse("its recording made something else")
        else:
            following = _form(given._replace(params=made.params, carry=made.carry))
            numbers = {self.settings: again.numbers}
            self.replays.recordings[form] = Recording(again, following, numbers)
        return made

    def read(self, given: Given, form: Hashable, recording: Recording) -> Stepped:
        """Takes a step with new settings, for the numbers of its operations."""
        try:
            with torch.random.fork_rng([]):
                made, numbers = recording.again.read(self.step, _apart(given))
        except Exception:  # the step says better what is wrong
            numbers = None
        if numbers is not None:
            recording.numbers[self.settings] = numbers
            return cast(Stepped, made)
        del self.replays.recordings[form]
        self.replays.changes += 1
        if self.replays.changes == CHANGES:
            self.replays.refuse("its operations change with its numbers")
        return self.step(given)

    def checked(self, given: Given, recording: Recording) -> Stepped:
        """Takes a step, and looks whether its recording does the same."""
        made = self.pure(given)
        if not self.replays.refused:
            recording.trusted = _same(made, self.again(given, recording))
        if not recording.trusted:
            self.replays.refuse(self.replays.refused or "its recording made something else")
        return made

    def pure(self, given: Given) -> Stepped:
        """A step, and whether it may be taken twice."""
        leaves = pytree.tree_leaves(given)
        if not all(isinstance(leaf, Tensor) for leaf in leaves):
            self.replays.refuse("it is given more than tensors")
            return self.step(given)
        before = [leaf._version for leaf in leaves]
        made = self.step(given)
        if [leaf._version for leaf in leaves] != before:
            self.replays.refuse("it writes into a tensor that it was given")
        return made


def _forms(tensors: Iterable[Tensor]) -> Hashable:
    """Shapes, strides and types."""
    return tuple((t.shape, t.stride(), t.dtype) for t in tensors if isinstance(t, Tensor))


def _form(given: Given) -> Hashable:
    """Names, shapes, strides and types of all but the minibatch."""
    leaves, structure = pytree.tree_flatten((*given[:2], *given[3:]))
    return structure, _forms(leaves)


def _apart(given: Given) -> Given:
    """The same, no tensor twice: what is recorded of it holds for any, also where two are one again."""
    met = set[int]()

    def own(tensor: Tensor) -> Tensor:
        twice = id(tensor) in met
        met.add(id(tensor))
        return tensor.detach() if twice else tensor

    return cast(Given, pytree.tree_map(own, given))


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
