"""A model in two parts: the vision part runs once for a batch, the decoder once for each mask.

What a vision tower makes of the images does not depend on the decoder's masks. So the call of the
decoder is recorded once for a batch of prompts, and repeated under every mask.

Shapes: B batch, T tokens of the prompts, L layers, C categories, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from blindsight.attention.interval_masks import BaseMask
from blindsight.attention.intervals import groups_of_keys
from blindsight.configs import (
    cache_argument,
    cache_of,
    check_has_vision,
    config_of,
    text_config,
    with_attention,
)
from blindsight.cost import count_visible
from blindsight.data.processors import inputs_on
from blindsight.evaluation.masked_model import (
    EVERYTHING,
    HeadMask,
    MaskedCall,
    Masks,
    Prompt,
    masked,
)
from blindsight.fingerprints import widths_of
from blindsight.modules import find_decoder, record_call, unwrapped
from blindsight.profile import Profile
from blindsight.reference import attention_layers
from blindsight.runtime.given_mask import intervals_or_groups
from blindsight.template import IMAGE, Template

# Config attributes with the number of experts that a token is routed to.
_EXPERTS = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k")


@dataclass(frozen=True, eq=False)
class Batch:
    """A batch of prompts, as the decoder receives them.

    Attributes:
        prompt: What masks may depend on.
        inputs: Arguments of the whole model.
        decoder_inputs: Arguments of its decoder: embeddings, positions and the like.
    """

    prompt: Prompt
    inputs: Mapping[str, Any]
    decoder_inputs: Mapping[str, Any]


class Output(NamedTuple):
    """The result of a prefill: the logits of the last position ``[B, V]``, and the cache."""

    logits: Tensor
    cache: Any


class _SeenError(Exception):
    """Ends a forward of the decoder once all of its masks have been seen."""


class _OwnMasks:
    """Masks that keep everything, and remember the model's own masks by layer."""

    def __init__(self, last: int) -> None:
        self.bases: dict[int, Tensor] = {}
        self._last = last

    def head_masks(self, call: MaskedCall) -> Sequence[HeadMask]:
        self.bases[call.layer] = call.base
        if call.layer == self._last:
            raise _SeenError
        return EVERYTHING


