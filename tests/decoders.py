"""A decoder with its head as one graph that shows ``input_ids``, and its reference."""

from typing import Any

import torch

from blindsight import Profile
from models import END_ID, IMAGE_ID, START_ID, VIDEO_ID, Image, make_inputs, valid_positions
from oracles import (
    assert_close_to_reference,
    oracle_template,
    reference_attention,
    reference_copy,
)

PROMPT = [5, Image(2, 5), 4, Image(4, 3), Image(), 7]
# As many tokens, the images elsewhere
OTHER_PROMPT = [Image(4, 3), 9, Image(), Image(2, 5), 7]


class DecoderWithHead(torch.nn.Module):
    """Image tokens are embedded like text: the masks are what matters."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.language_model = model.model.language_model
        self.lm_head = model.lm_head

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.language_model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        return self.lm_head(hidden)


def decoder_prompt(rows: Any, pad_side: str | None = None) -> dict[str, torch.Tensor]:
    inputs = make_inputs("qwen2_5_vl", rows, pad_side=pad_side)
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


def template_of(input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return oracle_template(input_ids, (IMAGE_ID, VIDEO_ID), (START_ID,), (END_ID,))


def check_decoder(
    model: Any, profile: Profile, inputs: dict[str, torch.Tensor], logits: torch.Tensor
) -> None:
    """Compare the logits of a :class:`DecoderWithHead` with the reference, which is not dense."""
    template = template_of(inputs["input_ids"])
    references = []
    with torch.no_grad():
        for copy in (model, reference_copy(model)):
            with reference_attention(copy, profile.categories, *template):
                references.append(DecoderWithHead(copy)(**inputs))
        dense = DecoderWithHead(model)(**inputs)
    valid = valid_positions(inputs)
    assert (dense - references[0])[valid].abs().max() > 0.1
    assert_close_to_reference(logits, *references, valid)
