"""A ceiling that is divided by a ceiling is simplified as if nothing were negative."""

import sys

import torch
from torch import Tensor


def divided(x: Tensor) -> Tensor:
    size = x.shape[0]
    return torch.zeros(-(-size // 128) // -(-size // 1024))


def happens() -> str | None:
    x = torch.empty(203)
    try:
        found = torch.compile(divided, dynamic=True, backend="aot_eager")(x)
    except AssertionError as error:
        return " ".join(str(error).split())[:160]
    if found.shape != divided(x).shape:
        return f"{len(found)} instead of {len(divided(x))} elements"
    return None


if __name__ == "__main__":
    found = happens()
    print(f"torch {torch.__version__}: {found or 'gone'}")
    sys.exit(1 if found else 0)
