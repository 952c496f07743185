"""Where the frames of a video begin, in families that write all frames as one run of tokens.

Shapes: B batch, T tokens, V videos.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

# What a token can be, as bits, beside those of blindsight.template.
VIDEO, FRAME = 32, 64  # of such a video; the first of a frame

PATCHES_PER_TOKEN = 4  # of a frame: all those families merge 2 x 2


def mark_by_grid(kinds: Tensor, video_grid_thw: Tensor) -> Tensor | None:
    """Mark where frames begin, from what the model is told of its videos.

    Tokens of videos are dealt out to the frames in turn, whatever is written between them.

    Args:
        kinds: ``[B, T]``, what each token is, as bits.
        video_grid_thw: ``[V, 3]``, frames, height and width in patches, of the videos of all rows
            in turn.

    Returns:
        None where those are not the videos of the tokens, or not all of them.
    """
    where = (kinds & VIDEO).flatten().nonzero().flatten()
    num_frames, heights, widths = video_grid_thw.to(where).unbind(1)
    patches = heights * widths
    if int((num_frames * patches).sum()) != PATCHES_PER_TOKEN * len(where):
        return None
    if bool((num_frames < 1).any() | (patches < 1).any() | (patches % PATCHES_PER_TOKEN).any()):
        return None
    tokens = patches // PATCHES_PER_TOKEN
    lengths = num_frames * tokens
    ends = lengths.cumsum(0)
    row_of = where // kinds.shape[1]
    if not torch.equal(row_of[ends - lengths], row_of[ends - 1]):
        return None
    sizes = tokens.repeat_interleave(num_frames)
    marked = kinds.flatten().clone()
    marked[where[sizes.cumsum(0) - sizes]] |= FRAME
    return marked.view_as(kinds)


def mark_by_positions(kinds: Tensor, height: Tensor, width: Tensor) -> Tensor | None:
    """Mark where frames begin, from rotary positions of several axes.

    The tokens of a frame go through its rows and columns (M-RoPE of Qwen2-VL, arXiv 2409.12191);
    a frame begins where that starts again. Whether the first token of all begins one, the token
    before it has to say: see :func:`begins_frame`.

    Args:
        kinds: ``[B, T]``, what each token is, as bits.
        height, width: ``[B, T]``, positions on these axes.

    Returns:
        None where the positions are those of text.
    """
    video = (kinds & VIDEO).bool()
    follows = (video & pad(video, (1, 0))[:, :-1])[:, 1:]
    corners = torch.stack([height, width])
    before, tokens = corners[..., :-1], corners[..., 1:]
    if bool((is_of_text(before, tokens) & follows).any()):
        return None
    begins = pad(~follows | begins_frame(before, tokens), (1, 0), value=True) & video
    return torch.where(begins, kinds | FRAME, kinds)


def begins_frame(before: Tensor, token: Tensor) -> Tensor:
    """Whether a token of a video begins a frame, from its height and width and those before it.

    Args:
        before, token: ``[2, ...]``.
    """
    height_before, width_before = before.unbind()
    height, width = token.unbind()
    return (height < height_before) | (height == height_before) & (width <= width_before)


def is_of_text(before: Tensor, token: Tensor) -> Tensor:
    """Whether both axes grow from one token to the next, as they do in no frame: ``[2, ...]``."""
    return (token > before).all(0)
