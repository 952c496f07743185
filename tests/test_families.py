"""Many families: their images are found, and the compiled model equals its eager reference.

`tests/test_exactness.py` has every scenario for four of them.
"""

import copy
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map
from transformers import CONFIG_MAPPING, DynamicCache, StaticCache

import blindsight
from blindsight import Profile, TemplateRule, blindsight_backend
from blindsight.calibrate import flops_cut
from blindsight.calibrate import profile_of as profile_of_measurements
from blindsight.calibration.prober import Prober
from blindsight.calibration.selection import select_categories
from blindsight.cli.calibrate import summary
from blindsight.cli.show import describe, heads_by_layer
from blindsight.configs import cache_argument
from blindsight.evaluation.baselines import shuffled_categories
from blindsight.evaluation.masked_model import ProfileMasking
from blindsight.evaluation.prefill import Decoder
from blindsight.exported import decoder_inputs
from blindsight.families import DECODER_ATTENTION_CLASSES, FAMILIES
from blindsight.fingerprints import fingerprint, layer_types_of
from blindsight.reference import attention_layers, reference_logits
from family_models import (
    COLUMN_ID,
    END_ID,
    FIRST_TAG_ID,
    FIRST_TEXT_ID,
    GLOBAL_ID,
    IMAGE_ID,
    ROW_ID,
    START_ID,
    TILE_END_ID,
    TILE_START_ID,
    make_inputs,
    tiny_config,
    tiny_model,
    why_not_here,
)
from family_models import FAMILIES as TINY
from oracles import (
    assert_close_to_reference,
    generate_reference,
    oracle_keep,
    reference_attention,
    reference_copy,
    run_reference,
)

NUM_IMAGES = 4
# Those of tests/models.py.
ELSEWHERE = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3"}
TAGS = range(FIRST_TAG_ID, FIRST_TEXT_ID)
TILES = {f"<row_1_col_{i}>": tag for i, tag in enumerate(TAGS, 1)}
COHERE = {"<|START_OF_IMG|>": START_ID, "<|END_OF_IMG|>": END_ID}
IDEFICS = {"<fake_token_around_image>": START_ID, "<global-img>": GLOBAL_ID, **TILES}
# What only the tokenizers of the real ones know.
VOCABULARY = {
    "internvl": {"<img>": START_ID, "</img>": END_ID},
    "mistral3": {"[IMG_BREAK]": ROW_ID, "[IMG_END]": END_ID},
    "llama4": {
        "<|image|>": GLOBAL_ID,
        "<|tile_x_separator|>": COLUMN_ID,
        "<|tile_y_separator|>": ROW_ID,
    },
    "idefics2": {"<fake_token_around_image>": START_ID},
    "idefics3": IDEFICS,
    "smolvlm": IDEFICS,
    "aya_vision": {**COHERE, **{f"TILE_{i}": tag for i, tag in enumerate(TAGS, 1)}},
    "cohere2_vision": {**COHERE, "<|IMG_LINE_BREAK|>": ROW_ID},
    "lfm2_vl": {
        "<|image_start|>": START_ID,
        "<|image_end|>": END_ID,
        "<|img_thumbnail|>": GLOBAL_ID,
        **{f"<|img_row_1_col_{i}|>": tag for i, tag in enumerate(TAGS, 1)},
    },
    "ovis2": {
        "<IMG_START>": START_ID,
        "<IMG_END>": END_ID,
        "<IMG_GRID>": GLOBAL_ID,
        "<IMG_COL>": COLUMN_ID,
        "<IMG_ROW>": ROW_ID,
    },
    "minicpmv4_6": {
        "<image>": START_ID,
        "</image>": END_ID,
        "<slice>": TILE_START_ID,
        "</slice>": TILE_END_ID,
    },
    "molmo2": {
        "<im_col>": COLUMN_ID,
        "<low_res_im_start>": GLOBAL_ID,
        "<im_start>": START_ID,
        "<im_end>": END_ID,
    },
    "kimi_k25": {"<|media_content|>": GLOBAL_ID},
    "exaone4_5": {"<vision>": START_ID, "</vision>": END_ID},
    "aria": {"<fim_prefix>": START_ID, "<fim_suffix>": END_ID},
}
# An image is a span that has text between its tiles.
TILED = {"idefics3", "smolvlm", "aya_vision", "minicpmv4_6"}
# Each tile of an image is a span.
IN_PIECES = {"idefics2"}


