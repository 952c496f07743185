"""Masks that a graph is handed ready made: intervals only where every element says so."""

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blindsight import BlindsightWarning, Profile, blindsight_backend
from blindsight.attention.interval_masks import BaseMask
from blindsight.attention.intervals import groups_of_keys
from blindsight.runtime.given_mask import intervals_of_elements
from models import (
    END_ID,
    IMAGE_ID,
    START_ID,
    VIDEO_ID,
    Image,
    make_inputs,
    tiny_model,
    valid_positions,
    without_vision,
)
from oracles import (
    assert_close_to_reference,
    oracle_template,
    reference_copy,
    run_reference,
)
from strategies import BaseCase, base_masks
from test_masks import base_of

CATEGORIES = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]])


def elements_of(mask: BaseMask, num_keys: int) -> torch.Tensor:
    """[B, Q, K], as the three parts of a base mask are defined."""
    column = torch.arange(num_keys)
    inside = (mask.lower[..., None] <= column) & (column <= mask.upper[..., None])
    return inside & mask.valid[:, None]


def elements_of_groups(mask: BaseMask, groups: torch.Tensor) -> torch.Tensor:
    """[B, Q, K] of intervals [B, G, Q] of groups [B, G, K]."""
    assert mask.lower.dtype == mask.upper.dtype == torch.int32
    column = torch.arange(groups.shape[2])
    inside = (mask.lower[..., None] <= column) & (column <= mask.upper[..., None])
    return (inside & groups[:, :, None]).any(1) & mask.valid[:, None]


def look_at(mask: torch.Tensor, groups: torch.Tensor | None = None) -> BaseMask | None:
    """Of bool or float [B, Q, K]."""
    return intervals_of_elements(mask[:, None], *mask.shape, groups=groups)


