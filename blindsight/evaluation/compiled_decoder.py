"""A decoder that is compiled with a profile, and how it is compared with the one that is not.

Shapes: B batch, T tokens of the prompts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from blindsight.backend import blindsight_backend
from blindsight.compile_apart import (
    compile_apart,
    forget_compiled,
    num_compiled,
    without_limits,
)
from blindsight.configs import cache_of
from blindsight.evaluation.masked_model import ProfileMasking
from blindsight.evaluation.prefill import Batch, Decoder, Output
from blindsight.modules import as_they_are
from blindsight.profile import Profile
from blindsight.runtime.context import disabled, use_template


class CompiledDecoder:
    """A decoder, compiled by ``torch.compile`` with the backend of a profile.

    Families that make the decoder's masks before they call it (Gemma 3) are compiled as a whole:
    in the decoder alone, nothing could be proven of masks that come from outside.
    """

    def __init__(
        self, decoder: Decoder, profile: Profile, *, inner: str | Callable[..., Any] = "inductor"
    ) -> None:
        self._decoder = decoder
        # "auto" would run short prompts dense: what is asked for here is the profile.
        self.backend = blindsight_backend(
            profile, inner=inner, model=decoder.model, lowering="split"
        )
        self._num_compiled = num_compiled()
        self._compiled: Any = compile_apart(decoder.decoder, self.backend)
        self._compiled_model: Any = compile_apart(decoder.model, self.backend)

    def compiles_whole(self, batch: Batch) -> bool:
        """Whether a batch runs through the whole compiled model, images included."""
        return isinstance(batch.decoder_inputs.get("attention_mask"), dict)

    def check(
        self, batch: Batch, profile: Profile, *, use_cache: bool = False
    ) -> tuple[float, float]:
        """Check that logits are those with a profile's explicit masks: :func:`check_distance`.

        Returns:
            How far logits differ from those with explicit masks, and how far dense ones do.
        """
        masks = ProfileMasking(profile.categories).masks(batch.prompt)
        differences = []
        for dense in (False, True):
            found = self.prefill(batch, dense=dense, use_cache=use_cache).logits
            explicit = self._decoder.prefill(batch, None if dense else masks).logits
            differences.append(float((found - explicit).double().abs().max()))
        distance, rounding = differences
        check_distance(distance, rounding, explicit)
        return distance, rounding

    def prefill(self, batch: Batch, *, dense: bool, use_cache: bool = False) -> Output:
        """Run the decoder with the profile's masks, or with the model's own alone."""
        whole = self.compiles_whole(batch)
        template = batch.prompt.template.tensors()
        # Every length of prompt compiles again; none may fall back to eager in silence.
        with (
            torch.no_grad(),
            without_limits(),
            as_they_are(self._decoder.model, self._decoder.decoder),
            disabled() if dense else nullcontext() if whole else use_template(*template),
        ):
            if whole:
                found = self._compiled_model(**batch.inputs, use_cache=use_cache, logits_to_keep=1)
                return Output(found.logits[:, -1], cache_of(found))
            inputs = batch.decoder_inputs
            return self._decoder.finish(self._compiled(**inputs, use_cache=use_cache))

    def close(self) -> None:
        self.backend.detach()
        forget_compiled(self._num_compiled)


def check_distance(distance: float, rounding: float, logits: Tensor) -> None:
    """Check that compiled logits are those with explicit masks, but for rounding.

    With equal masks, both compute the same sums in another order. So do the compiled and the
    explicit dense model: how far their logits differ (``rounding``) says how much that matters.
    Where they do not differ, a few units in the last place are allowed.

    Raises:
        ValueError: The logits differ by more than ten times that.
    """
    unit = torch.finfo(logits.dtype).eps * float(logits.abs().max())
    bound = 10 * max(rounding, 8 * unit)
    if not distance <= bound:
        raise ValueError(
            "compiled logits must be those with explicit masks, but for rounding of "
            f"{bound:.1e}, got a difference of {distance:.1e}. Please report this."
        )
