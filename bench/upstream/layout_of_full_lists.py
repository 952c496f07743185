"""The CPU template of FlexAttention reads the list of full blocks with the other list's strides."""

import sys

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

LENGTH, BLOCK = 256, 64
N = LENGTH // BLOCK


def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


def attention(q: Tensor, k: Tensor, v: Tensor, *lists: Tensor) -> Tensor:
    tables = BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=BLOCK, mask_mod=causal)
    return flex_attention(q, k, v, block_mask=tables)


def happens() -> str | None:
    q, k, v = torch.randn(3, 1, 2, LENGTH, 16).unbind()
    block = torch.arange(N, dtype=torch.int32)
    num = torch.ones(1, 1, N, dtype=torch.int32)  # partial: the diagonal
    at = block[:, None].expand(N, N).contiguous()[None, None]
    full_num = block[None, None].contiguous()  # full: all before it
    full_at = block[:, None].expand(N, N).contiguous().T[None, None]  # strides (.., 1, N)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    try:
        output = torch.compile(attention, dynamic=False)(q, k, v, num, at, full_num, full_at)
    except Exception as error:
        return " ".join(str(error).split())[:160]
    if not torch.allclose(output, expected, atol=1e-4):
        return f"wrong by {float((output - expected).abs().max()):.3g}"
    return None


if __name__ == "__main__":
    with torch.no_grad():
        found = happens()
    print(f"torch {torch.__version__}: {found or 'gone'}")
    sys.exit(1 if found else 0)
