"""A run's final model in other formats, checked against the original, with sizes and CPU latency."""

from __future__ import annotations

import copy
import io
import statistics
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from . import task
from .config import Layer
from .errors import RunError
from .folders import refuse_taken
from .layout import Layout
from .packing import load_csr, load_model, load_packed, save_csr, save_packed
from .resolve import resolve
from .results import Result

__all__ = ["FORMATS", "Exported", "Latency", "export", "load_csr", "load_packed"]

FORMATS = ("packed", "onnx", "csr")

TOLERANCE = 1e-4
"""Largest difference of logits that is rounding, relative to the largest logit where that is above 1.

Other kernels add float32 products in another order; that error is some 1e-7 of the sums' size and grows from
layer to layer, while a wrong weight or operator shows in the first digits.
"""

CHECKED = 256
"""Test samples, at most, whose logits are compared."""

BATCHES = (1, 64)
"""Batch sizes of which the latency is measured."""


@dataclass(frozen=True)
class Latency:
    """Median milliseconds of a forward pass, and the median of dense PyTorch's time over it, pairwise."""

    name: str
    batch: int
    milliseconds: float
    speedup: float
    repeats: int


@dataclass
class Exported:
    """What was written, how large it is in bytes, what was checked and measured, and what was left out."""

    folder: Path
    files: dict[str, Path] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    checks: dict[str, str] = field(default_factory=dict)
    latencies: list[Latency] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class ImpossibleError(RunError):
    """A format that this model or this installation cannot have; an error only if it was asked for."""


def export(folder: str | Path, formats: Sequence[str] = (), out: str | Path | None = None) -> Exported:
    """Writes a run's final model in `formats` to the folder `out`, new or empty (default: RUN/export).

    Without `formats`, all that are possible; the reasons against the others are in the notes. Raises RunError
    if the run has no final model, if a format asked for is impossible, and if an exported file does not give
    back the model: bit for bit from packed and csr, within `TOLERANCE` from onnx.
    """
    run = Result.load(folder)
    unknown = sorted(set(formats) - set(FORMATS))
    if unknown:
        raise RunError(f"unknown format {', '.join(unknown)}. Allowed: {', '.join(FORMATS)}")
    model, mask = (_read(run, name) for name in ("model.safetensors", "mask.safetensors"))
    target = run.path / "export" if out is None else Path(out)
    refuse_taken(target)
    wanted = [name for name in FORMATS if not formats or name in formats]
    if "onnx" in formats:
        _onnx()  # said before minutes are spent
    net = _Net.rebuilt(run, model) if {"onnx", "csr"} & set(wanted) else None
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot write to {target}: {error}") from None
    done = Exported(target)
    try:
        contenders = _write(run, model, mask, net, wanted, bool(formats), done)
    except BaseException:  # nothing half-written stays
        for file in target.iterdir():
            file.unlink()
        raise
    if net is not None:
        done.latencies = _latencies({"PyTorch, dense": net.forward, **contenders}, net.samples)
    return done


def _write(
    run: Result,
    model: dict[str, Tensor],
    mask: Mapping[str, Tensor],
    net: _Net | None,
    wanted: Sequence[str],
    asked: bool,
    done: Exported,
) -> dict[str, Callable[[Tensor], Any]]:
    """Writes and checks the files and fills `done`; what else computes logits, by name.

    A format that is impossible is an error only if it was asked for.
    """
    contenders: dict[str, Callable[[Tensor], Any]] = {}
    original = run.path / "model.safetensors"
    done.sizes |= {"dense": original.stat().st_size, "dense, zipped": _zipped(original)}
    for name in wanted:
        path = done.folder / ("model.onnx" if name == "onnx" else f"model.{name}.safetensors")
        try:
            if name == "packed":
                _pack(path, model, mask, done)
            elif name == "csr" and net is not None:
                contenders |= _csr(path, model, mask, net, done)
            elif net is not None:
                contenders |= _to_onnx(path, net, done)
        except ImpossibleError as reason:
            if asked:
                raise
            done.notes.append(str(reason))
            continue
        done.files[name], done.sizes[name] = path, path.stat().st_size
        if name == "packed":
            done.sizes["packed, zipped"] = _zipped(path)
    return contenders


