"""Past Dynamo's recompile limit flex_attention runs unfused, with a tensor of all pairs."""

import importlib
import sys
from typing import Any

import torch
from torch.nn.attention.flex_attention import flex_attention

# the package has the operator under the same name
home: Any = importlib.import_module("torch._higher_order_ops.flex_attention")


def happens() -> str | None:
    compiled = torch.compile(flex_attention, dynamic=False)
    unfused, calls = home.math_attention, []

    def count(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return unfused(*args, **kwargs)

    with torch._dynamo.config.patch(recompile_limit=1):
        compiled(*torch.randn(3, 1, 2, 128, 16).unbind())
        home.math_attention = count
        try:
            compiled(*torch.randn(3, 1, 2, 192, 16).unbind())
        finally:
            home.math_attention = unfused
    return "it runs unfused" if calls else None


if __name__ == "__main__":
    with torch.no_grad():
        found = happens()
    print(f"torch {torch.__version__}: {found or 'gone'}")
    sys.exit(1 if found else 0)
