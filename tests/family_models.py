"""Tiny random models of many vision-language families, and for each a prompt with several images.

`tests/models.py` has the four families that every test runs on; here each family is one row: sizes
that its configs need beside the common ones, and how the real processor writes an image.

Legend: N images of a prompt, M image tiles of all of them, C channels, P patch size, T tokens.
"""

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)

from models import as_loaded

# one vocabulary for all families: special ids, tags of tiles, then ordinary text
PAD_ID, START_ID, END_ID, IMAGE_ID, VIDEO_ID, AUDIO_ID = range(6)
# between the parts of one image: after a row, between tiles, around a tile, before a thumbnail
ROW_ID, COLUMN_ID, TILE_START_ID, TILE_END_ID, GLOBAL_ID, NEWLINE_ID = range(6, 12)
FIRST_TAG_ID, FIRST_TEXT_ID, VOCAB_SIZE = 12, 20, 512

HIDDEN_SIZE, NUM_HEADS, HEAD_DIM = 64, 4, 16
NUM_CHANNELS, PATCH_SIZE, MERGE_SIZE, TEMPORAL_PATCH_SIZE = 3, 4, 2, 2
PATCHES_PER_SIDE = 6  # of an image, or a tile, of fixed size
IMAGE_SIZE = PATCHES_PER_SIDE * PATCH_SIZE  # pixels
NUM_PATCHES = PATCHES_PER_SIDE**2
NUM_MERGED = NUM_PATCHES // MERGE_SIZE**2
NUM_LATENTS = 8  # tokens of an image or a tile that is resampled

# of the images of a prompt, in turn: height and width in merged patches, or in tiles
SIZES = ((2, 3), (3, 2), (2, 2), (1, 4))
TILINGS = ((1, 2), (1, 1), (2, 1), (2, 2))

# every family takes those that its config has
SPECIAL_IDS = {
    **dict.fromkeys(("image_token_id", "image_token_index", "image_patch_id"), IMAGE_ID),
    **dict.fromkeys(("video_token_id", "video_token_index"), VIDEO_ID),
    **dict.fromkeys(("audio_token_id", "audio_token_index"), AUDIO_ID),
    **dict.fromkeys(("vision_start_token_id", "image_start_token_id"), START_ID),
    **dict.fromkeys(("vision_end_token_id", "image_end_token_id"), END_ID),
    **dict.fromkeys(("boi_token_id", "boi_token_index"), START_ID),
    **dict.fromkeys(("eoi_token_id", "eoi_token_index"), END_ID),
}
TEXT_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 2 * HIDDEN_SIZE,
    "num_hidden_layers": 2,
    "num_attention_heads": NUM_HEADS,
    "num_key_value_heads": NUM_HEADS // 2,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 4096,
    "pad_token_id": PAD_ID,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,  # unit-size embeddings and unit-size logits
    # mixtures of experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    # linear attention
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": HEAD_DIM,
    "linear_value_head_dim": HEAD_DIM,
}
VISION_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "out_hidden_size": HIDDEN_SIZE,
    **dict.fromkeys(("num_hidden_layers", "depth"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "num_key_value_heads"), 2),
    "head_dim": 16,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
    "spatial_merge_size": MERGE_SIZE,
    "temporal_patch_size": TEMPORAL_PATCH_SIZE,
    "num_position_embeddings": 64,
}
AUDIO_SIZES = {
    **dict.fromkeys(("d_model", "encoder_ffn_dim"), 32),
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "num_mel_bins": 16,
    "max_source_positions": 16,
    "downsample_hidden_size": 8,
    "output_dim": HIDDEN_SIZE,
}

# the token ids of each image, and the tensors that hold them all
Written = tuple[list[list[int]], dict[str, Tensor]]
Images = Callable[[int, torch.Generator], Written]  # of so many images


@dataclass(frozen=True)
class Family:
    """One row.

    Attributes:
        prompt: an image as the real processor or chat template writes it.
        images: the same in ids of ours, with pixels.
        text, vision: what its text and vision configs need beside the common sizes.
        config: what the whole config needs.
        typed_ids: what the real processor marks in mm_token_type_ids.
    """

    prompt: str
    images: Images
    text: Mapping[str, Any] = field(default_factory=dict)
    vision: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    typed_ids: tuple[int, ...] = (IMAGE_ID,)


