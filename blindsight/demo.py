"""The demo: one prompt of photographs, prefilled dense and sparse by one compiled model.

Without arguments it needs no download: scikit-learn's two sample photographs, cut into many,
go through the family's own image processor into a small Qwen2.5-VL with random weights, for
which a byte is a token.

Shapes: B batch (1), T tokens of the prompt, L layers, H query heads, V vocabulary.
"""

from __future__ import annotations

import logging
import math
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from blindsight.backend import blindsight_backend
from blindsight.categories import NUM_CATEGORIES, summarize_categories
from blindsight.cost import AttentionFlops, attention_flops
from blindsight.families import text_config
from blindsight.profile import Profile
from blindsight.reference import reference_logits
from blindsight.report import Report
from blindsight.runtime import BlindsightWarning, disabled

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")

# The small model's vocabulary: the bytes, then these.
_CHAT_START, _CHAT_END, _VISION_START, _VISION_END, _IMAGE, _VIDEO = range(256, 262)
_VOCAB_SIZE = 264
_PATCH_SIZE, _MERGE_SIZE = 14, 2
_PIXELS = _PATCH_SIZE * _MERGE_SIZE  # an image token stands for this many, squared

_CAPTION = "Photograph {number}: "
_QUESTION = "Which of these photographs were taken at the same place, and what differs?"
_MAX_LOGITS = 2**26  # held at once: 256 MiB in float32


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """What to run; see ``blindsight demo --help``."""

    images: Path | None = None
    num_images: int = 12
    tokens: int = 4000
    layers: int = 2
    model: str | None = None
    profile: Path | None = None
    seed: int = 0
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    inner: str = "inductor"
    whole: bool = False
    check: bool = True
    repeats: int = 3
    new_tokens: int = 8

    def __post_init__(self) -> None:
        for name in ("num_images", "tokens", "layers", "repeats", "new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Largest absolute differences of logits, and what to judge them by.

    Attributes:
        sparse: Compiled sparse against the dense-mask reference.
        dense: Compiled dense against the model run eagerly: what compiling alone changes.
        effect: Compiled sparse against compiled dense: what the profile changes.
        magnitude: The largest logit of the reference.
        same_tokens: How many of the decoded tokens are the reference's.
    """

    sparse: float
    dense: float
    effect: float
    magnitude: float
    same_tokens: int


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What the demo measured; ``str()`` gives its tables. Times in seconds."""

    model: str
    num_tokens: int
    image_tokens: tuple[int, ...]
    profile: Profile
    compiled: str
    flops: AttentionFlops
    dense_seconds: tuple[float, ...]
    sparse_seconds: tuple[float, ...]
    compile_seconds: Mapping[str, float]
    num_decoded: int
    difference: Difference | None
    report: Report

    def __str__(self) -> str:
        dense, sparse = (statistics.median(x) for x in (self.dense_seconds, self.sparse_seconds))
        sizes = f"{min(self.image_tokens)} to {max(self.image_tokens)} tokens each"
        heads = summarize_categories(self.profile.categories.flatten().tolist())
        compiling = ", ".join(f"{name} {x:.1f} s" for name, x in self.compile_seconds.items())
        share = self.flops.sparse / self.flops.dense
        lines = [
            ("model", self.model),
            ("compiled", self.compiled),
            ("prompt", f"{self.num_tokens:,} tokens, {len(self.image_tokens)} images of {sizes}"),
            ("layers x heads", f"{self.profile.num_layers} x {self.profile.num_heads}: {heads}"),
            ("attention FLOPs, dense", f"{self.flops.dense:,}"),
            ("attention FLOPs, sparse", f"{self.flops.sparse:,} ({share:.1%} of dense)"),
            ("prefill, dense", _seconds(self.dense_seconds)),
            (
                "prefill, sparse",
                f"{_seconds(self.sparse_seconds)}; dense / sparse {dense / sparse:.2f}",
            ),
            ("first calls, which compile", compiling),
        ]
        if self.difference is not None:
            found = self.difference
            equal = f"{found.same_tokens} of {self.num_decoded} tokens as the reference's"
            lines += [
                ("decoded", equal),
                ("largest logit", f"{found.magnitude:.3g}"),
                ("largest difference of logits", ""),
                ("  sparse, from the reference", f"{found.sparse:.2g}"),
                ("  dense, compiled from eager", f"{found.dense:.2g} (rounding alone)"),
                ("  sparse, from dense", f"{found.effect:.2g} (what the profile changes)"),
            ]
        width = max(len(name) for name, _ in lines)
        table = [f"{name.ljust(width)}  {text}".rstrip() for name, text in lines]
        return "\n".join([*table, "", str(self.report)])


def _seconds(times: tuple[float, ...]) -> str:
    each = ", ".join(f"{seconds:.3f}" for seconds in times)
    return f"{statistics.median(times):.3f} s (median of {each})"


def run_demo(options: DemoOptions) -> DemoResult:
    """Run the demo and return what it measured.

    Raises:
        ValueError: An option is malformed, or the profile is another model's.
        ImportError: scikit-learn is wanted for its photographs, and is not installed.
    """
    steps = 5 + 2 * options.repeats + options.new_tokens
    with (
        quiet(),
        torch.no_grad(),
        tqdm(total=steps, disable=None, leave=False, bar_format="{l_bar}{bar}| {elapsed}") as bar,
    ):
        bar.set_description("building the prompt")
        model, inputs, described = load(options)
        profile = _profile_of(model, options)
        return _measure(options, model, inputs, profile, described, _Progress(bar))


def load(options: DemoOptions) -> tuple[nn.Module, dict[str, Any], str]:
    """Return the model, its inputs for one prompt of images, and a description of the model."""
    draw = random.Random(options.seed)
    images = _load_images(options, draw)
    if options.model is None:
        model = _build_model(options)
        inputs = _build_inputs(images)
        weights = f"random weights (seed {options.seed})"
    else:
        model, inputs = _load_pretrained(options, images)
        weights = options.model
    model = model.to(options.device)
    inputs = {
        name: value.to(options.device) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }
    dtype = str(options.dtype).removeprefix("torch.")
    return model, inputs, f"{type(model).__name__}, {weights}, {dtype} on {options.device}"


def _measure(
    options: DemoOptions,
    model: nn.Module,
    inputs: dict[str, Any],
    profile: Profile,
    described: str,
    progress: _Progress,
) -> DemoResult:
    eager = None
    if options.check:
        eager, _ = progress("running eagerly", lambda: model(**inputs).logits.cpu())
    # Short prompts too: the point is to show what sparse attention does.
    backend = blindsight_backend(profile, inner=options.inner, model=model, lowering="split")
    compiled, name = (model, "the whole model") if options.whole else _decoder_of(model)
    compiled.compile(backend=backend)

    def prefill(dense: bool) -> Any:
        with disabled() if dense else nullcontext():
            return model(**inputs, use_cache=True)

    seconds: dict[bool, list[float]] = {True: [], False: []}
    try:
        sparse, first_sparse = progress("compiling (sparse)", lambda: prefill(dense=False))
        dense, first_dense = progress("compiling (dense)", lambda: prefill(dense=True))
        sparse_logits, dense_logits = sparse.logits.cpu(), dense.logits.cpu()
        del sparse, dense
        for at in range(2 * options.repeats):
            is_dense = at % 2 == 0
            how = "dense" if is_dense else "sparse"
            output, elapsed = progress(f"timing {how}", partial(prefill, is_dense))
            seconds[is_dense].append(elapsed)
        tokens, decode_logits, decoding = _decode(model, output, options, progress)
        difference = None
        if eager is not None:
            longer = _append(inputs, tokens[:, :-1])
            if "logits_to_keep" in inputs:
                longer["logits_to_keep"] = inputs["logits_to_keep"] + tokens.shape[1] - 1
            reference, _ = progress(
                "running the reference", lambda: reference_logits(model, longer, profile).cpu()
            )
            whole = torch.cat([sparse_logits, decode_logits], dim=1)
            expected = reference[:, -tokens.shape[1] :].argmax(-1)
            difference = Difference(
                sparse=_distance(whole, reference),
                dense=_distance(dense_logits, eager),
                effect=_distance(sparse_logits, dense_logits),
                magnitude=float(reference.abs().max()),
                same_tokens=int((expected == tokens.cpu()).sum()),
            )
    finally:
        backend.detach()
    template = profile.rule.template(inputs["input_ids"])
    return DemoResult(
        model=described,
        num_tokens=template.num_tokens,
        image_tokens=tuple(torch.bincount(template.span_id[0])[1:].tolist()),
        profile=profile,
        compiled=f"{name}, by {options.inner}",
        flops=_count_flops(model, profile, inputs["input_ids"]),
        dense_seconds=tuple(seconds[True]),
        sparse_seconds=tuple(seconds[False]),
        compile_seconds={"sparse": first_sparse, "dense": first_dense, "decoding": decoding},
        num_decoded=tokens.shape[1],
        difference=difference,
        report=backend.report(),
    )


def _decode(
    model: nn.Module, output: Any, options: DemoOptions, progress: _Progress
) -> tuple[Tensor, Tensor, float]:
    """Decode greedily after a prefill: tokens ``[B, n]``, logits ``[B, n - 1, V]``, seconds."""
    tokens, logits, seconds = [output.logits[:, -1:].argmax(-1)], [], 0.0
    cache = output.past_key_values
    for layer in getattr(cache, "layers", ()):
        # The length grows with every token: compile for any, at once.
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if isinstance(tensor, Tensor):
                torch._dynamo.maybe_mark_dynamic(tensor, 2)
    for _ in range(options.new_tokens - 1):
        token = tokens[-1]
        output, elapsed = progress(
            "decoding",
            partial(model, input_ids=token, past_key_values=cache, use_cache=True),
        )
        seconds += elapsed
        logits.append(output.logits[:, -1:].cpu())
        tokens.append(output.logits[:, -1:].argmax(-1))
    empty = output.logits[:, :0].cpu()
    return torch.cat(tokens, dim=1), torch.cat([empty, *logits], dim=1), seconds


def _append(inputs: Mapping[str, Any], tokens: Tensor) -> dict[str, Any]:
    """Return the inputs of a longer prompt: text tokens ``[B, n]`` after it."""
    longer = dict(inputs)
    longer["input_ids"] = torch.cat([inputs["input_ids"], tokens], dim=1)
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            kinds = inputs[name].new_zeros(tokens.shape)
            longer[name] = torch.cat([inputs[name], kinds], dim=1)
    return longer


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().max())


