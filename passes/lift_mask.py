"""Prove what the mask of an attention call is, from the graph that builds it.

The nodes that lead to ``attn_mask`` are read as one expression of (b, q, k), batch row, query row
and key column: every node becomes an expression of its own dimensions, and views, broadcasting
and vmap rename them. The boolean expression is then taken apart into intervals of keys per row.
The language of both is that of :mod:`blindsight.base_mask`.

What is not understood is a load from the tensor as it is. A mask that stays a load from a
[Q, K] tensor is opaque, and kept: nothing here is a guess. What the data alone can tell is listed
as a fact, to be checked on every call. Overflow of 64-bit integers is not modelled.

Shapes: B batch, H heads, Q query rows, K key columns, T tokens.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import fx

from blindsight.base_mask import Expression, Fact, Form
from blindsight.passes.find_attention import Attention
from blindsight.passes.graph import fake_tensor, same_size

_Axis = int | str  # a dimension of a node, a level of vmap, or "b", "h", "q", "k"

_NAMES_OF_OPERATORS = {
    operator.and_: "and",
    operator.or_: "or",
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
    "rsub": "rsub",
    "negative": "neg",
    "absolute": "abs",
    "floor_divide": "floordiv",
    "remainder": "mod",
    "minimum": "min",
    "maximum": "max",
}
_FLIPPED = {"le": "gt", "gt": "le", "lt": "ge", "ge": "lt", "eq": "ne", "ne": "eq"}
_ARITHMETIC = {"add", "sub", "mul", "floordiv", "mod", "min", "max"}
_FOLD: dict[str, Callable[[Any, Any], Any]] = {
    **{name: getattr(operator, name) for name in (*_FLIPPED, "add", "sub", "mul")},
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "min": min,
    "max": max,
}
_SAME_VALUES = {"contiguous", "clone", "detach", "alias", "lift_fresh_copy"}
_CASTS = {
    *("to", "_to_copy", "type", "type_as", "bool", "int", "long", "float", "half", "bfloat16"),
    "double",
}
_FILLS = {"new_ones": 1, "ones": 1, "ones_like": 1, "new_zeros": 0, "zeros": 0, "zeros_like": 0}
_VIEWS = {
    *("getitem", "unsqueeze", "squeeze", "expand", "expand_as", "broadcast_to", "view", "reshape"),
    *("transpose", "swapaxes", "permute", "t", "slice", "select"),
}
# Results that never share memory with an argument; what is in no table may.
_FRESH = {
    *("and", "or", "xor", "not", "abs", "neg", "where", "masked_fill", "arange", "full"),
    *("new_full", "full_like", "tril", "triu", "scalar_tensor", "tensor", "rsub", "cumsum"),
    *("diff", "sum", "pad", "embedding", "linear", "matmul", "cat", "stack", "rand", "index"),
    "scaled_dot_product_attention",
    *_FLIPPED,
    *_ARITHMETIC,
    *_FILLS,
}
_IN_PLACE_OPERATORS = {
    *("setitem", "delitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow"),
    *("iand", "ior", "ixor", "ilshift", "irshift", "imatmul"),
}
_MAX_LEAVES = 64  # of a nest of constants
_MAX_BOUND = 2**60  # beyond any column, and safe to add to


@dataclass(frozen=True)
class Lifted:
    """What is known of the mask of one attention call.

    Attributes:
        tier: 1 if the mask is an interval of keys per row, 2 if it is a scalar expression, 3 if
            it is opaque.
        reason: Why the tier is not 1, else "".
        form: Tier 1: the intervals, see :mod:`blindsight.base_mask`, with nodes for tensors.
        facts: Tier 1: what must hold of the data for the form to be the mask, and be checked.
        expression: Tiers 1 and 2: whether (b, q, k) is allowed, with nodes for tensors.
        before: A node before which form, facts and expression may be evaluated; later in the
            graph a tensor that they read may have been overwritten, such as a cache's length.
    """

    tier: int
    reason: str
    form: Form | None
    facts: tuple[Fact, ...]
    expression: Expression
    before: fx.Node


def lift_mask(gm: fx.GraphModule, call: Attention) -> Lifted:
    """Prove what the mask of a call is, as far as its graph tells; nothing is changed.

    Args:
        gm: A graph as Dynamo or ``torch.export`` traced it.
        call: A call in it.
    """
    if call.attn_mask is None:
        return _lift_flag(call)
    if call.is_causal:
        return _opaque(call.node, "both attn_mask and is_causal are given")
    reader = _Reader(gm)
    before = reader.first_after(reader.made_by(call.attn_mask))
    try:
        value = reader.read(call.attn_mask)
        reader.check_not_overwritten(call.attn_mask, before, call.node)
        expression = _over_named_axes(value)
    except _NotUnderstood as problem:
        return _opaque(before, str(problem))
    except RecursionError:
        return _opaque(before, "the graph that builds the mask is too deep")
    opaque = _opaque_part(expression)
    if opaque is not None:
        return _opaque(before, opaque)
    matcher = _Matcher()
    try:
        form = matcher.form(expression)
    except _NotIntervals as problem:
        return Lifted(2, str(problem), None, (), expression, before)
    return Lifted(1, "", form, tuple(matcher.facts), expression, before)


def _lift_flag(call: Attention) -> Lifted:
    """Return what a call without a mask says; ``is_causal`` is aligned at the top left."""
    if not call.is_causal:
        return Lifted(1, "", ("nothing",), (), True, call.node)
    row, column = ("index", "q"), ("index", "k")
    return Lifted(1, "", ("upper", row), (), ("le", column, row), call.node)


def _opaque(before: fx.Node, reason: str) -> Lifted:
    return Lifted(3, reason, None, (), None, before)


class _NotUnderstood(Exception):
    """The mask is opaque; says why."""


class _NotIntervals(Exception):
    """The mask is no conjunction of known intervals; says why."""


# Expressions, simplified as they are made.


def _is_constant(expression: Expression) -> bool:
    return isinstance(expression, bool | int | float)


def _is_op(expression: Expression, *names: str) -> bool:
    return isinstance(expression, tuple) and expression[0] in names


def _and(a: Expression, b: Expression) -> Expression:
    if a is True or b is False:
        return b
    if b is True or a is False:
        return a
    return a if a == b else ("and", a, b)


def _or(a: Expression, b: Expression) -> Expression:
    if a is False or b is True:
        return b
    if b is False or a is True:
        return a
    return a if a == b else ("or", a, b)


def _not(a: Expression) -> Expression:
    if isinstance(a, bool):
        return not a
    return a[1] if _is_op(a, "not") else ("not", a)


def _where(condition: Expression, a: Expression, b: Expression) -> Expression:
    """Choose between two numbers."""
    if isinstance(condition, bool):
        return a if condition else b
    return ("where", condition, a, b)


def _choose(condition: Expression, a: Expression, b: Expression) -> Expression:
    """Choose between two booleans."""
    return _or(_and(condition, a), _and(_not(condition), b))


def _leaves(expression: Expression) -> list[Any] | None:
    """Return the numbers that a nest of ``where`` chooses from, or None where there is more."""
    if _is_constant(expression):
        return [expression]
    if not _is_op(expression, "where"):
        return None
    a, b = _leaves(expression[2]), _leaves(expression[3])
    return None if a is None or b is None or len(a) + len(b) > _MAX_LEAVES else a + b


def _on_leaves(expression: Expression, function: Callable[[Any], Expression]) -> Expression:
    if _is_constant(expression):
        return function(expression)
    _, condition, a, b = expression
    return _where(condition, _on_leaves(a, function), _on_leaves(b, function))


def _choose_on_leaves(expression: Expression, function: Callable[[Any], bool]) -> Expression:
    """Return the boolean that a function of the chosen number gives."""
    if _is_constant(expression):
        return function(expression)
    _, condition, a, b = expression
    return _choose(condition, _choose_on_leaves(a, function), _choose_on_leaves(b, function))


def _substitute(expression: Expression, axes: Mapping[Any, Expression]) -> Expression:
    """Return an expression with other indices in place of some axes."""
    done: dict[int, Expression] = {}

    def walk(node: Expression) -> Expression:
        if not isinstance(node, tuple):
            return node
        if id(node) not in done:
            if node[0] == "index":
                done[id(node)] = axes.get(node[1], node)
            elif node[0] == "load":
                done[id(node)] = ("load", node[1], tuple(walk(index) for index in node[2]))
            else:
                done[id(node)] = (node[0], *(walk(part) for part in node[1:]))
        return done[id(node)]

    return walk(expression)


def _parts(expression: Expression) -> Iterator[tuple[Any, ...]]:
    """Yield all operations in an expression, each object once."""
    waiting, seen = [expression], set()
    while waiting:
        node = waiting.pop()
        if not isinstance(node, tuple) or id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node[0], str):
            yield node
        waiting.extend(node[2] if node[0] == "load" else node[1:])


def _axes(expression: Expression) -> frozenset[Any]:
    return frozenset(part[1] for part in _parts(expression) if part[0] == "index")


def _bare_axes(expression: Expression) -> frozenset[Any]:
    """Return the axes that are used as numbers, not only to load from a tensor."""
    if not isinstance(expression, tuple) or expression[0] == "load":
        return frozenset()
    if expression[0] == "index":
        return frozenset((expression[1],))
    return frozenset().union(*(_bare_axes(part) for part in expression[1:]))


def _loads(expression: Expression) -> list[tuple[Any, ...]]:
    return [part for part in _parts(expression) if part[0] == "load"]


# Reading the graph.


@dataclass(frozen=True)
class _Value:
    """What a node holds: an expression of its dimensions, ``("index", 0)`` and so on.

    No dimension of size one appears in it. Inside a vmap the shape is what a function sees, and
    the axes that vmap hides have names of their own.
    """

    expression: Expression
    shape: tuple[Any, ...]
    dtype: torch.dtype

    @property
    def kind(self) -> str:
        if self.dtype == torch.bool:
            return "bool"
        if self.dtype.is_floating_point:
            return "float"
        return "complex" if self.dtype.is_complex else "int"


_Operand = _Value | bool | int | float | fx.Node  # a node is a symbolic size


class _CannotRead(Exception):
    """An operation is not understood; its result may still be loaded from."""


class _Reader:
    """Reads nodes as expressions."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self._nodes = list(gm.graph.nodes)
        self._position = {node: position for position, node in enumerate(self._nodes)}
        self._nesting = _nesting(self._nodes)
        self._values: dict[fx.Node, _Value] = {}
        self._read: set[fx.Node] = set()
        self._sizes: dict[str, fx.Node] = {}

    def made_by(self, node: fx.Node) -> fx.Node:
        """Return the node that computes what a chain of views shows."""
        while _name(node) in _VIEWS:
            source, *others = node.all_input_nodes
            if any(fake_tensor(other) is not None for other in others):
                break
            node = source
        return node

    def first_after(self, node: fx.Node) -> fx.Node:
        """Return the first node after another that is outside of any vmap and of the inputs."""
        position = self._position[node] + 1
        after: fx.Node = self._nodes[position]
        while self._nesting[after] or after.op in ("placeholder", "get_attr"):
            position += 1
            after = self._nodes[position]
        return after

    def check_not_overwritten(self, mask: fx.Node, before: fx.Node, call: fx.Node) -> None:
        """Raise where a tensor changes between where the graph reads it and where we would."""
        groups = _MemoryGroups(self._nodes)
        ours = {groups.find(node) for node in self._read}
        # The mask may also be changed after it was made, until it is used.
        masks = groups.find(mask)
        for node in self._nodes[: self._position[call]]:
            for target in _overwritten(node):
                group = groups.find(target)
                early = self._position[node] < self._position[before]
                if group == masks or (early and group in ours):
                    raise _NotUnderstood(f"{_name(node)} writes into a tensor that the mask uses")

    def read(self, node: fx.Node) -> _Value:
        if node not in self._values:
            self._read.add(node)
            self._values[node] = self._compute(node)
        return self._values[node]

    def _compute(self, node: fx.Node) -> _Value:
        fake = fake_tensor(node)
        if fake is None or fake.layout != torch.strided:
            raise _NotUnderstood(f"{_name(node)} gives no dense tensor")
        shape, dtype = tuple(fake.shape), fake.dtype
        try:
            expression = self._expression(node, shape, dtype)
        except _CannotRead:
            return self._leaf(node, shape, dtype)
        ones = {axis: 0 for axis, size in enumerate(shape) if same_size(size, 1)}
        value = _Value(_substitute(expression, ones), shape, dtype)
        return self._leaf(node, shape, dtype) if self._is_plain_data(node, value) else value

    def _leaf(self, node: fx.Node, shape: tuple[Any, ...], dtype: torch.dtype) -> _Value:
        if self._is_hidden(node):
            raise _NotUnderstood(f"{_name(node)} inside a vmap is not understood")
        indices = tuple(
            0 if same_size(size, 1) else ("index", axis) for axis, size in enumerate(shape)
        )
        return _Value(("load", node, indices), shape, dtype)

    def _is_hidden(self, node: fx.Node) -> bool:
        """Whether a node inside a vmap depends on what vmap hides."""
        if not self._nesting[node]:
            return False
        if _name(node) == "_add_batch_dim":
            return True
        hidden = set(self._nesting[node])
        return any(
            self._is_hidden(parent)
            if fake_tensor(parent) is None
            else bool(_axes(self.read(parent).expression) & hidden)
            for parent in node.all_input_nodes
        )

    def _is_plain_data(self, node: fx.Node, value: _Value) -> bool:
        """Whether an expression only computes with tables of tokens, element by element."""
        expression = value.expression
        is_table = len(value.shape) <= 2 and not _bare_axes(expression)
        if not is_table or _is_op(expression, "load") or _name(node) in _VIEWS:
            return False
        if _leaves(expression) is not None:
            return False
        full = {axis for axis, size in enumerate(value.shape) if not same_size(size, 1)}
        loads = _loads(expression)
        return bool(loads) and all(_axes(load) == full for load in loads)

    # One operation.

    def _expression(self, node: fx.Node, shape: tuple[Any, ...], dtype: torch.dtype) -> Expression:
        if node.op not in ("call_function", "call_method"):
            raise _CannotRead
        name = _name(node)
        if "out" in node.kwargs:
            raise _CannotRead
        if name in ("_add_batch_dim", "_remove_batch_dim"):
            return self._batch_dim(node, name)
        if name in ("getitem", "index", "slice", "select"):
            return self._getitem(node, name)
        if name in _VIEWS or name in _SAME_VALUES or name in _CASTS:
            return self._view(node, name, shape, dtype)
        if name in _FILLS:
            return _number(_FILLS[name], dtype)
        if name in ("full", "new_full", "full_like", "tensor", "scalar_tensor"):
            at = {"tensor": 0, "scalar_tensor": 0, "new_full": 2}.get(name, 1)
            fill = node.kwargs.get("fill_value", node.args[at] if len(node.args) > at else None)
            if not _is_constant(fill):
                raise _CannotRead
            return _number(fill, dtype)
        if name == "arange":
            return self._arange(node, dtype)
        if name in ("tril", "triu"):
            return self._triangle(node, name, shape, dtype)
        if name in ("where", "masked_fill"):
            return self._select(node, name, shape, dtype)
        if name in _FOLD or name in ("and", "or", "xor", "not", "abs", "neg", "rsub", "div"):
            return self._pointwise(node, name, shape, dtype)
        raise _CannotRead

    def _operand(self, argument: object) -> _Operand:
        if isinstance(argument, fx.Node):
            is_size = fake_tensor(argument) is None
            return self._size(argument) if is_size else self.read(argument)
        if _is_constant(argument):
            return cast("bool | int | float", argument)
        raise _CannotRead

    def _size(self, node: fx.Node) -> fx.Node:
        """Return one node for all that hold the same symbolic size."""
        value = node.meta.get("example_value", node.meta.get("val"))
        if not isinstance(value, torch.SymInt):
            raise _CannotRead
        self._read.add(node)
        return self._sizes.setdefault(str(value), node)

    def _aligned(self, operand: _Operand, shape: tuple[Any, ...]) -> Expression:
        """Return an operand as an expression of the dimensions of a result."""
        if not isinstance(operand, _Value):
            return operand
        shift = len(shape) - len(operand.shape)
        if shift == 0:
            return operand.expression
        return _substitute(
            operand.expression,
            {axis: ("index", axis + shift) for axis in range(len(operand.shape))},
        )

    def _batch_dim(self, node: fx.Node, name: str) -> Expression:
        """Give the axis that vmap hides a name, or its place in the result."""
        tensor, second, third, *rest = node.args
        value = self._operand(tensor)
        if not isinstance(value, _Value) or not isinstance(second, int):
            raise _NotUnderstood("vmap over something that is no tensor")
        rank = len(value.shape)
        if name == "_add_batch_dim":
            dim, level = second % rank, cast(int, third)
            hidden = self._level(node, level)
            axes: dict[_Axis, Expression] = {
                axis: ("index", axis - 1) for axis in range(dim + 1, rank)
            }
            axes[dim] = ("index", hidden)
        else:
            level, dim = second, cast(int, rest[0]) % (rank + 1)
            axes = {axis: ("index", axis + 1) for axis in range(dim, rank)}
            axes[self._level(node, level)] = ("index", dim)
        return _substitute(value.expression, axes)

    def _level(self, node: fx.Node, level: int) -> str:
        nesting = self._nesting[node]
        if not 1 <= level <= len(nesting):
            raise _NotUnderstood("a level of vmap is not in the graph")
        return nesting[level - 1]

    def _arange(self, node: fx.Node, dtype: torch.dtype) -> Expression:
        args, kwargs = list(node.args), node.kwargs
        if len(args) == 1 and "end" not in kwargs:
            args.insert(0, 0)
        start = self._operand(kwargs.get("start", args[0] if args else 0))
        step = self._operand(kwargs.get("step", args[2] if len(args) > 2 else 1))
        whole = type(step) is int and (type(start) is int or isinstance(start, fx.Node))
        if not whole or dtype not in (torch.int32, torch.int64):
            raise _CannotRead
        return _arithmetic("add", _arithmetic("mul", ("index", 0), step), start)

    def _triangle(
        self, node: fx.Node, name: str, shape: tuple[Any, ...], dtype: torch.dtype
    ) -> Expression:
        value = self._operand(node.args[0])
        diagonal = node.kwargs.get("diagonal", node.args[1] if len(node.args) > 1 else 0)
        if not isinstance(value, _Value) or not isinstance(diagonal, int) or len(shape) < 2:
            raise _CannotRead
        row, column = ("index", len(shape) - 2), ("index", len(shape) - 1)
        edge = _arithmetic("add", row, diagonal)
        inside = ("le" if name == "tril" else "ge", column, edge)
        if value.kind == "bool":
            return _and(inside, value.expression)
        if _leaves(value.expression) is None:
            raise _CannotRead
        return _where(inside, value.expression, _number(0, dtype))

    def _select(
        self, node: fx.Node, name: str, shape: tuple[Any, ...], dtype: torch.dtype
    ) -> Expression:
        if len(node.args) != 3 or node.kwargs:
            raise _CannotRead
        condition, a, b = (self._operand(arg) for arg in node.args)
        if name == "masked_fill":
            condition, a, b = a, b, condition
        elif node.op == "call_method" or node.target is torch.Tensor.where:
            condition, a = a, condition
        if not isinstance(condition, _Value) or condition.kind != "bool":
            raise _CannotRead
        chosen = [self._cast(self._aligned(x, shape), _kind(x), dtype) for x in (a, b)]
        where = _choose if dtype == torch.bool else _where
        return where(self._aligned(condition, shape), chosen[0], chosen[1])

    def _cast(self, expression: Expression, kind: str, dtype: torch.dtype) -> Expression:
        """Return a value in another dtype."""
        if dtype == torch.bool:
            if kind == "bool":
                return expression
            if _leaves(expression) is not None:
                return _choose_on_leaves(expression, bool)
            return ("ne", expression, 0)
        if kind == "bool":
            return _where(expression, _number(1, dtype), _number(0, dtype))
        if _leaves(expression) is not None:
            return _on_leaves(expression, lambda leaf: _number(leaf, dtype))
        # Positions fit in 32 bits; data may not.
        safe = dtype == torch.int64 or (dtype == torch.int32 and not _loads(expression))
        if kind == "int" and safe:
            return expression
        raise _CannotRead

    def _pointwise(
        self, node: fx.Node, name: str, shape: tuple[Any, ...], dtype: torch.dtype
    ) -> Expression:
        operands = [self._operand(arg) for arg in node.args]
        if name == "div" and node.kwargs == {"rounding_mode": "floor"}:
            name = "floordiv"
        elif node.kwargs or name == "div":
            raise _CannotRead
        if name == "rsub":
            name, operands = "sub", operands[::-1]
        kinds = {_kind(operand) for operand in operands}
        parts = [self._aligned(operand, shape) for operand in operands]
        if name in ("and", "or", "xor", "not"):
            if name == "not" and kinds == {"bool"}:
                return _not(parts[0])
            # logical_and of numbers asks whether they are zero; bitwise_and does not.
            if len(parts) != 2 or kinds != {"bool"}:
                raise _CannotRead
            if name == "xor":
                return _choose(parts[0], _not(parts[1]), parts[1])
            return (_and if name == "and" else _or)(parts[0], parts[1])
        if name in ("abs", "neg"):
            if kinds != {"int"} or not _is_safe(dtype, parts):
                raise _CannotRead
            return (name, parts[0])
        if len(parts) != 2:
            raise _CannotRead
        constants = [_leaves(part) for part in parts]
        if constants[0] is not None and constants[1] is not None:
            if len(constants[0]) * len(constants[1]) > _MAX_LEAVES:
                raise _CannotRead
            return self._fold(name, operands, parts, dtype)
        if name in _FLIPPED:
            return self._comparison(name, kinds, parts)
        if kinds == {"bool"} and dtype == torch.bool and name == "mul":
            return _and(parts[0], parts[1])
        if kinds != {"int"} or not _is_safe(dtype, parts):
            raise _CannotRead
        if name in ("floordiv", "mod") and not (type(parts[1]) is int and parts[1] > 0):
            raise _CannotRead
        return _arithmetic(name, parts[0], parts[1])

    def _fold(
        self, name: str, operands: Sequence[_Operand], parts: Sequence[Any], dtype: torch.dtype
    ) -> Expression:
        """Compute with numbers that conditions choose, in the precision of the graph."""
        kinds = {_kind(operand) for operand in operands}
        if "complex" in kinds:
            raise _CannotRead
        function = _FOLD[name]

        def compute(a: Any, b: Any) -> Any:
            if a != a or b != b or (name in ("floordiv", "mod") and b == 0):
                raise _CannotRead
            return _number(function(a, b), dtype)

        if name not in _FLIPPED:
            return _on_leaves(parts[0], lambda a: _on_leaves(parts[1], lambda b: compute(a, b)))
        narrow = [
            operand.dtype
            for operand in operands
            if isinstance(operand, _Value) and operand.kind == "float"
        ]

        def compare(a: Any, b: Any) -> bool:
            # A number may be rounded before it is compared; it must not matter.
            found = {bool(function(_number(a, d), _number(b, d))) for d in narrow}
            if a != a or b != b or found - {function(a, b)}:
                raise _CannotRead
            return bool(function(a, b))

        if _is_constant(parts[0]):
            return _choose_on_leaves(parts[1], lambda b: compare(parts[0], b))
        if _is_constant(parts[1]):
            return _choose_on_leaves(parts[0], lambda a: compare(a, parts[1]))
        raise _CannotRead

    def _comparison(self, name: str, kinds: set[str], parts: list[Expression]) -> Expression:
        if kinds == {"bool"} and name in ("eq", "ne"):
            same = _choose(parts[0], parts[1], _not(parts[1]))
            return same if name == "eq" else _not(same)
        # Mixed with floats, integers are rounded before they are compared.
        if kinds != {"int"} and any(_bare_axes(part) for part in parts):
            raise _CannotRead
        return (name, parts[0], parts[1])

    # Views and indices.

    def _view(
        self, node: fx.Node, name: str, shape: tuple[Any, ...], dtype: torch.dtype
    ) -> Expression:
        value = self._operand(node.args[0])
        if not isinstance(value, _Value):
            raise _CannotRead
        if dtype != value.dtype:
            if name not in _CASTS:
                raise _CannotRead
            return self._cast(value.expression, value.kind, dtype)
        if name in _CASTS or name in _SAME_VALUES:
            return value.expression
        rank = len(value.shape)
        if name in ("expand", "expand_as", "broadcast_to"):
            return self._aligned(value, shape)
        if name in ("transpose", "swapaxes", "permute", "t"):
            order = _order(node, name, rank)
            axes = {old: ("index", new) for new, old in enumerate(order)}
            return _substitute(value.expression, axes)
        # The others only add and drop dimensions of size one, or are not understood.
        old = [axis for axis in range(rank) if not same_size(value.shape[axis], 1)]
        new = [axis for axis in range(len(shape)) if not same_size(shape[axis], 1)]
        if len(old) != len(new) or not all(
            same_size(value.shape[a], shape[b]) for a, b in zip(old, new, strict=True)
        ):
            raise _CannotRead
        return _substitute(
            value.expression, {a: ("index", b) for a, b in zip(old, new, strict=True)}
        )

    def _getitem(self, node: fx.Node, name: str) -> Expression:
        value = self._operand(node.args[0])
        if not isinstance(value, _Value):
            raise _CannotRead
        index = _index_of_dim(node, name) if name in ("slice", "select") else node.args[1]
        parts = list(index) if isinstance(index, tuple | list) else [index]
        if isinstance(index, list) and name == "getitem":
            raise _CannotRead
        if name == "index":
            parts = [slice(None) if part is None else part for part in parts]
        given = sum(part is not None and part is not Ellipsis for part in parts)
        missing = [slice(None)] * (len(value.shape) - given)
        if Ellipsis in [part for part in parts if not isinstance(part, fx.Node)]:
            at = next(i for i, part in enumerate(parts) if part is Ellipsis)
            parts[at : at + 1] = missing
        else:
            parts += missing
        tensors = [isinstance(part, fx.Node) and fake_tensor(part) is not None for part in parts]
        if any(tensors):
            return self._advanced(node, value, parts, tensors)
        axes: dict[Any, Expression] = {}
        old = new = 0
        for part in parts:
            if part is None:
                new += 1
                continue
            if isinstance(part, slice):
                axes[old] = _arithmetic("add", ("index", new), _slice_start(part, value.shape[old]))
                new += 1
            elif type(part) is int:
                axes[old] = _from_start(part, value.shape[old])
            else:
                raise _CannotRead
            old += 1
        return _substitute(value.expression, axes)

    def _advanced(
        self, node: fx.Node, value: _Value, parts: list[Any], tensors: list[bool]
    ) -> Expression:
        """Read ``tensor[indices]`` with tensors among the indices."""
        for part, is_tensor in zip(parts, tensors, strict=True):
            if not is_tensor and part != slice(None) and part is not None:
                raise _CannotRead
        indices = [self.read(parts[at]) for at, is_tensor in enumerate(tensors) if is_tensor]
        if any(index.kind != "int" for index in indices):
            raise _CannotRead
        rank = max(len(index.shape) for index in indices)
        places = [place for place, is_tensor in enumerate(tensors) if is_tensor]
        adjacent = places == list(range(places[0], places[-1] + 1))
        start = places[0] if adjacent else 0
        axes: dict[Any, Expression] = {}
        old, new = 0, 0 if adjacent else rank
        counted = False
        aligned = iter(indices)
        for part, is_tensor in zip(parts, tensors, strict=True):
            if is_tensor:
                if adjacent and not counted:
                    new, counted = new + rank, True
                index = next(aligned)
                shift = start + rank - len(index.shape)
                axes[old] = _substitute(
                    index.expression,
                    {axis: ("index", axis + shift) for axis in range(len(index.shape))},
                )
                old += 1
                continue
            if part is not None:
                axes[old] = ("index", new)
                old += 1
            new += 1
        # An index below zero counts from the end: the expression of a position knows no end.
        if all(_is_direct(value, axis) or _is_natural(index) for axis, index in axes.items()):
            return _substitute(value.expression, axes)
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if self._is_hidden(source):
            raise _CannotRead
        return ("load", source, tuple(axes[axis] for axis in range(len(value.shape))))


