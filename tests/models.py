"""Tiny random vision-language models of four families, and prompts for them.

Legend: B batch, T tokens of the whole prompt, Q tokens of one forward.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from blindsight.configs import cache_argument

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3")

# one vocabulary for all families: the special ids, then ordinary text
PAD_ID, START_ID, END_ID, IMAGE_ID, VIDEO_ID = 0, 1, 2, 3, 4
FIRST_TEXT_ID, VOCAB_SIZE = 8, 96

HIDDEN_SIZE, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 64, 4, 2, 16
PATCH_SIZE, MERGE_SIZE, TEMPORAL_PATCH_SIZE, NUM_CHANNELS = 4, 2, 2, 3
GEMMA_SLIDING_WINDOW = 16  # tokens
GEMMA_TOKENS_PER_SIDE = 2  # 4 tokens an image
GEMMA_IMAGE_SIZE = 16  # pixels


@dataclass(frozen=True)
class Image:
    """One image with its delimiters, `height` x `width` image tokens. Gemma-3 takes 2 x 2 only."""

    height: int = 2
    width: int = 2

    @property
    def num_tokens(self) -> int:
        """Delimiters included."""
        return self.height * self.width + 2


@cache
def _traces_checks_of_tensors() -> bool:
    def checked(x: torch.Tensor) -> torch.Tensor:
        torch._check_tensor_all(x.sum() == 6)
        return x + 1

    try:
        torch.compile(checked, fullgraph=True, backend="eager")(torch.arange(4))
    except Exception:
        return False
    return True


def skip_unless_traced_whole(family: str) -> None:
    """Skip where Gemma 3 cannot be one graph: torch 2.11, whatever the backend."""
    if family == "gemma3" and not _traces_checks_of_tensors():
        pytest.skip("Dynamo of this torch cannot trace torch._check_tensor_all, which it calls")


Segment = int | Image  # an int is a number of text tokens


def recompiles_per_image(model: Any) -> bool:
    """Whether what each image became is guarded on in the frames that Dynamo cuts a forward into.

    So it is in the transformers that call a cache ``cache``, from 5.24 on: Dynamo compiles such a
    frame again for another number of images. It does not where the decoder is compiled alone.
    """
    return cache_argument(model.model.forward) == "cache"


def without_vision(model: Any) -> Any:
    """Return the model; its vision tower runs uncompiled: tracing it is most of a test's time."""
    tower = getattr(model.model, "visual", None) or model.model.vision_tower
    tower.forward = torch._dynamo.disable(tower.forward)
    return model


def tiny_model(
    family: str,
    *,
    num_layers: int = 2,
    num_heads: int = NUM_HEADS,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    attn_implementation: str = "sdpa",
) -> PreTrainedModel:
    """A random model whose attention is peaky, so that a mask changes its logits.

    Two decoder layers by default (Gemma-3: sliding and full in turn), 4 query heads, one key head
    for two of them. Buffers stay float32 in every dtype, as `from_pretrained` leaves them.
    """
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {FAMILIES}, got {family!r}.")
    model_class, config = {
        "qwen2_vl": (Qwen2VLForConditionalGeneration, _qwen2_vl_config),
        "qwen2_5_vl": (Qwen2_5_VLForConditionalGeneration, _qwen2_5_vl_config),
        "qwen3_vl": (Qwen3VLForConditionalGeneration, _qwen3_vl_config),
        "gemma3": (Gemma3ForConditionalGeneration, _gemma3_config),
    }[family]
    made = config(num_layers)
    text = made.get_text_config()
    text.num_attention_heads, text.num_key_value_heads = num_heads, num_heads // 2
    with torch.random.fork_rng(devices=[]):
        model = model_class._from_config(
            made, attn_implementation=attn_implementation, dtype=torch.float32
        )
    _draw_weights(model, torch.Generator().manual_seed(seed))
    return as_loaded(model, dtype)