def why_not_here(family: str) -> str:
    """Why these transformers cannot run a tiny model, or nothing."""
    needed = {"molmo2": "5.20", "minicpmv4_6": "5.23"}.get(family, "0")
    here = Version(transformers.__version__)
    if Version(needed) > here:
        return f"the tiny {family} is that of transformers {needed}"
    if family == "llama4" and here.release[:2] == (5, 24):
        return "transformers 5.24 reads image_outputs of Llama 4's decoder, which has none"
    return ""


def tiny_config(family: str) -> PreTrainedConfig:
    """The config of a tiny model: 2 or 4 decoder layers, 4 query heads of 16."""
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {tuple(FAMILIES)}, got {family!r}.")
    row, config_class = FAMILIES[family], _config_class(family)
    default = config_class(vision_config={})
    sized = {
        "text_config": _sized(default.text_config, TEXT_SIZES, row.text),
        "vision_config": _sized(default.vision_config, VISION_SIZES, row.vision),
    }
    if getattr(default, "audio_config", None) is not None:
        sized["audio_config"] = _sized(default.audio_config, AUDIO_SIZES, {})
    ids = _known(config_class, {**SPECIAL_IDS, "tie_word_embeddings": False})
    return config_class(**{**sized, **ids, **row.config})


def _config_class(family: str) -> type[PreTrainedConfig]:
    return CONFIG_MAPPING[family.partition("/")[0]]


def _sized(
    default: PreTrainedConfig, sizes: Mapping[str, Any], own: Mapping[str, Any]
) -> PreTrainedConfig:
    return type(default)(**{**_known(type(default), sizes), **own})


def _known(config_class: type, values: Mapping[str, Any]) -> dict[str, Any]:
    names = config_class.__dataclass_fields__
    return {name: value for name, value in values.items() if name in names}


def tiny_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A random model whose attention is peaky, so that a mask changes its logits.

    Buffers stay float32 in every dtype, as `from_pretrained` leaves them.
    """
    config = tiny_config(family)
    model_class = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class._from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    _draw_weights(model, torch.Generator().manual_seed(seed))
    return as_loaded(model, dtype)


def _draw_weights(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Unit-size activations everywhere, attention scores with a spread of a few units."""
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        module = modules[name.rpartition(".")[0]]
        is_decoder = re.search(r"\b(language_model|text_model)\.", name) is not None
        if is_decoder and re.search(r"\.[qk]_(layer)?norm\.", name):
            # scores are made of normalised vectors, so their spread is set here
            attention = modules[name.rsplit(".", 2)[0]]
            scaling = getattr(attention, "scaling", parameter.shape[0] ** -0.5)
            size = 1.6 / math.sqrt(scaling * math.sqrt(parameter.shape[0]))
            # some norms multiply by 1 + weight: theirs are initialised to 0, not to 1
            values = parameter.data.mean().round() - 1.0 + size + 0.1 * noise
        elif parameter.ndim <= 1:
            values = parameter.data + 0.1 * noise
        elif isinstance(module, torch.nn.Embedding):
            values = noise / float(getattr(module, "embed_scale", 1.0))
        elif re.search("position|token|latents|query", name.rpartition(".")[2]):
            values = noise
        elif "experts" in name and parameter.ndim == 3:
            values = noise / math.sqrt(HIDDEN_SIZE)
        else:
            values = noise / math.sqrt(parameter[0].numel())
        if is_decoder and re.search(r"\.(q|k|q_b|kv_b)_proj\.weight", name):
            values = 1.6 * values
        parameter.data.copy_(values)


def make_inputs(
    model_or_family: PreTrainedModel | str, num_images: int = 4, *, seed: int = 0
) -> dict[str, Tensor]:
    """Everything the forward needs for one prompt with `num_images` images, text in between."""
    family = model_or_family
    if not isinstance(family, str):
        family = family.config.model_type
    row = FAMILIES[family]
    generator = torch.Generator().manual_seed(seed)
    images, tensors = row.images(num_images, generator)
    ids = _text(5, generator)
    for i, image in enumerate(images):
        ids += image + _text(4 + i % 3, generator)
    ids += _text(8, generator)
    input_ids = torch.tensor([ids])
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **tensors}
    model_class = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[_config_class(family)]
    known = inspect.signature(model_class.forward).parameters
    if "mm_token_type_ids" in known:
        inputs["mm_token_type_ids"] = torch.isin(input_ids, torch.tensor(row.typed_ids)).long()
    if "moe_mm_token_type_ids" in known:  # Ernie: which experts a token goes to
        ids_of_images = torch.tensor([START_ID, END_ID, IMAGE_ID])
        inputs["moe_mm_token_type_ids"] = torch.isin(input_ids, ids_of_images).long()
    return inputs


