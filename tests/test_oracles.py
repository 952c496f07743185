"""The references themselves, against matrices typed in by hand and against the models' own sdpa."""

import copy
import warnings

import pytest
import torch
from hypothesis import given
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, StaticCache

import strategies
from models import (
    END_ID,
    FAMILIES,
    GEMMA_SLIDING_WINDOW,
    IMAGE_ID,
    NUM_HEADS,
    START_ID,
    Image,
    append_text,
    make_inputs,
    split_turns,
    tiny_model,
    valid_positions,
)
from oracles import (
    DENSE,
    DOCUMENT,
    DOCUMENT_SINK,
    SINK,
    assert_close_to_reference,
    error_bound,
    generate_reference,
    keep_of_call,
    oracle_attention,
    oracle_keep,
    oracle_template,
    reference_attention,
    reference_copy,
    run_reference,
)

ROWS = [
    [5, Image(), 3, Image(), Image(), 7, Image(), 4],
    [Image(), 9, Image(), 2],
]
NUM_LAYERS = 2


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family):
    return tiny_model(family, num_layers=NUM_LAYERS)


def template_of(inputs, sink_offsets=(0,)):
    return oracle_template(inputs["input_ids"], [IMAGE_ID], [START_ID], [END_ID], sink_offsets)


def all_heads(category):
    return torch.full((NUM_LAYERS, NUM_HEADS), category)


MIXED = torch.tensor([[DENSE, SINK, DOCUMENT, DOCUMENT_SINK], [DOCUMENT, DOCUMENT, SINK, DENSE]])


def matrix(text):
    """Rows of 0 and 1, blanks between columns ignored."""
    rows = [line.replace(" ", "") for line in text.strip().splitlines()]
    return torch.tensor([[cell == "1" for cell in row] for row in rows])


# ---- templates, typed in

I, S, E, X = IMAGE_ID, START_ID, END_ID, 50  # noqa: E741


@pytest.mark.parametrize(
    ("ids", "span_id", "sinks"),
    [
        ([X, S, I, I, E, X, S, I, E, X], [0, 1, 1, 1, 1, 0, 2, 2, 2, 0], [1, 6]),
        # adjacent images, the prompt starts and ends with one
        ([S, I, E, S, I, I, E], [1, 1, 1, 2, 2, 2, 2], [0, 3]),
        # delimiters without image tokens are text
        ([S, E, X, S, S, I, E, E, S], [0, 0, 0, 0, 1, 1, 1, 0, 0], [4]),
        # no delimiters at all, and one on either side only
        ([X, I, I, X, S, I, X, I, E, X], [0, 1, 1, 0, 2, 2, 0, 3, 3, 0], [1, 4, 7]),
        # cut by the end of the prompt
        ([X, X, S, I, I], [0, 0, 1, 1, 1], [2]),
        ([X, X, X, X, S], [0, 0, 0, 0, 0], []),
        # a delimiter belongs to the run it touches; between two runs it closes the first
        ([I, E, I, S, I], [1, 1, 2, 3, 3], [0, 2, 3]),
        ([X, X, X], [0, 0, 0], []),
    ],
)
def test_template(ids, span_id, sinks):
    actual_span_id, is_sink = oracle_template(torch.tensor([ids]), [I], [S], [E])
    assert actual_span_id.dtype == torch.int64 and is_sink.dtype == torch.bool
    assert actual_span_id.tolist() == [span_id]
    assert is_sink[0].nonzero().flatten().tolist() == sinks


@pytest.mark.parametrize(
    ("offsets", "sinks"),
    [((0,), [1, 5]), ((1,), [2, 6]), ((0, 2), [1, 3, 5, 7]), ((5,), [4, 7]), ((-3,), [1, 5])],
)
def test_sink_offsets_are_clipped_to_the_span(offsets, sinks):
    ids = torch.tensor([[X, S, I, I, E, S, I, E, X]])
    _, is_sink = oracle_template(ids, [I], [S], [E], offsets)
    assert is_sink[0].nonzero().flatten().tolist() == sinks


