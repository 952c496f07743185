"""Packed sequences: several prompts in one row, told apart by ids of the model's own mask.

Shapes: B batch, Q query rows, T tokens of the whole row.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from blindsight.attention.base_mask import Expression, Form, conjuncts
from blindsight.attention.form_intervals import base_mask_of
from blindsight.template import span_edges


def first_span_of(form: Form, span_id: Tensor, num_queries: int, num_keys: int) -> Tensor | None:
    """Return which queries are in the first span of their packed sequence, ``[B, Q]`` bool.

    Args:
        form: The model's own mask, see :mod:`blindsight.attention.base_mask`.
        span_id: ``[B, T]``.
        num_queries, num_keys: Q and K.

    Returns:
        None where nothing is packed: then it is span 1.
    """
    batch, num_tokens = span_id.shape
    packed = _ids_of_sequences(form)
    if not packed or not num_queries == num_keys == num_tokens:
        return None
    same_sequence = base_mask_of(
        ("and", *packed),
        batch=batch,
        num_queries=num_queries,
        num_keys=num_keys,
        device=span_id.device,
    )
    first, _ = span_edges(span_id)
    position = torch.arange(num_tokens, device=span_id.device)
    begins = (first == position) & (span_id > 0)
    num_before = pad(begins.cumsum(1), (1, 0))
    at_sequence = num_before.gather(1, same_sequence.lower.clamp(min=0).to(torch.int64))
    return (span_id > 0) & (num_before.gather(1, first) == at_sequence)


def is_packed(form: Form) -> bool:
    """Whether a mask tells sequences apart that are packed into one row."""
    return bool(_ids_of_sequences(form))


def _ids_of_sequences(form: Form) -> list[Form]:
    """Return the conditions that a key be of the query's own sequence.

    Where a mask allows several things (a causal part, and images that see all of themselves), they
    stand beside the causal bound: ids without one tell images apart.
    """
    alternatives = form[1:] if form[0] == "or" else (form,)
    for part in map(conjuncts, alternatives):
        found = [ids for each in part if each[0] == "same" and (ids := _only_ids(each))]
        if found and (form[0] != "or" or any(each[0] == "upper" for each in part)):
            return found
    return []


def _only_ids(form: Form) -> Form | None:
    """Return what of an equality tells rows apart by data, not by where they are, as chunks do."""
    _, rows, columns, _ = form
    pairs = [(row, column) for row, column in zip(rows, columns, strict=True) if _is_data(row)]
    if not pairs:
        return None
    if len(pairs) == len(rows):
        return form
    return ("same", *(tuple(side) for side in zip(*pairs, strict=True)), False)


def _is_data(value: Expression) -> bool:
    # What the graph divides, as chunks are, is no load, or is noted to be of a place.
    return isinstance(value, tuple) and value[0] == "load"
