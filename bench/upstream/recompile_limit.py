"""Past Dynamo's recompile limit flex_attention runs unfused, with a tensor of all pairs."""

import sys

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

LENGTH = 320


class Largest(TorchDispatchMode):
    """Of the outputs, in elements."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple) else (output,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return output


def happens() -> str | None:
    compiled = torch.compile(flex_attention, dynamic=False, backend="eager")
    lengths = range(64, LENGTH, 64)
    with torch._dynamo.config.patch(recompile_limit=len(lengths)), Largest() as largest:
        for length in (*lengths, LENGTH):
            q, k, v = torch.randn(3, 1, 2, length, 16).unbind()
            largest.elements = 0
            try:
                compiled(q, k, v)
            except torch._dynamo.exc.RecompileLimitExceeded:
                return None
    pairs = 2 * LENGTH * LENGTH
    return "it computes a tensor of all pairs" if largest.elements >= pairs else None


if __name__ == "__main__":
    with torch.no_grad():
        found = happens()
    print(f"torch {torch.__version__}: {found or 'gone'}")
    sys.exit(1 if found else 0)