def _read(run: Result, name: str) -> dict[str, Tensor]:
    path = run.path / name
    if not path.is_file():
        raise RunError(f"{run.path} has no {name}: its run did not end; go on by `fedsparse resume`")
    return load_model(path)


@dataclass(frozen=True)
class _Net:
    """The model on the CPU in evaluation mode, with normalised test samples.

    It lies in memory as it is fastest in a run: channels last, where it convolves.
    """

    module: nn.Module
    samples: Tensor
    layout: Layout

    @classmethod
    def rebuilt(cls, run: Result, tensors: Mapping[str, Tensor]) -> _Net:
        """As a run builds it, with trained weights. Raises RunError if they are not this model's."""
        here = Layer("fedsparse export", {"execution": {"device": "cpu", "channels_last": "auto"}})
        built = task.build(resolve(configs=[str(run.path / "config.toml")], layers=[here]).config)
        module = built.model.eval()
        own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        wrong = sorted(own.keys() ^ tensors.keys())
        both = sorted(own.keys() & tensors.keys())
        wrong += [name for name in both if own[name].shape != tensors[name].shape]
        wrong += [name for name in both if own[name].dtype != tensors[name].dtype]
        if wrong:
            raise RunError(
                f"{run.path}: model.safetensors does not hold the model that config.toml describes; they "
                f"differ in {', '.join(wrong[:5])}"
            )
        for name, tensor in own.items():
            tensor.data = built.layout.arrange(tensors[name])
        inputs, _ = next(built.test_batches(CHECKED))
        return cls(module, inputs.contiguous(), built.layout)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (b, classes)."""
        with torch.inference_mode():
            return cast(Tensor, self.module(self.layout.arrange(inputs)))


def _pack(path: Path, model: dict[str, Tensor], mask: Mapping[str, Tensor], done: Exported) -> None:
    packed = save_packed(path, model, mask)
    _same(model, load_packed(path), path)
    done.checks["packed"] = (
        f"read back, equal bit for bit; {len(packed)} of {len(mask)} masked tensors packed"
    )


def _csr(
    path: Path, model: dict[str, Tensor], mask: Mapping[str, Tensor], net: _Net, done: Exported
) -> dict[str, Callable[[Tensor], Any]]:
    layers = {
        f"{layer}.weight": layer
        for layer, module in net.module.named_modules()
        if type(module) is nn.Linear and f"{layer}.weight" in mask
    }
    if not layers:
        raise ImpossibleError("csr: the model has no linear layer that is masked")
    stored = save_csr(path, model, layers)
    if not stored:
        path.unlink()
        raise ImpossibleError(
            "csr: no linear layer is sparse enough to be shorter as CSR (density under a half)"
        )
    _same(model, load_csr(path), path)
    done.checks["csr"] = (
        f"read back, equal bit for bit; {len(stored)} of {len(layers)} masked linear layers as CSR"
    )
    twin = replace(net, module=copy.deepcopy(net.module))
    for name in stored:
        parent, _, child = layers[name].rpartition(".")
        linear = cast(nn.Linear, twin.module.get_submodule(layers[name]))
        setattr(twin.module.get_submodule(parent), child, _CsrLinear(linear))
    expected = net.forward(net.samples)
    off = _difference(expected, twin.forward(net.samples))
    if off > _allowed(expected):
        done.notes.append(f"torch.sparse_csr left out of the latency: its logits are {off:.1e} off")
        return {}
    return {"PyTorch, linear layers as sparse_csr": twin.forward}


class _CsrLinear(nn.Module):
    """A linear layer whose weight is a `torch.sparse_csr` matrix."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that torch's CSR is in beta
            self.weight = linear.weight.detach().to_sparse_csr()
        self.bias = linear.bias

    def forward(self, inputs: Tensor) -> Tensor:
        """(…, in) to (…, out)."""
        outputs = (self.weight @ inputs.reshape(-1, inputs.shape[-1]).t()).t()
        outputs = outputs if self.bias is None else outputs + self.bias
        return outputs.reshape(*inputs.shape[:-1], -1)


def _onnx() -> tuple[Any, Any]:
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise ImpossibleError(
            f"onnx: {error.name} is not installed: pip install 'fedsparse[export]'"
        ) from None
    return onnx, onnxruntime