def test_rows_of_a_batch_are_numbered_apart():
    ids = torch.tensor([[S, I, E, X, S, I, E], [X, X, X, X, S, I, E]])
    span_id, _ = oracle_template(ids, [I], [S], [E])
    assert span_id.tolist() == [[1, 1, 1, 0, 2, 2, 2], [0, 0, 0, 0, 1, 1, 1]]


# ---- keep matrices, typed in
#
# tokens: text, span 1 (2 tokens), text, span 2 (3 tokens), span 3 (2 tokens), text

SPAN_ID = torch.tensor([[0, 1, 1, 0, 2, 2, 2, 3, 3, 0]])
IS_SINK = torch.tensor([[0, 1, 0, 0, 1, 0, 0, 1, 0, 0]]).bool()

EXPECTED = {
    DENSE: """
        1 11 1 111 11 1
        1 11 1 111 11 1
        1 11 1 111 11 1
        1 11 1 111 11 1
        1 11 1 111 11 1
        1 11 1 111 11 1
        1 11 1 111 11 1
        1 11 1 111 11 1
        1 11 1 111 11 1
        1 11 1 111 11 1
    """,
    SINK: """
        1 11 1 111 11 1
        1 11 1 111 11 1
        1 11 1 111 11 1
        1 11 1 111 11 1
        1 10 1 100 10 1
        1 10 1 110 10 1
        1 10 1 101 10 1
        1 10 1 100 10 1
        1 10 1 100 11 1
        1 11 1 111 11 1
    """,
    DOCUMENT: """
        1 11 1 111 11 1
        1 11 1 111 11 1
        1 11 1 111 11 1
        1 11 1 111 11 1
        1 00 1 111 00 1
        1 00 1 111 00 1
        1 00 1 111 00 1
        1 00 1 000 11 1
        1 00 1 000 11 1
        1 11 1 111 11 1
    """,
    DOCUMENT_SINK: """
        1 11 1 111 11 1
        1 11 1 111 11 1
        1 11 1 111 11 1
        1 11 1 111 11 1
        1 10 1 111 10 1
        1 10 1 111 10 1
        1 10 1 111 10 1
        1 10 1 100 11 1
        1 10 1 100 11 1
        1 11 1 111 11 1
    """,
}


@pytest.mark.parametrize("category", EXPECTED)
def test_keep(category):
    assert torch.equal(oracle_keep(SPAN_ID, IS_SINK, category)[0], matrix(EXPECTED[category]))


def test_keep_of_packed_sequences():
    # two sequences; spans 1 and 3 are the first of theirs, 2 and 4 are not
    span_id = torch.tensor([[1, 1, 2, 2, 0, 3, 4, 4]])
    is_sink = torch.tensor([[1, 0, 1, 0, 0, 1, 1, 0]]).bool()
    sequence_id = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
    keep = oracle_keep(span_id, is_sink, DOCUMENT_SINK, sequence_id)[0]
    expected = matrix(
        """
        11 11 1 1 11
        11 11 1 1 11
        10 11 1 1 10
        10 11 1 1 10
        11 11 1 1 11
        11 11 1 1 11
        10 10 1 1 11
        10 10 1 1 11
        """
    )
    assert torch.equal(keep, expected)
    # without packing span 3 is an ordinary span
    assert oracle_keep(span_id, is_sink, DOCUMENT_SINK)[0, 5].tolist() == [
        cell == "1" for cell in "10101110"
    ]


def test_keep_refuses_unknown_categories():
    with pytest.raises(ValueError, match="got 4"):
        oracle_keep(SPAN_ID, IS_SINK, 4)


