"""Prove what the mask of an attention call is, from the graph that builds it.

The nodes that lead to ``attn_mask`` are read as one expression of (b, q, k): batch row, query row
and key column. This boolean expression is taken apart into intervals of keys per row. Both are
written in the language of :mod:`blindsight.attention.base_mask`.

Nothing here is a guess: a mask that can only be read from a [Q, K] tensor is opaque, and stays as
it is. What only the data can tell is listed as a fact, to be checked on every call. Overflow of
64-bit integers is not modelled.

Shapes: B batch, H heads, Q query rows, K key columns, T tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, cast

from torch import fx

from blindsight.attention.base_mask import CAUSAL, Expression, Fact, Form, Tier, conjuncts
from blindsight.passes.expressions import (
    and_,
    assuming,
    axes_of,
    flatten,
    is_op,
    loads_of,
)
from blindsight.passes.find_attention import Attention, is_attention
from blindsight.passes.graph import ancestors, fake_tensor, same_size
from blindsight.passes.integers import (
    column_bounds,
    direction,
    is_integer_comparison,
    linear_terms,
    normalized,
)
from blindsight.passes.mask_values import NotUnderstoodError, Value
from blindsight.passes.read_mask import MaskReader, opaque_part, over_named_axes
from blindsight.passes.read_views import is_natural


@dataclass(frozen=True)
class Lifted:
    """What is known of the mask of one attention call.

    Attributes:
        tier: How much is known.
        before: A node before which form, facts and expression may be evaluated; later in the
            graph a tensor that they read may have been overwritten, such as a cache's length.
        reason: Why the mask is not known as intervals, else "".
        form: The intervals, see :mod:`blindsight.attention.base_mask`, with nodes for tensors.
        facts: What must be checked of the data, as the form is the mask only where it holds.
        expression: Whether (b, q, k) is allowed, with nodes for tensors; None where the mask is
            opaque, or known only as intervals of each group of keys.
        given: The graph's input that an opaque mask is, ``[B or 1, 1, >= Q, >= K]``, if it is
            one: its elements can be looked at before the graph runs.
    """

    tier: Tier
    before: fx.Node
    _: KW_ONLY
    reason: str = ""
    form: Form | None = None
    facts: tuple[Fact, ...] = ()
    expression: Expression = None
    given: fx.Node | None = None


def lift_mask(gm: fx.GraphModule, call: Attention) -> Lifted:
    """Prove what the mask of a call is, as far as its graph tells; nothing is changed.

    Args:
        gm: A graph as Dynamo or ``torch.export`` traced it.
        call: A call in it.
    """
    return lift_masks(gm, [call])[0]


def lift_masks(gm: fx.GraphModule, calls: Sequence[Attention]) -> list[Lifted]:
    """As :func:`lift_mask`, for several calls of a graph, which is read once."""
    reader = MaskReader(gm)
    return [_lift(reader, call) for call in calls]


def _lift(reader: MaskReader, call: Attention) -> Lifted:
    if call.attn_mask is None:
        return _lift_flag(call)
    if call.is_causal:
        return _opaque(call.node, "both attn_mask and is_causal are given")
    before = reader.first_after(reader.made_by(call.attn_mask))
    given = None
    try:
        value = reader.read(call.attn_mask)
        reader.check_not_overwritten(call.attn_mask, before, call.node)
        given = _given(value)
        expression = over_named_axes(value)
    except NotUnderstoodError as problem:
        return _opaque(before, str(problem), given)
    except RecursionError:
        return _opaque(before, "the graph that builds the mask is too deep")
    opaque = opaque_part(expression)
    if opaque is not None:
        return _opaque(before, opaque, given)
    matcher = _Matcher(reader)
    try:
        form = matcher.form(expression)
    except _NotIntervalsError as problem:
        return Lifted(Tier.EXPRESSION, before, reason=str(problem), expression=expression)
    read = {load[1] for load in loads_of(expression)}
    if any(is_attention(node) for tensor in read for node in ancestors(tensor)):
        # Facts, and whether it is plain causal, would be asked of what the dense graph computes.
        reason = "it depends on the attention of an earlier layer"
        return Lifted(Tier.EXPRESSION, before, reason=reason, expression=expression)
    facts = tuple(matcher.facts)
    return Lifted(Tier.INTERVALS, before, form=form, facts=facts, expression=expression)


def _lift_flag(call: Attention) -> Lifted:
    """Return the mask of a call without a tensor; ``is_causal`` is aligned at the top left."""
    if not call.is_causal:
        return Lifted(Tier.INTERVALS, call.node, form=("nothing",), expression=True)
    is_seen = ("le", ("index", "k"), ("index", "q"))
    return Lifted(Tier.INTERVALS, call.node, form=CAUSAL, expression=is_seen)


def _opaque(before: fx.Node, reason: str, given: fx.Node | None = None) -> Lifted:
    return Lifted(Tier.OPAQUE, before, reason=reason, given=given)


def _given(value: Value) -> fx.Node | None:
    """Return the graph's input whose first rows and columns are the mask, if there is one."""
    expression, rank = value.expression, len(value.shape)
    if not is_op(expression, "load") or expression[1].op != "placeholder" or rank != 4:
        return None
    node, indices = expression[1:]
    batch, head = indices[:-2] if len(indices) == 4 else (None, None)
    is_whole = indices[-2:] == (("index", 2), ("index", 3))
    fake = fake_tensor(node)
    is_one = fake is not None and same_size(fake.shape[0], 1)
    is_every = batch == ("index", 0) or (batch == 0 and is_one)
    return node if is_whole and is_every and head == 0 else None


