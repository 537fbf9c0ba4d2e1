"""A function of tensors written down, operation by operation, while it runs; and run again from that.

What runs again are PyTorch's own operations below autograd, those of the backward pass among them, with the
same results to the bit. Python's way to them, and autograd's, is gone.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from .functional import is_stacked

P = ParamSpec("P")
T = TypeVar("T")

_running: Recorder | None = None  # one at a time, as `functional.call`


class Recorded(NamedTuple):
    """What a function returned, and how to have it again."""

    made: Any
    again: Callable[[Any, float], Any] | None
    """takes what has the same names and shapes, and another number, and returns what the function would"""
    refused: str
    """why there is no recording; "" where there is one"""


def operation(function: Callable[P, T]) -> Callable[P, T]:
    """Marks a function that looks at values: a recording takes it whole, as one of its operations.

    It takes tensors and plain values, by position, and returns new tensors or what it was given; it has no
    gradient, and changes nothing. Under vmap it is no operation.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if _running is None or _running.inside or is_stacked(_tensors(args)):
            return function(*args, **kwargs)
        return cast(T, _running.whole(function, args))

    return call


def record(function: Callable[[Any], Any], given: Any, number: float) -> Recorded:
    """Calls the function with `given`, tensors in dicts and tuples, and records it.

    `number` is one that the function uses and that may be another later, wherever it or its negative shows;
    that some other one was the same by chance is for the caller to notice, once it changes.

    Refused is a function that looks at values outside an `operation`, draws random numbers without a key,
    uses tensors that it was not given, or returns something else than tensors in dicts and named tuples.
    """
    recorder = Recorder(given, number)
    with _as_running(recorder), _Looks(recorder), recorder:
        made = function(given)
    recorder.graph.output(recorder.built(made))
    if recorder.trouble:
        return Recorded(made, None, recorder.trouble)
    recorder.graph.eliminate_dead_code()  # keeps what writes in place
    return Recorded(made, fx.GraphModule({}, recorder.graph).forward, "")


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs operations and writes them into a graph; every tensor is known by the node that makes it."""

    def __init__(self, given: Any, number: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph, self.trouble, self.inside = fx.Graph(), "", False
        self.nodes = WeakTensorKeyDictionary()
        root, positive = self.graph.placeholder("given"), self.graph.placeholder("number")
        self.numbers = {-number: self.graph.call_function(operator.neg, (positive,)), number: positive}
        self.take(root, given)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and to skip the compiler means to import it: two seconds

    def take(self, node: fx.Node, value: Any) -> None:
        """The tensors in `value`, which is what `node` stands for."""
        if isinstance(value, Tensor):
            self.nodes[value] = node
        elif isinstance(value, Mapping | tuple | list):
            for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
                self.take(self.graph.call_function(operator.getitem, (node, key)), item)

    def nodes_of(self, values: Any) -> Any:
        """The values with nodes for tensors and for the number."""
        values = pytree.tree_map_only(Tensor, self.node_of, values)
        return pytree.tree_map_only(float, lambda value: self.numbers.get(value, value), values)

    def node_of(self, tensor: Tensor) -> fx.Node | None:
        """The node that makes a tensor."""
        node: fx.Node | None = self.nodes.get(tensor)  # type: ignore[no-untyped-call]
        if node is None:
            self.trouble = self.trouble or f"it uses a tensor {tuple(tensor.shape)} that it was not given"
        return node

    def built(self, value: Any) -> Any:
        """The result of the function from nodes."""
        if isinstance(value, Tensor):
            return self.node_of(value)
        if isinstance(value, Mapping):
            return {key: self.built(item) for key, item in value.items()}
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return self.graph.call_function(type(value), tuple(self.built(item) for item in value))
        self.trouble = self.trouble or f"it returns a {type(value).__name__}"
        return None

    def write(self, function: Callable[..., Any], args: Any, kwargs: Any, made: Any) -> None:
        """Writes down a call; what it made is known from now on by its node."""
        args, kwargs = self.nodes_of((args, kwargs))
        if not self.trouble:
            self.take(self.graph.call_function(function, args, kwargs), made)

    def whole(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Calls an `operation`, and writes it down as one."""
        self.inside = True
        try:
            made = function(*args)
        finally:
            self.inside = False
        self.write(function, args, {}, made)
        return made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if self.inside or self.trouble:
            return made
        why = next((_REFUSED[tag] for tag in func.tags if tag in _REFUSED), None)
        if why is not None:
            self.trouble = f"it {why} by {func}"
        elif func in _SAME:
            self.nodes[made] = self.node_of(args[0])
        elif not isinstance(made, Tensor) or made not in self.nodes:
            self.write(func, args, kwargs or {}, made)
        else:  # in place
            self.graph.call_function(func, *self.nodes_of((args, kwargs or {})))
        return made


_REFUSED = {
    torch.Tag.data_dependent_output: "looks at values",
    torch.Tag.dynamic_output_shape: "makes shapes from values",
    torch.Tag.nondeterministic_seeded: "draws without a key",
}
_SAME = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)  # below autograd
_LOOKS = (Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__)


class _Looks(TorchFunctionMode):
    """Notices where a function looks at values past PyTorch's operations."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _LOOKS and not self.recorder.inside:
            self.recorder.trouble = f"it looks at values by {func.__name__}"
        return func(*args, **(kwargs or {}))


@contextmanager
def _as_running(recorder: Recorder) -> Iterator[None]:
    global _running
    _running = recorder
    try:
        yield
    finally:
        _running = None


def _tensors(values: Any) -> dict[int, Tensor]:
    return {at: value for at, value in enumerate(values) if isinstance(value, Tensor)}
