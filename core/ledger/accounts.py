"""The ledger of a run: bytes really sent, the paper's own bytes, FLOPs.

Bytes are those of `messages`, a version of which each end is known to hold:

* the server numbers its masks and frozen sets; version 0, the dense mask with nothing frozen, is known to
  everybody from the model's definition, so that a dense method never pays for a mask;
* a client that holds the current version is charged no mask; one that holds the version before is charged
  the changed positions where that is shorter; any other, the whole mask;
* the mask of a run's first round is charged as a seed of 8 bytes while it stays, if its part draws it from
  its key alone (`from_key`): every client can draw it, too;
* what is frozen, values and flags, is charged at the first contact since it changed, and frozen values in
  no other message;
* an upload carries a mask only if the client changed it, coded against the one that it downloaded;
* scores, control variates and other tensors beside the model are a message of their own; what is named as a
  parameter is sent where that trains, the rest whole;
* each message has a header of 26 bytes.

Values are 4 bytes each, or 2 under `ledger.values` "float16" and "bfloat16", which round what is sent.

FLOPs follow the convention of `flops`, at the densities of the server's mask or of what the method's passes
use of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import RunError
from ..state import Masks, Params
from .codecs import counted, decode_masks, encode_masks, masks_size, masks_sizes, on_host
from .flops import Cost, PassDensities, training_cost
from .messages import (
    SEED,
    Count,
    Form,
    Message,
    MessageSize,
    Seed,
    beside_size,
    count,
    deliver,
    deliver_beside,
    measure,
)
from .values import on_wire, rounded


class Traffic(NamedTuple):
    """One client's round, for a paper's own formula; counts of weights, not bytes."""

    round: int
    weights: int
    """prunable weights N, active or not"""
    active: int
    """of these, active in the mask that the client downloads (frozen ones included)"""
    active_upload: int
    """active in the mask that it uploads"""
    frozen: int
    """prunable weights that are frozen"""
    unmasked: int
    """parameters that have no mask: biases, scales and shifts of normalisation, …"""
    biases: int
    """of these, biases of convolutions and linear layers"""
    mask_changed: bool
    """the client held another mask than the one of this round, or has to be told its first one"""
    client_readjusted: bool
    """the client sends back a mask of its own"""
    first_contact: bool
    """the client never received anything before"""


PaperBytes = Callable[[Traffic], float]
"""A paper's formula: bytes of one client's round, download and upload together."""


def paper_bytes(traffic: Traffic) -> float:
    """4 bytes for each active weight and each unmasked parameter, down and up."""
    return 4.0 * (traffic.active + traffic.active_upload + 2 * traffic.unmasked)


class Tally(NamedTuple):
    """What a round, or a run, has cost so far; the last three are parts of `upload_bytes`."""

    upload_bytes: int = 0
    download_bytes: int = 0
    paper_bytes: float = 0.0
    flops: float = 0.0
    upload_values_bytes: int = 0
    """values of masked parameters"""
    upload_mask_bytes: int = 0
    upload_dense_bytes: int = 0
    """parameters without a mask, and buffers"""

    def plus(self, **more: float) -> Tally:
        """The sum; `more` is by field."""
        return self._replace(**{name: getattr(self, name) + amount for name, amount in more.items()})


UPLOAD_PARTS = ("upload_values_bytes", "upload_mask_bytes", "upload_dense_bytes")
"""Parts of an upload; the rest is headers and what goes beside the model."""


class Passed(NamedTuple):
    """A message that went from end to end: its bytes and, under `encode`, what its receiver decoded."""

    size: int
    got: Message | None = None


class OwnMask(NamedTuple):
    """What an upload takes of a mask that the client moved."""

    values: int
    """bytes of the values that it keeps, without frozen ones"""
    code: int
    """bytes of the mask's own"""
    active: int
    """weights, with frozen ones"""


class _Prices(NamedTuple):
    """All that a round's calls need of a mask and a frozen set, so that none of them touches a tensor."""

    size: MessageSize
    update: int
    """bytes of the mask for a receiver that holds the one before"""
    any_frozen: bool
    cost: Cost
    counts: Mapping[str, Count]
    traffic: Traffic
    """that of a client that changes nothing"""