@pytest.fixture(autouse=True)
def few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several portions of rows even of small masks."""
    monkeypatch.setattr("blindsight.runtime.given_mask._ELEMENTS", 100)


@given(case=base_masks(), dtype=st.sampled_from([torch.bool, torch.float32, torch.bfloat16]))
def test_every_base_mask_of_interval_form_is_found(case: BaseCase, dtype: torch.dtype) -> None:
    allowed = base_of(case)
    mask = allowed
    if dtype != torch.bool:
        lowest = -torch.inf if case.num_keys % 2 else torch.finfo(dtype).min
        mask = torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, lowest)
    found = look_at(mask)
    assert found is not None
    assert torch.equal(elements_of(found, case.num_keys), allowed)


@given(data=st.data(), num_queries=st.integers(1, 6), num_keys=st.integers(1, 6))
def test_nothing_is_found_that_is_not_there(
    data: st.DataObject, num_queries: int, num_keys: int
) -> None:
    """Any elements at all: what is found is the mask, or nothing."""
    rows = st.lists(st.booleans(), min_size=num_keys, max_size=num_keys)
    mask = torch.tensor([data.draw(st.lists(rows, min_size=num_queries, max_size=num_queries))])
    found = look_at(mask)
    if found is not None:
        assert torch.equal(elements_of(found, num_keys), mask)
    else:  # then some row sees two keys, not a third between them, which another row sees
        seen = mask[0].any(0)
        assert any(
            not row[k] and seen[k] and row[:k].any() and row[k + 1 :].any()
            for row in mask[0]
            for k in range(num_keys)
        )


@given(case=base_masks(by_group=True))
def test_masks_of_groups_are_found(case: BaseCase) -> None:
    allowed = base_of(case)
    template = case.template.span_id, case.template.is_sink
    groups = groups_of_keys(*template, case.num_keys)
    assert (groups.sum(1) == 1).all()
    found = look_at(allowed, groups)
    assert found is not None
    assert torch.equal(elements_of_groups(found, groups), allowed)


@given(data=st.data(), num_queries=st.integers(1, 5), num_keys=st.integers(1, 8))
def test_nothing_is_found_of_groups_that_is_not_there(
    data: st.DataObject, num_queries: int, num_keys: int
) -> None:
    rows = st.lists(st.booleans(), min_size=num_keys, max_size=num_keys)
    mask = torch.tensor([data.draw(st.lists(rows, min_size=num_queries, max_size=num_queries))])
    of = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=num_keys, max_size=num_keys)))
    groups = torch.stack([of == group for group in range(3)])[None]
    found = look_at(mask, groups)
    if found is not None:
        assert torch.equal(elements_of_groups(found, groups), mask)
    else:
        assert look_at(mask) is None
        assert any(look_at(mask[:, :, of == group]) is None for group in set(of.tolist()))


@pytest.mark.parametrize("row", [1, 17, 29])
def test_one_element_that_differs_is_seen(row: int) -> None:
    mask = torch.ones(2, 30, 30, dtype=torch.bool).tril()
    assert look_at(mask) is not None
    mask[1, row, row // 2] = False
    found = look_at(mask)
    assert found is None or torch.equal(elements_of(found, 30), mask)
    assert (found is None) == (row > 1)  # row 1 then sees an interval without column 0


@pytest.mark.parametrize("value", [1.0, -1.0, -1e30, torch.nan, torch.inf])
def test_a_bias_is_no_mask(value: float) -> None:
    mask = torch.zeros(1, 9, 9).masked_fill(~torch.ones(9, 9, dtype=torch.bool).tril(), -torch.inf)
    assert look_at(mask) is not None
    mask[0, 5, 3] = value
    assert look_at(mask) is None


def test_one_mask_for_all_batch_rows_and_more_columns_than_keys() -> None:
    mask = torch.ones(1, 1, 7, 12, dtype=torch.bool).tril()
    found = intervals_of_elements(mask, batch=3, num_queries=6, num_keys=8)
    assert found is not None
    assert torch.equal(elements_of(found, 8), mask[:, 0, :6, :8].expand(3, 6, 8))


# In a model


@pytest.fixture(name="qwen", scope="module")
def _qwen() -> Any:
    model = tiny_model("qwen2_5_vl", num_layers=3)
    without_vision(model)
    return model


@pytest.fixture(name="inputs", scope="module")
def _inputs() -> dict[str, torch.Tensor]:
    rows = [[5, Image(2, 5), 4, Image(4, 3), 6], [3, Image(2, 2), Image(4, 3), 2, Image(2, 2), 9]]
    inputs = make_inputs("qwen2_5_vl", rows, pad_side="left")
    positions = inputs["attention_mask"].cumsum(1) - 1
    return {**inputs, "position_ids": positions.clamp(min=0).expand(3, -1, -1)}


def run(model: Any, inputs: dict[str, torch.Tensor], mask: torch.Tensor) -> tuple[Any, Any]:
    torch._dynamo.reset()
    backend = blindsight_backend(
        Profile.for_model(model, CATEGORIES), inner="eager", lowering="fused"
    )
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        logits = compiled(**{**inputs, "attention_mask": mask}, use_cache=False).logits
    return logits, {how for row in backend.report().rows for how in row.runs}


def check(model: Any, inputs: dict[str, torch.Tensor], mask: Any, logits: Any) -> None:
    span_id, is_sink = oracle_template(
        inputs["input_ids"], (IMAGE_ID, VIDEO_ID), (START_ID,), (END_ID,)
    )
    given = {**inputs, "attention_mask": mask}
    references = [
        run_reference(m, CATEGORIES, span_id, is_sink, given, use_cache=False).logits
        for m in (model, reference_copy(model))
    ]
    assert_close_to_reference(logits, *references, valid_positions(inputs))


def padded_causal(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """bool [B, 1, L, L]"""
    valid = inputs["attention_mask"].bool()
    length = valid.shape[1]
    return torch.ones(length, length, dtype=torch.bool).tril() & valid[:, None, None, :]


def test_a_given_mask_of_intervals_is_not_read(qwen: Any, inputs: Any) -> None:
    mask = padded_causal(inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error", BlindsightWarning)
        logits, hows = run(qwen, inputs, mask)
    assert {how.split(", ")[1] for how in hows} <= {"sorted", "ordered"}
    check(qwen, inputs, mask, logits)


def test_a_given_mask_with_a_hole_is_read(qwen: Any, inputs: Any) -> None:
    mask = padded_causal(inputs)
    mask[:, :, -2, -9] = False
    with pytest.warns(BlindsightWarning, match="read element by element"):
        logits, hows = run(qwen, inputs, mask)
    assert hows == {"sparse, materialised, fused"}
    check(qwen, inputs, mask, logits)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_given_mask_that_changes_between_calls_is_looked_at_again(
    qwen: Any, inputs: Any, context: Any
) -> None:
    torch._dynamo.reset()
    backend = blindsight_backend(
        Profile.for_model(qwen, CATEGORIES), inner="eager", lowering="fused"
    )
    compiled = torch.compile(qwen, backend=backend)
    with context():
        mask = padded_causal(inputs).clone()
        given = {**inputs, "attention_mask": mask}
        compiled(**given, use_cache=False)
        mask[:, :, :, 11] = False
        logits = compiled(**given, use_cache=False).logits
    check(qwen, inputs, mask.clone(), logits)
