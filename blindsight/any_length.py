"""Compile a graph for prompts of many lengths, after Dynamo has left it.

Dynamo's own symbols can no longer be guarded then. So sizes get new ones, and what the compiler
assumes of them is checked before every call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from blindsight.passes.graph import placeholders
from blindsight.passes.replace_attention import TOKEN_INPUTS

_MIN_CAPACITY = 1024  # tokens; shorter prompts share one


def capacity_of(num_tokens: int, device: torch.device) -> int | None:
    """Return for up to how many tokens attention over so many is compiled; None: for any number.

    The next power of two. The rows beyond a prompt's last token list no block: they cost moving
    the tokens that fill them, and no attention. Kernels of Triton take any number; but what is
    compiled for a few tokens (one block) does not do for more, so the shortest prompts share one.
    """
    if device.type == "cuda" and num_tokens > _MIN_CAPACITY:
        return None
    return max(_MIN_CAPACITY, 1 << (num_tokens - 1).bit_length())


@dataclass(frozen=True)
class CompiledForLengths:
    """A compiled graph, and the sizes that it is right for.

    Attributes:
        run: The compiled graph.
        fits: Whether it is right for these values of the graph's symbols, in their order.
    """

    run: Callable[..., Any]
    fits: Callable[[Sequence[int]], bool]


class SymbolicSizes:
    """New symbols for the sizes of a graph that Dynamo left symbolic.

    Args:
        values: What the sizes are now, by Dynamo's symbols.
        fixed: Those that shall stay what they are.
    """

    def __init__(self, values: dict[Any, int], fixed: set[Any]) -> None:
        self._env = ShapeEnv()
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

    def size(self, size: int | torch.SymInt) -> int | torch.SymInt:
        """Return one of the graph's sizes in the new symbols."""
        if isinstance(size, int):
            return size
        return self._new(size.node.expr)

    def inputs(
        self, gm: fx.GraphModule, args: Sequence[Any], length: int | torch.SymInt
    ) -> list[Any]:
        """Return what to compile a graph with: its inputs, of symbolic sizes.

        Args:
            gm: The graph, as Dynamo traced it but for the inputs that were appended.
            args: The inputs of a call.
            length: The graph's size that the second dimension ``[B, T]`` of what has been appended
                is, the number of tokens.
        """
        return [
            self._input(node, arg, length) for node, arg in zip(placeholders(gm), args, strict=True)
        ]

    def _input(self, node: fx.Node, arg: Any, length: int | torch.SymInt) -> Any:
        traced = node.meta.get("example_value")
        if isinstance(traced, torch.SymInt):
            return self.size(traced)
        if not isinstance(arg, Tensor):
            return arg
        shape: Sequence[int | torch.SymInt] = arg.shape
        stride: Sequence[int | torch.SymInt] = arg.stride()
        if isinstance(traced, Tensor):
            shape, stride = traced.shape, traced.stride()
        elif node.name in TOKEN_INPUTS:
            shape, stride = (arg.shape[0], length), (length, 1)
        if all(isinstance(size, int) for size in (*shape, *stride)):
            return self._mode.from_tensor(arg, static_shapes=True)
        with self._mode, torch.no_grad():
            return torch.empty_strided(
                cast(Any, [self.size(size) for size in shape]),
                cast(Any, [self.size(step) for step in stride]),
                dtype=arg.dtype,
                device=arg.device,
            )

    def check(self) -> Callable[[Sequence[int]], bool]:
        """Return the function that tells whether what was assumed holds for sizes, in order.

        To be called when everything is compiled.
        """
        env, values = self._env, self._values
        assumed = env.produce_guards_expression(
            cast(Any, [self._new(symbol) for symbol in values]),
            ignore_static=False,
        )
        if assumed is None:
            return lambda sizes: True
        return lambda sizes: bool(env.evaluate_guards_expression(assumed, sizes))

    def _new(self, expression: Any) -> int | torch.SymInt:
        """Return what an expression of Dynamo's symbols is in the new ones."""
        value = int(expression.subs(self._values))
        # All at once: a new symbol may have the name of one of Dynamo's, and is then the same.
        renamed = expression.subs(self._fixed).xreplace(self._renamed)
        if renamed.is_number:
            return value
        symint: int | torch.SymInt = self._env.create_symintnode(renamed, hint=value)
        return symint
