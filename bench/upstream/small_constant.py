"""AOTInductor drops a constant of up to eight elements that FlexAttention's mask captures."""

import sys
import tempfile

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

LENGTH = 128


class Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.tensor([16, LENGTH]))  # one a head

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        window = self.window

        def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (q >= k) & (q - k < window[h])

        block_mask = create_block_mask(mask_mod, 1, 2, LENGTH, LENGTH, device="cpu", BLOCK_SIZE=64)
        return flex_attention(q, k, v, block_mask=block_mask)


def happens() -> str | None:
    inputs = torch.randn(3, 1, 2, LENGTH, 16).unbind()
    i = torch.arange(LENGTH)
    window = torch.tensor([16, LENGTH])[:, None, None]
    mask = (i[:, None] >= i) & (i[:, None] - i < window)
    expected = torch.nn.functional.scaled_dot_product_attention(*inputs, attn_mask=mask)
    program = torch.export.export(Attention(), inputs)
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/attention.pt2"
            torch._inductor.aoti_compile_and_package(program, package_path=path)
            output = torch._inductor.aoti_load_package(path)(*inputs)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    if not torch.allclose(output, expected, atol=1e-4):
        return f"wrong by {float((output - expected).abs().max()):.3g}"
    return None


if __name__ == "__main__":
    with torch.no_grad():
        found = happens()
    print(f"torch {torch.__version__}: {found or 'gone'}")
    sys.exit(1 if found else 0)
