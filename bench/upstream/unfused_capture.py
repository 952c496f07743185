"""The CPU template of FlexAttention cannot capture what the same graph computes pointwise.

The mask's subgraph is built before the buffers that it captures exist.
"""

import sys

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

LENGTH = 256


def attention(q: Tensor, k: Tensor, v: Tensor, token: Tensor, num: Tensor, at: Tensor) -> Tensor:
    is_text = (token % 7) < 3  # not a buffer yet

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (is_text[k] | (q == k))

    tables = BlockMask.from_kv_blocks(num, at, BLOCK_SIZE=64, mask_mod=mask_mod)
    return flex_attention(q, k, v, block_mask=tables)


def happens() -> str | None:
    q, k, v = torch.randn(3, 1, 2, LENGTH, 16).unbind()
    num = torch.full((1, 1, 4), 4, dtype=torch.int32)
    at = torch.arange(4, dtype=torch.int32).expand(1, 1, 4, 4).contiguous()
    token = torch.arange(LENGTH)
    mask = (token[:, None] >= token) & (((token % 7) < 3) | (token[:, None] == token))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    try:
        output = torch.compile(attention, dynamic=False)(q, k, v, token, num, at)
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