def _to_onnx(path: Path, net: _Net, done: Exported) -> dict[str, Callable[[Tensor], Any]]:
    onnx, onnxruntime = _onnx()
    two = net.samples[:1].repeat(2, 1, 1, 1)  # traced with one sample, a size of 1 could be taken for fixed
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that this exporter is the older one, and tracing's advice
            torch.onnx.export(
                copy.deepcopy(net.module).to(memory_format=torch.contiguous_format),
                (two,),
                path,
                dynamo=False,
                opset_version=17,
                input_names=["input"],
                output_names=["logits"],
                dynamic_axes={"input": {0: "batch"}, "logits": {0: "batch"}},
            )
        onnx.checker.check_model(path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

        def forward(inputs: Tensor) -> Any:
            return session.run(None, {"input": inputs.numpy()})[0]

        expected = net.forward(net.samples)
        # one sample, then batches of another size: the batch dimension is free
        pieces = [net.samples[:1], *torch.split(net.samples[1:], BATCHES[-1])]
        logits = torch.cat([torch.from_numpy(forward(piece)) for piece in pieces if len(piece)])
    except Exception as error:  # whatever tracing, the checker or the runtime make of a model
        path.unlink(missing_ok=True)
        reason = " ".join(str(error).split())[:300]
        raise ImpossibleError(
            f"onnx: this model cannot be exported: {type(error).__name__}: {reason}"
        ) from error
    off, allowed = _difference(expected, logits), _allowed(expected)
    if not off <= allowed:
        path.unlink()
        raise RunError(
            f"onnx: logits are {off:.1e} off PyTorch's, where {allowed:.1e} is allowed; not written"
        )
    same = int((expected.argmax(1) == logits.argmax(1)).sum())
    done.checks["onnx"] = (
        f"logits of {len(logits)} test samples at most {off:.1e} off PyTorch's (allowed: {allowed:.1e}, "
        f"float32 sums in another order), the same class for {same} of them; any batch size"
    )
    return {"onnxruntime": forward}


def _difference(expected: Tensor, given: Tensor) -> float:
    return float((expected - given).abs().max()) if expected.shape == given.shape else float("inf")


def _allowed(logits: Tensor) -> float:
    return TOLERANCE * max(1.0, float(logits.abs().max()))


def _same(model: Mapping[str, Tensor], read: Mapping[str, Tensor], path: Path) -> None:
    """Raises RunError unless what was written gives back the model bit for bit."""

    def raw(tensor: Tensor) -> Tensor:
        return tensor.contiguous().reshape(-1).view(torch.uint8)

    for name in model.keys() | read.keys():
        a, b = model.get(name), read.get(name)
        alike = a is not None and b is not None and a.shape == b.shape and a.dtype == b.dtype
        if not alike or not torch.equal(raw(cast(Tensor, a)), raw(cast(Tensor, b))):
            raise RunError(f"{path} does not give back {name}; is the disk full, or failing?")


def _zipped(path: Path) -> int:
    """Bytes of a ZIP archive of the file, deflated."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.write(path, path.name)
    return len(archive.getvalue())


def _latencies(
    contenders: Mapping[str, Callable[[Tensor], Any]],
    samples: Tensor,
    seconds: float = 1.0,
    repeats: tuple[int, int] = (5, 200),
) -> list[Latency]:
    """Each contender once a repeat, in turn, for some `seconds` a batch size; the first is the reference."""
    found = []
    with _one_thread():
        for batch in BATCHES:
            inputs = samples.repeat(-(-batch // len(samples)), 1, 1, 1)[:batch].contiguous()
            times: dict[str, list[float]] = {name: [] for name in contenders}
            for forward in contenders.values():
                for _ in range(3):
                    forward(inputs)
            started, reference = time.perf_counter(), next(iter(times))
            for number in range(repeats[1]):
                if number >= repeats[0] and time.perf_counter() - started > seconds:
                    break
                for name, forward in contenders.items():
                    begun = time.perf_counter()
                    forward(inputs)
                    times[name].append(time.perf_counter() - begun)
            for name, own in times.items():
                ratios = [dense / this for dense, this in zip(times[reference], own, strict=True)]
                median = statistics.median(own) * 1e3
                found.append(Latency(name, batch, median, statistics.median(ratios), len(own)))
    return found


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
