"""The same, for a tensor that is a buffer, but uniform: Inductor folds it into an expression."""

import sys

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

LENGTH = 256


def attention(q: Tensor, k: Tensor, v: Tensor, num: Tensor, at: Tensor) -> Tensor:
    first = torch.zeros(LENGTH, dtype=torch.int64).contiguous()
    first = torch.as_strided(first, first.shape, first.stride())  # enough if it were not uniform

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (k >= first[q])

    tables = BlockMask.from_kv_blocks(num, at, BLOCK_SIZE=64, mask_mod=mask_mod)
    return flex_attention(q, k, v, block_mask=tables)


def happens() -> str | None:
    q, k, v = torch.randn(3, 1, 2, LENGTH, 16).unbind()
    num = torch.full((1, 1, 4), 4, dtype=torch.int32)
    at = torch.arange(4, dtype=torch.int32).expand(1, 1, 4, 4).contiguous()
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    try:
        output = torch.compile(attention, dynamic=False)(q, k, v, num, at)
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
