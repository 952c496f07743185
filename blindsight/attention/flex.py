"""FlexAttention's operator, called so that Inductor can compile it inside a larger graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch._inductor.config
from torch import Tensor
from torch._higher_order_ops.flex_attention import flex_attention as flex_attention_op
from torch.nn.attention.flex_attention import BlockMask

from blindsight.attention.block_tables import BlockTables

# What torch.nn.attention.flex_attention passes for inference without auxiliary outputs.
_KERNEL_OPTIONS: dict[str, Any] = {
    "BACKEND": "AUTO",
    "PRESCALE_QK": False,
    "ROWS_GUARANTEED_SAFE": False,
    "BLOCKS_ARE_CONTIGUOUS": False,
    "WRITE_DQ": True,
    "OUTPUT_LOGSUMEXP": False,
    "OUTPUT_MAX": False,
}
# On Hopper, in 16 bits: loads by the tensor memory accelerator (USE_TMA), and tiles by head dim.
# Each was the fastest that bench/on_gpu.py timed at 16,504 tokens, and that of 128 up to 307,540;
# the other head dims keep Inductor's tiles.
_SMALL_TILE = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3}
_HOPPER_TILES = {
    64: _SMALL_TILE,
    128: _SMALL_TILE,
    256: {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
}
# With fewer queries Inductor may take its kernel for decoding, whose tiles are other ones.
_MIN_TILED_QUERIES = 128


class Mods(NamedTuple):
    """What decides of an element.

    Attributes:
        mask_mod: Whether it is allowed, of ``(b, h, q, k, *captures)``.
        captures: Tensors that it reads.
        score_mod: Its score, of ``(score, b, h, q, k, *score_captures)``, or None: unchanged.
        score_captures: Tensors that this reads.
    """

    mask_mod: Callable[..., Tensor]
    captures: tuple[Tensor, ...]
    score_mod: Callable[..., Tensor] | None = None
    score_captures: tuple[Tensor, ...] = ()


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tables: BlockTables,
    block_size: int,
    mods: Mods,
    scale: float | None,
) -> Tensor:
    """Call the operator itself: its public function would start a compilation of its own.

    Args:
        query: ``[B, H, Q, D]``.
        key, value: ``[B, G, K, D]``, H a multiple of G.
        tables: ``[B, 1 or H, ...]``, the blocks to visit.
        block_size: Of those, in tokens.
        mods: For the elements of partial blocks.
        scale: Factor on the scores; None: ``D ** -0.5``.
    """
    # The kernel takes the rows of a batch for as far apart as its heads are in all: Inductor, which
    # pads the strides of large buffers, must not (bench/upstream/padded_block_tables.py).
    tables = BlockTables(*map(realize, tables))
    block_mask = BlockMask.from_kv_blocks(
        *tables,
        BLOCK_SIZE=block_size,
        mask_mod=cast(Any, _unannotated(mods.mask_mod)),
        seq_lengths=(query.shape[2], key.shape[2]),
        compute_q_blocks=False,
    )
    output: Tensor = flex_attention_op(
        query,
        key,
        value,
        _unannotated(mods.score_mod or _unchanged),
        block_mask.as_tuple(),
        query.shape[-1] ** -0.5 if scale is None else scale,
        kernel_options_of(query),
        mods.score_captures,
        mods.captures,
    )[0]
    return output


def kernel_options_of(query: Tensor) -> dict[str, Any]:
    """Return the operator's options for ``query [B, H, Q, D]`` on its device.

    An autotuner of Inductor's chooses a tile itself, if the user wants it to.
    """
    if not _is_on_hopper(query) or query.shape[2] < _MIN_TILED_QUERIES:
        return _KERNEL_OPTIONS
    if torch._inductor.config.max_autotune:
        return _KERNEL_OPTIONS
    return {**_KERNEL_OPTIONS, "USE_TMA": True, **_HOPPER_TILES.get(query.shape[3], {})}


def _is_on_hopper(x: Tensor) -> bool:
    is_half = x.dtype in (torch.bfloat16, torch.float16)
    if not is_half or x.device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(x.device)[0] == 9


def realize(x: Tensor, span_id: Tensor | None = None) -> Tensor:
    """Return ``x`` as a buffer of its own: Inductor cannot fuse its producer into a mask.

    The C++ lowering of FlexAttention builds the mask's subgraph before the buffers that it
    captures exist, and fails on one that is still an unfused expression. A uniform tensor would
    be folded back into one: with ``span_id`` the result depends on an input, if in name only.
    """
    if span_id is not None:
        x = _depending_on(span_id[:1, :1], x)
    x = x.contiguous()
    return torch.as_strided(x, x.shape, x.stride())


def as_buffer(x: Tensor, codes: Tensor) -> Tensor:
    """Return ``x [B, H, L, D]`` as a result of its own, which no view of another buffer is.

    The C++ template takes the sizes of queries and keys from the buffer behind a view, which has
    others where a layer projects them and adds no positions (bench/upstream/view_of_matmul.py).
    Inductor fuses this into what computes ``x``, such as rotary positions. It would drop a plain
    clone where that changes no strides. Keys that are a buffer, of a cache, are copied.

    Args:
        x: Queries or keys.
        codes: ``[H]`` int32, category codes: none is negative, which Inductor does not know.
    """
    return _depending_on(codes[:1], x)


def _depending_on(number: Tensor, x: Tensor) -> Tensor:
    """Return ``x`` as a result that depends on one number, never negative, if in name only."""
    never = (number < 0).view((1,) * x.dim())
    return (x | never) if x.dtype == torch.bool else x + never.to(x.dtype)


def constant_rows(rows: Sequence[Sequence[int]], dtype: torch.dtype, span_id: Tensor) -> Tensor:
    """Return numbers that a graph holds as constants, as a buffer: see :func:`realize`."""
    return realize(torch.tensor(rows, dtype=dtype, device=span_id.device), span_id)


def _unannotated(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the function without its annotations.

    They are strings here. Tracing notes a result's in the graph, and a graph with such a note is
    stored by none of Inductor's caches.
    """
    return lambda *args: function(*args)


def _unchanged(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return score