def _text(num_tokens: int, generator: torch.Generator) -> list[int]:
    return torch.randint(FIRST_TEXT_ID, VOCAB_SIZE, (num_tokens,), generator=generator).tolist()


def _pixels(*shape: int, generator: torch.Generator) -> Tensor:
    # values that bfloat16 holds exactly, so that all dtypes see the same image
    return torch.randn(shape, generator=generator).bfloat16().float()


def _cycled(sizes: Sequence[tuple[int, int]], num_images: int) -> list[tuple[int, int]]:
    return [sizes[i % len(sizes)] for i in range(num_images)]


def _delimited(num_tokens: int) -> list[int]:
    return [START_ID] + [IMAGE_ID] * num_tokens + [END_ID]


# --- patches of images of any size, and a grid for each image


def _grids(
    *patch_shape: int,
    before: Sequence[int] = (START_ID,),
    after: Sequence[int] = (END_ID,),
    merge_sizes: bool = False,
) -> Images:
    """Patches of all images in one list: [patches, *patch_shape], image_grid_thw [N, 3]."""

    def images(num_images: int, generator: torch.Generator) -> Written:
        sizes = _cycled(SIZES, num_images)
        ids = [[*before, *[IMAGE_ID] * (height * width), *after] for height, width in sizes]
        grids = torch.tensor([[1, MERGE_SIZE * h, MERGE_SIZE * w] for h, w in sizes])
        tensors = {
            "pixel_values": _pixels(int(grids.prod(-1).sum()), *patch_shape, generator=generator),
            "image_grid_thw": grids,
        }
        if merge_sizes:
            tensors["image_merge_sizes"] = torch.full((num_images,), MERGE_SIZE)
        return ids, tensors

    return images


def _pixtral(row_end: Sequence[int], image_end: Sequence[int]) -> Images:
    """Images padded to the largest [N, C, height, width] and image_sizes [N, 2]; rows end."""

    def images(num_images: int, generator: torch.Generator) -> Written:
        sizes = _cycled(SIZES, num_images)
        ids = [
            ([IMAGE_ID] * w + [*row_end]) * (h - 1) + [IMAGE_ID] * w + [*image_end]
            for h, w in sizes
        ]
        image_sizes = torch.tensor(sizes) * MERGE_SIZE * PATCH_SIZE
        height, width = image_sizes.amax(0).tolist()
        pixel_values = _pixels(num_images, NUM_CHANNELS, height, width, generator=generator)
        for image, (h, w) in zip(pixel_values, image_sizes.tolist(), strict=True):
            image[:, h:], image[:, :, w:] = 0, 0
        return ids, {"pixel_values": pixel_values, "image_sizes": image_sizes}

    return images


def _padded_patches(patches_per_token: int, patch_dim: int) -> Images:
    """Gemma 4: patches padded to the most [N, patches, patch_dim], image_position_ids (x, y)."""

    def images(num_images: int, generator: torch.Generator) -> Written:
        sizes = _cycled(SIZES, num_images)
        side = math.isqrt(patches_per_token)
        num_patches = max(h * w for h, w in sizes) * patches_per_token
        positions = torch.full((num_images, num_patches, 2), -1)
        for image, (h, w) in zip(positions, sizes, strict=True):
            x, y = torch.meshgrid(torch.arange(w * side), torch.arange(h * side), indexing="xy")
            image[: x.numel()] = torch.stack([x.flatten(), y.flatten()], dim=-1)
        pixel_values = _pixels(num_images, num_patches, patch_dim, generator=generator)
        pixel_values[positions[..., 0] < 0] = 0
        ids = [_delimited(h * w) for h, w in sizes]
        return ids, {"pixel_values": pixel_values, "image_position_ids": positions}

    return images


# --- tiles of a fixed size


