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

_here = threading.local()  # .recorder: the one that runs in this thread


class Recorded(NamedTuple):
    """What a function returned, and how to have it again."""

    made: Any
    again: Script | None
    refused: str
    """why there is no recording; "" where there is one"""


class Line(NamedTuple):
    """One operation: tensors and numbers in it stand at places, which lines that do the same share."""

    function: Callable[..., Any]
    args: Any
    kwargs: Any
    made: Any
    """None for what it only writes into"""


@dataclass(frozen=True)
class TensorAt:
    """A tensor's place in a script."""

    place: int


@dataclass(frozen=True)
class NumberAt:
    """A number's place in a script."""

    place: int


@dataclass(frozen=True)
class Script:
    """What a function did with what it was given, line by line."""

    given: Any
    lines: list[Line]
    result: Any
    numbers: list[float]
    run: Callable[[Any, Sequence[float]], Any]

    def __call__(self, given: Any, numbers: Sequence[float] | None = None) -> Any:
        """Takes what has the same names and shapes, and returns what the function would."""
        return self.run(given, self.numbers if numbers is None else numbers)

    def read(self, function: Callable[[Any], Any], given: Any) -> tuple[Any, list[float] | None]:
        """Calls the function; the numbers of its lines now, None if these are other lines.

        For a function that works with other numbers than it did.
        """
        recorder = Recorder(given)
        made = recorder.call(function, given)
        same = (recorder.given, recorder.lines, recorder.result) == (self.given, self.lines, self.result)
        return made, recorder.numbers if same and not recorder.trouble else None