def _name(node: fx.Node) -> str:
    """Return what a node does: one name for all spellings of an operation."""
    target = node.target
    if node.op in ("placeholder", "get_attr", "output"):
        return node.op
    if isinstance(target, str):
        name = target
    elif target in _NAMES_OF_OPERATORS:
        name = _NAMES_OF_OPERATORS[target]
    elif isinstance(target, torch._ops.OpOverload):
        name = target.overloadpacket.__name__
    else:
        name = getattr(target, "__name__", str(target))
    if name.startswith("__") and name.endswith("__"):
        name = {"rand": "and", "ror": "or"}.get(name[2:-2], name[2:-2])
    if name == "reshape_as" or name == "view_as":
        return "reshape"
    return _SYNONYMS.get(name, name)


def _kind(operand: _Operand) -> str:
    if isinstance(operand, _Value):
        return operand.kind
    return "int" if isinstance(operand, fx.Node) else type(operand).__name__


def _number(value: Any, dtype: torch.dtype) -> Any:
    """Return a number as a tensor of a dtype holds it."""
    if dtype.is_complex:
        raise _CannotRead
    if dtype == torch.bool:
        return bool(value)
    if dtype.is_floating_point:
        return float(torch.tensor(float(value), dtype=dtype))
    if not math.isfinite(value) or not torch.iinfo(dtype).min <= value <= torch.iinfo(dtype).max:
        raise _CannotRead
    return int(value)


