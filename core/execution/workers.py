"""Workers: processes that share a round's clients, each with the whole server state.

`launch` starts them on this machine through torch's elastic launcher, one CPU thread or one GPU each;
`torchrun --no-python fedsparse run …` starts them on several. Every worker runs the same server hooks on the
same numbers, so that a round ends with one flat all-reduce; only what follows from sums that each GPU makes
itself, such as masks by gradients, is the first worker's.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.synchronize import Barrier
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .. import ending
from ..errors import ConfigError, FedsparseError, Problem, RunError
from ..state import Masks
from .exchange import Uploads

OTHER_SIGNALS = "SIGHUP,SIGQUIT"  # that end the launcher; SIGINT and SIGTERM are left to the workers
USED_GPU = (
    "this process has used a GPU and so cannot start workers, which are copies of it; "
    "start them first (in a notebook: restart the kernel), or in a shell: fedsparse run --workers N"
)
GRACE = 10.0  # seconds in which a worker that lost another one waits to be ended, so that the other is named
PATIENCE = timedelta(hours=2)  # of workers with one that has more to do; NCCL's own is ten minutes
LOOK = 1.0  # seconds between a worker's looks at whether its launcher lives

Value = TypeVar("Value")


class LostWorkerError(RunError):
    """Another worker is gone; what happened is known where that one was."""


@dataclass
class Workers:
    """This process among its workers; alone by default."""

    rank: int = 0
    size: int = 1
    flat: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64), repr=False)
    """what is sent, kept from round to round: fresh memory for a large model takes longer than its sums"""

    def deal(self, clients: Sequence[int], work: Mapping[int, int]) -> list[int]:
        """This worker's share of the clients: the most work first, each to whom has least so far.

        A client that was sampled twice trains twice on one worker. The order of `clients` is kept.
        """
        loads, owner = [0] * self.size, dict[int, int]()
        times = Counter(clients) if self.size > 1 else {}
        for client in sorted(times, key=lambda c: (-times[c] * work[c], c)):
            owner[client] = loads.index(min(loads))
            loads[owner[client]] += times[client] * work[client]
        return [client for client in clients if owner.get(client, self.rank) == self.rank]

    def add(self, tensors: Iterable[Tensor], numbers: Sequence[float]) -> list[float]:
        """Sums float64 tensors over all workers, in place, and returns the summed numbers."""
        if self.size == 1:
            return list(numbers)
        parts = list(tensors)
        device = parts[0].device if parts else torch.device("cpu")
        parts.append(torch.tensor(numbers, dtype=torch.float64, device=device))
        sizes = [part.numel() for part in parts]
        if self.flat.shape != (sum(sizes),) or self.flat.device != device:
            self.flat = torch.empty(sum(sizes), dtype=torch.float64, device=device)
        places = [
            place.view(part.shape) for place, part in zip(torch.split(self.flat, sizes), parts, strict=True)
        ]
        torch._foreach_copy_(places, parts)
        with _NamingTheLost():
            dist.all_reduce(self.flat)
            totals = places[-1].tolist()  # NCCL goes on meanwhile: here the host waits for the others
        torch._foreach_copy_(parts, places)
        return [float(total) for total in totals]

    def same_form(self, uploads: Uploads, idle: bool) -> None:
        """Gives a worker without uploads zeros of the form of another's sums; `idle`: there may be one."""
        if self.size == 1 or not idle:
            return
        forms = [form for form in self.gathered(uploads.form()) if form is not None]
        if forms and not uploads.before():
            uploads.take_form(forms[0])

    def gather(self, uploads: Uploads, clients: Sequence[int]) -> None:
        """Stacks contributions that stay apart, those of all workers, in the order of `clients`.

        On every worker: an all-gather a tensor, filled up where a worker has fewer clients than another.
        """
        if not uploads.gathered or not uploads.before():
            return
        held = [[number for number, _ in uploads.apart]]
        rows = len(held[0])
        if self.size > 1:
            held = self._numbers(held[0], len(clients), _device(uploads))
            rows = max(map(len, held))
        places: dict[int, list[tuple[int, int]]] = {}
        for rank, numbers in enumerate(held):
            for row, number in enumerate(numbers):
                places.setdefault(number, []).append((rank, row))
        order = [places[number].pop(0) for number in clients if places.get(number)]
        for name, form in uploads.one.items():
            own = [entries.pop(name) for _, entries in uploads.apart]  # one tensor at a time is there twice
            parts = [own] if self.size == 1 else self._all(own, rows, form, _device(uploads))
            uploads.stacked[name] = torch.stack([parts[rank][row] for rank, row in order])
        uploads.apart.clear()

    def _numbers(self, numbers: Sequence[int], most: int, device: torch.device) -> list[list[int]]:
        """The clients that each worker has, at most so many."""
        none = torch.full((most - len(numbers),), -1, dtype=torch.int64, device=device)
        own = torch.cat([torch.tensor(numbers, dtype=torch.int64, device=device), none])
        every = [torch.empty_like(own) for _ in range(self.size)]
        with _NamingTheLost():
            dist.all_gather(every, own)
        return [[number for number in each.tolist() if number >= 0] for each in every]

    def _all(self, own: Sequence[Tensor], rows: int, form: Tensor, device: torch.device) -> list[Tensor]:
        """This tensor of each worker's clients, (rows, …) each."""
        flags = form.dtype == torch.bool  # which not every backend sends
        kind = torch.uint8 if flags else form.dtype
        mine = torch.zeros((rows, *form.shape), dtype=kind, device=device)
        for row, value in enumerate(own):
            mine[row] = value
        every = [torch.empty_like(mine) for _ in range(self.size)]
        with _NamingTheLost():
            dist.all_gather(every, mine)
        return [each.bool() for each in every] if flags else every

    def rows(self, rows: dict[int, Any]) -> dict[int, Any]:
        """The rows of clients that any worker trained."""
        if self.size == 1:
            return rows
        return {client: row for part in self.gathered(rows) for client, row in part.items()}

    def gathered(self, value: Any) -> list[Any]:
        """What each worker has, plain values and tensors of the host, in the order of their ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _NamingTheLost():
            dist.all_gather_object(values, value)
        return values

    def from_first(self, value: Value) -> Value:
        """The first worker's value, for all; each calls it."""
        if self.size == 1:
            return value
        shared = [value]
        with _NamingTheLost():
            dist.broadcast_object_list(shared)
        return shared[0]

    def same(self, masks: Masks) -> Masks:
        """The first worker's masks, for all; each calls it with masks of the same names and shapes."""
        if self.size == 1:
            return masks
        flat = torch.cat([mask.reshape(-1) for mask in masks.values()])
        with _NamingTheLost():
            dist.broadcast(flat.view(torch.uint8), 0)
        parts = torch.split(flat, [mask.numel() for mask in masks.values()])
        return {name: part.view(masks[name].shape) for name, part in zip(masks, parts, strict=True)}

    def wait(self) -> None:
        """Returns when every worker is here."""
        if self.size > 1:
            with _NamingTheLost():
                dist.barrier()


