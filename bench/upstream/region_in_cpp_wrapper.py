"""Inductor's C++ wrapper has no code for a region that is compiled once."""

import sys

import torch
from torch import Tensor


@torch.compiler.nested_compile_region
def layer(x: Tensor) -> Tensor:
    return torch.sin(x) + 1


def happens() -> str | None:
    x = torch.randn(64)
    options: dict[str, str | int | bool] = {"cpp_wrapper": True}
    compiled = torch.compile(lambda x: layer(layer(x)), fullgraph=True, options=options)
    try:
        output = compiled(x)
    except Exception as error:
        return " ".join(str(error).split())[:160]
    torch.testing.assert_close(output, torch.sin(torch.sin(x) + 1) + 1)
    return None


if __name__ == "__main__":
    with torch.no_grad():
        found = happens()
    print(f"torch {torch.__version__}: {found or 'gone'}")
    sys.exit(1 if found else 0)
