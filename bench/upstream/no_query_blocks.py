"""A BlockMask without lists by query (compute_q_blocks=False) cannot be traced with gradients."""

import sys

import torch
from torch import Tensor
from torch._higher_order_ops.flex_attention import flex_attention as operator
from torch.nn.attention.flex_attention import BlockMask

LENGTH = 128


def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


def same(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return score


def happens() -> str | None:
    q, k, v = torch.randn(3, 1, 2, LENGTH, 16).requires_grad_().unbind()
    num = torch.full((1, 1, 2), 2, dtype=torch.int32)
    at = torch.arange(2, dtype=torch.int32).expand(1, 1, 2, 2).contiguous()
    tables = BlockMask.from_kv_blocks(
        num, at, BLOCK_SIZE=64, mask_mod=causal, compute_q_blocks=False
    )
    try:
        operator(q, k, v, same, tables.as_tuple(), 0.25, {}, (), ())
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return None


if __name__ == "__main__":
    found = happens()
    print(f"torch {torch.__version__}: {found or 'gone'}")
    sys.exit(1 if found else 0)
