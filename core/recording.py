"""A function of tensors written down, operation by operation, while it runs; and run again from that.

What runs again are PyTorch's own operations below autograd, those of the backward pass among them, without
Python's way to them and autograd's.
"""

from __future__ import annotations

import functools
import operator
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
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
    again: Callable[[Any], Any] | None
    """takes what has the same names and shapes, and returns what the function would"""
    refused: str
    """why there is no recording; "" where there is one"""


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
    with recorder.watching(), recorder:
        made = function(given)
    recorder.graph.output(recorder.built(made))
    if recorder.trouble:
        return Recorded(made, None, recorder.trouble)
    recorder.graph.eliminate_dead_code()  # keeps what writes in place
    return Recorded(made, fx.GraphModule({}, recorder.graph).forward, "")


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs operations and writes them into a graph; every tensor is known by the node that makes it."""

    def __init__(self, given: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph, self.trouble, self.in_operation = fx.Graph(), "", False
        self.nodes = WeakTensorKeyDictionary()
        self.take(self.graph.placeholder("given"), given)

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
        """The values with nodes for tensors."""
        return pytree.tree_map_only(Tensor, self.node_of, values)

    def node_of(self, tensor: Tensor) -> fx.Node | None:
        """The node that makes a tensor."""
        node: fx.Node | None = self.nodes.get(tensor)  # type: ignore[no-untyped-call]
        if node is None:
            self.refuse(f"uses a tensor {tuple(tensor.shape)} that it was not given")
        return node

    def refuse(self, why: str) -> None:
        """This becomes no recording; the function goes on."""
        self.trouble = self.trouble or f"it {why}"

    def built(self, value: Any) -> Any:
        """The result of the function from nodes."""
        if isinstance(value, Tensor):
            return self.node_of(value)
        if isinstance(value, Mapping):
            return {key: self.built(item) for key, item in value.items()}
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return self.graph.call_function(type(value), tuple(self.built(item) for item in value))
        self.refuse(f"returns a {type(value).__name__}")
        return None

    def write(self, function: Callable[..., Any], args: Any, kwargs: Any, made: Any) -> None:
        """Writes down a call; what it made is known from now on by its node."""
        args, kwargs = self.nodes_of((args, kwargs))
        if not self.trouble:
            self.take(self.graph.call_function(function, args, kwargs), made)

    def whole(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Calls an `operation`, and writes it down as one."""
        given = pytree.tree_leaves((args, kwargs))
        strange = {type(value) for value in given if not isinstance(value, Tensor)} - _PLAIN
        if strange:
            self.refuse(f"gives {function.__name__} a {strange.pop().__name__}")
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
        if self.in_operation or self.trouble:
            return made
        why = next((_REFUSED[tag] for tag in func.tags if tag in _REFUSED), None)
        if why is not None:
            self.refuse(f"{why} by {func}")
        elif func in _SAME:
            self.nodes[made] = self.node_of(args[0])
        elif isinstance(made, Tensor) and made in self.nodes:  # in place
            self.graph.call_function(func, *self.nodes_of((args, kwargs)))
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
