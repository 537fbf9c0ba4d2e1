"""A function of tensors written down, operation by operation, while it runs; and run again from that.

What runs again are PyTorch's own operations below autograd, those of the backward pass among them, without
Python's way to them and autograd's.
"""

from __future__ import annotations

import functools
import operator
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast
from unittest.mock import patch

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from .functional import is_stacked

P = ParamSpec("P")
T = TypeVar("T")

_here = threading.local()  # .reader: the one that runs in this thread


class Recorded(NamedTuple):
    """What a function returned, and how to have it again."""

    made: Any
    again: Script | None
    refused: str
    """why there is no recording; "" where there is one"""


@dataclass(frozen=True)
class Script:
    """What a function did."""

    run: Callable[[Any, Sequence[float]], Any]
    calls: list[Callable[..., Any]]
    numbers: list[float]
    """those that its operations were given, in their order"""

    def __call__(self, given: Any, numbers: Sequence[float] | None = None) -> Any:
        """Takes what has the same names and shapes, and returns what the function would."""
        return self.run(given, self.numbers if numbers is None else numbers)

    def read(self, function: Callable[[Any], Any], given: Any) -> tuple[Any, list[float] | None]:
        """Calls the function; the numbers of its operations now, None if these are not the recorded ones.

        For a function that works with other numbers than it did. That it does the same with what these
        operations make is not looked at.
        """
        reader = Reader()
        with reader.watching(), reader:
            made = function(given)
        same = reader.calls == self.calls and len(reader.numbers) == len(self.numbers)
        return made, reader.numbers if same and not reader.trouble else None