def as_loaded(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model, its weights in a dtype, for inference; buffers stay as they are."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model.eval()


def _text_config(num_layers: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 2 * HIDDEN_SIZE,
        "num_hidden_layers": num_layers,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "max_position_embeddings": 4096,
        "pad_token_id": PAD_ID,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _qwen_text_config(num_layers: int) -> dict[str, Any]:
    # the three sections share HEAD_DIM / 2 frequencies
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
    return {**_text_config(num_layers), "rope_parameters": rope}


def _qwen_vision_config() -> dict[str, Any]:
    return {
        "depth": 2,
        "num_heads": 2,
        "in_channels": NUM_CHANNELS,
        "patch_size": PATCH_SIZE,
        "spatial_merge_size": MERGE_SIZE,
        "temporal_patch_size": TEMPORAL_PATCH_SIZE,
    }


def _qwen_special_ids() -> dict[str, int]:
    return {
        "image_token_id": IMAGE_ID,
        "video_token_id": VIDEO_ID,
        "vision_start_token_id": START_ID,
        "vision_end_token_id": END_ID,
    }


def _qwen2_vl_config(num_layers: int) -> Qwen2VLConfig:
    vision = {**_qwen_vision_config(), "embed_dim": 32, "hidden_size": HIDDEN_SIZE, "mlp_ratio": 2}
    return Qwen2VLConfig(
        text_config=_qwen_text_config(num_layers), vision_config=vision, **_qwen_special_ids()
    )


def _qwen2_5_vl_config(num_layers: int) -> Qwen2_5_VLConfig:
    vision = {
        **_qwen_vision_config(),
        "hidden_size": 32,
        "intermediate_size": 64,
        "out_hidden_size": HIDDEN_SIZE,
        "window_size": 2 * MERGE_SIZE * PATCH_SIZE,  # pixels
        "fullatt_block_indexes": [1],
    }
    return Qwen2_5_VLConfig(
        text_config=_qwen_text_config(num_layers), vision_config=vision, **_qwen_special_ids()
    )


def _qwen3_vl_config(num_layers: int) -> Qwen3VLConfig:
    vision = {
        **_qwen_vision_config(),
        "hidden_size": 32,
        "intermediate_size": 64,
        "out_hidden_size": HIDDEN_SIZE,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }
    text = {**_qwen_text_config(num_layers), "head_dim": HEAD_DIM}
    return Qwen3VLConfig(text_config=text, vision_config=vision, **_qwen_special_ids())


def _gemma3_config(num_layers: int) -> Gemma3Config:
    text = {
        **_text_config(num_layers),
        "head_dim": HEAD_DIM,
        "query_pre_attn_scalar": HEAD_DIM,
        "sliding_window": GEMMA_SLIDING_WINDOW,
        "layer_types": [
            "full_attention" if layer % 2 else "sliding_attention" for layer in range(num_layers)
        ],
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": GEMMA_IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        "vision_use_head": False,
    }
    return Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=GEMMA_TOKENS_PER_SIDE**2,
        boi_token_index=START_ID,
        eoi_token_index=END_ID,
        image_token_index=IMAGE_ID,
    )


def _draw_weights(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Unit-size activations everywhere, attention scores with a spread of a few units."""
    is_gemma = isinstance(model, Gemma3ForConditionalGeneration)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_norm = parameter.ndim == 1 and name.endswith("weight")
        if "q_norm" in name or "k_norm" in name:
            # scores are made of normalised vectors, so their spread is set here (Gemma: 1 + weight)
            values = 1.6 + 0.1 * noise - (1.0 if is_gemma else 0.0)
        elif (is_norm and is_gemma and "vision_tower" not in name) or "mm_soft_emb_norm" in name:
            values = 0.1 * noise
        elif is_norm:
            values = 1.0 + 0.1 * noise
        elif parameter.ndim == 1:
            values = 0.1 * noise
        elif "embed_tokens" in name:
            # Gemma multiplies its embeddings by sqrt(hidden size)
            values = noise / (math.sqrt(HIDDEN_SIZE) if is_gemma else 1.0)
        elif "mm_input_projection_weight" in name:
            values = noise / math.sqrt(parameter.shape[0])
        elif "embed" in name and parameter.ndim == 2:
            values = noise
        else:
            values = noise / math.sqrt(parameter[0].numel())
        if "language_model" in name and ("q_proj" in name or "k_proj" in name):
            values = 1.6 * values
        parameter.data.copy_(values)


def make_inputs(
    family: str,
    rows: Sequence[Sequence[Segment]],
    *,
    pad_side: str | None = None,
    seed: int = 0,
    attention_mask: bool = True,
) -> dict[str, torch.Tensor]:
    """Everything the forward needs for a batch of prompts.

    Args:
        family: one of FAMILIES.
        rows: for each batch row its segments: a number of text tokens, or an Image.
        pad_side: "left", "right", or None where all rows have the same length.
        attention_mask: False leaves it out (no padding then).
    """
    row_ids = [_row_ids(row, seed=seed + 1000 * b) for b, row in enumerate(rows)]
    num_tokens = max(len(ids) for ids in row_ids)
    is_padded = any(len(ids) != num_tokens for ids in row_ids)
    if pad_side not in ("left", "right", None):
        raise ValueError(f"pad_side must be 'left', 'right' or None, got {pad_side!r}.")
    if is_padded and (pad_side is None or not attention_mask):
        raise ValueError(
            "rows of unlike lengths must have a pad_side and an attention_mask, got "
            f"pad_side={pad_side!r}, attention_mask={attention_mask}, "
            f"lengths {[len(ids) for ids in row_ids]}."
        )
    input_ids = torch.full((len(rows), num_tokens), PAD_ID)
    mask = torch.zeros(len(rows), num_tokens, dtype=torch.int64)
    for b, ids in enumerate(row_ids):
        first = num_tokens - len(ids) if pad_side == "left" else 0
        input_ids[b, first : first + len(ids)] = torch.tensor(ids)
        mask[b, first : first + len(ids)] = 1

    inputs = {"input_ids": input_ids}
    if attention_mask:
        inputs["attention_mask"] = mask
    inputs[_token_types_name(family)] = (input_ids == IMAGE_ID).to(torch.int64)
    images = [segment for row in rows for segment in row if isinstance(segment, Image)]
    if images:
        inputs.update(_pixels(family, images, torch.Generator().manual_seed(seed)))
    return inputs


def _row_ids(row: Sequence[Segment], seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    for segment in row:
        if isinstance(segment, Image):
            ids += [START_ID] + [IMAGE_ID] * (segment.num_tokens - 2) + [END_ID]
        else:
            ids += torch.randint(
                FIRST_TEXT_ID, VOCAB_SIZE, (segment,), generator=generator
            ).tolist()
    return ids


def _token_types_name(family: str) -> str:
    return "token_type_ids" if family == "gemma3" else "mm_token_type_ids"


def _pixels(
    family: str, images: Sequence[Image], generator: torch.Generator
) -> dict[str, torch.Tensor]:
    # values that bfloat16 holds exactly, so that all dtypes see the same image
    if family == "gemma3":
        side = GEMMA_TOKENS_PER_SIDE
        if any((image.height, image.width) != (side, side) for image in images):
            raise ValueError(f"a Gemma-3 image must be Image({side}, {side}), got {images}.")
        shape = (len(images), NUM_CHANNELS, GEMMA_IMAGE_SIZE, GEMMA_IMAGE_SIZE)
        return {"pixel_values": torch.randn(shape, generator=generator).bfloat16().float()}
    grids = torch.tensor([[1, MERGE_SIZE * i.height, MERGE_SIZE * i.width] for i in images])
    patch_dim = NUM_CHANNELS * TEMPORAL_PATCH_SIZE * PATCH_SIZE**2
    shape = (int(grids.prod(-1).sum()), patch_dim)
    return {
        "pixel_values": torch.randn(shape, generator=generator).bfloat16().float(),
        "image_grid_thw": grids,
    }


def valid_positions(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Which query positions are no padding: bool [B, Q]."""
    input_ids = inputs["input_ids"]
    if "attention_mask" not in inputs:
        return torch.ones_like(input_ids, dtype=torch.bool)
    # the mask of a later turn covers the cached tokens too
    return inputs["attention_mask"][:, -input_ids.shape[1] :].bool()


def full_position_ids(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Position ids of a whole prompt: [3, B, T] (Qwen), [B, T] (Gemma-3)."""
    input_ids = inputs["input_ids"]
    if not hasattr(model.model, "get_rope_index"):
        return torch.arange(input_ids.shape[1]).expand(input_ids.shape)
    position_ids, _ = model.model.get_rope_index(
        input_ids,
        mm_token_type_ids=inputs["mm_token_type_ids"],
        image_grid_thw=inputs.get("image_grid_thw"),
        attention_mask=inputs.get("attention_mask"),
    )
    return position_ids


def split_turns(
    model: PreTrainedModel, inputs: dict[str, torch.Tensor], split: int
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Cut a whole prompt before token `split`, into two forwards on one cache.

    Both carry explicit position ids: left to itself a Qwen model computes those of a later turn for
    the whole length of the attention mask.

    Raises:
        ValueError: the cut goes through an image of some row, or leaves a turn empty.
    """
    input_ids = inputs["input_ids"]
    num_tokens = input_ids.shape[1]
    if not 0 < split < num_tokens:
        raise ValueError(f"split must lie in 1..{num_tokens - 1}, got {split}.")
    for b, (before, after) in enumerate(input_ids[:, split - 1 : split + 1].tolist()):
        if before in (START_ID, IMAGE_ID) or after in (IMAGE_ID, END_ID):
            raise ValueError(
                f"split must lie between segments, got {split}, inside an image of batch row {b}."
            )
    position_ids = full_position_ids(model, inputs)
    first = {"input_ids": input_ids[:, :split], "position_ids": position_ids[..., :split]}
    second = {"input_ids": input_ids[:, split:], "position_ids": position_ids[..., split:]}
    if "attention_mask" in inputs:
        first["attention_mask"] = inputs["attention_mask"][:, :split]
        second["attention_mask"] = inputs["attention_mask"]
    if "token_type_ids" in inputs:
        first["token_type_ids"] = inputs["token_type_ids"][:, :split]
        # Gemma's bidirectional mask reads them by absolute position
        second["token_type_ids"] = inputs["token_type_ids"]
    else:
        first["mm_token_type_ids"] = inputs["mm_token_type_ids"][:, :split]
        second["mm_token_type_ids"] = inputs["mm_token_type_ids"][:, split:]
    if "pixel_values" in inputs:
        # images are listed row by row
        row_of_image, start_of_image = (input_ids == START_ID).nonzero(as_tuple=True)
        assert len(row_of_image) > 0
        is_first = start_of_image < split
        for turn, is_chosen in ((first, is_first), (second, ~is_first)):
            if is_chosen.any():
                turn.update(_choose_images(inputs, is_chosen))
    return first, second


def _choose_images(
    inputs: dict[str, torch.Tensor], is_chosen: torch.Tensor
) -> dict[str, torch.Tensor]:
    pixel_values = inputs["pixel_values"]
    if "image_grid_thw" not in inputs:
        return {"pixel_values": pixel_values[is_chosen]}
    grids = inputs["image_grid_thw"]
    return {
        "pixel_values": pixel_values[is_chosen.repeat_interleave(grids.prod(-1))],
        "image_grid_thw": grids[is_chosen],
    }


def generation_options(cache: str) -> dict[str, Any]:
    """Return what `generate` is given for a few tokens, on a "dynamic" or a "static" cache."""
    options: dict[str, Any] = {} if cache == "dynamic" else {"cache_implementation": cache}
    return {
        **options,
        "max_new_tokens": 4,
        "do_sample": False,
        # random weights may say "image"; a decoded image token is one of a span, not text
        "suppress_tokens": [START_ID, END_ID, IMAGE_ID, VIDEO_ID],
        "return_dict_in_generate": True,
        "output_scores": True,
    }


def append_text(inputs: dict[str, torch.Tensor], tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """A whole prompt followed by text tokens [B, n], after the padding where there is any.

    `split_turns(model, append_text(inputs, tokens), T)[1]` is a decode step on a cache of `inputs`.
    """
    result = dict(inputs)
    result["input_ids"] = torch.cat([inputs["input_ids"], tokens], dim=1)
    for name, value in (("attention_mask", 1), ("token_type_ids", 0), ("mm_token_type_ids", 0)):
        if name in inputs:
            result[name] = torch.cat([inputs[name], torch.full_like(tokens, value)], dim=1)
    return result
