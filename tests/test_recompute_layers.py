"""Segments that gradients compute again: the same numbers and gradients, from less memory."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from blindsight.calibration.gradients import gradients_of
from blindsight.passes.find_attention import find_attention
from blindsight.passes.recompute_layers import Recomputed, recompute_layers_pass

LAYER = r"layers\.(\d+)"
SIZE, WIDE = 4, 64
KINDS = ("plain", "changes_its_own", "changes_the_table", "autocast", "vmap", "no_grad", "buffer")


class Layer(nn.Module):
    """Attention and an MLP; what kinds do beside it must not be cut, or run twice."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.up, self.down = nn.Linear(SIZE, WIDE), nn.Linear(WIDE, SIZE)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.kind == "autocast"):
            attended = scaled_dot_product_attention(x, x, x, is_causal=True)
        if self.kind == "vmap":
            x = torch.vmap(lambda row, other: (row + other).sin())(x, attended)
        else:
            x = x + attended
        if self.kind == "changes_its_own":
            x = (2 * x).add_(1)
        elif self.kind == "changes_the_table":
            table[0] += 1
            x = x + table
        elif self.kind == "no_grad":
            with torch.no_grad():
                shift = x.sum()
            x = x + shift
        elif self.kind == "buffer":
            self.calls += 1
            x = x + self.calls
        return x + self.down(self.up(x).relu())


class Stack(nn.Module):
    def __init__(self, kinds: Sequence[str]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(map(Layer, kinds))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        table = torch.zeros(3, SIZE)
        for layer in self.layers:
            x = layer(x, table)
        return x, x.sum()


def recomputed(model: nn.Module, *, dynamic: bool = False) -> tuple[Callable[..., Any], list[int]]:
    """Return a model whose graph went through the pass, and where its segments are counted."""
    counts: list[int] = []

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Any:
        result = recompute_layers_pass(gm, attention=find_attention(gm, layer_pattern=LAYER))
        counts.append(sum(isinstance(part, Recomputed) for part in result.children()))
        return result.forward

    torch._dynamo.reset()
    return torch.compile(model, backend=backend, dynamic=dynamic), counts


@settings(max_examples=10)
@example(list(KINDS[:-1]), 0, False)
@given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=5), st.integers(0, 99), st.booleans())
def test_numbers_and_gradients_are_the_same(kinds: list[str], seed: int, dynamic: bool) -> None:
    torch.manual_seed(seed)
    model = Stack(kinds)
    x = torch.randn(2, 3, SIZE, requires_grad=True)
    found = []
    compiled, counts = recomputed(model, dynamic=dynamic)
    for run in (model, compiled):
        for layer in model.layers:
            layer.calls.zero_()
        outputs, total = run(x)
        wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
        for _ in range(2):  # each pass computes the segments again
            gradients = torch.autograd.grad(total, wanted, retain_graph=True)
        found.append([outputs, total, *gradients, *(layer.calls.clone() for layer in model.layers)])
        assert torch._C._functorch.peek_interpreter_stack() is None  # no vmap is left open
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)

    if "buffer" in kinds:
        assert counts == [0]
    else:
        changing = [at for at, kind in enumerate(kinds) if kind == "changes_the_table"]
        # All from the first layer on, which reads what the table was made with, are one.
        assert counts == [len(kinds) - (changing[-1] if changing else 0)]


class _MadeInMLPs(TorchDispatchMode):
    """Collects the memory of what the MLPs compute inside."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: list[StorageWeakRef] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.numel() == 2 * 3 * WIDE:
            self.memory.append(StorageWeakRef(result.untyped_storage()))
        return result

    @property
    def num_alive(self) -> int:
        return len({memory.cdata for memory in self.memory if not memory.expired()})


def test_what_a_layer_computes_inside_is_not_kept() -> None:
    graphs = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        attention = find_attention(gm, layer_pattern=LAYER)
        for graph in (gm, recompute_layers_pass(gm, attention=attention)):
            graphs.append(partial(graph, *example_inputs))
        return gm.forward

    torch.compile(Stack(6 * ["plain"]), backend=backend)(
        torch.randn(2, 3, SIZE, requires_grad=True)
    )
    alive = []
    for graph in graphs:  # Dynamo does not run what it compiled where tensors are watched
        with _MadeInMLPs() as made:
            outputs = graph()
            alive.append(made.num_alive)
        del outputs
    assert alive == [6, 0]


class _KnowsNoBatches(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * (1 if gradient.abs().sum().item() < 1e9 else 0)


@pytest.mark.parametrize("batches", [True, False])
def test_gradients_of_many_numbers(batches: bool) -> None:
    x, other = torch.randn(3, 5, requires_grad=True), torch.randn(2, requires_grad=True)
    middle = x.sin()
    end = middle if batches else _KnowsNoBatches.apply(middle)
    numbers = torch.stack([end.square().sum(), end[1].exp().sum(), end[2, 2]])
    found, of_other = gradients_of(numbers, [middle, other])
    assert torch.equal(torch.stack(list(of_other)), torch.zeros(3, 2))
    for number, gradient in zip(numbers, found, strict=True):
        (expected,) = torch.autograd.grad(number, middle, retain_graph=True)
        torch.testing.assert_close(gradient, expected)