def _arithmetic(name: str, a: Expression, b: Expression) -> Expression:
    """Compute with integers."""
    if type(a) is int and type(b) is int:
        return _FOLD[name](a, b)
    if (name in ("add", "sub") and b == 0) or (name in ("mul", "floordiv") and b == 1):
        return a
    if name == "add" and a == 0:
        return b
    return (name, a, b)


def _is_safe(dtype: torch.dtype, parts: Sequence[Expression]) -> bool:
    """Whether integers of a dtype may be computed with as if they had no limits."""
    return dtype == torch.int64 or (
        dtype == torch.int32 and not any(_loads(part) for part in parts)
    )


def _order(node: fx.Node, name: str, rank: int) -> list[int]:
    """Return which old dimension each new one is."""
    if node.kwargs:
        raise _CannotRead
    order = list(range(rank))
    if name == "permute":
        given = node.args[1] if isinstance(node.args[1], tuple | list) else node.args[1:]
        return [cast(int, dim) % rank for dim in given]
    if name == "t":
        return order[::-1]
    a, b = (cast(int, dim) % rank for dim in node.args[1:3])
    order[a], order[b] = order[b], order[a]
    return order


def _index_of_dim(node: fx.Node, name: str) -> list[Any]:
    """Return the index that ATen's ``slice`` or ``select`` stands for."""
    if node.kwargs:
        raise _CannotRead
    _, dim, *rest = (*node.args, 0) if len(node.args) == 1 else node.args
    fake = fake_tensor(node.args[0])
    if fake is None or not isinstance(dim, int) or fake_tensor(rest and rest[0]) is not None:
        raise _CannotRead
    part = rest[0] if name == "select" else slice(*(rest + [None] * 3)[:3])
    return [slice(None)] * (dim % fake.dim()) + [part]


