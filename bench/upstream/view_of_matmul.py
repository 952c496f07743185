"""The CPU template of FlexAttention fails on queries or keys that are a view of a product."""

import sys

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

LENGTH, HEADS, HEAD_DIM = 128, 2, 16


def attention(x: Tensor, *weights: Tensor) -> Tensor:
    # As in a layer without positional encoding: nothing is computed between product and kernel.
    q, k, v = ((x @ weight).view(1, LENGTH, HEADS, HEAD_DIM).transpose(1, 2) for weight in weights)
    return flex_attention(q, k, v)


def happens() -> str | None:
    x, weights = torch.randn(1, LENGTH, 32), torch.randn(3, 32, HEADS * HEAD_DIM).unbind()
    try:
        output = torch.compile(attention, dynamic=False)(x, *weights)
    except Exception as error:
        return " ".join(str(error).split())[:160]
    q, k, v = ((x @ w).view(1, LENGTH, HEADS, HEAD_DIM).transpose(1, 2) for w in weights)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    if not torch.allclose(output, expected, atol=1e-4):
        return f"wrong by {float((output - expected).abs().max()):.3g}"
    return None


if __name__ == "__main__":
    with torch.no_grad():
        found = happens()
    print(f"torch {torch.__version__}: {found or 'gone'}")
    sys.exit(1 if found else 0)
