"""Gradients of the likeliest next tokens, with respect to the outputs of attention.

Shapes: B batch, T tokens, V vocabulary, Y likeliest next tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from blindsight.calibration.probe import Losses, ProbedCall, measure_losses

logger = logging.getLogger(__name__)

_NUM_TOKENS = 4  # the likeliest next tokens, whose gradients are taken


def losses_with_gradients(
    calls: Mapping[int, Losses | ProbedCall], logits: Tensor, mask: Tensor
) -> tuple[dict[int, Losses], Tensor]:
    """Measure calls with the gradients of the log-probabilities of the likeliest next tokens.

    For a small change, the KL divergence is half the mean of the squared changes of the
    log-probabilities, each token weighted by its probability (the Fisher information).

    Returns:
        The losses by layer, and the probabilities ``[B, Y]`` of those tokens.

    Raises:
        ValueError: The logits are not numbers.
    """
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)  # of each prompt
    at = torch.arange(len(mask), device=mask.device)
    next_logits = logits[at, last if logits.shape[1] == mask.shape[1] else -1]
    log_p = next_logits.float().log_softmax(-1)
    if bool(log_p.isnan().any()):
        raise ValueError(
            f"logits of the next token must be numbers, got nan in {next_logits.dtype}. Load the "
            "model in bfloat16 or float32, or see whether its weights are whole."
        )
    likeliest = log_p.detach().topk(min(_NUM_TOKENS, log_p.shape[-1]), dim=-1)
    # Prompts of a batch do not see each other: one number for each token serves all.
    chosen = log_p.gather(1, likeliest.indices).sum(0)
    kept = {layer: call for layer, call in calls.items() if isinstance(call, ProbedCall)}
    gradients = gradients_of(chosen, [call.output for call in kept.values()])
    losses = {
        layer: measure_losses(call, of_call)
        for (layer, call), of_call in zip(kept.items(), gradients, strict=True)
    }
    return losses, likeliest.values.exp()


def gradients_of(numbers: Tensor, outputs: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
    """Yield, for each output, the gradients of all numbers ``[Y]`` with respect to it."""
    each = torch.eye(len(numbers), dtype=numbers.dtype, device=numbers.device)
    options: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
    batched: Sequence[Tensor | None] | None
    found: Sequence[Sequence[Tensor | None]]
    try:  # all at once: every pass computes the layers again
        batched = torch.autograd.grad(numbers, outputs, each, is_grads_batched=True, **options)
    except RuntimeError as error:  # an operator without batching, or too little memory
        logger.info("gradients one after the other: %s", error)
        batched = None
    if batched is None:  # the error is gone by now, and with it what its frames kept
        passes = [torch.autograd.grad(numbers, outputs, one, **options) for one in each]
        found = list(zip(*passes, strict=True))
    else:
        found = [len(each) * (None,) if part is None else part.unbind() for part in batched]
    for parts, output in zip(found, outputs, strict=True):
        yield [torch.zeros_like(output) if part is None else part for part in parts]


@contextmanager
def gradients_from_embeddings(model: nn.Module) -> Iterator[None]:
    """Let gradients flow from the token embeddings on, but not into the weights."""
    parameters = list(model.parameters())
    before = [parameter.requires_grad for parameter in parameters]
    embeddings: Any = model
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        embeddings.get_input_embeddings().weight.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for parameter, flag in zip(parameters, before, strict=True):
            parameter.requires_grad_(flag)