def _slice_start(part: slice, size: Any) -> int:
    if part.step not in (None, 1) or not (part.start is None or type(part.start) is int):
        raise _CannotRead
    return 0 if part.start is None else _from_start(part.start, size, clip=True)


def _from_start(index: int, size: Any, *, clip: bool = False) -> int:
    if index >= 0:
        return index
    if type(size) is not int:
        raise _CannotRead
    return max(index + size, 0) if clip else index + size


def _is_direct(value: _Value, axis: int) -> bool:
    """Whether a value is a plain load in which a dimension is one of the tensor's own."""
    if same_size(value.shape[axis], 1):
        return True
    if not _is_op(value.expression, "load"):
        return False
    _, node, indices = value.expression
    fake = fake_tensor(node)
    return fake is not None and all(
        index == ("index", axis) and same_size(fake.shape[dim], value.shape[axis])
        for dim, index in enumerate(indices)
        if axis in _axes(index)
    )


def _is_natural(expression: Expression) -> bool:
    """Whether an integer is known not to be negative."""
    if type(expression) is int:
        return expression >= 0
    if isinstance(expression, fx.Node):
        size = expression.meta.get("example_value", expression.meta.get("val"))
        return isinstance(size, torch.SymInt) and bool(size.node.expr.is_nonnegative)
    if _is_op(expression, "index"):
        return True
    if _is_op(expression, "add", "mul", "floordiv", "min"):
        return all(_is_natural(part) for part in expression[1:])
    return _is_op(expression, "abs")


