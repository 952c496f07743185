"""Call a function of tensors as a region of the graph, which all calls alike share.

Inductor would write and compile a kernel of FlexAttention for each layer of a model, the same one
every time. It compiles a region once: ``torch.ops.higher_order.invoke_subgraph``, which is what
``torch.compiler.nested_compile_region`` is made of.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, cast

from torch import SymInt, Tensor
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph
from torch.utils import _pytree as pytree


def call_in_region(
    name: str, function: Callable[..., tuple[Tensor, ...]], *args: Any
) -> tuple[Tensor, ...]:
    """Return ``function(*args)``.

    Inside, every tensor is an input with memory of its own: nothing is fused across the border.

    Args:
        name: Says what the function does: functions of one name do the same.
        function: Of the tensors in its arguments alone, and of what identifies the call: it must
            neither change them nor return one of them.
        args: Trees of tensors, sizes and hashable constants.
    """
    leaves, spec = pytree.tree_flatten(args)
    tensors: list[Tensor | SymInt] = []
    at: list[Any] = []
    known: dict[int, int] = {}
    for leaf in leaves:
        if not isinstance(leaf, (Tensor, SymInt)):
            at.append(_Constant(leaf))
            continue
        if id(leaf) not in known:
            known[id(leaf)] = len(tensors)
            tensors.append(leaf)
        at.append(known[id(leaf)])
    # Constants that are equal, as 1 and True, need not mean the same: the text tells them apart.
    text = repr((spec, at, [_layout(tensor) for tensor in tensors]))
    region = _region(name, function, spec, tuple(at), text)
    outputs: tuple[Tensor, ...] = invoke_subgraph(cast(Any, region), region.identifier, *tensors)
    return outputs


@dataclass(frozen=True)
class _Constant:
    value: Any


@dataclass(frozen=True)
class _Region:
    name: str
    function: Callable[..., tuple[Tensor, ...]]
    spec: pytree.TreeSpec
    at: tuple[int | _Constant, ...]  # of each leaf: which tensor, or what
    text: str  # all of it, and the layouts of the tensors

    @cached_property
    def identifier(self) -> str:
        """Calls with the same one share a graph, so it tells of all but the values of tensors."""
        return f"{self.name}_{hashlib.sha256(self.text.encode()).hexdigest()[:16]}"

    @property
    def __name__(self) -> str:
        return self.identifier

    def __call__(self, *tensors: Tensor | SymInt) -> tuple[Tensor, ...]:
        leaves = [x.value if isinstance(x, _Constant) else tensors[x] for x in self.at]
        return self.function(*pytree.tree_unflatten(leaves, self.spec))


@lru_cache(maxsize=256)
def _region(
    name: str,
    function: Callable[..., tuple[Tensor, ...]],
    spec: pytree.TreeSpec,
    at: tuple[Any, ...],
    text: str,
) -> _Region:
    """Return the one object of a region: what compilers know of it they look up by identity."""
    return _Region(name, function, spec, at, text)


def _layout(tensor: Tensor | SymInt) -> Sequence[object]:
    if isinstance(tensor, SymInt):
        return ("size", str(tensor))
    return tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, tensor.device
