"""Compile a graph for prompts of many lengths, after Dynamo has left it.

Dynamo's own symbols can no longer be guarded then. So sizes get new ones, and what the compiler
assumes of them is checked before every call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from blindsight.passes.graph import placeholders

_MIN_CAPACITY = 1024  # tokens; shorter prompts share one


def is_symbol(size: int | torch.SymInt) -> bool:
    """Whether a size is a symbol, and no expression of several."""
    return isinstance(size, torch.SymInt) and bool(size.node.expr.is_symbol)


def takes_any_number(size: int | torch.SymInt, device: torch.device) -> bool:
    """Whether one compiled kernel serves any number of queries, or keys."""
    return device.type == "cuda" and is_symbol(size)


def capacity_of(num_tokens: int, size: int | torch.SymInt, device: torch.device) -> int | None:
    """Return the largest number of queries, or keys, to compile attention for; None: no limit.

    The next power of two. The rows beyond the last token list no block: they cost moving the
    tokens that fill them, and no attention. Kernels of Triton take any number; but what is
    compiled for a few tokens (one block) does not do for more, so the shortest prompts share one.
    A composed size (past and new tokens) is none that a region could be given the masks in: it
    would need the symbols among its inputs.

    Args:
        num_tokens: How many there are now.
        size: The graph's own.
        device: Where.
    """
    if isinstance(size, int):
        return None
    if num_tokens > _MIN_CAPACITY and takes_any_number(size, device):
        return None
    return max(_MIN_CAPACITY, 1 << (num_tokens - 1).bit_length())


@dataclass(frozen=True)
class CompiledForLengths:
    """A compiled graph, and the sizes that it is right for.

    Attributes:
        run: The compiled graph.
        fits: Whether it is right for these values of the graph's symbols, in their order, and this
            number of tokens of the whole sequence.
    """

    run: Callable[..., Any]
    fits: Callable[[Sequence[int], int], bool]


class SymbolicSizes:
    """New symbols for the sizes of a graph that Dynamo left symbolic.

    Args:
        values: What the sizes are now, by Dynamo's symbols.
        fixed: Those that shall stay what they are.
        num_tokens: T, of the whole sequence: that size of the graph which it is, or, where it is
            none of them, what it is now.
    """

    def __init__(
        self, values: dict[Any, int], fixed: set[Any], num_tokens: int | torch.SymInt
    ) -> None:
        self._env = ShapeEnv(allow_dynamic_output_shape_ops=True)
        self._mode = FakeTensorMode(shape_env=self._env, allow_non_fake_inputs=True)
        self._values = values
        self._fixed = {symbol: value for symbol, value in values.items() if symbol in fixed}
        self._renamed = {
            symbol: self._env.create_symbol(
                value, ConstantSource(str(symbol)), dynamic_dim=DimDynamic.DYNAMIC
            )
            for symbol, value in values.items()
            if symbol not in fixed
        }
        self._tokens_have_a_symbol = isinstance(num_tokens, int)
        if isinstance(num_tokens, int):
            source = ConstantSource("num_tokens")
            symbol = self._env.create_symbol(num_tokens, source, dynamic_dim=DimDynamic.DYNAMIC)
            self.num_tokens = self._env.create_symintnode(symbol, hint=num_tokens)
        else:
            self.num_tokens = self.size(num_tokens)

    def size(self, size: int | torch.SymInt) -> int | torch.SymInt:
        """Return one of the graph's sizes in the new symbols."""
        if isinstance(size, int):
            return size
        return self._new(size.node.expr)

    def inputs(
        self,
        gm: fx.GraphModule,
        args: Sequence[Any],
        appended: Mapping[str, int | torch.SymInt],
    ) -> list[Any]:
        """Return what to compile a graph with: its inputs, of symbolic sizes.

        Args:
            gm: The graph, as Dynamo traced it but for the inputs that were appended.
            args: The inputs of a call.
            appended: What the last size of ``[B, ..., L]`` is in the new symbols, by the name of
                the input. Others that were appended keep their sizes.
        """
        return [
            self._input(node, arg, appended.get(node.name))
            for node, arg in zip(placeholders(gm), args, strict=True)
        ]

    def _input(self, node: fx.Node, arg: Any, length: int | torch.SymInt | None) -> Any:
        traced = node.meta.get("example_value")
        if isinstance(traced, torch.SymInt):
            return self.size(traced)
        if not isinstance(arg, Tensor):
            return arg
        shape: Sequence[int | torch.SymInt] = arg.shape
        stride: Sequence[int | torch.SymInt] = arg.stride()
        if isinstance(traced, Tensor):
            shape = [self.size(size) for size in traced.shape]
            stride = [self.size(step) for step in traced.stride()]
        elif length is not None:
            shape = (*arg.shape[:-1], length)
            stride = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        if all(isinstance(size, int) for size in (*shape, *stride)):
            return self._mode.from_tensor(arg, static_shapes=True)
        with self._mode, torch.no_grad():
            return torch.empty_strided(
                cast(Any, shape), cast(Any, stride), dtype=arg.dtype, device=arg.device
            )

    def check(self) -> Callable[[Sequence[int], int], bool]:
        """Return the function that tells whether what was assumed holds: ``fits``.

        To be called when everything is compiled.
        """
        env, has_symbol = self._env, self._tokens_have_a_symbol
        symbols = [self._new(symbol) for symbol in self._values]
        if has_symbol:
            symbols.append(self.num_tokens)
        assumed = env.produce_guards_expression(cast(Any, symbols), ignore_static=False)

        def fits(sizes: Sequence[int], num_tokens: int) -> bool:
            values = [*sizes, num_tokens] if has_symbol else sizes
            return assumed is None or bool(env.evaluate_guards_expression(assumed, values))

        return fits

    def _new(self, expression: Any) -> int | torch.SymInt:
        """Return what an expression of Dynamo's symbols is in the new ones."""
        value = int(expression.subs(self._values))
        # All at once: a new symbol may have the name of one of Dynamo's, and is then the same.
        renamed = expression.subs(self._fixed).xreplace(self._renamed)
        if renamed.is_number:
            return value
        symint: int | torch.SymInt = self._env.create_symintnode(renamed, hint=value)
        return symint