def test_keep_of_call_cuts_rows_and_columns():
    keep = torch.arange(36).reshape(1, 6, 6) % 5 == 0
    assert torch.equal(keep_of_call(keep, 6, 6), keep)
    assert torch.equal(keep_of_call(keep, 2, 6), keep[:, 4:])
    assert torch.equal(keep_of_call(keep, 2, 3), keep[:, 4:, 3:])
    wider = keep_of_call(keep, 2, 8)
    assert torch.equal(wider[:, :, :6], keep[:, 4:]) and wider[:, :, 6:].all()


# ---- attention


def test_attention_equals_sdpa_and_empty_rows_are_zero():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, 5, 8, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, 2, 2, 7, 8, generator=generator, dtype=torch.float64)
    mask = torch.rand(2, 6, 5, 7, generator=generator) < 0.5
    mask[0, 1, 2] = False
    output = oracle_attention(query, key, value, mask, scale=0.3)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True
    )
    assert (output[0, 1, 2] == 0).all()
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)


def test_error_bound_and_its_assertion():
    reference64 = torch.tensor([[[1.0], [2.0], [4.0]]], dtype=torch.float64)
    same_dtype = reference64.float() + torch.tensor([[[0.5], [0.0], [100.0]]])
    valid = torch.tensor([[True, True, False]])
    bound = error_bound(reference64[valid], same_dtype[valid])
    assert bound == 2 * 0.5 + torch.finfo(torch.float32).eps * 2.0
    assert_close_to_reference(reference64.float() + 0.9, same_dtype, reference64, valid)
    wrong = reference64.float() + torch.tensor([[[0.0], [1.1], [0.0]]])
    with pytest.raises(AssertionError, match=r"batch row 0, position 1 exceeds .* \[\[0, 1\]\]"):
        assert_close_to_reference(wrong, same_dtype, reference64, valid)
    # what stands at a padded position does not matter
    wrong = reference64.float() + torch.tensor([[[0.0], [0.0], [float("nan")]]])
    assert_close_to_reference(wrong, same_dtype, reference64, valid)
    wrong = reference64.float() + torch.tensor([[[float("nan")], [0.0], [0.0]]])
    with pytest.raises(AssertionError, match="nan"):
        assert_close_to_reference(wrong, same_dtype, reference64, valid)


# ---- whole models


