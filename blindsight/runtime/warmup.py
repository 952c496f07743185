"""Compile ahead, for prompts of lengths that are still to come."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from blindsight.progress import progress_bar
from blindsight.runtime.context import disabled
from blindsight.template import TemplateRule

# Inputs with an entry per token, and what that of a text token is.
_PER_TOKEN = {"attention_mask": 1, "token_type_ids": 0, "mm_token_type_ids": 0}
# A prefill, and two steps with one token: at the second, Dynamo sees that a cache grows.
_A_FEW_TOKENS = {"max_new_tokens": 3, "min_new_tokens": 3}


def append_text(inputs: Mapping[str, Any], tokens: Tensor) -> dict[str, Any]:
    """Return the inputs of a longer prompt: text tokens ``[B, n]`` after it."""
    longer = dict(inputs)
    longer["input_ids"] = torch.cat([inputs["input_ids"], tokens], dim=1)
    for name, value in _PER_TOKEN.items():
        if isinstance(inputs.get(name), Tensor):
            more = inputs[name].new_full(tokens.shape, value)
            longer[name] = torch.cat([inputs[name], more], dim=1)
    return longer


def warm_up(
    model: Callable[..., Any],
    rule: TemplateRule,
    inputs: Mapping[str, Any],
    lengths: int | Sequence[int],
    *,
    generate: bool,
    progress: bool | None,
) -> None:
    """Run a prompt, made longer with text, dense and sparse at each length.

    See :meth:`~blindsight.backend.BlindsightBackend.warmup`.
    """
    input_ids = inputs.get("input_ids")
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2:
        raise ValueError(
            f"inputs must hold input_ids [B, L], got {type(input_ids).__name__}. Give a prompt as "
            "the processor makes it: warmup(model, processor(...), lengths)."
        )
    length = input_ids.shape[1]
    sizes = [lengths] if isinstance(lengths, int) else sorted(set(lengths))
    if not sizes or sizes[0] < length:
        raise ValueError(
            f"lengths must be of at least the {length} tokens of the prompt that is given, got "
            f"{sizes}. Give a shorter prompt: text is added to it, images are not removed."
        )
    span_id = rule.template_of_inputs(inputs).span_id
    if int(span_id.max()) < 2:
        raise ValueError(
            f"inputs must be a prompt with at least two images, got {int(span_id.max())}. With "
            "fewer nothing is sparse, and only the model's own graphs would be compiled."
        )
    text = input_ids[(span_id == 0).to(input_ids.device)]
    if not len(text):
        raise ValueError("inputs must be a prompt with text, got images alone.")
    run = partial(_generator_of(model), **_A_FEW_TOKENS) if generate else model
    bar = progress_bar(progress, iterable=sizes, desc="compiling ahead", unit="length")
    with torch.no_grad():
        for size in bar:
            bar.set_postfix_str(f"{size:,} tokens")
            more = text[-1].expand(input_ids.shape[0], size - length)
            longer = append_text(inputs, more) if size > length else dict(inputs)
            run(**longer)
            with disabled():
                run(**longer)


def _generator_of(model: Any) -> Callable[..., Any]:
    found = getattr(model, "generate", None)
    if not callable(found):
        raise ValueError(
            f"model must have generate() to be warmed up for it, got {type(model).__name__}. Give "
            "the model that was compiled in place: model.compile(backend=backend), or its decoder."
        )
    return found  # type: ignore[no-any-return]
