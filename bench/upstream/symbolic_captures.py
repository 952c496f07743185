"""The CPU template of FlexAttention does not compile when sizes are symbolic and captured ones too.

Names of symbols in the C++ source are replaced by prefix: "ks2 was not declared", and the like.
"""

import sys

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention


def attention(q: Tensor, k: Tensor, v: Tensor, span_id: Tensor, num: Tensor, at: Tensor) -> Tensor:
    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (span_id[q] == span_id[k])

    tables = BlockMask.from_kv_blocks(num, at, BLOCK_SIZE=64, mask_mod=mask_mod)
    return flex_attention(q, k, v, block_mask=tables)


def happens() -> str | None:
    compiled = torch.compile(attention, dynamic=True)
    for length in (192, 320):
        q, k, v = torch.randn(3, 1, 2, length, 16).unbind()
        span_id = torch.arange(length) // 50
        blocks = length // 64
        num = torch.full((1, 1, blocks), blocks, dtype=torch.int32)
        at = torch.arange(blocks, dtype=torch.int32).expand(1, 1, blocks, blocks).contiguous()
        i = torch.arange(length)
        mask = (i[:, None] >= i) & (span_id[:, None] == span_id)
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        try:
            output = compiled(q, k, v, span_id, num, at)
        except Exception as error:
            lines = [line for line in str(error).splitlines() if "error:" in line]
            return (lines or str(error).splitlines())[0]
        if not torch.allclose(output, expected, atol=1e-4):
            return f"wrong by {float((output - expected).abs().max()):.3g} at {length} tokens"
    return None


if __name__ == "__main__":
    with torch.no_grad():
        found = happens()
    print(f"torch {torch.__version__}: {found or 'gone'}")
    sys.exit(1 if found else 0)