def close(actual, expected, valid):
    torch.testing.assert_close(actual[valid], expected[valid], rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("pad_side", ["left", "right"])
def test_dense_reference_equals_sdpa(family, model, pad_side, use_cache):
    inputs = make_inputs(family, ROWS, pad_side=pad_side)
    expected = model(**inputs, use_cache=use_cache).logits
    output = run_reference(
        model, all_heads(DENSE), *template_of(inputs), inputs, use_cache=use_cache
    )
    assert (output.past_key_values is not None) == use_cache
    close(output.logits, expected, valid_positions(inputs))


@torch.no_grad()
def test_dense_reference_equals_sdpa_in_plain_prompts(family, model):
    for rows in ([[20]], [[Image()]], [[3, Image(), 4]], [[Image(), Image(), Image(), Image()]]):
        for attention_mask in (True, False):
            inputs = make_inputs(family, rows, attention_mask=attention_mask)
            expected = model(**inputs).logits
            template = template_of(inputs)
            output = run_reference(model, all_heads(DENSE), *template, inputs).logits
            close(output, expected, valid_positions(inputs))
            if len(rows[0]) < 4:
                # with one image nothing is masked
                output = run_reference(model, all_heads(DOCUMENT), *template, inputs).logits
                close(output, expected, valid_positions(inputs))


@torch.no_grad()
def test_masks_matter(family, model):
    inputs = make_inputs(family, ROWS, pad_side="left")
    valid = valid_positions(inputs)
    outputs = [
        run_reference(model, all_heads(category), *template_of(inputs), inputs).logits[valid]
        for category in (DENSE, SINK, DOCUMENT, DOCUMENT_SINK)
    ]
    for i, output in enumerate(outputs):
        for other in outputs[:i]:
            assert (output - other).abs().max() > 0.1
    # and the head that a category belongs to, in each layer
    for layer in range(NUM_LAYERS):
        for head in range(NUM_HEADS):
            categories = all_heads(DENSE)
            categories[layer, head] = DOCUMENT
            output = run_reference(model, categories, *template_of(inputs), inputs).logits[valid]
            assert (output - outputs[0]).abs().max() > 0.01


@torch.no_grad()
def test_sizes_of_images(family, model):
    if family == "gemma3":
        with pytest.raises(ValueError, match=r"must be Image\(2, 2\)"):
            make_inputs(family, [[Image(2, 3)]])
        return
    rows = [[3, Image(1, 1), Image(3, 2), 5, Image(4, 4)], [Image(2, 5), 4, Image(1, 3), 6]]
    inputs = make_inputs(family, rows, pad_side="right")
    span_id, _ = template_of(inputs)
    assert span_id.max(dim=1).values.tolist() == [3, 2]
    expected = model(**inputs).logits
    output = run_reference(model, all_heads(DENSE), *template_of(inputs), inputs).logits
    close(output, expected, valid_positions(inputs))


@torch.no_grad()
def test_reference_leaves_the_model_untouched(family):
    model = tiny_model(family, num_layers=NUM_LAYERS, seed=3)
    inputs = make_inputs(family, ROWS, pad_side="left")
    weights = copy.deepcopy(model.state_dict())
    config = model.config.to_dict()
    modules = [(name, sorted(vars(module))) for name, module in model.named_modules()]
    with_config = [module for module in model.modules() if hasattr(module, "config")]
    implementations = [module.config._attn_implementation for module in with_config]
    names = list(AttentionInterface._global_mapping), list(AttentionMaskInterface._global_mapping)
    before = model(**inputs).logits

    run_reference(model, MIXED, *template_of(inputs), inputs)
    with (
        pytest.raises(RuntimeError, match="stop"),
        reference_attention(model, MIXED, *template_of(inputs)),
    ):
        raise RuntimeError("stop")

    assert torch.equal(model(**inputs).logits, before)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert model.config.to_dict() == config
    assert [(name, sorted(vars(module))) for name, module in model.named_modules()] == modules
    assert implementations == [module.config._attn_implementation for module in with_config]
    assert names == (
        list(AttentionInterface._global_mapping),
        list(AttentionMaskInterface._global_mapping),
    )


@torch.no_grad()
def test_reference_names_what_does_not_fit(family, model):
    inputs = make_inputs(family, [[4, Image(), 3]])
    span_id, is_sink = template_of(inputs)
    for wrong in (slice(1, None), slice(None, -2)):
        with pytest.raises(ValueError, match=r"must cover 13 tokens, got 1[12]"):
            run_reference(model, MIXED, span_id[:, wrong], is_sink[:, wrong], inputs)
    with pytest.raises(ValueError, match=r"must have shape \(2, 4\), got \(4, 2\)"):
        run_reference(model, MIXED.T, span_id, is_sink, inputs)


def caches(model, num_tokens):
    yield DynamicCache(config=model.config)
    yield StaticCache(config=model.config, max_cache_len=num_tokens + 5)


@torch.no_grad()
@pytest.mark.parametrize("pad_side", ["left", "right"])
def test_two_turns_equal_one_prefill(family, model, pad_side):
    """Dense with the model's own attention; then under masks, where Gemma's window is crossed."""
    rows = [
        [5, Image(), 3, Image(), Image(), 7, Image(), 4, Image(), Image(), 2],
        [2, Image(), 14, Image(), 3, Image(), 5],
    ]
    inputs = make_inputs(family, rows, pad_side=pad_side)
    num_tokens = inputs["input_ids"].shape[1]
    assert num_tokens > 2 * GEMMA_SLIDING_WINDOW
    span_id, is_sink = template_of(inputs)
    valid = valid_positions(inputs)
    dense = model(**inputs).logits
    masked = run_reference(model, MIXED, span_id, is_sink, inputs).logits
    num_tried = 0
    for split in (1, 8, 20, 33, num_tokens - 1):
        try:
            first, second = split_turns(model, inputs, split)
        except ValueError:
            continue
        num_tried += 1
        for dense_cache, masked_cache in zip(
            caches(model, num_tokens), caches(model, num_tokens), strict=True
        ):
            turns = [model(**turn, past_key_values=dense_cache).logits for turn in (first, second)]
            close(torch.cat(turns, dim=1), dense, valid)
            turns = [
                run_reference(
                    model,
                    MIXED,
                    span_id[:, :length],
                    is_sink[:, :length],
                    turn,
                    past_key_values=masked_cache,
                ).logits
                for turn, length in ((first, split), (second, num_tokens))
            ]
            close(torch.cat(turns, dim=1), masked, valid)
    assert num_tried >= 2


@torch.no_grad()
def test_decode_steps_equal_one_prefill(family, model):
    inputs = make_inputs(family, ROWS, pad_side="left")
    num_tokens = inputs["input_ids"].shape[1]
    whole = append_text(inputs, torch.tensor([[20, 21, 22], [30, 31, 32]]))
    span_id, is_sink = template_of(whole)
    expected = run_reference(model, MIXED, span_id, is_sink, whole).logits
    for cache in caches(model, num_tokens + 3):
        run_reference(
            model,
            MIXED,
            span_id[:, :num_tokens],
            is_sink[:, :num_tokens],
            inputs,
            past_key_values=cache,
        )
        for length in range(num_tokens + 1, num_tokens + 4):
            so_far = append_text(inputs, whole["input_ids"][:, num_tokens:length])
            _, step = split_turns(model, so_far, length - 1)
            assert step["input_ids"].shape[1] == 1
            logits = run_reference(
                model,
                MIXED,
                span_id[:, :length],
                is_sink[:, :length],
                step,
                past_key_values=cache,
            ).logits
            torch.testing.assert_close(logits[:, 0], expected[:, length - 1], rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("cache_implementation", ["dynamic", "static"])
def test_generate_equals_repeated_prefill(family, model, cache_implementation):
    inputs = make_inputs(family, ROWS, pad_side="left")
    num_tokens = inputs["input_ids"].shape[1]
    options = {"max_new_tokens": 4, "do_sample": False}
    options["cache_implementation"] = cache_implementation
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own = model.generate(**inputs, **options)
        dense = generate_reference(model, all_heads(DENSE), *template_of(inputs), inputs, **options)
        masked = generate_reference(model, MIXED, *template_of(inputs), inputs, **options)
    assert own.shape[1] == num_tokens + 4
    assert torch.equal(dense, own)
    whole = append_text(inputs, masked[:, num_tokens:])
    logits = run_reference(model, MIXED, *template_of(whole), whole).logits
    assert torch.equal(logits[:, num_tokens - 1 : -1].argmax(-1), masked[:, num_tokens:])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copy_in_float64(family, dtype):
    model = tiny_model(family, num_layers=NUM_LAYERS, dtype=dtype)
    inputs = make_inputs(family, ROWS, pad_side="right")
    model64 = reference_copy(model)
    for parameter, parameter64 in zip(model.parameters(), model64.parameters(), strict=True):
        assert parameter.dtype == dtype and parameter64.dtype == torch.float64
        assert torch.equal(parameter64, parameter.double())
    for (name, buffer), (_, buffer64) in zip(
        model.named_buffers(), model64.named_buffers(), strict=True
    ):
        assert torch.equal(buffer, buffer64), name
    template = template_of(inputs)
    output = run_reference(model, MIXED, *template, inputs).logits
    output64 = run_reference(model64, MIXED, *template, inputs).logits
    assert output.dtype == dtype and output64.dtype == torch.float64
    valid = valid_positions(inputs)
    bound = error_bound(output64[valid], output[valid])
    assert 0 < bound < {torch.float32: 1e-4, torch.bfloat16: 1.0}[dtype]
    assert_close_to_reference(output, output, output64, valid)
    # dense logits are far outside the bound: a mask that is ignored is noticed
    dense = run_reference(model, all_heads(DENSE), *template, inputs).logits
    assert (dense.double() - output64)[valid].abs().max() > 2 * bound


def test_reference_with_own_sdpa_is_within_its_bound(family, model):
    inputs = make_inputs(family, ROWS, pad_side="left")
    template = template_of(inputs)
    with torch.no_grad():
        actual = model(**inputs).logits
    reference = run_reference(model, all_heads(DENSE), *template, inputs).logits
    reference64 = run_reference(reference_copy(model), all_heads(DENSE), *template, inputs).logits
    assert_close_to_reference(actual, reference, reference64, valid_positions(inputs))


@torch.no_grad()
def test_split_refuses_to_cut_images(family, model):
    inputs = make_inputs(family, [[2, Image(), 3]])
    assert inputs["input_ids"].shape[1] == 11
    for split in range(3, 8):
        with pytest.raises(ValueError, match="between segments"):
            split_turns(model, inputs, split)
    for split in (0, 11):
        with pytest.raises(ValueError, match=r"1\.\.10"):
            split_turns(model, inputs, split)
    for split in (1, 2, 8, 9):
        first, second = split_turns(model, inputs, split)
        assert ("pixel_values" in first) == (split >= 8)
        assert ("pixel_values" in second) == (split < 8)


def test_padding_needs_a_side_and_a_mask(family):
    with pytest.raises(ValueError, match="pad_side"):
        make_inputs(family, ROWS)
    with pytest.raises(ValueError, match="attention_mask"):
        make_inputs(family, ROWS, pad_side="left", attention_mask=False)


# ---- strategies


@given(template=strategies.templates(max_spans=4, max_span=6, max_text=3, text_inside=True))
def test_drawn_templates_are_consistent(template):
    span_id, is_sink, key_valid = template.span_id, template.is_sink, template.attention_mask
    assert span_id.shape == is_sink.shape == key_valid.shape
    assert key_valid.any(dim=1).all() and key_valid.all(dim=1).any()
    assert (span_id[~key_valid] == 0).all() and (span_id[is_sink] > 0).all()
    for b, row in enumerate(template.rows):
        spans = torch.zeros(1 + max(number for number, _ in row), dtype=torch.int64)
        for number, length in row:
            spans[number] += length
        assert torch.bincount(span_id[b])[1:].tolist() == spans[1:].tolist()
        ids = span_id[b][span_id[b] > 0]
        assert (ids.diff() >= 0).all()
        padding = (~key_valid[b]).nonzero().flatten()
        if len(padding):
            edge = 0 if template.pad_side == "left" else span_id.shape[1] - len(padding)
            assert padding.tolist() == list(range(edge, edge + len(padding)))


@given(template=strategies.templates(max_spans=4, max_span=6, max_text=3))
def test_keep_is_ordered_and_reflexive(template):
    keeps = [oracle_keep(template.span_id, template.is_sink, category) for category in range(4)]
    assert keeps[DENSE].all()
    assert (keeps[DOCUMENT] <= keeps[DOCUMENT_SINK]).all()
    assert (keeps[SINK] <= keeps[DOCUMENT_SINK]).all()
    for keep in keeps:
        assert keep.diagonal(dim1=1, dim2=2).all()


@given(heads=strategies.gqa_heads(), categories=strategies.categories(3, 5))
def test_drawn_heads_and_categories(heads, categories):
    assert heads[0] % heads[1] == 0
    assert categories.shape == (3, 5) and categories.dtype == torch.uint8
    assert int(categories.max()) <= 3