def _tiles(
    write: Callable[[int, int], list[int]], *, num_tokens: int, nested: bool = False
) -> Images:
    """Tiles of all images in one list: [M, C, height, width].

    Args:
        write: the ids of an image of so many rows and columns of tiles.
        num_tokens: of a tile.
        nested: [1, M, C, height, width] and a mask of its pixels.
    """

    def images(num_images: int, generator: torch.Generator) -> Written:
        ids = [write(*tiling) for tiling in _cycled(TILINGS, num_images)]
        num_tiles = sum(image.count(IMAGE_ID) for image in ids) // num_tokens
        shape = (num_tiles, NUM_CHANNELS, IMAGE_SIZE, IMAGE_SIZE)
        pixel_values = _pixels(*shape, generator=generator)
        if not nested:
            return ids, {"pixel_values": pixel_values}
        mask = torch.ones(1, num_tiles, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.int64)
        return ids, {"pixel_values": pixel_values[None], "pixel_attention_mask": mask}

    return images


def _num_tiles(rows: int, columns: int) -> int:
    """With the thumbnail of an image that is cut."""
    return rows * columns + (rows * columns > 1)


def _tags(rows: int, columns: int) -> list[int]:
    """The ids of `<row_1_col_1>` and so on: none where the image is one tile."""
    return [FIRST_TAG_ID + i for i in range(rows * columns)] if rows * columns > 1 else []


def _plain(num_tokens: int) -> Callable[[int, int], list[int]]:
    return lambda rows, columns: [IMAGE_ID] * num_tokens


def _internvl(rows: int, columns: int) -> list[int]:
    return _delimited(NUM_MERGED * _num_tiles(rows, columns))


def _idefics3(rows: int, columns: int) -> list[int]:
    ids = []
    for i, tag in enumerate(_tags(rows, columns)):
        ids += [START_ID, tag, *[IMAGE_ID] * NUM_MERGED]
        ids += [NEWLINE_ID] * ((i + 1) % columns == 0)
    ids += [NEWLINE_ID] * bool(ids)
    return [*ids, START_ID, GLOBAL_ID, *[IMAGE_ID] * NUM_MERGED, START_ID]


def _idefics2(rows: int, columns: int) -> list[int]:
    # four quarters and the whole
    return [START_ID] + ([IMAGE_ID] * NUM_LATENTS + [START_ID]) * 5


def _aria(rows: int, columns: int) -> list[int]:
    return _delimited(NUM_LATENTS)


def _aya(rows: int, columns: int) -> list[int]:
    ids = [START_ID]
    for tag in [*_tags(rows, columns), GLOBAL_ID]:
        ids += [tag, *[IMAGE_ID] * NUM_MERGED]
    return [*ids, END_ID]


def _cohere2(rows: int, columns: int) -> list[int]:
    tile = [IMAGE_ID] * NUM_MERGED + [ROW_ID]
    return [START_ID, *tile * _num_tiles(rows, columns), END_ID]


def _ovis2(rows: int, columns: int) -> list[int]:
    tile = [IMAGE_ID] * NUM_PATCHES
    ids = [START_ID, *tile, GLOBAL_ID]
    if rows * columns > 1:
        row = [*tile, COLUMN_ID] * (columns - 1) + tile
        ids += [*row, ROW_ID] * (rows - 1) + row
    return [*ids, END_ID]


def _llama4(rows: int, columns: int) -> list[int]:
    tile = [IMAGE_ID] * NUM_MERGED
    ids = [START_ID]
    if rows * columns > 1:
        ids += ([*tile, COLUMN_ID] * (columns - 1) + [*tile, ROW_ID]) * rows
    return [*ids, GLOBAL_ID, *tile, END_ID]


def _llava_next(num_images: int, generator: torch.Generator) -> Written:
    """Tiles padded to the most [N, tiles, C, height, width]; each row of patches has a newline."""
    tilings = _cycled(((1, 2), (2, 1), (2, 2)), num_images)
    side = PATCHES_PER_SIDE
    ids = [[IMAGE_ID] * (NUM_PATCHES + r * side * (c * side + 1)) for r, c in tilings]
    shape = (num_images, 5, NUM_CHANNELS, IMAGE_SIZE, IMAGE_SIZE)
    pixel_values = _pixels(*shape, generator=generator)
    for image, (rows, columns) in zip(pixel_values, tilings, strict=True):
        image[1 + rows * columns :] = 0
    return ids, {"pixel_values": pixel_values, "image_sizes": torch.tensor(tilings) * IMAGE_SIZE}