def _device(uploads: Uploads) -> torch.device:
    """Where a worker's uploads are, also of one without clients."""
    return next(iter(uploads.metrics.values())).device


class _NamingTheLost:
    """A worker whose peer is gone waits for its own end, so that the launcher reports the peer."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, RuntimeError):
            until = time.monotonic() + GRACE
            while time.monotonic() < until and not ending.asked:
                time.sleep(0.05)
            raise LostWorkerError(f"lost another worker: {str(error).partition(chr(10))[0]}") from error


def started_by_launcher() -> bool:
    """Whether this process is a worker, of `launch` or of torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def join(clients_per_round: int | None = None, device: str = "auto") -> Workers:
    """Joins the workers that the environment names; alone if it names none.

    `device` is the run's setting. Raises ConfigError if some would have no client or no GPU of their own.
    """
    if not started_by_launcher():
        return Workers()
    if not dist.is_initialized():
        # newer versions of NCCL's backend take a GPU at once
        gpu = device != "cpu" and own_device().type == "cuda"
        # one that ends at once, by an error of its own, may leave others half connected
        with _NamingTheLost():
            dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=PATIENCE)
    me = Workers(dist.get_rank(), dist.get_world_size())
    if clients_per_round is not None:
        refuse_idle(me.size, clients_per_round)
    return me


def refuse_idle(workers: int, clients_per_round: int) -> None:
    """Raises ConfigError if some workers would have no client."""
    if workers > clients_per_round:
        message = f"{workers} workers for {clients_per_round} clients a round; start at most one a client"
        raise ConfigError([Problem("federation.clients_per_round", message)])


def leave() -> None:
    """Ends this process's part, as all workers do: after an error NCCL would wait for the others for ever."""
    if dist.is_initialized():
        dist.destroy_process_group()


def local_workers() -> int:
    """Workers on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def own_device() -> torch.device:
    """This worker's own: the GPU of its local rank, or the CPU."""
    gpus, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", "0"))
    if not gpus:
        return torch.device("cpu")
    if local_workers() > gpus:
        message = (
            f"{local_workers()} workers on a machine with {gpus} GPUs; start at most one a "
            "GPU, or set execution.device=cpu"
        )
        raise ConfigError([Problem("execution.device", message)])
    if torch.cuda._is_in_bad_fork():  # even by asking whether there is a GPU
        raise RunError(USED_GPU)
    torch.cuda.set_device(local)  # collectives of NCCL go by it
    return torch.device("cuda", local)