FAMILIES_HERE = [
    pytest.param(
        family, marks=pytest.mark.skipif(bool(why_not_here(family)), reason=why_not_here(family))
    )
    for family in TINY
]
LLAMA4, MOLMO2 = (each for each in FAMILIES_HERE if each.values[0] in ("llama4", "molmo2"))
# Their decoders are those of others here, or (Ernie) take long to compile.
TWINS = {"llava", "llava_next", "glm46v", "smolvlm", "deepseek_vl", "qwen3_5_moe", "ovis2"}
TWINS |= {"qwen3_omni_moe_thinker", "paddleocr_vl", "glm4v_moe", "video_llama_3", "lighton_ocr"}
TWINS |= {"gemma4_unified", "ernie4_5_vl_moe"}
NOT_EXPORTED = {"ernie4_5_vl_moe"}  # torch.export cannot trace it
EXPORTED = [each for each in FAMILIES_HERE if each.values[0] not in NOT_EXPORTED]
# What is before the delimiter that stands right before the placeholders.
NOT_INSIDE = {"kimi_k25": 2}


def rule_of(family: str) -> TemplateRule:
    vocabulary = {"text": FIRST_TEXT_ID, **VOCABULARY.get(family, {})}
    tokenizer = SimpleNamespace(get_vocab=lambda: vocabulary)
    return TemplateRule.from_config(tiny_config(family), tokenizer)


def extents(family: str, ids: list[int]) -> list[tuple[int, int]]:
    """The first token of each image of the prompt, and the one after its last."""
    images, _ = TINY[family].images(NUM_IMAGES, torch.Generator())
    found, at = [], 0
    for image in images:
        while ids[at : at + len(image)] != image:
            at += 1
        found.append((at + NOT_INSIDE.get(family, 0), at + len(image)))
        at += len(image)
    return found


def profile_of(model: Any, family: str) -> Profile:
    """A profile whose heads and layers are all unlike."""
    types = layer_types_of(fingerprint(model))
    codes = torch.tensor([[(head + layer) % 4 for head in range(4)] for layer in range(len(types))])
    codes[[kind in ("linear_attention", "conv") for kind in types]] = 0
    return Profile.for_model(model, codes, rule=rule_of(family))