class Mark(NamedTuple):
    """A round's accounts at some time, as far as some clients can change them."""

    round: Tally
    clients: set[int]
    held: dict[int, tuple[int, int]]
    downloaded: dict[int, tuple[bool, bool]]


class Ledger:
    """Accounts of a run.

    A round is `begin_round`; for each client `download`, `train`, `upload`; `end_round`.

    `params` and `buffers` are templates: only names, shapes and dtypes matter. `macs` are those of
    `forward_macs`. `paper` is the method's own formula. `values` is the type in which floating-point values
    travel. `seed` draws the mask of the first round, if its part says so. With `encode`, every message is
    encoded and decoded; its length is held against the charge, what arrives is compared with what was sent
    and handed out to be gone on with (slow; RunError at the first difference).

    As long as mask and frozen set stay the same, a call is arithmetic on the host and touches no tensor.
    `round` is this worker's `Tally` of the current round, `total` that of the rounds that have ended.
    """

    def __init__(
        self,
        params: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        macs: Mapping[str, float],
        *,
        paper: PaperBytes = paper_bytes,
        passes: PassDensities | None = None,
        encode: bool = False,
        values: torch.dtype = torch.float32,
        seed: Seed | None = None,
    ) -> None:
        self.round, self.total = Tally(), Tally()
        self.encode, self.values = encode, values
        self._params = {name: torch.empty_like(param, device="meta") for name, param in params.items()}
        self._buffers = {name: torch.empty_like(buffer, device="meta") for name, buffer in buffers.items()}
        self._macs, self._paper, self._passes, self._seed = dict(macs), paper, passes, seed
        self._seeded = -1  # the version of the mask that the seed stands for
        self._index = -1
        self._version = (0, 0)
        self._held: dict[int, tuple[int, int]] = {}
        self._downloaded: dict[int, tuple[bool, bool]] = {}
        self._mask: Masks | None = None
        self._frozen: Masks | None = None
        self._before: Masks | None = None
        self._still: Params = {}  # values of the frozen positions, flat, as they were sent
        self._prices: _Prices | None = None
        self._host: tuple[tuple[int, int], Masks, Masks] | None = None
        self._model: Message | None = None

    @property
    def alters(self) -> bool:
        """Whether a receiver goes on with other tensors than the sender's: decoded or rounded ones."""
        return self.encode or self.values != torch.float32

    def begin_round(
        self, params: Params, buffers: Params, mask: Masks, frozen: Masks, trained: Masks | None = None
    ) -> None:
        """Open a round with what the server is about to send, after its readjustment and freezing.

        `mask` says which values are sent; `trained`, if it is another, which weights clients train (FLOPs).
        Masks are never changed in place (the hooks' contract): an object that was seen before is unchanged.
        """
        self.round = Tally()
        self._downloaded.clear()
        self._index += 1
        new_mask = not _same(self._mask, mask, everywhere=True)
        new_frozen = not _same(self._frozen, frozen, everywhere=False)
        if new_frozen or (self._still and any(f is not (self._frozen or {})[n] for n, f in frozen.items())):
            # a policy that froze the same weights anew may have given them other values
            still = self._frozen_values(params, frozen)
            new_frozen = new_frozen or any(not torch.equal(v, still[n]) for n, v in self._still.items())
            self._still = still
        if new_mask:
            self._before = self._mask
        self._version = (self._version[0] + new_mask, self._version[1] + new_frozen)
        self._mask, self._frozen = mask, frozen
        if self._index == 0 and self._seed is not None and new_mask:
            drawn = self._seed.masks(self._seed.key)
            self._seeded = self._version[0] if _same(drawn, mask, everywhere=True) else -1
        if self.encode:
            sent = [self.rounded(tensors, "download") for tensors in (params, buffers)]
            self._model = Message(sent[0], sent[1], mask, frozen)
        if new_mask or new_frozen or self._prices is None:
            self._prices = self._price(mask, frozen, mask if trained is None else trained)

    def rounded(self, tensors: Params, way: str, client: int | None = None) -> Params:
        """The tensors as they arrive: rounded to the type of values. RunError for one beyond its range."""
        return rounded(tensors, self.values, lambda: self._label(way, client))

    def beside(
        self, tensors: Params, way: str, client: int, mask: Masks | None = None, whole: bool = False
    ) -> Params:
        """Charges tensors that travel beside the model as "download" or "upload"; returns what arrives.

        One that is named as a parameter, perhaps behind a prefix and "/", is sent where that trains in
        `mask` (default: the server's) and arrives as 0 elsewhere; others, and with `whole` all, are sent
        whole. No tensors, no message.
        """
        if not tensors:
            return tensors
        counts, places = self._open().counts, Masks()
        own = mask is not None and any(mask[name] is not old for name, old in (self._mask or {}).items())
        if mask is not None and own:
            counts = count(self._params, mask, self._frozen or {})
        twins = {} if whole else {name: name.rpartition("/")[2] for name in tensors}
        live = {
            name: counts[twin].live
            for name, twin in twins.items()
            if twin in counts and tensors[name].shape == self._params[twin].shape
        }
        for name, size in live.items():
            if size < tensors[name].numel():
                places[name] = self._places(twins[name], mask if own else self._mask, tensors[name].device)
        sent = self.rounded(tensors, way, client)
        sent |= {name: torch.where(at, sent[name], 0) for name, at in places.items()}
        size = beside_size(sent, live, self.values)
        self.round = self.round.plus(**{f"{way}_bytes": size})
        if not self.encode:
            return sent
        label = f"{self._label(way, client)}, beside the model"
        return deliver_beside(sent, places, size, Form(values=self.values, label=label))

    def download(self, client: int) -> Passed:
        """The model sent to `client` now; it holds the current mask and frozen set then."""
        prices = self._open()
        first, held = client not in self._held, self._held.get(client, (0, 0))
        send_mask = held[0] != self._version[0]
        send_frozen = held[1] != self._version[1] and prices.any_frozen
        seed = send_mask and self._version[0] == self._seeded and prices.size.mask > SEED
        update = send_mask and held[0] == self._version[0] - 1 and not seed
        size = prices.size.total(send_mask=send_mask and not update, send_frozen=send_frozen, seed=seed)
        size += prices.update if update else 0
        self._held[client] = self._version
        self._downloaded[client] = (first, send_mask)
        self.round = self.round.plus(download_bytes=size)
        if self._model is None:
            return Passed(size)
        form = Form(
            send_mask,
            send_frozen,
            self._before if update else None,
            self._seed if seed else None,
            self.values,
            self._label("download", client),
        )
        return Passed(size, deliver(self._model, size, form, self._still or None))

    def upload(
        self,
        client: int,
        mask: Masks,
        params: Params | None = None,
        buffers: Params | None = None,
        own: OwnMask | None = None,
    ) -> Passed:
        """What `client` sends back, after its `download` in this round (RunError otherwise).

        `mask` holds the very tensors of the server's mask if the client left it alone; otherwise it is sent,
        and says which values are; `own` is its entry in `own_masks` where that is at hand. `params` and
        `buffers`, the client's own as `rounded` gives them, are needed for `encode` only.
        """
        prices = self._open()
        if client not in self._downloaded:
            raise RunError(f"client {client} uploads in round {self._index} without having downloaded")
        first, mask_changed = self._downloaded.pop(client)
        server, frozen = self._mask or {}, self._frozen or {}
        if own is None and any(mask[name] is not old for name, old in server.items()):
            own = self.own_masks({name: flags[None] for name, flags in mask.items()})[0]
        size, active = prices.size.total(), prices.traffic.active
        values, coded = prices.size.values, 0
        if own is not None:
            values, coded, active = own
            size += values - prices.size.values + coded
        got = None
        if self.encode and params is not None and buffers is not None:
            form = Form(own is not None, False, server, None, self.values, self._label("upload", client))
            got = deliver(Message(params, buffers, mask, frozen), size, form, self._still or None)
        traffic = prices.traffic._replace(
            round=self._index,
            active_upload=active,
            mask_changed=mask_changed,
            client_readjusted=own is not None,
            first_contact=first,
        )
        self.round = self.round.plus(
            upload_bytes=size,
            paper_bytes=self._paper(traffic),
            upload_values_bytes=values,
            upload_mask_bytes=coded,
            upload_dense_bytes=prices.size.dense + prices.size.buffers,
        )
        return Passed(size, got)

    def own_masks(self, masks: Masks) -> list[OwnMask]:
        """What uploads take of stacked masks (clients, …) that clients moved, each."""
        server, frozen = self._on_host()
        moved = on_host(masks)
        values = active = np.zeros(1, np.int64)
        for name, mask in moved.items():
            flags = mask.reshape(len(mask), -1).numpy()
            every = live = counted(flags)
            if name in frozen:
                live = every - counted(flags & frozen[name].reshape(-1).numpy())
            values = values + live * on_wire(self._params[name].dtype, self.values).itemsize
            active = active + every
        columns = (values, masks_sizes(moved, server), active)
        return [OwnMask(*map(int, row)) for row in zip(*columns, strict=True)]

    def mark(self, clients: Iterable[int]) -> Mark:
        """The round's accounts, and what these clients hold: for `back_to`."""
        own = set(clients)
        held = {client: self._held[client] for client in own & self._held.keys()}
        downloaded = {client: self._downloaded[client] for client in own & self._downloaded.keys()}
        return Mark(self.round, own, held, downloaded)

    def back_to(self, mark: Mark) -> None:
        """Forgets what was charged since, all of it for the clients of `mark`."""
        self.round = mark.round
        for client in mark.clients:
            self._held.pop(client, None)
            self._downloaded.pop(client, None)
        self._held |= mark.held
        self._downloaded |= mark.downloaded

    def train(self, samples: int, score_samples: int = 0) -> float:
        """FLOPs of a client that trains on `samples` (each as often as it is used).

        `score_samples` are those of which a grow score took the dense gradient.
        """
        step, score = self._open().cost
        flops = step * samples + score * score_samples
        self.round = self.round.plus(flops=flops)
        return flops

    def end_round(self, tally: Iterable[float] | None = None, clients: Iterable[int] = ()) -> None:
        """Add the round to the total.

        With several workers, `tally` is the sum of their `round`s (each a row of numbers) and `clients`
        are all clients of the round: those of other workers hold the current versions, too.
        """
        if tally is not None:
            summed: dict[str, Any] = dict(zip(Tally._fields, tally, strict=True))
            whole = {name: round(number) for name, number in summed.items() if name.endswith("_bytes")}
            self.round = Tally(**summed | whole | {"paper_bytes": summed["paper_bytes"]})
        self._held.update(dict.fromkeys(clients, self._version))
        self.total = self.total.plus(**self.round._asdict())
        self._model = None

    def metrics(self) -> dict[str, float]:
        """The fields of a line of `metrics.jsonl` that are the ledger's, after `end_round`."""
        return {
            "upload_bytes": self.round.upload_bytes,
            "download_bytes": self.round.download_bytes,
            **{name: getattr(self.round, name) for name in UPLOAD_PARTS},
            "upload_other_bytes": self.round.upload_bytes - sum(getattr(self.round, n) for n in UPLOAD_PARTS),
            "upload_bytes_total": self.total.upload_bytes,
            "download_bytes_total": self.total.download_bytes,
            "paper_bytes_total": self.total.paper_bytes,
            "flops_total": self.total.flops,
        }

    def state(self) -> dict[str, Any]:
        """Everything between two rounds that a resumed run needs: plain values and uint8 tensors (masks)."""
        return {
            "index": self._index,
            "total": list(self.total),
            "version": list(self._version),
            "seeded": self._seeded,
            "still": {name: value.cpu() for name, value in self._still.items()},
            "clients": list(self._held),
            "held": [list(held) for held in self._held.values()],
            "mask": _dump(self._mask),
            "frozen": _dump(self._frozen),
            "before": _dump(self._before),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from `state()` of a ledger with the same templates. RunError if it is none."""
        try:
            numbers = [*state["total"], state["index"], state["seeded"], *state["version"], *state["clients"]]
            if any(type(n) not in (int, float) for each in (numbers, *state["held"]) for n in each):
                raise TypeError("a number is none")
            held = [(mask, frozen) for mask, frozen in state["held"]]
            self._index, self._seeded = state["index"], state["seeded"]
            self.round, self.total = Tally(), Tally(*state["total"])
            mask_version, frozen_version = state["version"]
            self._version = (mask_version, frozen_version)
            self._held = dict(zip(state["clients"], held, strict=True))
            self._mask, self._frozen, self._before = (
                self._load(state[key]) for key in ("mask", "frozen", "before")
            )
            still = {name: state["still"][name] for name in (self._frozen or {}) if state["still"]}
            if any(not isinstance(value, Tensor) for value in still.values()):
                raise TypeError("a frozen value is none")
            self._still = still
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise RunError(f"its ledger is damaged: {type(error).__name__} {error}") from error
        self._downloaded, self._prices, self._host, self._model = {}, None, None, None

    def _label(self, way: str, client: int | None = None) -> str:
        return f"round {self._index}, {way}" + ("" if client is None else f" of client {client}")

    def _frozen_values(self, params: Params, frozen: Masks) -> Params:
        """Flat values of what is frozen, as they are sent, on the host."""
        values = {name: params[name].detach()[flags] for name, flags in frozen.items()}
        return {name: value.cpu() for name, value in self.rounded(values, "download").items()}

    def _places(self, name: str, mask: Masks | None, device: torch.device) -> Tensor:
        """Where a parameter trains."""
        live = torch.ones(self._params[name].shape, dtype=torch.bool, device=device)
        live = (mask or {}).get(name, live)
        still = (self._frozen or {}).get(name)
        return live if still is None else live & ~still

    def _open(self) -> _Prices:
        if self._prices is None:
            raise RunError("the ledger has no open round")
        return self._prices

    def _on_host(self) -> tuple[Masks, Masks]:
        """The round's mask and frozen set on the CPU, copied once a version."""
        if self._host is None or self._host[0] != self._version:
            self._host = (self._version, on_host(self._mask or {}), on_host(self._frozen or {}))
        return self._host[1:]

    def _price(self, mask: Masks, frozen: Masks, trained: Masks) -> _Prices:
        """Everything that needs the tensors of a mask and a frozen set."""
        mask, frozen, trained = on_host(mask), on_host(frozen), on_host(trained)
        counts = count(self._params, mask, frozen)
        sizes = {name: param.numel() for name, param in self._params.items()}
        biases = {f"{name.removesuffix('weight')}bias" for name in self._macs} & (sizes.keys() - mask.keys())
        size = measure(Message(self._params, self._buffers, mask, frozen), counts=counts, values=self.values)
        active = sum(sum(counts[name]) for name in mask)
        return _Prices(
            size,
            size.mask if self._before is None else masks_size(mask, self._before),
            any_frozen=any(c.still for c in counts.values()),
            cost=training_cost(self._macs, count(self._params, trained, frozen), sizes, self._passes),
            counts=counts,
            traffic=Traffic(
                round=self._index,
                weights=sum(sizes[name] for name in mask),
                active=active,
                active_upload=active,
                frozen=sum(counts[name].still for name in mask),
                unmasked=sum(size for name, size in sizes.items() if name not in mask),
                biases=sum(sizes[name] for name in biases),
                mask_changed=False,
                client_readjusted=False,
                first_contact=False,
            ),
        )

    def _load(self, dumped: dict[str, Any] | None) -> Masks | None:
        if dumped is None:
            return None
        shapes = {name: self._params[name].shape for name in dumped["names"]}
        return decode_masks(dumped["code"].numpy().tobytes(), shapes)


def _dump(masks: Masks | None) -> dict[str, Any] | None:
    if masks is None:
        return None
    code = np.frombuffer(encode_masks(masks), np.uint8).copy()
    return {"names": list(masks), "code": torch.from_numpy(code)}


def _same(old: Masks | None, new: Masks, *, everywhere: bool) -> bool:
    """Whether nothing changed; None stands for masks that are `everywhere` on, or off."""
    if old is None:
        return not any(bool((mask != everywhere).any()) for mask in new.values())
    return old.keys() == new.keys() and all(
        mask is old[name] or torch.equal(mask, old[name].to(mask.device)) for name, mask in new.items()
    )