def _count_flops(model: nn.Module, profile: Profile, input_ids: Tensor) -> AttentionFlops:
    """Add up the layers, each under its causal mask or sliding window."""
    template = profile.rule.template(input_ids)
    window = getattr(text_config(model.config), "sliding_window", None)
    layer_types = profile.fingerprint["layer_types"].split(",")
    dense = sparse = 0
    for layer_type in set(layer_types):
        rows = [at for at, name in enumerate(layer_types) if name == layer_type]
        lower = None
        if layer_type == "sliding_attention" and window is not None:
            lower = (torch.arange(template.num_tokens) - window + 1)[None]
        found = attention_flops(
            template,
            profile.categories[rows],
            head_dim=int(profile.fingerprint["head_dim"]),
            base_lower=lower,
        )
        dense, sparse = dense + found.dense, sparse + found.sparse
    return AttentionFlops(dense, sparse)


def _decoder_of(model: nn.Module) -> tuple[nn.Module, str]:
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "language_model":
            return module, f"the decoder ({name})"
    raise ValueError(
        f"model must have a decoder called 'language_model', got {type(model).__name__}. Compile "
        "the whole model."
    )


def _profile_of(model: nn.Module, options: DemoOptions) -> Profile:
    if options.profile is not None:
        return Profile.load(options.profile)
    text = text_config(model.config)
    layer, head = torch.arange(text.num_hidden_layers), torch.arange(text.num_attention_heads)
    return Profile.for_model(model, (layer[:, None] + head) % NUM_CATEGORIES)