def _nesting(nodes: Sequence[fx.Node]) -> dict[fx.Node, tuple[str, ...]]:
    """Return the vmaps around each node, the outermost first."""
    around: dict[fx.Node, tuple[str, ...]] = {}
    stack: tuple[str, ...] = ()
    for node in nodes:
        if _name(node) == "_vmap_increment_nesting":
            stack = (*stack, f"vmap {node.name}")
        around[node] = stack
        if _name(node) == "_vmap_decrement_nesting":
            stack = stack[:-1]
    return around


class _MemoryGroups:
    """Which nodes may share memory; errs on the side of sharing."""

    def __init__(self, nodes: Sequence[fx.Node]) -> None:
        self._leader = {node: node for node in nodes}
        for node in nodes:
            if _name(node) in _FRESH:
                continue
            # What writes into an argument returns that.
            written = _overwritten(node)
            for parent in written or node.all_input_nodes:
                if written or _may_share(node, parent):
                    self._leader[self.find(parent)] = self.find(node)

    def find(self, node: fx.Node) -> fx.Node:
        while self._leader[node] is not node:
            self._leader[node] = self._leader[self._leader[node]]
            node = self._leader[node]
        return node


def _may_share(node: fx.Node, parent: fx.Node) -> bool:
    """Whether a result may be a view of an argument."""
    result, argument = fake_tensor(node), fake_tensor(parent)
    if argument is None:
        # An element of what a split returned, say, or a size.
        held = parent.meta.get("example_value", parent.meta.get("val"))
        return isinstance(held, tuple | list)
    if result is None:
        return node.op != "output"
    return result.dtype == argument.dtype or _name(node).startswith("view")


