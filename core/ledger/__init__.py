"""What a run costs: wire codecs, messages and their exact sizes, bytes, FLOPs."""

from .accounts import Ledger, PaperBytes, Tally, Traffic, paper_bytes
from .codecs import Codec, decode_masks, encode_masks, masks_size
from .flops import Cost, forward_macs, training_cost
from .messages import Count, Message, MessageSize, count, measure, message_size, pack, prove, unpack

__all__ = [
    "Codec",
    "Cost",
    "Count",
    "Ledger",
    "Message",
    "MessageSize",
    "PaperBytes",
    "Tally",
    "Traffic",
    "count",
    "decode_masks",
    "encode_masks",
    "forward_macs",
    "masks_size",
    "measure",
    "message_size",
    "pack",
    "paper_bytes",
    "prove",
    "training_cost",
    "unpack",
]