def launch(workers: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls `function` in each of so many new processes and returns the first one's result.

    Raises the FedsparseError that a worker raised, KeyboardInterrupt if Ctrl-C ended them before they began,
    and RunError that names a worker which died or the signal that ended them all.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if not hasattr(os, "fork"):
        raise RunError(
            "several workers need a system with fork; use torchrun --no-python fedsparse run …, or one worker"
        )
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        raise RunError(USED_GPU)
    if threading.current_thread() is not threading.main_thread():
        raise RunError("workers start from a program's main thread only; call this one from there")
    # Ctrl-C is the workers' business: they end the round first
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = OTHER_SIGNALS
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for logger in ("torch.distributed.elastic", "torch.multiprocessing"):
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    before_term, told = signal.getsignal(signal.SIGTERM), list[int]()

    def pass_on(number: int, frame: FrameType | None) -> None:
        told.append(number)
        children = multiprocessing.active_children()
        if not children:
            raise SignalException("no worker runs yet", signal.Signals(number))
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid or 0, number)

    signal.signal(signal.SIGTERM, pass_on)
    with tempfile.TemporaryDirectory(prefix="fedsparse-") as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=workers,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            run_id=f"fedsparse-{os.getpid()}",
            max_restarts=0,
            start_method="fork",  # they start with what is imported already
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            **no_look_at_gpus(LaunchConfig),
        )
        if hasattr(config, "numa_options"):
            config.numa_options = None
        if hasattr(config, "signals_to_handle"):  # newer than torch 2.8
            config.signals_to_handle = OTHER_SIGNALS
        try:
            started = multiprocessing.get_context("fork").Barrier(workers)
            results = elastic_launch(config, _worker)(folder, os.getpid(), started, function, arguments)
            return results[0]
        except ChildFailedError as failed:
            if told and all(f.exitcode == -signal.SIGTERM for f in failed.failures.values()):
                raise _ended(signal.SIGTERM) from None  # before its first round
            raise _reported(Path(folder), failed.failures) from None
        except SignalException as ended:
            raise _ended(ended.sigval) from None
        finally:
            signal.signal(signal.SIGINT, before)
            signal.signal(signal.SIGTERM, before_term)


def _ended(number: int) -> RunError:
    """What a signal that no worker could wait for leaves to say."""
    name = signal.Signals(number).name
    error = RunError(
        f"{name} ended the run at once; if it has a checkpoint, fedsparse resume goes on from it"
    )
    error.exit_code = 128 + number
    return error


def no_look_at_gpus(config: type) -> dict[str, Any]:
    """Arguments that keep a launch configuration from asking CUDA for devices, after which none can fork."""
    fields = getattr(config, "__dataclass_fields__", {})
    return {"numa_options": object()} if "numa_options" in fields else {}


def _end_with(launcher: int) -> None:
    """Ends this process when its launcher is gone, even if it waits for another worker."""

    def look() -> None:
        while os.getppid() == launcher:
            time.sleep(LOOK)
        os._exit(1)

    threading.Thread(target=look, name="launcher", daemon=True).start()


def _worker(
    folder: str, launcher: int, started: Barrier, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> Any:
    """Runs in a worker: errors that the user can mend go to the launcher by a file.

    None begins before all are forked: a thread of the launcher answers their first calls, and a worker forked
    while it looks up an address would find the resolver locked, for ever.
    """
    _end_with(launcher)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in ("SIGTERM", *OTHER_SIGNALS.split(",")):  # the launcher's own handlers came with the fork
        signal.signal(signal.Signals[name], signal.SIG_DFL)
    try:
        started.wait()
        return function(*arguments)
    except (FedsparseError, KeyboardInterrupt) as error:
        report = {
            "at": time.monotonic(),  # of the machine, the same for all workers
            "interrupted": isinstance(error, KeyboardInterrupt),
            "message": str(error),
            "exit_code": getattr(error, "exit_code", 1),
        }
        path = Path(folder) / f"{os.environ['RANK']}.json"
        path.with_suffix(".new").write_text(json.dumps(report), encoding="utf-8")
        path.with_suffix(".new").rename(path)
        raise SystemExit(1) from None


def _reported(folder: Path, failures: Mapping[int, Any]) -> BaseException:
    """The error behind failed workers: the first that one reported, else who died and how."""
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    lost = [rank for rank in failures if not (folder / f"{rank}.json").exists()]
    if reports and not lost:
        first = min(reports, key=lambda report: report["at"])
        if first["interrupted"]:
            return KeyboardInterrupt()
        error = FedsparseError(first["message"])
        error.exit_code = first["exit_code"]
        return error
    rank = min(lost)
    failure = failures[rank]
    code = failure.exitcode
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
    said = failure.message.get("message", "") if isinstance(failure.message, dict) else ""
    return RunError(
        f"worker {rank} of {os.uname().nodename} (pid {failure.pid}) {how}, and the run with it"
        f"{f': {said}' if said and code > 0 else ''}; what was recorded stays"
    )