def _overwritten(node: fx.Node) -> list[fx.Node]:
    """Return the tensors that a node writes into."""
    if node.op not in ("call_function", "call_method"):
        return []
    name, target = _name(node), node.target
    if isinstance(target, torch._ops.OpOverloadPacket):
        target = getattr(target, "default", target)
    if isinstance(target, torch._ops.OpOverload):
        return node.all_input_nodes if target._schema.is_mutable else []
    if isinstance(target, torch._ops.HigherOrderOperator):
        return node.all_input_nodes if "mutation" in name else []
    found = [node.kwargs["out"]] if "out" in node.kwargs else []
    writes = name in _IN_PLACE_OPERATORS or (name.endswith("_") and not name.endswith("__"))
    if writes or node.kwargs.get("inplace") is True:
        found.append(node.args[0] if node.args else node.kwargs.get("input"))
    if all(isinstance(written, fx.Node) for written in found):
        return cast(list[fx.Node], found)
    return node.all_input_nodes


def _over_named_axes(value: _Value) -> Expression:
    """Return whether (b, q, k) is allowed, from a mask that broadcasts to [B, H, Q, K]."""
    names = ("b", "h", "q", "k")[4 - min(len(value.shape), 4) :]
    if len(value.shape) > 4:
        raise _NotUnderstood("the mask has more than four dimensions")
    expression = _substitute(
        value.expression, {axis: ("index", name) for axis, name in enumerate(names)}
    )
    if value.kind == "float":
        leaves = _leaves(expression)
        if leaves is None:
            raise _NotUnderstood("the mask is a bias that is not understood")
        lowest = torch.finfo(value.dtype).min
        if not all(leaf == 0 or leaf <= lowest for leaf in leaves):
            raise _NotUnderstood("the mask is a bias other than 0 and -inf")
        expression = _choose_on_leaves(expression, lambda leaf: bool(leaf == 0))
    elif value.kind != "bool":
        raise _NotUnderstood("the mask is neither bool nor float")
    if "h" in _axes(expression):
        raise _NotUnderstood("the mask differs from head to head")
    return expression


def _opaque_part(expression: Expression) -> str | None:
    """Return why an expression still needs a tensor of queries x keys, if it does."""
    for load in _loads(expression):
        if {"q", "k"} <= _axes(load):
            node = load[1]
            if node.op == "placeholder":
                return f"the mask is an input of the graph: {node.name}"
            return f"{_name(node)} is not understood: {node.name}"
    return None


# Taking a boolean expression apart into intervals.


@dataclass(frozen=True)
class _Context:
    """What else must hold where a part of the mask matters.

    Attributes:
        rows: Condition on the row.
        sames: Pairs of a row's value and a column's value that are equal.
        is_top: Whether the part is not inside a union.
    """

    rows: Expression = True
    sames: tuple[tuple[Expression, Expression], ...] = ()
    is_top: bool = True


