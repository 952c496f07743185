"""The exact cost against a count of every pair, written from the definitions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import strategies
from blindsight.cost import attention_flops, count_visible
from blindsight.template import Template

SMALL = {"max_spans": 5, "max_span": 7, "max_text": 4}


def count_pairs(
    template: strategies.Template, lower: torch.Tensor, upper: torch.Tensor
) -> list[list[int]]:
    """Pairs by batch row and category, one at a time.

    lower and upper are [B, T] for all tokens; or [B, 3, T], by whether a key is text, a sink, or
    another token of a span.
    """
    num_rows, num_tokens = template.span_id.shape
    counts = [[0] * 4 for _ in range(num_rows)]
    for b in range(num_rows):
        span = template.span_id[b].tolist()
        sink = template.is_sink[b].tolist()
        valid = template.attention_mask[b].tolist()
        for q in range(num_tokens):
            for k in range(num_tokens):
                at = (b, q)
                if lower.dim() == 3:
                    at = (b, 0 if span[k] == 0 else 1 if sink[k] else 2, q)
                base = valid[q] and valid[k] and lower[at] <= k <= upper[at]
                if not base:
                    continue
                always = span[q] == 0 or span[k] == 0 or span[q] == 1
                counts[b][0] += 1
                counts[b][1] += bool(always or sink[k] or q == k)
                counts[b][2] += bool(always or span[q] == span[k])
                counts[b][3] += bool(always or span[q] == span[k] or sink[k])
    return counts


TEMPLATES = strategies.templates(**SMALL) | strategies.templates(**SMALL, text_inside=True)


def as_template(drawn: strategies.Template) -> Template:
    return Template(drawn.span_id.to(torch.int32), drawn.is_sink)


@given(drawn=TEMPLATES)
def test_causal_counts_equal_those_of_every_pair(drawn: strategies.Template) -> None:
    num_rows, num_tokens = drawn.span_id.shape
    upper = torch.arange(num_tokens).expand(num_rows, -1)
    counts = count_visible(as_template(drawn), key_valid=drawn.attention_mask)
    assert counts.dtype == torch.int64
    assert counts.tolist() == count_pairs(drawn, torch.zeros_like(upper), upper)


@given(drawn=TEMPLATES, data=st.data())
def test_counts_under_any_interval_mask(drawn: strategies.Template, data: st.DataObject) -> None:
    num_rows, num_tokens = drawn.span_id.shape
    seed = data.draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    # out of range and empty intervals included
    shape = (num_rows, num_tokens)
    lower = torch.randint(-3, num_tokens + 3, shape, generator=generator)
    upper = torch.randint(-3, num_tokens + 3, shape, generator=generator)
    counts = count_visible(
        as_template(drawn), base_lower=lower, base_upper=upper, key_valid=drawn.attention_mask
    )
    assert counts.tolist() == count_pairs(drawn, lower, upper)


@given(drawn=TEMPLATES, seed=st.integers(0, 2**16))
def test_counts_under_intervals_of_groups(drawn: strategies.Template, seed: int) -> None:
    num_rows, num_tokens = drawn.span_id.shape
    generator = torch.Generator().manual_seed(seed)
    shape = (num_rows, 3, num_tokens)
    lower = torch.randint(-3, num_tokens + 3, shape, generator=generator)
    upper = torch.randint(-3, num_tokens + 3, shape, generator=generator)
    counts = count_visible(
        as_template(drawn), base_lower=lower, base_upper=upper, key_valid=drawn.attention_mask
    )
    assert counts.tolist() == count_pairs(drawn, lower, upper)


@given(drawn=TEMPLATES, data=st.data())
def test_chunks_add_up_to_the_whole(drawn: strategies.Template, data: st.DataObject) -> None:
    num_tokens = drawn.span_id.shape[1]
    cut = data.draw(st.integers(0, num_tokens))
    template, valid = as_template(drawn), drawn.attention_mask
    before = Template(template.span_id[:, :cut], template.is_sink[:, :cut])
    first = count_visible(before, key_valid=valid[:, :cut])
    second = count_visible(template, num_queries=num_tokens - cut, key_valid=valid)
    assert torch.equal(first + second, count_visible(template, key_valid=valid))


def test_flops_of_a_prompt_counted_by_hand() -> None:
    # two images of two tokens, the first of each its sink: t a a t b b
    template = Template(torch.tensor([[0, 1, 1, 0, 2, 2]]), torch.tensor([[0, 1, 0, 0, 1, 0]]) > 0)
    dense = 1 + 2 + 3 + 4 + 5 + 6
    # of the keys 1, 2 (image a) and 4, 5 (image b), rows 4 and 5 lose ...
    sink, document, document_sink = dense - 2, dense - 4, dense - 2
    assert count_visible(template).tolist() == [[dense, sink, document, document_sink]]
    flops = attention_flops(template, [[0, 1, 2, 3], [2, 2, 2, 2]], head_dim=16)
    assert flops.dense == 4 * 16 * 8 * dense
    assert flops.sparse == 4 * 16 * (dense + sink + document_sink + 5 * document)


def test_a_very_long_prompt_is_instant() -> None:
    num_tokens, span = 300_000, 1_000
    position = torch.arange(num_tokens)[None]
    span_id = position // span * (position % span < 900)
    template = Template(span_id.to(torch.int32), (position % span == 0) & (span_id > 0))
    flops = attention_flops(template, torch.zeros(28, 28, dtype=torch.uint8), head_dim=128)
    assert flops.dense == flops.sparse == 4 * 128 * 28 * 28 * num_tokens * (num_tokens + 1) // 2
    flops = attention_flops(template, torch.full((28, 28), 2), head_dim=128)
    assert 0 < flops.sparse < flops.dense


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_queries": 7}, r"num_queries must be 0\.\.6, .* got 7"),
        ({"key_valid": torch.ones(1, 5)}, r"key_valid must have the shape \[1, 6\], got \[1, 5\]"),
        ({"num_queries": 2, "base_upper": torch.ones(1, 6)}, r"base_upper must .* \[1, 2\]"),
    ],
)
def test_what_does_not_fit_is_an_error(arguments: dict[str, object], message: str) -> None:
    template = Template(torch.zeros(1, 6, dtype=torch.int32), torch.zeros(1, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match=message):
        count_visible(template, **arguments)  # type: ignore[arg-type]


def test_unknown_category_codes_are_an_error() -> None:
    template = Template(torch.zeros(1, 6, dtype=torch.int32), torch.zeros(1, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"categories must be codes 0\.\.3, got 0 to 4"):
        attention_flops(template, [[0, 4]], head_dim=8)