class _NotIntervalsError(Exception):
    """The mask is no conjunction of known intervals; the message says why."""


@dataclass(frozen=True)
class _Context:
    """What holds wherever a part of the mask matters.

    Attributes:
        rows: A condition on the row.
        sames: Pairs of a value of the row and a value of the column that are equal.
        is_top: Whether the part is not inside a union.
    """

    rows: Expression = True
    sames: tuple[tuple[Expression, Expression], ...] = ()
    is_top: bool = True


class _Matcher:
    """Turns an expression into a form, and collects the facts that the form rests on."""

    def __init__(self, reader: MaskReader) -> None:
        self.facts: dict[Fact, None] = {}
        self._reader = reader

    def form(self, expression: Expression) -> Form:
        return self._all_of(flatten("and", normalized(expression)), _Context())

    def _all_of(self, parts: Sequence[Expression], context: _Context) -> Form:
        """Return the form of a conjunction."""
        forms: list[Form] = []
        sames: list[tuple[Expression, Expression]] = []
        waiting: list[Expression] = []
        rows = context.rows
        of_row = [part for part in parts if axes_of(part) <= {"b", "q"}]
        others = [assuming(part, of_row) for part in parts if part not in of_row]
        parts = [*of_row, *(leaf for part in others for leaf in flatten("and", part))]
        for part in dict.fromkeys(parts):
            if part is True:
                continue
            axes = axes_of(part)
            if (found := column_bounds(part)) is not None:
                forms.extend(found)
            elif axes <= {"b", "q"}:
                rows = and_(rows, part)
                forms.append(("row", part))
            elif axes <= {"b", "k"} and context.is_top:
                forms.append(("valid", part))
            elif axes <= {"b", "k"}:
                sames.append((True, part))  # the keys with it, if they are neighbours
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
            if is_op(part, "or"):
                forms.append(self._any_of(flatten("or", part), inner))
            elif (remapped := self._remapped(part, inner)) is not None:
                forms.extend(remapped)
            else:
                raise _NotIntervalsError(f"{_shown(part)} is no interval of keys")
        forms = [form for form in dict.fromkeys(forms) if form != ("nothing",)]
        if not forms:
            return ("nothing",)
        return forms[0] if len(forms) == 1 else ("and", *forms)

    def _any_of(self, parts: Sequence[Expression], context: _Context) -> Form:
        """Return the form of a disjunction, if it is one interval."""
        forms = [self._all_of(flatten("and", part), context) for part in parts]
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
            raise _NotIntervalsError("what a query sees is more than one interval of keys")
        if len(plain) == len(forms):
            return ("or", *forms)
        # Whether groups of equal values join the rest, only the data can tell.
        self.facts["connected", context.rows, tuple(forms)] = None
        return ("or", *forms)

    def _equalities(
        self, sames: list[tuple[Expression, Expression]], context: _Context
    ) -> list[Form]:
        """Return the forms of ``value of the row == value of the column``."""
        if all(direction(column) for _, column in sames):
            return [
                ("same", (self._told(row),), (column,), direction(column) == 1)
                for row, column in sames
            ]
        # Values that come back in another sequence tell tokens apart together with its number.
        rows, columns = zip(*context.sames, strict=True)
        self.facts["contiguous", context.rows, rows, columns] = None
        return [("same", tuple(map(self._told, rows)), columns, False)]

    def _told(self, row: Expression) -> Expression:
        """Return a row's value, with a note if it is loaded, and is of a place, of no sequence."""
        is_place = is_op(row, "load") and row[1] not in self._reader.sequence_ids
        return ("place", row) if is_place else row

    def _remapped(self, part: Expression, context: _Context) -> list[Form] | None:
        """Compare the positions of two tokens of a sequence by where the tokens are."""
        if not is_integer_comparison(part):
            return None
        loads = list(dict.fromkeys(loads_of(part)))
        if not all(load[2] for load in loads):  # one of a number, not of a table
            return None
        if len({(load[1], load[2][:-1]) for load in loads}) != 1:
            return None
        positions, batch = loads[0][1], loads[0][2][:-1]
        tokens = {load[2][-1] for load in loads}
        if not _is_per_token(positions, batch) or len(tokens) != 2:
            return None
        by_axis = {_only_axis(token): token for token in tokens}
        if set(by_axis) != {"q", "k"} or not all(is_natural(token) for token in tokens):
            return None
        difference = linear_terms(("sub", part[1], part[2]))
        if sum(difference.get(load, 0) for load in loads) != 0:
            return None
        if any(load not in difference for load in loads):
            return None
        # Positions need not begin at 0: in a division or a remainder they are no places.
        if any(loads_of(term) for term in difference if term not in loads):
            return None
        replaced = {load: load[2][-1] for load in loads}
        found = column_bounds((part[0], *(_exchange(side, replaced) for side in part[1:])))
        if found is not None:
            ids = _common_ids(context.sames, by_axis["q"], by_axis["k"], _num_tokens(positions))
            self.facts["consecutive", _of_kind(positions, batch), ids] = None
        return found