def _llava_onevision(num_images: int, generator: torch.Generator) -> Written:
    """As LLaVA-NeXT where a prompt has one image; where it has several, one tile and a newline."""
    if num_images == 1:
        ids, tensors = _llava_next(num_images, generator)
    else:
        shape = (num_images, 1, NUM_CHANNELS, IMAGE_SIZE, IMAGE_SIZE)
        ids = [[IMAGE_ID] * (NUM_PATCHES + 1)] * num_images
        image_sizes = torch.tensor(_cycled(TILINGS, num_images)) * IMAGE_SIZE
        tensors = {
            "pixel_values": _pixels(*shape, generator=generator),
            "image_sizes": image_sizes,
        }
    return ids, {**tensors, "batch_num_images": torch.tensor([num_images])}


def _lfm2(num_images: int, generator: torch.Generator) -> Written:
    """Tiles and images of any size, patches padded: [M, patches, C * P * P], spatial_shapes."""
    ids, shapes = [], []
    for (rows, columns), (height, width) in zip(
        _cycled(TILINGS, num_images), _cycled(SIZES, num_images), strict=True
    ):
        tags = _tags(rows, columns)
        image = [START_ID]
        for tag in tags:
            image += [tag, *[IMAGE_ID] * NUM_MERGED]
        image += [GLOBAL_ID] * bool(tags) + [IMAGE_ID] * (height * width)
        ids.append([*image, END_ID])
        shapes += [(PATCHES_PER_SIDE, PATCHES_PER_SIDE)] * len(tags)
        shapes.append((MERGE_SIZE * height, MERGE_SIZE * width))
    spatial_shapes = torch.tensor(shapes)
    patch_dim = NUM_CHANNELS * PATCH_SIZE**2
    pixel_values = _pixels(len(shapes), NUM_PATCHES, patch_dim, generator=generator)
    mask = torch.arange(NUM_PATCHES) < spatial_shapes.prod(-1, keepdim=True)
    pixel_values[~mask] = 0
    return ids, {
        "pixel_values": pixel_values,
        "pixel_attention_mask": mask.to(torch.int64),
        "spatial_shapes": spatial_shapes,
    }


def _molmo2(num_images: int, generator: torch.Generator) -> Written:
    """Crops of patches [M, patches, P * P * C]; image_token_pooling says which make a token."""
    side, pool = PATCHES_PER_SIDE, MERGE_SIZE
    merged = side // pool
    ids, pooling, grids, num_crops = [], [], [], []
    for rows, columns in _cycled(TILINGS, num_images):
        low = [GLOBAL_ID] + [IMAGE_ID] * NUM_MERGED + [END_ID]
        row = [IMAGE_ID] * (columns * merged) + [COLUMN_ID]
        ids.append([*low, START_ID, *row * (rows * merged), END_ID])
        # the first crop is the whole image
        for crop_rows, crop_columns in ((1, 1), (rows, columns)):
            count = crop_rows * crop_columns
            patches = torch.arange(count * NUM_PATCHES) + sum(num_crops) * NUM_PATCHES
            patches = patches.view(crop_rows, crop_columns, side, side).transpose(1, 2)
            patches = patches.reshape(crop_rows * merged, pool, crop_columns * merged, pool)
            pooling.append(patches.transpose(1, 2).reshape(-1, pool**2))
            num_crops.append(count)
        grids.append((merged, merged, rows * merged, columns * merged))
    shape = (sum(num_crops), NUM_PATCHES, PATCH_SIZE**2 * NUM_CHANNELS)
    return ids, {
        "pixel_values": _pixels(*shape, generator=generator),
        "image_token_pooling": torch.cat(pooling),
        "image_grids": torch.tensor(grids),
        "image_num_crops": torch.tensor(num_crops).view(-1, 2).sum(-1),
    }


def _minicpm(num_images: int, generator: torch.Generator) -> Written:
    """Patches of all images and their slices in one row [1, C, P, patches * P], target_sizes."""
    ids, sizes = [], []
    for i, (rows, columns) in enumerate(_cycled(TILINGS, num_images)):
        height, width = SIZES[i % len(SIZES)]
        tile = [TILE_START_ID] + [IMAGE_ID] * MERGE_SIZE**2 + [TILE_END_ID]
        num_slices = rows * columns if rows * columns > 1 else 0
        slices = ([*tile * columns, NEWLINE_ID] * rows)[:-1] if num_slices else []
        # the first three are the image's number in its own delimiters
        ids.append([COLUMN_ID, FIRST_TEXT_ID + i, ROW_ID, *_delimited(height * width), *slices])
        sizes += [(height, width)] + [(MERGE_SIZE, MERGE_SIZE)] * num_slices
    # patches are merged twice
    target_sizes = torch.tensor(sizes, dtype=torch.int32) * MERGE_SIZE**2
    num_pixels = int(target_sizes.prod(-1).sum()) * PATCH_SIZE
    pixel_values = _pixels(1, NUM_CHANNELS, PATCH_SIZE, num_pixels, generator=generator)
    return ids, {"pixel_values": pixel_values, "target_sizes": target_sizes}


