"""A model with its profile as an exported program: for AOTInductor, without this package.

Shapes: B batch, Q tokens of the prompt, E hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from blindsight.attention.lowering import Lowering
from blindsight.data.processors import inputs_on
from blindsight.error_text import first_line
from blindsight.modules import find_decoder, record_call, unwrapped
from blindsight.passes.sparse_attention import rewrite
from blindsight.profile import Profile
from blindsight.runtime.context import disabled

_TEMPLATE = ("span_id", "is_sink")


def export(
    model: nn.Module,
    profile: Profile | str | os.PathLike[str],
    example_inputs: Mapping[str, Any],
    *,
    lowering: str = "fused",
) -> ExportedProgram:
    """Export a model with sparse attention, for prefill; its program returns logits ``[B, Q, V]``.

    The program is for prompts of exactly these sizes, in any arrangement of images, and takes the
    example's inputs by keyword. ``torch._inductor.aoti_compile_and_package`` makes a package of it
    that runs without this one.

    Args:
        model: A transformers model, in eval mode; its weights become the program's.
        profile: A profile, or the path of one.
        example_inputs: Of the whole model, with ``input_ids``, from which the program tells where
            the images are. Or of its decoder, with ``inputs_embeds``, ``span_id [B, Q]`` (ints)
            and ``is_sink [B, Q]`` (bool): see :func:`decoder_inputs`. Use these for models whose
            vision tower ``torch.export`` cannot trace: all but Gemma's.
        lowering: ``"fused"`` or ``"split"``, as for :func:`~blindsight.blindsight_backend`.

    Raises:
        ValueError: ``torch.export`` cannot trace the model, the profile does not fit it, or some
            of the profile's layers are not in the program.
    """
    profile = Profile.of(profile)
    profile.validate(model)
    kind = Lowering.of(lowering)
    if kind is Lowering.AUTO:
        raise ValueError("lowering must be 'fused' or 'split' for an export, got 'auto'.")
    if model.training:
        raise ValueError("model must be in eval mode, got train mode. Call model.eval().")
    inputs = dict(example_inputs)
    is_decoder = "inputs_embeds" in inputs
    if is_decoder and (missing := [name for name in _TEMPLATE if name not in inputs]):
        raise ValueError(
            f"inputs of a decoder must have span_id and is_sink, got no {', '.join(missing)}. "
            "Take them from blindsight.exported.decoder_inputs(model, profile, inputs)."
        )
    if not is_decoder and "input_ids" not in inputs:
        raise ValueError(
            "example_inputs must have input_ids or inputs_embeds, got "
            f"{', '.join(sorted(inputs)) or 'nothing'}."
        )
    module = _DecoderAlone(model, profile.rule.layer_pattern) if is_decoder else _WholeModel(model)
    with torch.no_grad():
        try:
            with _without_partial_graph():
                program = torch.export.export(module.eval(), (), inputs, strict=False)
        except Exception as error:
            hint = (
                ""
                if is_decoder
                else " Export its decoder: give the inputs that "
                "blindsight.exported.decoder_inputs(model, profile, inputs) returns."
            )
            raise ValueError(
                f"{type(model).__name__} must be traceable by torch.export, got "
                f"{type(error).__name__}: {first_line(error)}.{hint}"
            ) from error
        gm: Any = program.module()
        layers = rewrite(gm, profile, kind)
        expected = [layer for layer in range(profile.num_layers) if profile.categories[layer].any()]
        if sorted(layers) != expected:
            raise ValueError(
                f"layers {expected} of the profile must be in the program as calls of "
                f"scaled_dot_product_attention, got layers {sorted(layers)}. Load the model with "
                "attn_implementation='sdpa', and give a prompt of several tokens."
            )
        # Traced again, the functions of this package are gone: operators are left.
        return torch.export.export(gm, (), inputs, strict=False)


@contextlib.contextmanager
def _without_partial_graph() -> Iterator[None]:
    """Leave out what ``torch.export`` prints of the graph so far, hundreds of lines, as it fails.

    It prints them (torch/export/_trace.py) with no setting to prevent it; all else is passed on.
    """
    graph, printed = "", io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            yield
    except Exception as error:
        if hasattr(error, "partial_fx_graph"):
            graph = f"{error.partial_fx_graph}\n"
        raise
    finally:
        sys.stderr.write(printed.getvalue().replace(graph, "") if graph else printed.getvalue())


def decoder_inputs(
    model: nn.Module, profile: Profile | str | os.PathLike[str], inputs: Mapping[str, Any]
) -> dict[str, Any]:
    """Run what comes before a model's decoder, and return the decoder's inputs and the template.

    Args:
        model: A transformers model.
        profile: The profile of this model, or the path of one.
        inputs: Of its forward, padded on either side.

    Returns:
        ``inputs_embeds [B, Q, E]`` and what else the model gives its decoder, tensors or lists of
        them (of what Qwen3-VL adds to its first layers), ``span_id [B, Q]``
        and ``is_sink [B, Q]``: the inputs of a program that :func:`export` makes of them.

    Raises:
        ValueError: The decoder takes more than tensors.
    """
    profile, model = Profile.of(profile), unwrapped(model)
    decoder = find_decoder(model, profile.rule.layer_pattern)
    inputs = inputs_on(model, inputs)
    with disabled():
        recorded = record_call(model, decoder, inputs)
    # All logits are put out, whatever else the model can do.
    found = {
        name: value
        for name, value in recorded.items()
        if value is not None and name != "logits_to_keep"
    }
    tensors = {name: value for name, value in found.items() if _holds_tensors(value)}
    others = {
        name: type(value).__name__
        for name, value in found.items()
        if name not in tensors and not isinstance(value, bool)
    }
    if others:
        raise ValueError(
            f"the decoder of {type(model).__name__} must take tensors, got {others}. Export the "
            "whole model, where torch.export can trace it."
        )
    device = next(decoder.parameters()).device
    template = (x.to(device) for x in profile.rule.template_of_inputs(inputs).tensors())
    return {**tensors, **dict(zip(_TEMPLATE, template, strict=True))}


def _holds_tensors(value: object) -> bool:
    """Whether a value is a tensor, or a list of them."""
    is_list = isinstance(value, (list, tuple)) and all(isinstance(x, Tensor) for x in value)
    return isinstance(value, Tensor) or is_list


class _WholeModel(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Tensor:
        logits: Tensor = self.model(**inputs, use_cache=False).logits
        return logits


class _DecoderAlone(nn.Module):
    """The template is not read here: the rewriting finds it among the inputs."""

    def __init__(self, model: Any, layer_pattern: str) -> None:
        super().__init__()
        self.language_model = find_decoder(model, layer_pattern)
        self.lm_head = model.get_output_embeddings()

    def forward(self, span_id: Tensor, is_sink: Tensor, **inputs: Any) -> Tensor:
        hidden = self.language_model(**inputs, use_cache=False).last_hidden_state
        logits: Tensor = self.lm_head(hidden)
        return logits