def _common_ids(
    sames: Sequence[tuple[Expression, Expression]],
    query: Expression,
    key: Expression,
    num_tokens: str,
) -> Expression:
    """Return the ids of tokens that are known to be equal for a query's token and a key's."""
    for row, column in reversed(sames):
        if not is_op(row, "load") or not is_op(column, "load"):
            continue
        (_, ids, (*batch, token)), (_, other, (*other_batch, other_token)) = row, column
        if (
            ids is other
            and batch == other_batch
            and _is_per_token(ids, tuple(batch))
            and (token, other_token) == (query, key)
            and _num_tokens(ids) == num_tokens
        ):
            return _of_kind(ids, tuple(batch))
    return None


def _same(part: Expression) -> tuple[Expression, Expression] | None:
    """Return the values of row and column that an equation compares."""
    if not is_op(part, "eq") or not is_integer_comparison(part):
        return None
    a, b = part[1:]
    if "k" in axes_of(a):
        a, b = b, a
    return (a, b) if axes_of(a) <= {"b", "q"} and axes_of(b) <= {"b", "k"} else None


def _always_touch(a: Form, b: Form) -> bool:
    """Whether two intervals, where neither is empty, overlap or are next to each other."""
    edges = [_edges(form) for form in (a, b)]
    for one, other in (edges, edges[::-1]):
        if one is None or other is None:
            return False
        lower, upper = one["lower"], other["upper"]
        if lower is None or upper is None:
            continue
        gap = linear_terms(("sub", lower, upper))
        if set(gap) - {None} or gap.get(None, 0) > 1:
            return False
    return True


def _edges(form: Form) -> dict[str, Expression | None] | None:
    """Return the bounds of an interval, None where it has none, if it is just that."""
    edges: dict[str, Expression | None] = {"lower": None, "upper": None}
    for name, *rest in conjuncts(form):
        if edges.get(name, 0) is not None:
            return None
        edges[name] = rest[0]
    return edges


def _depends_on_data(form: Form) -> bool:
    """Whether data, and not positions alone, decides which keys a form allows."""
    if form[0] in ("and", "or"):
        return any(_depends_on_data(part) for part in form[1:])
    return form[0] == "same" or (form[0] == "row" and bool(loads_of(form[1])))


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


def _of_kind(node: fx.Node, batch: tuple[Expression, ...]) -> Expression:
    """Return a tensor per token, with the indices that choose it of several kinds, if any do."""
    chosen = _chosen(batch)
    return (node, *chosen) if chosen else node


def _num_tokens(node: fx.Node) -> str:
    fake = fake_tensor(node)
    return "" if fake is None else str(fake.shape[-1])


def _only_axis(token: Expression) -> str | None:
    """Return the axis along which an index counts up by one, if it varies along no other."""
    terms = linear_terms(token)
    axes = [term for term in terms if term is not None and axes_of(term)]
    if len(axes) == 1 and is_op(axes[0], "index") and terms[axes[0]] == 1:
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