# The photographs.


def _load_images(options: DemoOptions, draw: random.Random) -> list[Image.Image]:
    """Return as many images as wanted, of unlike sizes: whole photographs, then parts of them."""
    photos = _sample_photos() if options.images is None else _photos_of(options.images)
    overhead = len(_CAPTION) + 4  # delimiters and such
    average = (options.tokens - len(_QUESTION)) / options.num_images - overhead
    images = []
    for at in range(options.num_images):
        photo = photos[at % len(photos)]
        scale = 1.0 if at < len(photos) else draw.uniform(0.3, 0.8)
        area = max(4.0, average * draw.uniform(0.6, 1.4))  # in image tokens
        shape = photo.width / photo.height * draw.uniform(0.7, 1.4)
        width = max(2, round(math.sqrt(area * shape)))
        height = max(2, round(area / width))
        crop_width = scale * min(photo.width, photo.height * width / height)
        crop_height = crop_width * height / width
        left = draw.uniform(0, photo.width - crop_width)
        top = draw.uniform(0, photo.height - crop_height)
        box = (left, top, left + crop_width, top + crop_height)
        images.append(photo.resize((width * _PIXELS, height * _PIXELS), box=box))
    return images


def _sample_photos() -> list[Image.Image]:
    try:
        from sklearn.datasets import load_sample_images
    except ImportError:
        raise ImportError(
            "the sample photographs come with scikit-learn, which is not installed. Install "
            "blindsight[demo], or give a folder of images."
        ) from None
    return [Image.fromarray(pixels) for pixels in load_sample_images().images]