def masks_of(profile: Profile, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """What the oracles want to know of a profile and a prompt: categories, spans, sinks."""
    span_id, is_sink = profile.rule.template(inputs["input_ids"]).tensors()
    return profile.categories, span_id.long(), is_sink


def encoder_of(model: Any) -> Any:
    """The module that makes features of images."""
    inner = getattr(model, "model", model)
    return inner if hasattr(inner, "get_image_features") else model


def without_vision(model: Any) -> Any:
    """Return the model; its images are encoded uncompiled, which is most of a test's time."""
    encoder = encoder_of(model)
    encoder.get_image_features = torch._dynamo.disable(encoder.get_image_features)
    return model


def exact_copy(model: Any) -> Any:
    """A copy whose decoder is in fp64; images are what the model makes of them."""
    copy64 = reference_copy(model)
    copy64.set_experts_implementation("eager")  # grouped products are not for fp64
    encode = encoder_of(model).get_image_features

    def double(value: Any) -> Any:
        return tree_map(lambda x: x.double() if isinstance(x, torch.Tensor) else x, value)

    def image_features(*args: Any, **kwargs: Any) -> Any:
        found = encode(*args, **kwargs)
        if not hasattr(found, "__dict__"):
            return double(found)
        for name, value in list(vars(found).items()):
            setattr(found, name, double(value))
        return found

    encoder_of(copy64).get_image_features = image_features
    return copy64


def test_every_listed_family_is_here() -> None:
    tiny = {family.partition("/")[0] for family in TINY}
    assert set(FAMILIES) == tiny | ELSEWHERE


def test_every_listed_family_is_in_the_document() -> None:
    text = (Path(__file__).parent.parent / "FAMILIES.md").read_text()
    here = set(CONFIG_MAPPING)  # of these transformers, which may be older than a family
    assert set(FAMILIES) & here == set(re.findall(r"`([a-z0-9_]+)`", text)) & here
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    assert f"any of {len(FAMILIES)} families" in readme


def test_layers_that_choose_keys_have_no_reference() -> None:
    model = tiny_model("cohere2_vision")
    profile = profile_of(model, "cohere2_vision")
    text = model.config.get_text_config()
    text.layer_types = ["minimax_m3_sparse", *text.layer_types[1:]]
    profile = replace(
        profile, fingerprint={**profile.fingerprint, "layer_types": ",".join(text.layer_types)}
    )
    with pytest.raises(ValueError, match="got minimax_m3_sparse in Cohere2Vision"):
        reference_logits(model, make_inputs("cohere2_vision", NUM_IMAGES), profile)


@pytest.mark.parametrize("family", FAMILIES_HERE)
def test_images_are_found(family: str) -> None:
    ids = make_inputs(family, NUM_IMAGES)["input_ids"]
    template = rule_of(family).template(ids)
    span_id, is_sink = (tensor[0].tolist() for tensor in template.tensors())
    expected = extents(family, ids[0].tolist())
    inside = {at for begin, end in expected for at in range(begin, end)}
    assert not any(span for at, span in enumerate(span_id) if at not in inside)
    placeholders = set((ids[0] == IMAGE_ID).nonzero().flatten().tolist())
    if family in IN_PIECES:
        assert max(span_id) > NUM_IMAGES
        assert all(span_id[at] for at in placeholders)
        for begin, end in expected[1:]:
            assert not (set(span_id[begin:end]) - {0}) & set(span_id[:begin])
        return
    for number, (begin, end) in enumerate(expected, 1):
        image = range(begin, end)
        tokens = [at for at in image if span_id[at] == number]
        assert {span_id[at] for at in image} <= {0, number}
        assert placeholders.intersection(image) <= set(tokens)
        assert [at for at in image if is_sink[at]] == tokens[:1]
        assert family in TILED or tokens == list(image)


def test_what_only_the_tokenizer_knows_is_asked_for() -> None:
    config = tiny_config("internvl")
    with pytest.raises(ValueError, match=r"tokenizer of internvl must be given.*<img>.*from_conf"):
        Profile.for_model(config, "sink")
    other = SimpleNamespace(get_vocab=lambda: {"text": 20})
    with pytest.raises(ValueError, match="must have tokens <img>, got one without"):
        TemplateRule.from_config(config, other)
    rule = rule_of("internvl")
    processor = SimpleNamespace(tokenizer=SimpleNamespace(get_vocab=lambda: VOCABULARY["internvl"]))
    assert TemplateRule.from_config(config, processor) == rule
    assert Profile.for_model(config, "sink", rule=rule).rule == rule


def check_compiled(family: str, *, inner: str = "eager", device: str = "cpu") -> None:
    """Compare a compiled model on a device with the reference on a CPU."""
    model = without_vision(tiny_model(family))
    inputs = make_inputs(family, NUM_IMAGES)
    profile = profile_of(model, family)
    masks = masks_of(profile, inputs)
    reference = run_reference(model, *masks, inputs, use_cache=False).logits
    reference64 = run_reference(exact_copy(model), *masks, inputs, use_cache=False).logits
    with torch.no_grad():
        dense = model(**inputs, use_cache=False).logits
    valid = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    with pytest.raises(AssertionError, match="exceeds the bound"):
        assert_close_to_reference(dense, reference, reference64, valid)
    torch._dynamo.reset()
    model = model.to(device)
    on_device = {name: tensor.to(device) for name, tensor in inputs.items()}
    backend = blindsight_backend(profile, inner=inner, lowering="fused")
    with torch.no_grad():
        logits = torch.compile(model, backend=backend)(**on_device, use_cache=False).logits.cpu()
    assert_close_to_reference(logits, reference, reference64, valid)
    rewritten = [row for row in backend.report().rows if row.rewritten]
    assert {row.layer for row in rewritten if row.layer is not None} <= set(profile.layers)
    runs = {how for row in rewritten for how in row.runs}
    assert runs and all(how.startswith("sparse") for how in runs)
    assert not any("materialised" in how or "expressed" in how for how in runs)


@pytest.mark.parametrize("family", [each for each in FAMILIES_HERE if each.values[0] not in TWINS])
def test_the_compiled_model_equals_its_reference(family: str) -> None:
    check_compiled(family)


@pytest.mark.nightly
@pytest.mark.parametrize("family", sorted(TWINS))
def test_a_twin_equals_its_reference(family: str) -> None:
    check_compiled(family)


@pytest.mark.parametrize("family", FAMILIES_HERE)
def test_attention_is_known_by_its_class(family: str) -> None:
    """Where a compiled frame begins inside the decoder."""
    model = tiny_model(family)
    layers = profile_of(model, family).layers
    found = attention_layers(model, rule_of(family).layer_pattern, layers)
    classes = {type(module).__name__ for module in found}
    assert classes <= DECODER_ATTENTION_CLASSES


@pytest.mark.nightly
@pytest.mark.parametrize("family", EXPORTED)
def test_an_exported_decoder_equals_its_reference(family: str) -> None:
    model = tiny_model(family)
    inputs = make_inputs(family, NUM_IMAGES)
    profile = profile_of(model, family)
    masks = masks_of(profile, inputs)
    reference = run_reference(model, *masks, inputs, use_cache=False).logits
    with torch.no_grad():
        is_whole = family.startswith("gemma4")
        example = inputs if is_whole else decoder_inputs(model, profile, inputs)
        logits = blindsight.export(model, profile, example).module()(**example)
    torch.testing.assert_close(logits, reference, atol=5e-5, rtol=0)


@pytest.mark.parametrize(
    "family", ["qwen3_5", "gemma4/large", "lfm2_vl", "kimi_k25", "internvl", MOLMO2]
)
@pytest.mark.parametrize("cache", ["dynamic", pytest.param("static", marks=pytest.mark.nightly)])
def test_generation_equals_its_reference(family: str, cache: str) -> None:
    model = without_vision(tiny_model(family))
    inputs = make_inputs(family, NUM_IMAGES)
    profile = profile_of(model, family)
    options: dict[str, Any] = {
        "max_new_tokens": 3,
        "do_sample": False,
        "suppress_tokens": list(range(1, FIRST_TEXT_ID)),
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    if cache == "static":
        options["cache_implementation"] = cache
    masks = masks_of(profile, inputs)
    reference = generate_reference(model, *masks, inputs, **options)
    dense = model.generate(**inputs, **options)
    torch._dynamo.reset()
    model.compile(backend=blindsight_backend(profile, inner="eager", lowering="fused"))
    with torch._dynamo.config.patch(recompile_limit=64):
        found = model.generate(**inputs, **options)
    assert found.sequences.tolist() == reference.sequences.tolist()
    for ours, expected in zip(found.logits, reference.logits, strict=True):
        torch.testing.assert_close(ours, expected, atol=2e-5, rtol=0)
    assert (dense.logits[0] - reference.logits[0]).abs().max() > 1e-2


@pytest.mark.parametrize(
    "family", ["qwen3_5", "gemma4", "gemma4/large", LLAMA4, "kimi_k25", MOLMO2]
)
def test_calibration_counts_and_runs_the_masks_of_the_model(family: str) -> None:
    """Layers without attention, wider heads, shared keys, chunks, values of another size."""
    model = without_vision(tiny_model(family))
    inputs = make_inputs(family, NUM_IMAGES)
    profile = profile_of(model, family)
    masks = masks_of(profile, inputs)
    decoder = Decoder(model, profile)
    batch = decoder.prepare(inputs)
    masking = ProfileMasking(profile.categories)
    found = decoder.prefill(batch, masking.masks(batch.prompt)).logits
    expected = run_reference(model, *masks, inputs, use_cache=False).logits
    torch.testing.assert_close(found, expected[:, -1], atol=2e-5, rtol=0)

    bases = own_masks(model, inputs)
    assert set(bases) == set(profile.layers)
    keeps = [oracle_keep(*masks[1:], code) for code in range(4)]
    visible = torch.zeros(profile.num_layers, 4)
    for layer, base in bases.items():
        visible[layer] = torch.tensor([int((base & keep).sum()) for keep in keeps])
    dims = torch.tensor([profile.head_dim(layer) for layer in range(profile.num_layers)])
    flops = 4 * (visible.gather(1, profile.categories.long()).sum(1) * dims).sum()
    assert 4 * decoder.head_dim * int(masking.masks(batch.prompt).count_pairs()) == int(flops)

    torch._dynamo.reset()
    measured = Prober(model, profile.rule, next_token=True)(inputs)
    assert measured.pairs[0].tolist() == visible.tolist()
    moved = measured.effect[0, :, :, 1:].amax((1, 2))
    assert bool((moved[list(profile.layers)[:-1]] > 0).any())
    assert all(moved[at] == 0 for at in range(profile.num_layers) if at not in profile.layers)


def own_masks(model: Any, inputs: dict[str, torch.Tensor]) -> dict[int, torch.Tensor]:
    """The model's own mask ``[1, T, T]`` of each layer with attention."""
    text = model.config.get_text_config()
    found: dict[int, torch.Tensor] = {}
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attention(module: Any, *args: Any, **kwargs: Any) -> Any:
        found[module.layer_idx] = args[3][:, 0]
        return sdpa_attention_forward(module, *args, **kwargs)

    def mask(*args: Any, **kwargs: Any) -> Any:
        skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        return sdpa_mask(*args, **{**kwargs, **skips})

    AttentionInterface.register("shown", attention)
    AttentionMaskInterface.register("shown", mask)
    text._attn_implementation = "shown"
    with torch.no_grad():
        model(**inputs, use_cache=False)
    text._attn_implementation = "sdpa"
    return found


def test_a_profile_knows_which_layers_have_attention() -> None:
    config = tiny_config("qwen3_5")
    profile = Profile.for_model(config, "document_sink")
    assert profile.layers == (1, 3) and profile.num_layers == 4
    assert profile.categories.tolist() == [[0] * 4, [3] * 4] * 2
    assert sum(profile.counts().values()) == 8
    assert "2 layers x 4 heads: 8 DOCUMENT_SINK" in repr(profile)
    with pytest.raises(ValueError, match="heads of layer 0, which is linear_attention, must be D"):
        Profile.for_model(config, [["sink"] * 4] * 4)
    stage = profile.stage(2, 4, keeps_numbers=True)
    assert stage.layers == (3,)
    assert profile.stage(2, 4, keeps_numbers=False).layers == (1,)
    stage.validate(config, part_is_fine=True)


def test_layers_may_have_unlike_head_dims(tmp_path: Any) -> None:
    config = tiny_config("gemma4/large")
    profile = Profile.for_model(config, "sink")
    assert [profile.head_dim(layer) for layer in range(4)] == [16, 32, 16, 32]
    assert profile.fingerprint["num_kv_heads"] == "2,1,2,1"
    profile.save(tmp_path / "it")
    assert Profile.load(tmp_path / "it") == profile
    stage = profile.stage(1, 4, keeps_numbers=False)
    assert [stage.head_dim(layer) for layer in range(3)] == [32, 16, 32]
    stage.validate(config, part_is_fine=True)
    for wrong in ("16,32", "16,32,16,x", "0", ""):
        with pytest.raises(ValueError, match="head_dim must be a positive number, or one for each"):
            replace(profile, fingerprint={**profile.fingerprint, "head_dim": wrong})
    with pytest.raises(ValueError, match="num_kv_heads must be a multiple of world_size, got 2,1"):
        profile.shard(0, 2)
    text = config.get_text_config()
    text.per_layer_config = {0: {"num_attention_heads": 8}}
    with pytest.raises(ValueError, match=r"the same number of query heads, got \[4, 8\]"):
        fingerprint(config)


def test_stages_without_attention_can_be_shown() -> None:
    profile = Profile.for_model(tiny_config("qwen3_5"), "sink").stage(0, 1, keeps_numbers=True)
    assert profile.layers == ()
    assert describe(profile).splitlines()[-1].split() == ["0%"] * 4


def test_what_calibration_prints_is_what_show_prints() -> None:
    profile = Profile.for_model(tiny_config("qwen3_5"), [[0] * 4, [0, 1, 2, 3]] * 2)
    pairs = torch.zeros(4, 4, 4)
    pairs[[1, 3]] = torch.tensor([10.0, 1.0, 2.0, 3.0])
    noted = {"num_samples": "3", "num_samples_used": "2"}
    measured = replace(profile, evidence={"pairs": pairs}, calibration=noted)
    text = summary(measured, 3.0)
    table = heads_by_layer(profile)
    assert [line.split()[0] for line in table] == ["layer", "1", "3", "all", "25%"]
    assert "\n".join(table) in text
    assert "60.0% less" in text  # 16 pairs of 40 are left


def test_layers_without_attention_are_dealt_no_cards_and_have_no_budget() -> None:
    categories = torch.zeros(4, 4, dtype=torch.uint8)
    categories[1] = torch.tensor([1, 2, 3, 0])
    for seed in range(5):
        dealt = shuffled_categories(categories, (1, 3), seed)
        assert not dealt[[0, 2]].any()
        assert sorted(dealt[[1, 3]].flatten().tolist()) == [0, 0, 0, 0, 0, 1, 2, 3]
    alone = {"error": torch.zeros(1, 4, 4), "pairs": torch.ones(1, 4, 4)}
    alone["error"][..., 1:] = 0.01 * torch.arange(1.0, 5.0)[:, None]
    alone["pairs"][..., 0] = 10
    beside = {name: torch.cat([x, torch.zeros(3, 4, 4)]) for name, x in alone.items()}
    options = {"criterion": "output_error", "allocation": "global"}
    chosen = select_categories(alone, 0.012, **options)
    assert bool(chosen.any()) and not bool(chosen.all())
    assert select_categories(beside, 0.012, **options)[0].tolist() == chosen[0].tolist()


def test_pairs_of_wider_heads_cost_more() -> None:
    model = without_vision(tiny_model("gemma4/large"))
    profile = profile_of(model, "gemma4/large")
    inputs = make_inputs("gemma4/large", NUM_IMAGES)
    measured = Prober(model, profile.rule)(inputs)
    found = profile_of_measurements(
        model, measured, rule=profile.rule, criterion="output_error", budget=1e9
    )
    decoder = Decoder(model, profile)
    prompt = decoder.prepare(inputs).prompt
    dense, sparse = (
        float(ProfileMasking(codes).masks(prompt).count_pairs())
        for codes in (torch.zeros_like(found.categories), found.categories)
    )
    assert flops_cut(found) == pytest.approx(1 - sparse / dense)


@pytest.mark.parametrize("family", ["gemma4", "internvl"])
def test_a_reference_of_the_last_logits_alone(family: str) -> None:
    """Small Gemma 4's last layers compute no rows but those that are kept."""
    model = tiny_model(family)
    inputs, profile = make_inputs(family, NUM_IMAGES), profile_of(model, family)
    whole = reference_logits(model, inputs, profile)
    last = reference_logits(model, {**inputs, "logits_to_keep": 2}, profile)
    assert last.shape[1] == 2
    torch.testing.assert_close(last, whole[:, -2:], atol=2e-5, rtol=0)


def test_experts_count_as_far_as_they_are_used() -> None:
    model = tiny_model("qwen3_vl_moe")
    profile = profile_of(model, "qwen3_vl_moe")
    decoder = Decoder(model, profile)
    hidden, experts = 64, 32
    config = model.config.get_text_config()
    attention = 2 * hidden * 64 + 2 * hidden * 32
    mixture = config.num_experts_per_tok * 3 * hidden * experts + hidden * config.num_experts
    assert decoder.weights_per_layer == attention + mixture


@pytest.mark.parametrize("lowering", ["fused", "split"])
@pytest.mark.parametrize("family", [LLAMA4])
def test_a_static_cache_of_chunked_layers(family: str, lowering: str) -> None:
    """The full layers' cache tells the history, not that of layers which forget."""
    model = without_vision(tiny_model(family))
    inputs, profile = make_inputs(family, NUM_IMAGES), profile_of(model, family)
    masks = masks_of(profile, inputs)
    expected = run_reference(model, *masks, inputs, use_cache=False).logits
    num_tokens = inputs["input_ids"].shape[1]
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=num_tokens + 8)
    torch._dynamo.reset()
    backend = blindsight_backend(profile, inner="eager", lowering=lowering)
    with torch.no_grad():
        given = {cache_argument(model.forward): cache}
        found = torch.compile(model, backend=backend)(**inputs, **given, use_cache=True).logits
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    runs = {how for row in backend.report().rows if row.rewritten for how in row.runs}
    assert runs and all(how.startswith("sparse") for how in runs)


def test_packed_sequences_of_chunked_layers() -> None:
    """The first image of each sequence is free in layers whose masks tell chunks apart, too."""
    if reason := why_not_here("llama4"):
        pytest.skip(reason)
    model = tiny_model("llama4")
    rows = [make_inputs("llama4", 2, seed=seed)["input_ids"] for seed in (0, 1)]
    positions = torch.cat([torch.arange(row.shape[1]) for row in rows])[None]
    inputs = {"input_ids": torch.cat(rows, dim=1), "position_ids": positions}
    profile = profile_of(model, "llama4")
    sequence_id = torch.cat([torch.full_like(row, n) for n, row in enumerate(rows)], dim=1)
    expected = run_reference(
        model, *masks_of(profile, inputs), inputs, sequence_id=sequence_id, use_cache=False
    ).logits
    torch._dynamo.reset()
    backend = blindsight_backend(profile, inner="eager", lowering="fused")
    model.language_model.compile(backend=backend)
    with torch.no_grad():
        found = model(**inputs, use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("by_hand", [False, True])
def test_layers_that_share_keys_are_compiled_one_by_one(by_hand: bool) -> None:
    """The keys that they are given were noted by an earlier layer, in the same forward."""
    model = without_vision(tiny_model("gemma4"))
    inputs = make_inputs("gemma4", NUM_IMAGES)
    profile = profile_of(model, "gemma4")
    span_id, is_sink = profile.rule.template(inputs["input_ids"]).tensors()
    expected = run_reference(model, *masks_of(profile, inputs), inputs, use_cache=False).logits
    torch._dynamo.reset()
    backend = blindsight_backend(profile, inner="eager", lowering="fused")
    for layer in model.model.language_model.layers:
        layer.compile(backend=backend)
    around = blindsight.use_template(span_id, is_sink) if by_hand else nullcontext()
    with torch._dynamo.config.patch(recompile_limit=64), torch.no_grad(), around:
        found = model(**inputs, use_cache=True).logits
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=0)
    runs = {how for row in backend.report().rows for how in row.runs}
    assert all(how.startswith("sparse") for how in runs)


def test_given_masks_are_looked_at_in_later_conversations() -> None:
    """Dynamo then has a symbol for what is in the cache of each layer; their values are alike."""
    family = "gemma4/large"
    if reason := why_not_here(family):
        pytest.skip(reason)
    model = without_vision(tiny_model(family))
    profile, plain = profile_of(model, family), copy.deepcopy(model)
    torch._dynamo.reset()
    backend = blindsight_backend(profile, inner="eager", lowering="fused")
    model.model.language_model.compile(backend=backend)
    for conversation, counts in enumerate([(2, 2), (3, 2)]):
        turns = [make_inputs(family, n, seed=3 * conversation + n) for n in counts]
        names = ("input_ids", "attention_mask", "mm_token_type_ids")  # placeholders will do
        turns = [{name: turn[name] for name in names if name in turn} for turn in turns]
        cache, its_cache = (DynamicCache(config=model.config.get_text_config()) for _ in "ab")
        ids = torch.zeros(1, 0, dtype=torch.int64)
        for turn in turns:
            ids = torch.cat([ids, turn["input_ids"]], dim=1)
            given = {**turn, "attention_mask": torch.ones_like(ids), "use_cache": True}
            masks = masks_of(profile, {"input_ids": ids})
            with torch.no_grad():
                with torch._dynamo.config.patch(recompile_limit=64):
                    found = model(**given, past_key_values=cache).logits
                with reference_attention(plain, *masks):
                    expected = plain(**given, past_key_values=its_cache).logits
            torch.testing.assert_close(found, expected, atol=5e-5, rtol=0)
    runs = {how for row in backend.report().rows for how in row.runs}
    assert runs and not any("materialised" in how or "dense" in how for how in runs)


@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
def test_turns_on_a_cache_of_latents(cache_class: Any) -> None:
    """Newer transformers keep what keys are computed of, of one head."""
    model = without_vision(tiny_model("kimi_k25"))
    profile = profile_of(model, "kimi_k25")
    turns = [make_inputs("kimi_k25", 2), make_inputs("kimi_k25", 3)]
    per_token = ("input_ids", "attention_mask")
    whole = {
        name: torch.cat([turn[name] for turn in turns], dim=int(name in per_token))
        for name in turns[0]
    }
    expected = run_reference(model, *masks_of(profile, whole), whole, use_cache=False).logits
    torch._dynamo.reset()
    backend = blindsight_backend(profile, inner="eager", lowering="fused")
    model.model.language_model.compile(backend=backend)
    num_tokens = whole["input_ids"].shape[1]
    sizes = {"max_cache_len": num_tokens + 9} if cache_class is StaticCache else {}
    cache = cache_class(config=model.config.get_text_config(), **sizes)
    found = []
    with torch.no_grad():
        for turn in turns:
            seen = sum(part.shape[1] for part in found) + turn["input_ids"].shape[1]
            given = {**turn, "attention_mask": whole["attention_mask"][:, :seen]}
            argument = {cache_argument(model.forward): cache}
            found.append(model(**given, **argument, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(found, dim=1), expected, atol=5e-5, rtol=0)
    runs = {how for row in backend.report().rows for how in row.runs}
    assert runs and all(how.startswith("sparse") for how in runs)