def _mrope(section: Sequence[int], **others: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [*section]}
    return {"rope_parameters": {**rope, **others}}


QWEN_PATCH = NUM_CHANNELS * TEMPORAL_PATCH_SIZE * PATCH_SIZE**2
QWEN_PROMPT = "<|vision_start|> <|image_pad|>*n <|vision_end|>"
GLM_PROMPT = "<|begin_of_image|> <|image|>*n <|end_of_image|>"
IDEFICS3_PROMPT = (
    "(<fake_token_around_image> <row_1_col_1> <image>*n)*tiles, a newline after each row of tiles, "
    "newline <fake_token_around_image> <global-img> <image>*n <fake_token_around_image>"
)


def _full_in_turn_with(kind: str) -> dict[str, Any]:
    return {"num_hidden_layers": 4, "layer_types": [kind, "full_attention"] * 2}


SLIDING = {**_full_in_turn_with("sliding_attention"), "sliding_window": 16}
# rotary embeddings turn half of HEAD_DIM, as in the real ones a quarter
QWEN3_5_TEXT = {
    **_full_in_turn_with("linear_attention"),
    **_mrope((2, 1, 1), partial_rotary_factor=0.5, mrope_interleaved=True),
}

GRID_PINPOINTS = {
    "image_grid_pinpoints": [[IMAGE_SIZE * r, IMAGE_SIZE * c] for r, c in ((1, 2), (2, 1), (2, 2))]
}
WINDOWED_VISION = {"window_size": 2 * MERGE_SIZE * PATCH_SIZE, "fullatt_block_indexes": [1]}
GEMMA4_PROMPT = "<|image> <|image|>*n <image|>"
GEMMA4_VISION = {"pooling_kernel_size": MERGE_SIZE, "position_embedding_size": 32}
# images see themselves whole in sliding layers; values of full layers are their keys
LARGE_GEMMA4_TEXT = {
    **SLIDING,
    "global_head_dim": 2 * HEAD_DIM,
    "use_bidirectional_attention": "vision",
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
}

