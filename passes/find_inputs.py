"""Find the inputs of a model's graph that tell where its images and videos are.

Shapes: B batch, Q query rows, V videos.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from blindsight.passes.graph import fake_tensor, input_name, placeholders


def find_input_ids(gm: fx.GraphModule) -> int | None:
    """Return the position of the input that the model calls ``input_ids [B, Q]``, if any."""
    return _find_input(gm, "input_ids", is_token_ids)


def find_video_grid(gm: fx.GraphModule) -> int | None:
    """Return the position of the input that the model calls ``video_grid_thw [V, 3]``, if any."""
    return _find_input(gm, "video_grid_thw", is_video_grid)


def find_axis_positions(gm: fx.GraphModule) -> int | None:
    """Return the position of the input that is ``position_ids [3 or 4, B, Q]``, if any."""
    return _find_input(gm, "position_ids", is_axis_positions)


def _find_input(gm: fx.GraphModule, name: str, fits: Callable[[torch.Tensor], bool]) -> int | None:
    for position, node in enumerate(placeholders(gm)):
        tensor = fake_tensor(node)
        if input_name(node) == name and tensor is not None and fits(tensor):
            return position
    return None


def is_token_ids(tensor: torch.Tensor) -> bool:
    """Whether a tensor looks like token ids ``[B, Q]``."""
    return tensor.dim() == 2 and not tensor.dtype.is_floating_point and tensor.dtype != torch.bool


def is_video_grid(tensor: torch.Tensor) -> bool:
    """Whether a tensor looks like frames, heights and widths of videos ``[V, 3]``."""
    return tensor.dim() == 2 and tensor.shape[1] == 3 and not tensor.dtype.is_floating_point


def is_axis_positions(tensor: torch.Tensor) -> bool:
    """Whether a tensor looks like positions in (text,) time, height and width."""
    return tensor.dim() == 3 and tensor.shape[0] in (3, 4)  # floats in Qwen3-Omni
