"""One name for all spellings of an operation."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

_NAMES_OF_OPERATORS = {
    operator.and_: "and",
    operator.or_: "or",
    # No operation on tensors: it gives a Python bool. Its own name ends in an underscore, as do
    # those of operations that write into their argument, and memory.overwritten would take it for
    # one of them.
    operator.not_: "",
    operator.invert: "not",
    operator.inv: "not",
}
_SYNONYMS = {
    "bitwise_and": "and",
    "logical_and": "and",
    "bitwise_or": "or",
    "logical_or": "or",
    "bitwise_not": "not",
    "logical_not": "not",
    "invert": "not",
    "bitwise_xor": "xor",
    "logical_xor": "xor",
    "less_equal": "le",
    "less": "lt",
    "greater_equal": "ge",
    "greater": "gt",
    "not_equal": "ne",
    "radd": "add",
    "subtract": "sub",
    "multiply": "mul",
    "rmul": "mul",
    "negative": "neg",
    "absolute": "abs",
    "floor_divide": "floordiv",
    "bitwise_right_shift": "rshift",
    "remainder": "mod",
    "minimum": "min",
    "maximum": "max",
    "reshape_as": "reshape",
    "view_as": "reshape",
}
# What fills a new tensor, and with what.
FILLS = {"new_ones": 1, "ones": 1, "ones_like": 1, "new_zeros": 0, "zeros": 0, "zeros_like": 0}


def name_of(node: fx.Node) -> str:
    """Return what a node does: one name for all spellings of an operation."""
    target = node.target
    if node.op in ("placeholder", "get_attr", "output"):
        return node.op
    if isinstance(target, str):
        name = target
    elif target in _NAMES_OF_OPERATORS:
        name = _NAMES_OF_OPERATORS[target]
    elif isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        packet: Any = getattr(target, "overloadpacket", target)
        whole: str = packet._qualified_op_name
        namespace, _, name = whole.partition("::")
        if namespace not in ("aten", "prims"):
            return whole  # whatever somebody else's operator does
    else:
        name = getattr(target, "__name__", str(target))
    if name.startswith("__") and name.endswith("__"):
        name = {"rand": "and", "ror": "or"}.get(name[2:-2], name[2:-2])
    return _SYNONYMS.get(name, name)
