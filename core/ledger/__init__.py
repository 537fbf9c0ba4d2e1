"""What a run costs: wire codecs, messages and their exact sizes, bytes, FLOPs."""

from .accounts import Ledger, OwnMask, PaperBytes, Passed, Tally, Traffic, paper_bytes
from .codecs import Codec, decode_masks, encode_masks, masks_size, on_host
from .flops import Cost, PassDensities, PassDensity, forward_macs, training_cost
from .frame import HEADER, CorruptError
from .messages import (
    Count,
    Form,
    Message,
    MessageSize,
    Seed,
    beside_size,
    count,
    deliver,
    measure,
    message_size,
    pack,
    pack_beside,
    unpack,
    unpack_beside,
)
from .values import TYPES, on_wire, rounded

__all__ = [
    "HEADER",
    "TYPES",
    "Codec",
    "CorruptError",
    "Cost",
    "Count",
    "Form",
    "Ledger",
    "Message",
    "MessageSize",
    "OwnMask",
    "PaperBytes",
    "PassDensities",
    "PassDensity",
    "Passed",
    "Seed",
    "Tally",
    "Traffic",
    "beside_size",
    "count",
    "decode_masks",
    "deliver",
    "encode_masks",
    "forward_macs",
    "masks_size",
    "measure",
    "message_size",
    "on_host",
    "on_wire",
    "pack",
    "pack_beside",
    "paper_bytes",
    "rounded",
    "training_cost",
    "unpack",
    "unpack_beside",
]