def operation(function: Callable[P, T]) -> Callable[P, T]:
    """Marks a function that looks at values: a recording takes it whole, as one of its operations.

    It takes tensors and plain values, and returns new tensors or what it was given; it has no gradient, and
    changes nothing. Under vmap it is no operation.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        recorder: Recorder | None = getattr(_here, "recorder", None)
        if recorder is None or recorder.in_operation or is_stacked(_tensors((args, kwargs))):
            return function(*args, **kwargs)
        return cast(T, recorder.whole(function, args, kwargs))

    return call


def record(function: Callable[[Any], Any], given: Any) -> Recorded:
    """Calls the function with `given`, tensors in dicts and tuples, and records it.

    Refused is a function that looks at values outside an `operation`, draws random numbers without a key,
    uses tensors that it was not given, or returns something else than tensors in dicts and named tuples.
    """
    recorder = Recorder(given)
    made = recorder.call(function, given)
    if recorder.trouble:
        return Recorded(made, None, recorder.trouble)
    return Recorded(made, recorder.script(), "")


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs operations and writes them down; every tensor is known by its place."""

    def __init__(self, given: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lines, self.numbers, self.result = list[Line](), list[float](), None
        self.trouble, self.in_operation = "", False
        self.places, self.count = WeakTensorKeyDictionary(), 0
        self.given = self.new(given)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and to skip the compiler means to import it: two seconds

    def call(self, function: Callable[[Any], Any], given: Any) -> Any:
        """What the function returns; what it did is written down."""
        with self.watching(), self:
            made = function(given)
        self.result = self.returned(made)
        return made

    def script(self) -> Script:
        """What was written down, to run again."""
        run = _graph(self.given, self.lines, self.result).forward
        return Script(self.given, self.lines, self.result, self.numbers, run)

    def refuse(self, why: str) -> None:
        """This becomes no recording; the function goes on."""
        self.trouble = self.trouble or f"it {why}"

    def new(self, value: Any) -> Any:
        """The value with places for its tensors, which are known by them from now on."""
        if isinstance(value, Tensor):
            self.places[value] = at = TensorAt(self.count)
            self.count += 1
            return at
        if isinstance(value, Mapping):
            return {key: self.new(item) for key, item in value.items()}
        return tuple(self.new(item) for item in value) if isinstance(value, tuple | list) else None

    def known(self, value: Any) -> Any:
        """The value with the places of its tensors and numbers."""
        kind = type(value)
        if kind is float:
            self.numbers.append(value)
            return NumberAt(len(self.numbers) - 1)
        if isinstance(value, Tensor):
            at: TensorAt | None = self.places.get(value)  # type: ignore[no-untyped-call]
            if at is None:
                self.refuse(f"uses a tensor {tuple(value.shape)} that it was not given")
            return at
        if kind is tuple or kind is list:
            return kind([self.known(item) for item in value])
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return kind(*[self.known(item) for item in value])
        return {key: self.known(item) for key, item in value.items()} if isinstance(value, dict) else value

    def returned(self, value: Any) -> Any:
        """The result of the function with the places of its tensors."""
        if isinstance(value, Tensor):
            return self.known(value)
        if isinstance(value, Mapping):
            return {key: self.returned(item) for key, item in value.items()}
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*[self.returned(item) for item in value])
        self.refuse(f"returns a {type(value).__name__}")
        return None

    def write(self, function: Callable[..., Any], args: Any, kwargs: Any, made: Any) -> None:
        """Writes down a call."""
        in_place = isinstance(made, Tensor) and made in self.places
        args, kwargs = self.known(args), self.known(kwargs)
        self.lines.append(Line(function, args, kwargs, None if in_place else self.new(made)))

    def whole(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Calls an `operation`, and writes it down as one."""
        given = pytree.tree_leaves((args, kwargs))
        strange = {type(value) for value in given if not isinstance(value, Tensor)} - _PLAIN
        if strange:
            self.refuse(f"gives {function.__name__} a {strange.pop().__name__}")
        self.in_operation = True
        try:
            made = function(*args, **kwargs)
            # what it was given stays known by its own place
            same = {id(value) for value in given if isinstance(value, Tensor)}
            made = pytree.tree_map_only(Tensor, lambda t: t.detach() if id(t) in same else t, made)
        finally:
            self.in_operation = False
        self.write(function, args, kwargs, made)
        return made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made, kwargs = func(*args, **(kwargs or {})), kwargs or {}
        if self.in_operation or self.trouble:
            return made
        why = next((_REFUSED[tag] for tag in func.tags if tag in _REFUSED), None)
        if why is not None:
            self.refuse(f"{why} by {func}")
        elif func in _SAME:
            self.places[made] = self.known(args[0])
        else:
            self.write(func, args, kwargs, made)
        return made

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Operations tell this recorder of themselves, and so does what reads values past PyTorch's own."""

        def noticed(name: str, read: Callable[..., Any]) -> Callable[..., Any]:
            def reading(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
                if getattr(_here, "recorder", None) is self and not self.in_operation:
                    self.refuse(f"looks at values by {name}")
                return read(tensor, *args, **kwargs)

            return reading

        before = getattr(_here, "recorder", None)
        with ExitStack() as stack:
            # a TorchFunctionMode is not asked in backward passes and rules of vmap
            for name in _LOOKS:
                stack.enter_context(patch.object(Tensor, name, noticed(name, getattr(Tensor, name))))
            _here.recorder = self
            try:
                yield
            finally:
                _here.recorder = before


def _graph(given: Any, lines: Sequence[Line], result: Any) -> fx.GraphModule:
    """The lines as a function of what was given and of numbers."""
    graph, nodes = fx.Graph(), dict[TensorAt, fx.Node]()

    def take(node: fx.Node, places: Any) -> None:
        """The tensors of what a node stands for."""
        if isinstance(places, TensorAt):
            nodes[places] = node
        elif isinstance(places, dict | tuple):
            for key, item in places.items() if isinstance(places, dict) else enumerate(places):
                if item is not None:
                    take(graph.call_function(operator.getitem, (node, key)), item)

    def use(value: Any) -> Any:
        """What stands at places."""
        if isinstance(value, TensorAt):
            return nodes[value]
        if isinstance(value, NumberAt):
            return graph.call_function(operator.getitem, (numbers, value.place))
        if isinstance(value, dict):
            return {key: use(item) for key, item in value.items()}
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return graph.call_function(type(value), tuple(use(item) for item in value))
        return type(value)(map(use, value)) if type(value) in (tuple, list) else value

    start, numbers = graph.placeholder("given"), graph.placeholder("numbers")
    take(start, given)
    for line in lines:
        node = graph.call_function(line.function, use(line.args), use(line.kwargs))
        take(node, line.made)
    graph.output(use(result))
    graph.eliminate_dead_code()  # keeps what writes in place
    return fx.GraphModule({}, graph)


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