FAMILIES: dict[str, Family] = {
    "qwen3_5": Family(QWEN_PROMPT, _grids(QWEN_PATCH), text=QWEN3_5_TEXT),
    "gemma4": Family(
        GEMMA4_PROMPT,
        _padded_patches(MERGE_SIZE**2, NUM_CHANNELS * PATCH_SIZE**2),
        text={
            **SLIDING,
            "global_head_dim": 2 * HEAD_DIM,
            "vocab_size_per_layer_input": VOCAB_SIZE,
            "hidden_size_per_layer_input": 16,
            "num_kv_shared_layers": 2,
        },
        vision=GEMMA4_VISION,
    ),
    "gemma4/large": Family(
        GEMMA4_PROMPT,
        _padded_patches(MERGE_SIZE**2, NUM_CHANNELS * PATCH_SIZE**2),
        text={**LARGE_GEMMA4_TEXT, "hidden_size_per_layer_input": 0},
        vision=GEMMA4_VISION,
    ),
    "internvl": Family(
        "<img> <IMG_CONTEXT>*n*tiles </img>",
        _tiles(_internvl, num_tokens=NUM_MERGED),
        vision={"image_size": [IMAGE_SIZE] * 2, "patch_size": [PATCH_SIZE] * 2},
    ),
    "llava_onevision": Family("<image>*n", _llava_onevision, config=GRID_PINPOINTS),
    "mistral3": Family(
        "([IMG]*width [IMG_BREAK])*height, with [IMG_END] in place of the last [IMG_BREAK]",
        _pixtral((ROW_ID,), (END_ID,)),
    ),
    "idefics3": Family(IDEFICS3_PROMPT, _tiles(_idefics3, num_tokens=NUM_MERGED, nested=True)),
    "smolvlm": Family(IDEFICS3_PROMPT, _tiles(_idefics3, num_tokens=NUM_MERGED, nested=True)),
    "glm4v": Family(GLM_PROMPT, _grids(QWEN_PATCH), text=_mrope((4, 2, 2))),
    "llama4": Family(
        "<|image_start|> ((<|patch|>*n <|tile_x_separator|>)*columns <|tile_y_separator|>)*rows "
        "<|image|> <|patch|>*n <|image_end|>",
        _tiles(_llama4, num_tokens=NUM_MERGED),
        text={
            "num_hidden_layers": 4,
            "no_rope_layer_interval": 2,
            "attention_chunk_size": 32,
            "intermediate_size_mlp": 64,
            "num_experts_per_tok": 1,
        },
        vision={
            "intermediate_size": 32 * MERGE_SIZE**2,
            "vision_output_dim": 64,
            "projector_input_dim": 64,
            "projector_output_dim": 64,
        },
    ),
    "qwen3_vl_moe": Family(
        QWEN_PROMPT,
        _grids(QWEN_PATCH),
        text=_mrope((4, 2, 2), mrope_interleaved=True),
        vision={"deepstack_visual_indexes": [0]},
    ),
    "qwen3_5_moe": Family(QWEN_PROMPT, _grids(QWEN_PATCH), text=QWEN3_5_TEXT),
    "llava": Family("<image>*n", _tiles(_plain(NUM_PATCHES), num_tokens=NUM_PATCHES)),
    "llava_next": Family(
        "<image>*n",
        _llava_next,
        config=GRID_PINPOINTS,
    ),
    "glm46v": Family(GLM_PROMPT, _grids(QWEN_PATCH), text=_mrope((4, 2, 2))),
    "glm4v_moe": Family(
        GLM_PROMPT, _grids(QWEN_PATCH), text=_mrope((2, 1, 1), partial_rotary_factor=0.5)
    ),
    "aya_vision": Family(
        "<|START_OF_IMG|> (TILE_1 <|IMG_PATCH|>*n)*tiles TILE_GLOBAL <|IMG_PATCH|>*n "
        "<|END_OF_IMG|>",
        _tiles(_aya, num_tokens=NUM_MERGED),
        text={**SLIDING, "logit_scale": 1.0},
    ),
    "cohere2_vision": Family(
        "<|START_OF_IMG|> (<|IMG_PATCH|>*n <|IMG_LINE_BREAK|>)*tiles <|END_OF_IMG|>",
        _tiles(_cohere2, num_tokens=NUM_MERGED),
        text={**SLIDING, "logit_scale": 1.0},
        config={"alignment_intermediate_size": 64},
    ),
    "ovis2": Family(
        "<IMG_START> <IMG_ATOM>*n <IMG_GRID> "
        "((<IMG_ATOM>*n <IMG_COL>)*columns <IMG_ROW>)*rows <IMG_END>, no separator after the last",
        _tiles(_ovis2, num_tokens=NUM_PATCHES),
        vision={"vocab_size": 32},
        config={
            "hidden_size": HIDDEN_SIZE,
            "vocab_size": VOCAB_SIZE,
            "visual_indicator_token_ids": [START_ID, GLOBAL_ID, COLUMN_ID, ROW_ID, END_ID],
        },
    ),
    "lfm2_vl": Family(
        "<|image_start|> (<|img_row_1_col_1|> <image>*n)*tiles <|img_thumbnail|> <image>*n "
        "<|image_end|>",
        _lfm2,
        text={**_full_in_turn_with("conv"), "block_auto_adjust_ff_dim": False},
        vision={"num_patches": NUM_PATCHES},
        config={"projector_hidden_size": HIDDEN_SIZE},
    ),
    "video_llama_3": Family(
        "<|image_pad|>*n",
        _grids(NUM_CHANNELS * PATCH_SIZE**2, before=(), after=(), merge_sizes=True),
    ),
    "qwen2_5_omni_thinker": Family(
        "<|vision_bos|> <|IMAGE|>*n <|vision_eos|>",
        _grids(QWEN_PATCH),
        text=_mrope((4, 2, 2)),
        vision=WINDOWED_VISION,
        config={"vision_start_token_id": START_ID, "vision_end_token_id": END_ID},
    ),
    "qwen3_omni_moe_thinker": Family(
        QWEN_PROMPT,
        _grids(QWEN_PATCH),
        text=_mrope((4, 2, 2), mrope_interleaved=True),
        vision={"deepstack_visual_indexes": [0]},
        config={"vision_start_token_id": START_ID, "vision_end_token_id": END_ID},
    ),
    "kimi_k25": Family(
        "<|media_begin|> image <|media_content|> <|media_pad|>*n <|media_end|>",
        _grids(NUM_CHANNELS, PATCH_SIZE, PATCH_SIZE, before=(START_ID, FIRST_TEXT_ID, GLOBAL_ID)),
        text={
            "num_key_value_heads": NUM_HEADS,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": HEAD_DIM,
            "qk_rope_head_dim": HEAD_DIM // 2,
            "v_head_dim": HEAD_DIM,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
        vision={"pos_emb_height": 8, "pos_emb_width": 8},
        config={"projection_hidden_size": 32},
    ),
    "gemma4_unified": Family(
        GEMMA4_PROMPT,
        _padded_patches(1, NUM_CHANNELS * (MERGE_SIZE * PATCH_SIZE) ** 2),
        text=LARGE_GEMMA4_TEXT,
        vision={
            "pooling_kernel_size": MERGE_SIZE,
            "mm_embed_dim": HIDDEN_SIZE,
            "mm_posemb_size": 32,
            "output_proj_dims": HIDDEN_SIZE,
        },
    ),
    "minicpmv4_6": Family(
        "<image_id>0</image_id> <image> <|image_pad|>*n </image> "
        "(<slice> <|image_pad|>*n </slice>)*slices, a newline between rows of slices",
        _minicpm,
        text=QWEN3_5_TEXT,
        vision={"insert_layer_id": 0},
        config={"insert_layer_id": 0},
    ),
    "molmo2": Family(
        "<low_res_im_start> <im_patch>*n <im_end> <im_start> (<im_patch>*width <im_col>)*height "
        "<im_end>",
        _molmo2,
        text={"additional_vocab_size": 8},
        vision={"image_size": [IMAGE_SIZE] * 2, "num_position_embeddings": NUM_PATCHES},
        config={
            "adapter_config": {
                "vision_feature_layer": [1, 0],
                "hidden_size": 32,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "intermediate_size": 64,
                "text_hidden_size": HIDDEN_SIZE,
            },
            "low_res_image_start_token_id": GLOBAL_ID,
            "frame_start_token_id": TILE_START_ID,
            "frame_end_token_id": TILE_END_ID,
        },
        typed_ids=(START_ID, END_ID, IMAGE_ID, COLUMN_ID, GLOBAL_ID),
    ),
    "ernie4_5_vl_moe": Family(
        "<|IMAGE_START|> <|IMAGE_PLACEHOLDER|>*n <|IMAGE_END|>",
        _grids(NUM_CHANNELS * PATCH_SIZE**2),
        text={
            **_mrope((2, 2, 4)),
            "moe_intermediate_size": [32, 16],
            "moe_num_shared_experts": 1,
            "mlp_layer_types": ["dense", "sparse"],
        },
    ),
    "exaone4_5": Family(
        "<vision> <|image_pad|>*n </vision>",
        _grids(QWEN_PATCH),
        text=SLIDING,
        vision=WINDOWED_VISION,
    ),
    "aria": Family(
        "<fim_prefix> <|img|>*n <fim_suffix>",
        _tiles(_aria, num_tokens=NUM_LATENTS),
        text={"moe_num_shared_experts": 1},
        config={"projector_patch_to_query_dict": {NUM_PATCHES: NUM_LATENTS}},
    ),
    "deepseek_vl": Family(
        "<image_placeholder>*n",
        _tiles(_plain(NUM_PATCHES), num_tokens=NUM_PATCHES),
    ),
    "idefics2": Family(
        "<fake_token_around_image> (<image>*n <fake_token_around_image>)*tiles",
        _tiles(_idefics2, num_tokens=NUM_LATENTS, nested=True),
        config={
            "perceiver_config": {
                "hidden_size": HIDDEN_SIZE,
                "resampler_n_latents": NUM_LATENTS,
                "resampler_depth": 1,
                "resampler_n_heads": 2,
                "resampler_head_dim": HEAD_DIM,
                "num_key_value_heads": 2,
            }
        },
    ),
    "lighton_ocr": Family("<|image_pad|>*n", _pixtral((), ())),
    "paddleocr_vl": Family(
        "<|IMAGE_START|> <|IMAGE_PLACEHOLDER|>*n <|IMAGE_END|>",
        _grids(NUM_CHANNELS, PATCH_SIZE, PATCH_SIZE),
        text=_mrope((4, 2, 2)),
    ),
}