class _Matcher:
    """Turns an expression into a form, and collects the facts that this needs."""

    def __init__(self) -> None:
        self.facts: dict[Fact, None] = {}

    def form(self, expression: Expression) -> Form:
        return self._all_of(_flatten("and", _normal(expression, False)), _Context())

    def _all_of(self, parts: Sequence[Expression], context: _Context) -> Form:
        """Return the form of a conjunction."""
        forms: list[Form] = []
        sames: list[tuple[Expression, Expression]] = []
        waiting: list[Expression] = []
        rows = context.rows
        for part in dict.fromkeys(parts):
            if part is True:
                continue
            axes = _axes(part)
            if (found := _bounds(part)) is not None:
                forms.extend(found)
            elif axes <= {"b", "q"}:
                rows = _and(rows, part)
                forms.append(("row", part))
            elif axes <= {"b", "k"}:
                if not context.is_top:
                    raise _NotIntervals("a condition on keys is one way of several to be seen")
                forms.append(("valid", part))
            elif (same := _same(part)) is not None:
                sames.append(same)
            else:
                waiting.append(part)
        inner = replace(
            context, rows=rows, sames=(*context.sames, *dict.fromkeys(sames)), is_top=False
        )
        if sames:
            forms.extend(self._equalities(list(dict.fromkeys(sames)), inner))
        for part in waiting:
            if _is_op(part, "or"):
                forms.append(self._any_of(_flatten("or", part), inner))
            elif (remapped := self._remapped(part, inner)) is not None:
                forms.extend(remapped)
            else:
                raise _NotIntervals(f"{_shown(part)} is no interval of keys")
        forms = [form for form in dict.fromkeys(forms) if form != ("nothing",)]
        if not forms:
            return ("nothing",)
        return forms[0] if len(forms) == 1 else ("and", *forms)

    def _any_of(self, parts: Sequence[Expression], context: _Context) -> Form:
        """Return the form of a disjunction, if it is one interval."""
        forms = [self._all_of(_flatten("and", part), context) for part in parts]
        forms = list(dict.fromkeys(forms))
        if ("nothing",) in forms:
            return ("nothing",)
        for name, widest in (("upper", "max"), ("lower", "min")):
            if all(form[0] == name for form in forms):
                edge = forms[0][1]
                for form in forms[1:]:
                    edge = (widest, edge, form[1])
                return (name, edge)
        if len(forms) == 1:
            return forms[0]
        plain = [form for form in forms if form[0] != "row" and not _depends_on_data(form)]
        if not all(_always_touch(a, b) for a, b in itertools.combinations(plain, 2)):
            raise _NotIntervals("what a query sees is more than one interval of keys")
        if len(plain) == len(forms):
            return ("or", *forms)
        # Whether groups of equal values join the rest, only the data can tell.
        self.facts["connected", context.rows, tuple(forms)] = None
        return ("or", *forms)

    def _equalities(
        self, sames: list[tuple[Expression, Expression]], context: _Context
    ) -> list[Form]:
        """Return the forms of ``value of the row == value of the column``."""
        if all(_is_monotone(column) for _, column in sames):
            return [("same", (row,), (column,), _is_monotone(column) == 1) for row, column in sames]
        # Values that come back in another sequence tell tokens apart together with its number.
        rows, columns = zip(*context.sames, strict=True)
        self.facts["contiguous", context.rows, rows, columns] = None
        return [("same", rows, columns, False)]

    def _remapped(self, part: Expression, context: _Context) -> list[Form] | None:
        """Compare the positions of two tokens of a sequence by where the tokens are."""
        if not _is_integer_comparison(part):
            return None
        loads = list(dict.fromkeys(_loads(part)))
        if len({(load[1], load[2][:-1]) for load in loads}) != 1:
            return None
        positions, batch = loads[0][1], loads[0][2][:-1]
        tokens = {load[2][-1] for load in loads}
        if not _is_per_token(positions, batch) or len(tokens) != 2:
            return None
        by_axis = {_only_axis(token): token for token in tokens}
        if set(by_axis) != {"q", "k"} or not all(_is_natural(token) for token in tokens):
            return None
        difference = _linear(("sub", part[1], part[2]))
        if sum(difference.get(load, 0) for load in loads) != 0:
            return None
        if any(load not in difference for load in loads):
            return None
        ids = None
        for row, column in context.sames:
            if (
                _is_op(row, "load")
                and _is_op(column, "load")
                and row[1] is column[1]
                and row[2][:-1] == column[2][:-1]
                and _is_per_token(row[1], row[2][:-1])
                and (row[2][-1], column[2][-1]) == (by_axis["q"], by_axis["k"])
                and _num_tokens(row[1]) == _num_tokens(positions)
            ):
                ids = row[1]
        replaced = {load: load[2][-1] for load in loads}
        found = _bounds((part[0], *(_exchange(side, replaced) for side in part[1:])))
        if found is not None:
            chosen = _chosen(batch)
            self.facts["consecutive", (positions, *chosen) if chosen else positions, ids] = None
        return found


def _normal(expression: Expression, negate: bool) -> Expression:
    """Return a boolean expression with its negations at the leaves, and ``abs`` written out."""
    if isinstance(expression, bool):
        return expression != negate
    name = expression[0] if isinstance(expression, tuple) else ""
    if name == "not":
        return _normal(expression[1], not negate)
    if name in ("and", "or"):
        join = _and if (name == "and") != negate else _or
        return join(_normal(expression[1], negate), _normal(expression[2], negate))
    if name not in _FLIPPED or not _is_integer_comparison(expression):
        return _not(expression) if negate else expression
    if negate:
        name = _FLIPPED[name]
    a, b = expression[1:]
    if _is_op(b, "abs") and not _is_op(a, "abs"):
        a, b = b, a
        name = {"le": "ge", "ge": "le", "lt": "gt", "gt": "lt"}.get(name, name)
    if _is_op(a, "abs") and not _is_op(b, "abs"):
        inside, minus = a[1], ("neg", b)
        if name in ("le", "lt"):
            return _and((name, inside, b), ("ge" if name == "le" else "gt", inside, minus))
        if name in ("ge", "gt"):
            return _or((name, inside, b), ("le" if name == "ge" else "lt", inside, minus))
    constant = _constant_comparison(name, a, b)
    return (name, a, b) if constant is None else constant


def _constant_comparison(name: str, a: Expression, b: Expression) -> bool | None:
    """Return the value of a comparison that no token can change."""
    difference = _linear(("sub", a, b))
    constant = difference.pop(None, 0)
    if not difference and name in _FOLD:
        return bool(_FOLD[name](constant, 0))
    natural = all(_is_op(term, "index") and factor > 0 for term, factor in difference.items())
    if natural and ((name == "ge" and constant >= 0) or (name == "gt" and constant > 0)):
        return True
    if natural and ((name == "lt" and constant >= 0) or (name == "le" and constant > 0)):
        return False
    return None


def _flatten(name: str, expression: Expression) -> list[Expression]:
    if not _is_op(expression, name):
        return [expression]
    return [leaf for part in expression[1:] for leaf in _flatten(name, part)]


def _is_integer(expression: Expression) -> bool:
    if type(expression) is int or isinstance(expression, fx.Node):
        return True
    if not isinstance(expression, tuple):
        return False
    if expression[0] == "load":
        fake = fake_tensor(expression[1])
        return fake is not None and _Value(0, (), fake.dtype).kind == "int"
    if expression[0] == "where":
        return all(_is_integer(part) for part in expression[2:])
    return expression[0] == "index" or (
        expression[0] in (*_ARITHMETIC, "neg", "abs")
        and all(_is_integer(part) for part in expression[1:])
    )


def _is_integer_comparison(expression: Expression) -> bool:
    return _is_op(expression, *_FLIPPED) and all(_is_integer(part) for part in expression[1:])


def _linear(expression: Expression) -> dict[Expression | None, int]:
    """Return the factor of each term of a sum; that of None is the constant."""
    if type(expression) is int:
        return {None: expression}
    terms: dict[Expression | None, int] = {}
    if _is_op(expression, "add", "sub", "neg"):
        parts = [_linear(part) for part in expression[1:]]
        signs = {"add": (1, 1), "sub": (1, -1), "neg": (-1,)}[expression[0]]
        for sign, part in zip(signs, parts, strict=True):
            for term, factor in part.items():
                terms[term] = terms.get(term, 0) + sign * factor
        return {term: factor for term, factor in terms.items() if factor}
    if _is_op(expression, "mul"):
        a, b = (_linear(part) for part in expression[1:])
        if set(a) - {None}:
            a, b = b, a
        if not set(a) - {None}:
            scale = a.get(None, 0)
            return {term: scale * factor for term, factor in b.items() if scale * factor}
    return {expression: 1}