def _photos_of(folder: Path) -> list[Image.Image]:
    if not folder.is_dir():
        raise ValueError(f"images must be an existing folder, got {str(folder)!r}.")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise ValueError(
            f"images must be a folder with {', '.join(IMAGE_SUFFIXES)} files, got none in "
            f"{str(folder)!r}."
        )
    return [Image.open(path).convert("RGB") for path in paths]


# The model.


def _build_model(options: DemoOptions) -> nn.Module:
    """Return a small Qwen2.5-VL with random weights, drawn so that attention is uneven."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    hidden_size, num_heads = 512, 8
    text = {
        "vocab_size": _VOCAB_SIZE,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": options.layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": 2,
        "bos_token_id": _CHAT_START,
        "eos_token_id": _CHAT_END,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [8, 12, 12],  # of the 32 frequencies of a head
        },
    }
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "out_hidden_size": hidden_size,
        "patch_size": _PATCH_SIZE,
        "spatial_merge_size": _MERGE_SIZE,
        "window_size": 4 * _PIXELS,
        "fullatt_block_indexes": [1],
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=_IMAGE,
        video_token_id=_VIDEO,
        vision_start_token_id=_VISION_START,
        vision_end_token_id=_VISION_END,
    )
    model_class: Any = Qwen2_5_VLForConditionalGeneration
    model: nn.Module = model_class._from_config(
        config, attn_implementation="sdpa", dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(options.seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        spread = 1.0 if "embed_tokens" in name else parameter[0].numel() ** -0.5
        if "q_proj" in name or "k_proj" in name:
            spread *= 1.6  # or every head would average over all that it sees
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(spread * noise)
    return model.to(options.dtype).eval()


def _build_inputs(images: list[Image.Image]) -> dict[str, Tensor]:
    """Return the small model's inputs: a chat turn with text before each image."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(patch_size=_PATCH_SIZE, merge_size=_MERGE_SIZE)
    pixels = processor(images=images, return_tensors="pt")
    ids = [_CHAT_START, *b"user\n"]
    for number, grid in enumerate(pixels["image_grid_thw"], start=1):
        num_tokens = int(grid.prod()) // _MERGE_SIZE**2
        ids += _CAPTION.format(number=number).encode()
        ids += [_VISION_START, *[_IMAGE] * num_tokens, _VISION_END]
    ids += [*_QUESTION.encode(), _CHAT_END, *b"\n", _CHAT_START, *b"assistant\n"]
    input_ids = torch.tensor([ids])
    # Nothing is padded, so there is no attention mask and dense attention is at its fastest.
    return {
        "input_ids": input_ids,
        "mm_token_type_ids": (input_ids == _IMAGE).int(),
        "pixel_values": pixels["pixel_values"],
        "image_grid_thw": pixels["image_grid_thw"],
    }


def _load_pretrained(
    options: DemoOptions, images: list[Image.Image]
) -> tuple[nn.Module, dict[str, Any]]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model_class: Any = AutoModelForImageTextToText
    processor_class: Any = AutoProcessor
    processor = processor_class.from_pretrained(options.model)
    content: list[dict[str, Any]] = []
    for number, image in enumerate(images, start=1):
        content.append({"type": "text", "text": _CAPTION.format(number=number)})
        content.append({"type": "image", "image": image})
    content.append({"type": "text", "text": _QUESTION})
    inputs = dict(
        processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    )
    inputs.pop("attention_mask", None)  # as in _build_inputs
    model: nn.Module = model_class.from_pretrained(
        options.model, dtype=options.dtype, attn_implementation="sdpa"
    )
    keep = _MAX_LOGITS // text_config(model.config).vocab_size
    if keep < inputs["input_ids"].shape[1]:
        inputs["logits_to_keep"] = keep
    return model.eval(), inputs


# What the user sees while it runs.


class _Progress:
    """A bar that says what is under way, and a clock."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def __call__(self, description: str, function: Callable[[], Any]) -> tuple[Any, float]:
        """Return what the function returns, and the seconds it took."""
        self._bar.set_description(description)
        _wait()
        start = time.perf_counter()
        result = function()
        _wait()
        elapsed = time.perf_counter() - start
        self._bar.update()
        return result, elapsed


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the chatter of other libraries out of the output; our own warnings stay."""
    import transformers

    transformers_logging: Any = transformers.logging
    loggers = [logging.getLogger(name) for name in ("torch._dynamo", "torch._inductor")]
    levels = [logger.level for logger in loggers]
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # Appended: whoever asked for something else, gets it.
            warnings.filterwarnings("default", category=BlindsightWarning, append=True)
            warnings.filterwarnings("ignore", append=True)
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
