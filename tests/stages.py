"""A decoder cut into the stages of a pipeline."""

import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

from blindsight import Profile, blindsight_backend, use_template
from decoders import OTHER_PROMPT, PROMPT, decoder_prompt, template_of
from models import tiny_model

NUM_LAYERS = 4
CATEGORIES = [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 3, 2], [2, 0, 3, 1]]


class Stage(nn.Module):
    """Layers ``first <= layer < stop`` of a Qwen2.5-VL, and what comes before and after them.

    Args:
        model: The whole model, which keeps its layers.
        first, stop: Numbers of layers.
        keeps_numbers: Whether ``layers.2`` is called so here, too.
    """

    def __init__(self, model: Any, first: int, stop: int, *, keeps_numbers: bool) -> None:
        super().__init__()
        text = model.model.language_model
        names = range(first, stop) if keeps_numbers else range(stop - first)
        layers = zip(map(str, names), text.layers[first:stop], strict=True)
        self.layers = nn.ModuleDict(dict(layers))
        self.embed_tokens = text.embed_tokens if first == 0 else None
        self.rotary_emb = text.rotary_emb
        self.norm, self.lm_head = (text.norm, model.lm_head) if stop == NUM_LAYERS else (None, None)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Of all stages but the first, ``input_ids`` are hidden states."""
        hidden = input_ids if self.embed_tokens is None else self.embed_tokens(input_ids)
        position_ids = torch.arange(hidden.shape[1]).expand(3, hidden.shape[0], -1)
        rotary = self.rotary_emb(hidden, position_ids)
        for layer in self.layers.values():
            hidden = layer(hidden, attention_mask=None, position_embeddings=rotary)
        return hidden if self.lm_head is None else self.lm_head(self.norm(hidden))


def compile_stages(
    model: Any, edges: Sequence[int], *, keeps_numbers: bool, inner: str = "eager"
) -> list[Any]:
    """Return the stages between these layers, each with the profile of its own."""
    profile = Profile.for_model(model, CATEGORIES)
    stages = []
    for first, stop in itertools.pairwise(edges):
        own = profile.stage(first, stop, keeps_numbers=keeps_numbers)
        backend = blindsight_backend(own, inner=inner, lowering="fused")
        stage = Stage(model, first, stop, keeps_numbers=keeps_numbers)
        stages.append(torch.compile(stage, backend=backend))
    return stages


class WithTemplate(nn.Module):
    """A compiled stage that is told with every microbatch where the images of it are."""

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, x: Tensor, span_id: Tensor, is_sink: Tensor) -> Tensor:
        with use_template(span_id, is_sink):
            return self.stage(x)


def prompts() -> dict[str, Tensor]:
    """Two, with their images at other places: one for each microbatch."""
    return decoder_prompt([PROMPT, OTHER_PROMPT])


def main(folder: str) -> None:
    """Run prompts through two processes, by torch.distributed.pipelining, one a microbatch."""
    rank = int(os.environ["RANK"])
    distributed.init_process_group("gloo")
    model = tiny_model("qwen2_5_vl", num_layers=NUM_LAYERS)
    input_ids = prompts()["input_ids"]
    compiled = compile_stages(model, [0, 3, NUM_LAYERS], keeps_numbers=True)[rank]
    whole = WithTemplate(compiled)
    stage = PipelineStage(whole, rank, num_stages=2, device=torch.device("cpu"))
    schedule = ScheduleGPipe(stage, n_microbatches=2)
    span_id, is_sink = template_of(input_ids)
    with torch.no_grad():
        args = [input_ids] if rank == 0 else []
        output = schedule.step(*args, span_id=span_id, is_sink=is_sink)
    if output is not None:
        torch.save(output, Path(folder) / "logits.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
