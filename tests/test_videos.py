"""Videos whose frames have nothing between them: each frame is a span."""

import warnings
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

import family_models
import models
from blindsight import Profile, TemplateRule, blindsight_backend
from blindsight.calibration.prober import Prober
from blindsight.evaluation.prefill import Decoder
from blindsight.families import FAMILIES
from blindsight.reference import reference_logits
from blindsight.runtime.context import BlindsightWarning, disabled
from blindsight.runtime.forwards import Forwards
from blindsight.runtime.history import History
from models import END_ID, FIRST_TEXT_ID, IMAGE_ID, PAD_ID, START_ID, VIDEO_ID, VOCAB_SIZE
from oracles import (
    assert_close_to_reference,
    generate_reference,
    oracle_template,
    reference_copy,
    run_reference,
)

PATCH_DIM, MERGE = 96, 2
# frames, height and width in patches
GRIDS = [[3, 4, 4], [2, 4, 8], [4, 4, 4]]


def tiny_model(family: str) -> Any:
    source = models if family in models.FAMILIES else family_models
    model = source.tiny_model(family)
    (vision,) = (part for name, part in model.named_modules() if name.endswith("visual"))
    vision.forward = torch._dynamo.disable(vision.forward)  # most of a test's time
    return model


def placeholders(grid: list[int], token_id: int) -> list[int]:
    frames, height, width = grid
    return [START_ID, *[token_id] * (frames * height * width // MERGE**2), END_ID]


def make_inputs(seed: int = 0, num_texts: int = 4) -> dict[str, torch.Tensor]:
    """Two prompts, one with two videos, one with a video and an image, padded on the left."""
    generator = torch.Generator().manual_seed(seed)

    def text(length: int) -> list[int]:
        return torch.randint(FIRST_TEXT_ID, VOCAB_SIZE, (length,), generator=generator).tolist()

    def pixels(*grids: list[int]) -> torch.Tensor:
        num_patches = int(torch.tensor(grids).prod(-1).sum())
        return torch.randn(num_patches, PATCH_DIM, generator=generator).bfloat16().float()

    image = [1, 4, 6]
    rows = [
        [*text(num_texts), *placeholders(GRIDS[0], VIDEO_ID), *text(2)],
        [*text(2), *placeholders(GRIDS[2], VIDEO_ID), *text(1), *placeholders(image, IMAGE_ID)],
    ]
    rows[0] += [*placeholders(GRIDS[1], VIDEO_ID), *text(5)]
    rows[1] += text(3)
    length = max(map(len, rows))
    ids = torch.tensor([[PAD_ID] * (length - len(row)) + row for row in rows])
    return {
        "input_ids": ids,
        "attention_mask": (ids != PAD_ID).long(),
        "mm_token_type_ids": (ids == IMAGE_ID).long() + 2 * (ids == VIDEO_ID).long(),
        "pixel_values": pixels(image),
        "image_grid_thw": torch.tensor([image]),
        "pixel_values_videos": pixels(*GRIDS),
        "video_grid_thw": torch.tensor(GRIDS),
    }


def inputs_of(family: str, **options: int) -> dict[str, torch.Tensor]:
    inputs = make_inputs(**options)
    if family not in models.FAMILIES:
        del inputs["mm_token_type_ids"]
    if "omni" in family:
        inputs["video_second_per_grid"] = torch.full((len(GRIDS),), 0.5)
    return inputs


def profile_of(model: Any) -> Profile:
    num_layers = model.config.get_text_config().num_hidden_layers
    codes = torch.tensor([[(head + layer) % 4 for head in range(4)] for layer in range(num_layers)])
    rule = TemplateRule(
        (IMAGE_ID, VIDEO_ID),
        (START_ID,),
        (END_ID,),
        layer_pattern=FAMILIES[model.config.model_type].layer_pattern,
        video_token_ids=(VIDEO_ID,),
    )
    if model.config.model_type in models.FAMILIES:
        assert TemplateRule.from_config(model.config) == rule
    return Profile.for_model(model, codes, rule=rule)


def masks_of(
    profile: Profile, inputs: dict[str, torch.Tensor], *, whole: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    frames = () if whole else tuple(inputs["video_grid_thw"][:, 0].tolist())
    ids = inputs["input_ids"]
    delimiters = ((START_ID,), (END_ID,))
    template = oracle_template(
        ids, (IMAGE_ID, VIDEO_ID), *delimiters, video_ids=(VIDEO_ID,), num_frames=frames
    )
    return profile.categories, *template


def check(model: Any, logits: torch.Tensor, masks: Any, inputs: dict[str, torch.Tensor]) -> None:
    copy64 = reference_copy(model)
    copy64.set_experts_implementation("eager")  # grouped products are not for fp64
    references = [run_reference(m, *masks, inputs, use_cache=False).logits for m in (model, copy64)]
    with torch.no_grad():
        dense = model(**inputs, use_cache=False).logits
    valid = inputs["attention_mask"].bool()
    assert_close_to_reference(logits, *references, valid)
    with pytest.raises(AssertionError, match="exceeds the bound"):
        assert_close_to_reference(dense, *references, valid)


@pytest.mark.parametrize(
    "family",
    [
        "qwen2_5_vl",
        "exaone4_5",
        pytest.param("qwen2_5_omni_thinker", marks=pytest.mark.nightly),
        pytest.param("qwen2_vl", marks=pytest.mark.nightly),
        pytest.param("qwen3_omni_moe_thinker", marks=pytest.mark.nightly),
    ],
)
def test_frames_are_spans_of_a_compiled_model(family: str) -> None:
    model = tiny_model(family)
    profile = profile_of(model)
    backend = blindsight_backend(profile, inner="eager", lowering="fused")
    compiled = torch.compile(model, backend=backend)
    for options in ({}, {"seed": 1, "num_texts": 7})[: 2 if family == "qwen2_5_vl" else 1]:
        inputs = inputs_of(family, **options)
        with torch.inference_mode():
            logits = compiled(**inputs, use_cache=False).logits
        masks = masks_of(profile, inputs)
        check(model, logits, masks, inputs)
        assert torch.equal(profile.rule.template_of_inputs(inputs).span_id.long(), masks[1])
    expected = reference_logits(model, inputs, profile)
    valid = inputs["attention_mask"].bool()
    torch.testing.assert_close(expected[valid], logits[valid], atol=1e-4, rtol=0)


def test_layers_that_are_compiled_one_by_one() -> None:
    """Hooks on the model show its videos."""
    model = tiny_model("qwen2_5_vl")
    profile, inputs = profile_of(model), inputs_of("qwen2_5_vl")
    backend = blindsight_backend(profile, inner="eager", lowering="fused")
    for layer in model.model.language_model.layers:
        layer.compile(backend=backend)
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
    for layer in model.model.language_model.layers:
        layer._compiled_call_impl = None
    backend.detach()
    check(model, logits, masks_of(profile, inputs), inputs)


def test_frames_that_no_graph_shows_are_told_by_the_call() -> None:
    model = tiny_model("qwen2_5_vl")
    profile, inputs = profile_of(model), inputs_of("qwen2_5_vl")
    model.model.get_video_features = torch._dynamo.disable(model.model.get_video_features)
    backend = blindsight_backend(profile, inner="eager", lowering="fused")
    with torch.no_grad():
        logits = torch.compile(model, backend=backend)(**inputs, use_cache=False).logits
    check(model, logits, masks_of(profile, inputs), inputs)


def first_prompt(family: str) -> dict[str, torch.Tensor]:
    """The prompt with two videos, without its padding."""
    inputs = inputs_of(family)
    inputs.pop("pixel_values"), inputs.pop("image_grid_thw")
    begin = int(inputs["attention_mask"][0].argmax())
    inputs = {
        name: value[:1, begin:] if value.shape[0] == 2 else value for name, value in inputs.items()
    }
    inputs["video_grid_thw"] = inputs["video_grid_thw"][:2]
    if "video_second_per_grid" in inputs:
        inputs["video_second_per_grid"] = inputs["video_second_per_grid"][:2]
    num_patches = int(inputs["video_grid_thw"].prod(-1).sum())
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"][:num_patches]
    return inputs


GENERATION = {
    "max_new_tokens": 4,
    "do_sample": False,
    "return_dict_in_generate": True,
    "output_logits": True,
}


@pytest.mark.parametrize(
    ("family", "chunk", "one_by_one"),
    [
        ("qwen2_5_vl", None, False),
        ("qwen2_5_vl", 10, True),
        pytest.param("qwen2_5_vl", 13, False, marks=pytest.mark.nightly),
        pytest.param("qwen2_5_vl", 6, True, marks=pytest.mark.nightly),
        pytest.param("qwen2_5_vl", None, True, marks=pytest.mark.nightly),
        pytest.param("qwen2_5_omni_thinker", 10, False, marks=pytest.mark.nightly),
        pytest.param("qwen3_omni_moe_thinker", 10, False, marks=pytest.mark.nightly),
    ],
)
def test_generation_with_videos(family: str, chunk: int | None, one_by_one: bool) -> None:
    """Positions tell the frames; chunks begin anywhere in them."""
    model = tiny_model(family)
    profile, inputs = profile_of(model), first_prompt(family)
    options = {**GENERATION, **({} if chunk is None else {"prefill_chunk_size": chunk})}
    try:
        model.generate(**inputs, **options)
    except RuntimeError as error:  # some transformers give the second chunk no positions
        pytest.skip(f"transformers cannot chunk this prompt: {error}")
    codes, span_id, is_sink = masks_of(profile, inputs)
    expected = generate_reference(model, codes, span_id, is_sink, inputs, **GENERATION)
    backend = blindsight_backend(profile, inner="eager", lowering="fused")
    parts = list(model.model.language_model.layers) if one_by_one else [model]
    for part in parts:
        part.compile(backend=backend)
    with warnings.catch_warnings(), torch._dynamo.config.patch(recompile_limit=64):
        warnings.simplefilter("error", BlindsightWarning)
        found = model.generate(**inputs, **options)
    for part in parts:
        part._compiled_call_impl = None
    backend.detach()
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)
    whole = masks_of(profile, inputs, whole=True)[1:]
    other = generate_reference(model, codes, *whole, inputs, **GENERATION)
    assert (other.logits[0] - expected.logits[0]).abs().max() > 1e-2


def test_generation_that_shows_no_frames_says_so() -> None:
    """EXAONE has the positions of text, and newer transformers prepare its videos beforehand."""
    model = tiny_model("exaone4_5")
    profile, inputs = profile_of(model), first_prompt("exaone4_5")
    model.compile(backend=blindsight_backend(profile, inner="eager", lowering="fused"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = model.generate(**inputs, **GENERATION)
    model._compiled_call_impl = None
    said = any("frames of a video are not told apart" in str(x.message) for x in caught)
    assert said or Version(transformers.__version__) < Version("5.23")
    masks = masks_of(profile, inputs, whole=said)
    expected = generate_reference(model, *masks, inputs, **GENERATION)
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


def forwards_of(model: Any) -> Forwards:
    return blindsight_backend(profile_of(model), inner="eager", model=model).state.forwards


def spans_of(forwards: Forwards, past: History | None = None) -> tuple[History, str]:
    assert forwards.pending is not None
    history = forwards.history(forwards.pending, past)
    assert history is not None
    return history, "".join(map(str, history.template.span_id[0].tolist()))


def test_a_video_that_comes_frame_by_frame() -> None:
    """Each call with the grid of its own frame, as one run or in the middle of one."""
    forwards = forwards_of(tiny_model("qwen2_5_vl"))
    grid, history, spans = torch.tensor([[1, 4, 4]]), None, ""
    frame = [VIDEO_ID] * 4
    for tokens in ([FIRST_TEXT_ID, START_ID, *frame], frame, [*frame, END_ID, FIRST_TEXT_ID]):
        ids = torch.tensor([tokens])
        forwards.observe(ids)
        forwards.observe_videos(grid)
        history, spans = spans_of(forwards, history)
    assert spans == "011111" + "2222" + "333330"


def test_the_last_grid_that_is_shown_counts() -> None:
    """The first call failed: its grid did not fit its pixels."""
    forwards = forwards_of(tiny_model("qwen2_5_vl"))
    ids = torch.tensor([[START_ID, *[VIDEO_ID] * 8, END_ID]])
    for frames, expected in ((2, "1111122222"), (4, "1112233444"), (3, "1111111111")):
        forwards.observe(ids)
        forwards.observe_videos(torch.tensor([[frames, 4, 32 // frames // 4]]))
        if frames == 3:
            with pytest.warns(BlindsightWarning, match="does not fit its tokens"):
                assert spans_of(forwards)[1] == expected
        else:
            assert spans_of(forwards)[1] == expected


def places(*corners: tuple[int, int]) -> torch.Tensor:
    """Positions of one row: of text, then those of three axes."""
    height, width = torch.tensor(corners).T
    text = torch.arange(len(corners))
    return torch.stack([text, torch.zeros_like(text), height, width])[:, None]


# two frames of 2 x 2 tokens
CORNERS = [(0, 0), (0, 1), (1, 0), (1, 1)] * 2


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 7, 8])
def test_chunks_may_begin_anywhere(chunk: int) -> None:
    """Each chunk in the same buffer, as some callers do."""
    forwards = forwards_of(tiny_model("qwen2_5_vl"))
    ids, history, spans = torch.tensor([[VIDEO_ID] * 8]), None, ""
    buffer = torch.zeros(4, 1, chunk, dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("error", BlindsightWarning)
        for begin in range(0, 8, chunk):
            part = ids[:, begin : begin + chunk]
            positions = buffer[..., : part.shape[1]]
            positions.copy_(places(*CORNERS[begin : begin + chunk]))
            forwards.observe(part)
            forwards.observe_positions(positions)
            history, spans = spans_of(forwards, history)
    assert spans == "11112222"


@pytest.mark.parametrize("second", [None, [(7, 7), (8, 8)], [(7, 7)]])
def test_chunks_whose_frames_nobody_tells(second: Any) -> None:
    """No positions, or those of text."""
    forwards = forwards_of(tiny_model("qwen2_5_vl"))
    ids = torch.tensor([[VIDEO_ID] * 4])
    before, after = ids[:, :2], ids[:, 2 : 3 if second is None else 2 + len(second)]
    forwards.observe(before)
    forwards.observe_positions(places(*CORNERS[:2]))
    history, _ = spans_of(forwards)
    forwards.observe(after)
    if second is not None:
        forwards.observe_positions(places(*second))
    with disabled(), warnings.catch_warnings():
        warnings.simplefilter("error", BlindsightWarning)
        spans_of(forwards, history)
    forwards.pending.joined.clear()
    with pytest.warns(BlindsightWarning, match="not told apart"):
        spans_of(forwards, history)


def test_a_video_right_after_an_image() -> None:
    forwards = forwards_of(tiny_model("qwen2_5_vl"))
    image, video = [IMAGE_ID] * 2, [VIDEO_ID] * 8
    corners = [(9, 9)] * 2 + CORNERS
    for parts in ([image + video], [image, video]):
        history, begin, spans = None, 0, ""
        for part in parts:
            ids = torch.tensor([part])
            forwards.observe(ids)
            forwards.observe_positions(places(*corners[begin : begin + len(part)]))
            history, spans = spans_of(forwards, history)
            begin += len(part)
        assert spans == "1122223333"


def test_positions_of_the_call_count_more_than_a_grid_of_one_that_failed() -> None:
    forwards = forwards_of(tiny_model("qwen2_5_vl"))
    ids = torch.tensor([[VIDEO_ID] * 8])
    forwards.observe(ids)
    forwards.observe_videos(torch.tensor([[4, 2, 4]]))
    assert spans_of(forwards)[1] == "11223344"
    forwards.observe_positions(places(*CORNERS))
    assert spans_of(forwards)[1] == "11112222"
    forwards.observe_videos(torch.tensor([[9, 9, 9]]))  # which are not these videos
    assert spans_of(forwards)[1] == "11112222"


def test_videos_are_measured_and_evaluated() -> None:
    model = tiny_model("qwen2_5_vl")
    profile, inputs = profile_of(model), inputs_of("qwen2_5_vl")
    span_id = masks_of(profile, inputs)[1]
    prober = Prober(model, profile.rule)
    seen = []
    begin = prober._backend.begin
    prober._backend.begin = lambda template: (seen.append(template), begin(template))[1]
    prober(inputs)
    assert torch.equal(seen[0].span_id.long(), span_id)
    batch = Decoder(model, profile).prepare(inputs)
    assert torch.equal(batch.prompt.template.span_id.long(), span_id)