def _sum(terms: Mapping[Expression | None, int]) -> Expression:
    """Return the expression of a sum, safe to add to where a term is data."""
    result: Expression = 0
    for term, factor in terms.items():
        if term is None:
            continue
        if (len(terms) > 1 or factor != 1) and _loads(term):
            term = ("max", ("min", term, _MAX_BOUND), -_MAX_BOUND)
        if factor < 0:
            scaled = term if factor == -1 else ("mul", term, -factor)
            result = ("neg", scaled) if result == 0 else ("sub", result, scaled)
        else:
            scaled = term if factor == 1 else ("mul", term, factor)
            result = _arithmetic("add", result, scaled)
    return _arithmetic("add", result, terms.get(None, 0))


def _bounds(part: Expression) -> list[Form] | None:
    """Return the bounds that a comparison sets on the column, if it does."""
    if not _is_integer_comparison(part) or part[0] == "ne":
        return None
    difference = _linear(("sub", part[1], part[2]))
    column = ("index", "k")
    slope = difference.pop(column, 0)
    if slope == 0 or any("k" in _axes(term) for term in difference):
        return None
    name = part[0]
    if slope < 0:
        difference = {term: -factor for term, factor in difference.items()}
        name = {"le": "ge", "ge": "le", "lt": "gt", "gt": "lt"}.get(name, name)
        slope = -slope
    if slope != 1:
        return None
    # From here: column + difference <name> 0.
    limit = {term: -factor for term, factor in difference.items()}
    if name in ("lt", "gt"):
        limit[None] = limit.get(None, 0) + (-1 if name == "lt" else 1)
    edge = _sum({term: factor for term, factor in limit.items() if factor})
    forms: list[Form] = []
    if name in ("le", "lt", "eq"):
        forms.append(("upper", edge))
    if name in ("ge", "gt", "eq"):
        forms.append(("lower", edge))
    return forms


def _same(part: Expression) -> tuple[Expression, Expression] | None:
    """Return the values of row and column that an equation compares."""
    if not _is_op(part, "eq") or not _is_integer_comparison(part):
        return None
    a, b = part[1:]
    if "k" in _axes(a):
        a, b = b, a
    return (a, b) if _axes(a) <= {"b", "q"} and _axes(b) <= {"b", "k"} else None


def _is_monotone(expression: Expression) -> int:
    """Return 1 if a value never decreases from column to column, -1 if never increases, or 0."""
    if "k" not in _axes(expression):
        return 1
    name = expression[0]
    if name == "index":
        return 1
    if name == "neg":
        return -_is_monotone(expression[1])
    if name in ("add", "sub"):
        first, second = (_is_monotone(part) for part in expression[1:])
        if "k" not in _axes(expression[1]):
            first = second if name == "add" else -second
        if "k" not in _axes(expression[2]):
            return first
        second = second if name == "add" else -second
        return first if first == second else 0
    if name in ("mul", "floordiv") and type(expression[2]) is int and expression[2] > 0:
        return _is_monotone(expression[1])
    return 0


def _always_touch(a: Form, b: Form) -> bool:
    """Whether two intervals, where neither is empty, overlap or are next to each other."""
    edges = [_edges(form) for form in (a, b)]
    for one, other in (edges, edges[::-1]):
        if one is None or other is None:
            return False
        lower, upper = one["lower"], other["upper"]
        if lower is None or upper is None:
            continue
        gap = _linear(("sub", lower, upper))
        if set(gap) - {None} or gap.get(None, 0) > 1:
            return False
    return True


def _edges(form: Form) -> dict[str, Expression | None] | None:
    """Return the bounds of an interval, None where it has none, if it is just that."""
    edges: dict[str, Expression | None] = {"lower": None, "upper": None}
    for name, *rest in form[1:] if form[0] == "and" else (form,):
        if edges.get(name, 0) is not None:
            return None
        edges[name] = rest[0]
    return edges


def _depends_on_data(form: Form) -> bool:
    """Whether which keys a form allows, other than by position, is up to the data."""
    if form[0] in ("and", "or"):
        return any(_depends_on_data(part) for part in form[1:])
    return form[0] == "same" or (form[0] == "row" and bool(_loads(form[1])))


def _is_per_token(node: fx.Node, batch: tuple[Expression, ...]) -> bool:
    """Whether a tensor is indexed as [B, T], or [1, T], or [T]."""
    fake = fake_tensor(node)
    chosen = _chosen(batch)
    if fake is None or fake.dim() != len(batch) + 1 or len(batch) - len(chosen) > 1:
        return False
    rest = batch[len(chosen) :]
    return not rest or rest[0] == ("index", "b") or same_size(fake.shape[len(chosen)], 1)


def _chosen(batch: tuple[Expression, ...]) -> tuple[int, ...]:
    """Return the constant indices in front of a batch index: one of several kinds of positions."""
    front = batch[:-1]
    return front if all(type(index) is int for index in front) else ()


def _num_tokens(node: fx.Node) -> str:
    fake = fake_tensor(node)
    return "" if fake is None else str(fake.shape[-1])


def _only_axis(token: Expression) -> str | None:
    """Return the axis of an index that counts up by one along it."""
    terms = _linear(token)
    axes = [term for term in terms if term is not None and _axes(term)]
    if len(axes) == 1 and _is_op(axes[0], "index") and terms[axes[0]] == 1:
        return cast(str, axes[0][1])
    return None


def _exchange(expression: Expression, replaced: Mapping[tuple[Any, ...], Expression]) -> Expression:
    if not isinstance(expression, tuple):
        return expression
    if expression in replaced:
        return replaced[expression]
    if expression[0] in ("index", "load"):
        return expression
    return (expression[0], *(_exchange(part, replaced) for part in expression[1:]))


def _shown(expression: Expression) -> str:
    """Return an expression as a short text."""
    if not isinstance(expression, tuple):
        return str(expression)
    if expression[0] == "index":
        return str(expression[1])
    if expression[0] == "load":
        return f"{expression[1]}[{', '.join(_shown(index) for index in expression[2])}]"
    text = f"{expression[0]}({', '.join(_shown(part) for part in expression[1:])})"
    return text if len(text) <= 120 else f"{expression[0]}(...)"
