"""torch.export.save has no schema for FlexAttention's operator."""

import io
import sys

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

LENGTH = 128


def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


class Attention(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, num: Tensor, at: Tensor) -> Tensor:
        block_mask = BlockMask.from_kv_blocks(num, at, BLOCK_SIZE=64, mask_mod=causal)
        return flex_attention(q, k, v, block_mask=block_mask)


def happens() -> str | None:
    num = torch.full((1, 1, 2), 2, dtype=torch.int32)
    at = torch.arange(2, dtype=torch.int32).expand(1, 1, 2, 2).contiguous()
    inputs = (*torch.randn(3, 1, 2, LENGTH, 16).unbind(), num, at)
    program = torch.export.export(Attention(), inputs)
    file = io.BytesIO()
    try:
        torch.export.save(program, file)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    file.seek(0)
    loaded = torch.export.load(file).module()(*inputs)
    torch.testing.assert_close(loaded, program.module()(*inputs))
    return None


if __name__ == "__main__":
    with torch.no_grad():
        found = happens()
    print(f"torch {torch.__version__}: {found or 'gone'}")
    sys.exit(1 if found else 0)