class Decoder:
    """The decoder of a model, run on its own.

    Args:
        model: A transformers model with a vision part and a decoder.
        profile: A profile of this model, for its rule and fingerprint; its categories do not
            matter.

    Raises:
        ValueError: The model has no vision part, or no decoder where the profile says.
    """

    def __init__(self, model: nn.Module, profile: Profile) -> None:
        self.model = unwrapped(model)
        check_has_vision(self.model)
        self.rule = rule = profile.rule
        self.layer_types = profile.layer_types
        self.head_dim, self.widths = widths_of(profile.fingerprint)
        self.num_heads = profile.num_heads
        self.layers = attention_layers(
            self.model, rule.layer_pattern, with_attention(self.layer_types)
        )
        self.decoder = find_decoder(self.model, rule.layer_pattern)
        transformers_model: Any = self.model
        self.head: Callable[[Tensor], Tensor] = transformers_model.get_output_embeddings()
        self._is_checked = False

    @property
    def device(self) -> torch.device:
        """Where masks are made; if the decoder is on several devices, that of its first layer."""
        return next(self.decoder.parameters()).device

    @property
    def devices(self) -> set[torch.device]:
        return {parameter.device for parameter in self.decoder.parameters()}

    @property
    def weights_per_layer(self) -> int:
        """The weights of a decoder layer that every token is multiplied by, averaged over layers.

        Of experts, as many count as a token is routed to. Ernie 4.5 VL has some for text and
        others for images, and both count: too many.
        """
        layers: Any = self.decoder.layers
        config = text_config(config_of(self.model))
        chosen = next((n for name in _EXPERTS if (n := getattr(config, name, None))), 1)
        weights = 0.0
        for layer in layers:
            for name, parameter in layer.named_parameters():
                if parameter.dim() == 2:
                    weights += parameter.numel()
                elif parameter.dim() == 3 and "experts" in name:
                    weights += parameter.numel() * chosen / parameter.shape[0]
        return round(weights / len(self.layer_types))

    def prepare(self, inputs: Mapping[str, Any]) -> Batch:
        """Run everything that comes before the decoder.

        Args:
            inputs: Arguments of the model's forward, padded on the left.

        Raises:
            ValueError: The prompts are padded on the right, the decoder is not called as expected,
                its own masks are not intervals, or the logits are not the output embedding of what
                it returns.
        """
        inputs = inputs_on(self.model, inputs)
        ids = inputs["input_ids"]
        valid = inputs.get("attention_mask", torch.ones_like(ids)).bool().to(self.device)
        if not bool(valid[:, -1].all()):
            raise ValueError(
                "prompts must be padded on the left, got padding at the end. "
                "Set padding_side='left' on the processor's tokenizer."
            )
        with masked(self.model, self.layers, None):  # so that masks made before it are explicit
            decoder_inputs = record_call(self.model, self.decoder, inputs)
        batch = Batch(self._prompt(inputs, valid, decoder_inputs), inputs, decoder_inputs)
        if not self._is_checked:
            self._check(batch)
            self._is_checked = True
        return batch

    def prefill(self, batch: Batch, masks: Masks | None, *, use_cache: bool = False) -> Output:
        """Run the decoder under masks; None for the model's own mask alone."""
        with masked(self.model, self.layers, masks):
            return self.finish(self.decoder(**batch.decoder_inputs, use_cache=use_cache))

    def finish(self, outputs: Any) -> Output:
        """Return the logits of the last position, from the decoder's outputs."""
        logits = self.head(outputs.last_hidden_state[:, -1:])[:, 0]
        return Output(logits, cache_of(outputs))

    def decode(
        self,
        batch: Batch,
        masks: Masks | None,
        output: Output,
        *,
        max_new_tokens: int,
        stop_ids: Sequence[int],
    ) -> Tensor:
        """Decode greedily after a prefill; return the token ids ``[B, n]``, ``n`` at least 1.

        Decoding ends after ``max_new_tokens``, or when every row has had one of ``stop_ids``. What
        follows the first of them in a row has no meaning.
        """
        tokens = [output.logits.argmax(-1, keepdim=True)]
        stops = torch.tensor(list(stop_ids), device=tokens[0].device)
        ended = torch.isin(tokens[0], stops)
        mask = batch.prompt.valid.long()
        position = batch.decoder_inputs.get("position_ids")
        cache = {cache_argument(self.decoder.forward): output.cache}
        with masked(self.model, self.layers, masks) as run:
            for step in range(1, max_new_tokens):
                if bool(ended.all()):
                    break
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
                run.num_tokens = mask.shape[1]
                outputs = self.decoder(
                    input_ids=tokens[-1],
                    attention_mask=mask,
                    # A prompt ends with text, whose position is the same on every axis.
                    position_ids=None if position is None else position[..., -1:] + step,
                    use_cache=True,
                    **cache,
                )
                tokens.append(self.finish(outputs).logits.argmax(-1, keepdim=True))
                ended = ended | torch.isin(tokens[-1], stops)
        return torch.cat(tokens, dim=1)

    def _prompt(
        self, inputs: Mapping[str, Any], valid: Tensor, decoder_inputs: Mapping[str, Any]
    ) -> Prompt:
        ids = inputs["input_ids"]
        template = self.rule.template_of_inputs(inputs)
        template = Template(*(x.to(self.device) for x in template.tensors()))
        is_image = (self.rule.classify(ids) & IMAGE).bool().to(self.device)
        widths = torch.tensor(self.widths, device=self.device)
        own = self._own_masks(decoder_inputs)
        bases = {
            layer_type: self._intervals_of(layer_type, own.get(layer_type), valid, template)
            for layer_type in dict.fromkeys(self.layer_types)
        }
        counts = {
            layer_type: count_visible(
                template,
                base_lower=base.lower.long(),
                base_upper=base.upper.long(),
                key_valid=valid,
            )
            for layer_type, base in bases.items()
        }
        groups = torch.ones_like(valid)[:, None]
        if any(base.is_by_group for base in bases.values()):
            groups = groups_of_keys(*template.tensors(), valid.shape[1])
        num_groups = groups.shape[1]

        def bounds(side: str) -> Tensor:
            found = [getattr(bases[layer_type], side).long() for layer_type in self.layer_types]
            whole = [x if x.dim() == 3 else x[:, None].expand(-1, num_groups, -1) for x in found]
            return torch.stack(whole)

        visible = torch.stack([counts[layer_type] for layer_type in self.layer_types])
        return Prompt(
            template,
            is_image,
            valid,
            groups,
            bounds("lower"),
            bounds("upper"),
            widths,
            visible * widths[:, None, None],
            self.num_heads,
        )

    def _own_masks(self, decoder_inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the model's own mask ``[B, 1, T, T]`` for each type of layer with attention."""
        first = {
            self.layer_types[layer]: layer for layer in reversed(with_attention(self.layer_types))
        }
        seen = _OwnMasks(last=max(first.values()))
        try:
            with masked(self.model, self.layers, seen):
                self.decoder(**decoder_inputs, use_cache=False)
        except _SeenError:
            pass
        return {layer_type: seen.bases[layer] for layer_type, layer in first.items()}

    def _intervals_of(
        self, layer_type: str, mask: Tensor | None, valid: Tensor, template: Template
    ) -> BaseMask:
        batch, num_tokens = valid.shape
        if mask is None:  # without attention
            nothing = valid.new_zeros(valid.shape, dtype=torch.int32)
            return BaseMask(nothing + 1, nothing, valid)
        base = intervals_or_groups(mask.to(self.device), batch, num_tokens, num_tokens, template)
        if base is None:
            raise ValueError(
                f"the masks of {type(self.model).__name__} must be one interval of tokens per row, "
                "or one each of text, sinks and other tokens of images, and that of its layers of "
                f"type {layer_type} is not. This family cannot be evaluated yet."
            )
        return base

    def _check(self, batch: Batch) -> None:
        found = self.prefill(batch, None).logits
        with masked(self.model, self.layers, None):
            expected = self.model(**batch.inputs, use_cache=False).logits[:, -1]
        # One row and many are computed by different kernels: they round differently.
        tolerance = max(1e-3, 4 * torch.finfo(expected.dtype).eps)
        atol = tolerance * float(expected.abs().max())
        if not torch.allclose(found, expected, rtol=tolerance, atol=atol):
            raise ValueError(
                f"logits of {type(self.model).__name__} must be the output embedding of what its "
                "decoder returns, and are something else. This family cannot be evaluated yet."
            )