def operation(function: Callable[P, T]) -> Callable[P, T]:
    """Marks a function that looks at values: a recording takes it whole, as one of its operations.

    It takes tensors and plain values, and returns new tensors or what it was given; it has no gradient, and
    changes nothing. Under vmap it is no operation.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        reader: Reader | None = getattr(_here, "reader", None)
        if reader is None or reader.in_operation or is_stacked(_tensors((args, kwargs))):
            return function(*args, **kwargs)
        return cast(T, reader.whole(function, args, kwargs))

    return call


def record(function: Callable[[Any], Any], given: Any) -> Recorded:
    """Calls the function with `given`, tensors in dicts and tuples, and records it.

    Refused is a function that looks at values outside an `operation`, draws random numbers without a key,
    uses tensors that it was not given, or returns something else than tensors in dicts and named tuples.
    """
    recorder = Recorder(given)
    with recorder.watching(), recorder:
        made = function(given)
    recorder.graph.output(recorder.built(made))
    if recorder.trouble:
        return Recorded(made, None, recorder.trouble)
    recorder.graph.eliminate_dead_code()  # keeps what writes in place
    run = fx.GraphModule({}, recorder.graph).forward
    return Recorded(made, Script(run, recorder.calls, recorder.numbers), "")


class Reader(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs operations, and notes which they are and what numbers they are given."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls, self.numbers = list[Callable[..., Any]](), list[float]()
        self.trouble, self.in_operation = "", False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and to skip the compiler means to import it: two seconds

    def refuse(self, why: str) -> None:
        """This becomes no recording; the function goes on."""
        self.trouble = self.trouble or f"it {why}"

    def tensor(self, tensor: Tensor) -> Any:
        """What stands for a tensor."""
        return tensor

    def number(self, number: float) -> Any:
        """What stands for a number."""
        self.numbers.append(number)
        return number

    def noted(self, value: Any) -> Any:
        """An argument with what stands for its tensors and numbers."""
        kind = type(value)
        if kind is float:
            return self.number(value)
        if isinstance(value, Tensor):
            return self.tensor(value)
        if kind is tuple or kind is list:
            return kind([self.noted(item) for item in value])
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return kind(*[self.noted(item) for item in value])
        if isinstance(value, dict):
            return {key: self.noted(item) for key, item in value.items()}
        return value

    def write(self, function: Callable[..., Any], args: Any, kwargs: Any, made: Any) -> None:
        """Notes a call."""
        self.calls.append(function)
        self.noted(args)
        self.noted(kwargs)

    def whole(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Calls an `operation`, and notes it as one."""
        given = pytree.tree_leaves((args, kwargs))
        self.in_operation = True
        try:
            made = function(*args, **kwargs)
            # what it was given stays known by its own node
            same = {id(value) for value in given if isinstance(value, Tensor)}
            made = pytree.tree_map_only(Tensor, lambda t: t.detach() if id(t) in same else t, made)
        finally:
            self.in_operation = False
        self.write(function, args, kwargs, made)
        return made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made, kwargs = func(*args, **(kwargs or {})), kwargs or {}
        if not self.in_operation and not self.trouble:
            self.write(func, args, kwargs, made)
        return made

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Operations tell this reader of themselves, and so does what reads values past PyTorch's own."""

        def noticed(name: str, read: Callable[..., Any]) -> Callable[..., Any]:
            def reading(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
                if getattr(_here, "reader", None) is self and not self.in_operation:
                    self.refuse(f"looks at values by {name}")
                return read(tensor, *args, **kwargs)

            return reading

        before = getattr(_here, "reader", None)
        with ExitStack() as stack:
            # a TorchFunctionMode is not asked in backward passes and rules of vmap
            for name in _LOOKS:
                stack.enter_context(patch.object(Tensor, name, noticed(name, getattr(Tensor, name))))
            _here.reader = self
            try:
                yield
            finally:
                _here.reader = before


class Recorder(Reader):
    """Writes operations into a graph, too; every tensor is known by the node that makes it."""

    def __init__(self, given: Any) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.nodes = WeakTensorKeyDictionary()
        tensors = self.graph.placeholder("given")
        self.of_numbers = self.graph.placeholder("numbers")
        self.take(tensors, given)

    def take(self, node: fx.Node, value: Any) -> None:
        """The tensors in `value`, which is what `node` stands for."""
        if isinstance(value, Tensor):
            self.nodes[value] = node
        elif isinstance(value, Mapping | tuple | list):
            for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
                self.take(self.graph.call_function(operator.getitem, (node, key)), item)

    def tensor(self, tensor: Tensor) -> fx.Node | None:
        """The node that makes a tensor."""
        node: fx.Node | None = self.nodes.get(tensor)  # type: ignore[no-untyped-call]
        if node is None:
            self.refuse(f"uses a tensor {tuple(tensor.shape)} that it was not given")
        return node

    def number(self, number: float) -> fx.Node:
        """The node of a number's place."""
        super().number(number)
        return self.graph.call_function(operator.getitem, (self.of_numbers, len(self.numbers) - 1))

    def built(self, value: Any) -> Any:
        """The result of the function from nodes."""
        if isinstance(value, Tensor):
            return self.tensor(value)
        if isinstance(value, Mapping):
            return {key: self.built(item) for key, item in value.items()}
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return self.graph.call_function(type(value), tuple(self.built(item) for item in value))
        self.refuse(f"returns a {type(value).__name__}")
        return None

    def write(self, function: Callable[..., Any], args: Any, kwargs: Any, made: Any) -> None:
        """Writes down a call; what it made is known from now on by its node."""
        why = next((_REFUSED[tag] for tag in getattr(function, "tags", ()) if tag in _REFUSED), None)
        if why is not None:
            return self.refuse(f"{why} by {function}")
        self.calls.append(function)
        if function in _SAME:
            self.nodes[made] = self.tensor(args[0])
            return None
        in_place = isinstance(made, Tensor) and made in self.nodes
        args, kwargs = self.noted(args), self.noted(kwargs)
        if not self.trouble:
            node = self.graph.call_function(function, args, kwargs)
            if not in_place:
                self.take(node, made)
        return None

    def whole(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Calls an `operation`, and writes it down as one."""
        strange = {type(value) for value in pytree.tree_leaves((args, kwargs)) if not isinstance(value, Tensor)}
        if strange - _PLAIN:
            self.refuse(f"gives {function.__name__} a {(strange - _PLAIN).pop().__name__}")
        return super().whole(function, args, kwargs)


_PLAIN = {bool, int, float, str, type(None)}  # that a graph can spell
_REFUSED = {
    torch.Tag.data_dependent_output: "looks at values",
    torch.Tag.dynamic_output_shape: "makes shapes from values",
    torch.Tag.nondeterministic_seeded: "draws without a key",
    torch.Tag.inplace_view: "changes a shape in place",
}
_SAME = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)  # below autograd
_LOOKS = ("numpy", "tolist", "__array__", "__dlpack__")


def _tensors(values: Any) -> dict[int, Tensor]:
    leaves = pytree.tree_leaves(values)
    return {at: value for at, value in enumerate(leaves) if isinstance(value, Tensor)}
