"""The ledger of a run: bytes really sent, the paper's own bytes, FLOPs.

Bytes are those of `messages`, a version of which each end is known to hold:

* the server numbers its masks and frozen sets; version 0, the dense mask with nothing frozen, is known to
  everybody from the model's definition, so that a dense method never pays for a mask;
* a client that holds the current version is charged no mask; one that holds the version before is charged
  the changed positions where that is shorter; any other, the whole mask;
* what is frozen, values and flags, is charged at the first contact since it changed, and frozen values in
  no other message;
* an upload carries a mask only if the client changed it, coded against the one that it downloaded.

FLOPs follow the convention of `flops`, at the densities of the server's mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import RunError
from ..state import Masks, Params
from .codecs import decode_masks, encode_masks, masks_size
from .flops import Cost, training_cost
from .messages import Count, Message, MessageSize, count, measure, prove


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
    """What a round, or a run, has cost so far."""

    upload_bytes: int = 0
    download_bytes: int = 0
    paper_bytes: float = 0.0
    flops: float = 0.0

    def plus(
        self,
        upload_bytes: int = 0,
        download_bytes: int = 0,
        paper_bytes: float = 0.0,
        flops: float = 0.0,
    ) -> Tally:
        """The sum."""
        return Tally(
            self.upload_bytes + upload_bytes,
            self.download_bytes + download_bytes,
            self.paper_bytes + paper_bytes,
            self.flops + flops,
        )


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
    `forward_macs`. `paper` is the method's own formula. With `encode`, every message is encoded, decoded and
    compared, and its length held against the charge (slow; RunError at the first difference).

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
        encode: bool = False,
    ) -> None:
        self.round, self.total = Tally(), Tally()
        self._params = {name: torch.empty_like(param, device="meta") for name, param in params.items()}
        self._buffers = {name: torch.empty_like(buffer, device="meta") for name, buffer in buffers.items()}
        self._macs, self._paper, self._encode = dict(macs), paper, encode
        self._index = -1
        self._version = (0, 0)
        self._held: dict[int, tuple[int, int]] = {}
        self._downloaded: dict[int, tuple[bool, bool]] = {}
        self._mask: Masks | None = None
        self._frozen: Masks | None = None
        self._before: Masks | None = None
        self._prices: _Prices | None = None
        self._model: Message | None = None

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
        if new_mask:
            self._before = self._mask
        self._version = (self._version[0] + new_mask, self._version[1] + new_frozen)
        self._mask, self._frozen = mask, frozen
        self._model = Message(params, buffers, mask, frozen) if self._encode else None
        if new_mask or new_frozen or self._prices is None:
            self._prices = self._price(mask, frozen, mask if trained is None else trained)

    def sidecar(self, tensors: Mapping[str, Tensor]) -> int:
        """Bytes of tensors that travel beside the model.

        One that is named as a parameter, perhaps behind a prefix and "/", is sent where that trains.
        """
        counts = self._open().counts
        size = 0
        for name, tensor in tensors.items():
            twin = counts.get(name.rpartition("/")[2])
            size += (tensor.numel() if twin is None else twin.live) * tensor.element_size()
        return size

    def download(self, client: int, extra: int = 0) -> int:
        """Bytes sent to `client` now, `extra` among them; it holds the current mask and frozen set then."""
        prices = self._open()
        first, held = client not in self._held, self._held.get(client, (0, 0))
        send_mask = held[0] != self._version[0]
        send_frozen = held[1] != self._version[1] and prices.any_frozen
        update = send_mask and held[0] == self._version[0] - 1
        size = prices.size.total(send_mask=send_mask and not update, send_frozen=send_frozen)
        size += prices.update if update else 0
        if self._model is not None:
            reference = self._before if update else None
            prove(self._model, size, send_mask=send_mask, send_frozen=send_frozen, reference=reference)
        size += extra
        self._held[client] = self._version
        self._downloaded[client] = (first, send_mask)
        self.round = self.round.plus(download_bytes=size)
        return size

    def upload(
        self,
        client: int,
        mask: Masks,
        params: Params | None = None,
        buffers: Params | None = None,
        extra: int = 0,
    ) -> int:
        """Bytes that `client` sends back, after its `download` in this round (RunError otherwise).

        `mask` holds the very tensors of the server's mask if the client left it alone; otherwise it is sent,
        and says which values are. `params` and `buffers`, the client's own, are needed for `encode` only.
        `extra` bytes go with the upload as they are: growth scores, control variates.
        """
        prices = self._open()
        if client not in self._downloaded:
            raise RunError(f"client {client} uploads in round {self._index} without having downloaded")
        first, mask_changed = self._downloaded.pop(client)
        server, frozen = self._mask or {}, self._frozen or {}
        own = any(mask[name] is not old for name, old in server.items())
        size, active = prices.size.total(), prices.traffic.active
        if own:
            counts = count(self._params, mask, frozen)
            values = sum(counts[name].live * self._params[name].element_size() for name in mask)
            size += values - prices.size.values + masks_size(mask, server)
            active = sum(sum(counts[name]) for name in mask)
        if self._encode and params is not None and buffers is not None:
            prove(Message(params, buffers, mask, frozen), size, send_mask=own, reference=server)
        traffic = prices.traffic._replace(
            round=self._index,
            active_upload=active,
            mask_changed=mask_changed,
            client_readjusted=own,
            first_contact=first,
        )
        size += extra
        self.round = self.round.plus(upload_bytes=size, paper_bytes=self._paper(traffic))
        return size

    def mark(self, clients: Iterable[int]) -> Mark:
        """The round's accounts, and what these clients hold: for `back_to`."""
        own = set(clients)
        held, downloaded = (
            {client: table[client] for client in own & table.keys()}
            for table in (self._held, self._downloaded)
        )
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

        With several workers, `tally` is the sum of their `round`s (each a row of four numbers) and `clients`
        are all clients of the round: those of other workers hold the current versions, too.
        """
        if tally is not None:
            upload, download, paper, flops = tally
            self.round = Tally(round(upload), round(download), float(paper), float(flops))
        self._held.update(dict.fromkeys(clients, self._version))
        self.total = self.total.plus(*self.round)
        self._model = None

    def metrics(self) -> dict[str, float]:
        """The fields of a line of `metrics.jsonl` that are the ledger's, after `end_round`."""
        return {
            "upload_bytes": self.round.upload_bytes,
            "download_bytes": self.round.download_bytes,
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
            "clients": list(self._held),
            "held": [list(held) for held in self._held.values()],
            "mask": _dump(self._mask),
            "frozen": _dump(self._frozen),
            "before": _dump(self._before),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from `state()` of a ledger with the same templates."""
        self._index = state["index"]
        self.round, self.total = Tally(), Tally(*state["total"])
        mask_version, frozen_version = state["version"]
        self._version = (mask_version, frozen_version)
        self._held = {c: (held[0], held[1]) for c, held in zip(state["clients"], state["held"], strict=True)}
        self._mask, self._frozen, self._before = (
            self._load(state[key]) for key in ("mask", "frozen", "before")
        )
        self._downloaded, self._prices, self._model = {}, None, None

    def _open(self) -> _Prices:
        if self._prices is None:
            raise RunError("the ledger has no open round")
        return self._prices

    def _price(self, mask: Masks, frozen: Masks, trained: Masks) -> _Prices:
        """Everything that needs the tensors of a mask and a frozen set."""
        counts = count(self._params, mask, frozen)
        sizes = {name: param.numel() for name, param in self._params.items()}
        biases = {f"{name.removesuffix('weight')}bias" for name in self._macs} & (sizes.keys() - mask.keys())
        size = measure(Message(self._params, self._buffers, mask, frozen), counts=counts)
        active = sum(sum(counts[name]) for name in mask)
        return _Prices(
            size,
            size.mask if self._before is None else masks_size(mask, self._before),
            any_frozen=any(c.still for c in counts.values()),
            cost=training_cost(self._macs, count(self._params, trained, frozen), sizes),
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
