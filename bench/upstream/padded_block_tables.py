"""On a GPU, FlexAttention reads the block lists of a batch wrongly where Inductor padded them.

The template takes rows of a batch to be as many elements apart as all heads have together. Inductor
pads the strides of what it computes from 1,024 elements on; here from 4, so that little will do.
"""

import sys

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

LENGTH, BLOCK = 256, 128
N = LENGTH // BLOCK
SMALL = {"padding_stride_threshold": 4}


def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


def attention(q: Tensor, k: Tensor, v: Tensor, num: Tensor) -> Tensor:
    rows = num.expand(2, 4, -1) + 1  # computed in the graph
    blocks = (torch.zeros_like(rows)[..., None] + torch.arange(N, device=q.device)).int()
    tables = BlockMask.from_kv_blocks(rows, blocks, BLOCK_SIZE=BLOCK, mask_mod=causal)
    return flex_attention(q, k, v, block_mask=tables)


def inputs(device: str) -> list[Tensor]:
    q, k, v = torch.randn(3, 2, 4, LENGTH, 32, device=device).unbind()
    return [q, k, v, torch.arange(N, dtype=torch.int32, device=device)]


def happens() -> str | None:
    given = inputs("cuda")
    expected = scaled_dot_product_attention(*given[:3], is_causal=True)
    with torch._inductor.config.patch(SMALL):
        output = torch.compile(attention, dynamic=False)(*given)
    if torch.allclose(output, expected, atol=1e-2):
        return None
    return f"wrong by {float((output - expected).abs().max()):.3g}"


if __name__ == "__main__":
    if not torch.cuda.is_available():
        print("needs a GPU")
        sys.exit(2)
    with torch.no_grad():
        found = happens()
    print(f"torch {torch.__version__}: {found or 'gone'}")
    sys.exit(1 if found else 0)
