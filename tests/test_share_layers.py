"""Layers that are alike become one region: exactly those, and nothing else changes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch._inductor.utils import fresh_cache
from torch.testing._internal.two_tensor import TwoTensor

from blindsight.passes.share_layers import call_shared, share_layers_pass
from blindsight.runtime.inner import Inner


class Layer(nn.Module):
    """Of one kind of many, which differ as little as layers can."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.linear = nn.Linear(4, 4)
        self.other = nn.Linear(4, 4)

    def forward(self, x: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        first, second = self.linear, self.other
        if self.kind == "swapped":
            first, second = second, first
        elif self.kind == "tied":
            second = first
        hidden = first(x).relu() + table
        scale: object = {"scaled": 2, "true": True, "float": 1.0}.get(self.kind, 1)
        hidden = torch.mul(second(hidden), scale)
        if self.kind == "sliced":
            return x + hidden[:, :-1].sum(1, keepdim=True), hidden
        return x + hidden, hidden


class Stack(nn.Module):
    def __init__(self, kinds: Sequence[str], read: Sequence[bool] = ()) -> None:
        super().__init__()
        self.layers = nn.ModuleList(map(Layer, kinds))
        self.read = read or [False] * len(kinds)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        table, hidden = x.sin(), []
        for layer, is_read in zip(self.layers, self.read, strict=True):
            x, inside = layer(x, table)
            if is_read:
                hidden.append(inside)
        return (x, *hidden)


def share(model: Callable[..., Any], *inputs: Tensor) -> tuple[Any, list[int]]:
    """Return what a model returns with its layers shared, and how many share each region."""
    counts: list[int] = []

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Any:
        share_layers_pass(gm)
        calls = [node for node in gm.graph.nodes if node.target is call_shared]
        modules = [node.args[0].target for node in calls]
        counts.extend(modules.count(name) for name in dict.fromkeys(modules))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        outputs = torch.compile(model, backend=backend)(*inputs)
    return outputs, counts


ALL = ("plain", "scaled", "true", "float", "swapped", "tied", "sliced")


@given(
    st.lists(st.tuples(st.sampled_from(ALL), st.booleans()), min_size=1, max_size=6),
    st.integers(0, 99),
)
@example([(kind, False) for kind in ALL * 2], 0)
@example([(kind, kind == "tied") for kind in ALL * 2], 0)
def test_layers_alike_share_and_nothing_changes(drawn: Any, seed: int) -> None:
    torch.manual_seed(seed)
    model = Stack([kind for kind, _ in drawn], [is_read for _, is_read in drawn])
    x = torch.randn(2, 3, 4)
    with torch.no_grad():
        expected = model(x)
    found, counts = share(model, x)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    # "swapped" reads its weights in another order, which is no other work to do.
    alike = [("plain" if kind == "swapped" else kind, is_read) for kind, is_read in drawn]
    expected_counts = [alike.count(item) for item in dict.fromkeys(alike)]
    assert sorted(counts) == sorted(n for n in expected_counts if n > 1)


def triple(x: Tensor) -> Tensor:
    return 3 * x


class OwnForward(nn.Module):
    """Three layers of a function that is given."""

    def __init__(self, function: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()

        class One(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.randn(4))
                self.register_buffer("seen", torch.zeros(4))

            def forward(self, x: Tensor) -> Any:
                return function(self, x)

        self.layers = nn.ModuleList(One() for _ in range(3))

    def forward(self, x: Tensor) -> Any:
        kept = []
        for layer in self.layers:
            x = layer(x)
            if isinstance(x, tuple):
                kept.append(x[1])
                x = x[0]
        return x, *kept


def in_place(self: Any, x: Tensor) -> Tensor:
    self.seen.add_(x.sum(0))
    return x * self.weight + self.seen


def in_place_by_aten(self: Any, x: Tensor) -> Tensor:
    torch.ops.aten.add_.Tensor(self.seen, x.sum(0))
    return x * self.weight + self.seen


def set_item(self: Any, x: Tensor) -> Tensor:
    self.seen[0] = x.sum()
    return x * self.weight + self.seen


def into_out(self: Any, x: Tensor) -> Tensor:
    return torch.mul(x, self.weight, out=torch.empty_like(x))


def returns_its_input(self: Any, x: Tensor) -> Any:
    return x * self.weight, x.view(4, -1)


def returns_one_twice(self: Any, x: Tensor) -> Any:
    y = x * self.weight
    return y, y.view(4, -1)


def switches_a_mode(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return x @ self.weight.diag()


@pytest.mark.parametrize(
    "function",
    [
        in_place,
        in_place_by_aten,
        set_item,
        into_out,
        returns_its_input,
        returns_one_twice,
        switches_a_mode,
    ],
)
def test_what_a_region_cannot_do_stays_as_it_is(function: Any) -> None:
    torch.manual_seed(0)
    model, x = OwnForward(function), torch.randn(2, 4)
    with torch.no_grad():
        expected = model(x)
        for layer in model.layers:
            layer.seen.zero_()
    found, counts = share(model, x)
    assert not counts
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_weights_of_a_tensor_subclass_stay_as_they_are() -> None:
    def function(self: Any, x: Tensor) -> Tensor:
        scaled = (x * self.weight).sin()
        return getattr(scaled, "a", scaled)  # the next layer gets a plain tensor

    torch.manual_seed(0)
    model, x = OwnForward(function), torch.randn(2, 4)
    with torch.no_grad():
        expected = model(x)
    assert share(model, x)[1] == [3]
    for layer in model.layers:
        both = TwoTensor(layer.weight.detach(), layer.weight.detach())
        layer.weight = nn.Parameter(both, requires_grad=False)
    found, counts = share(model, x)
    assert not counts
    torch.testing.assert_close(found, expected)


def test_functions_that_caches_do_not_know_stay_where_they_see_them() -> None:
    torch.manual_seed(0)
    seen = torch.compiler.allow_in_graph(triple)
    model, x = OwnForward(lambda self, x: seen(x * self.weight)), torch.randn(2, 4)
    found, counts = share(model, x)
    torch.testing.assert_close(found, model(x))
    assert not counts
    # The control: of the same layers, without the function.
    assert share(OwnForward(lambda self, x: 3 * (x * self.weight)), x)[1] == [3]


def test_a_layer_that_is_read_before_its_end_stays_as_it_is() -> None:
    class Interleaved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(layer(x).sin())  # sin is not the layer's
            return x

    torch.manual_seed(0)
    model, x = Interleaved(), torch.randn(2, 4)
    found, counts = share(model, x)
    assert not counts
    torch.testing.assert_close(found, model(x))


def test_a_mode_inside_one_layer_alone() -> None:
    def function(self: Any, x: Tensor) -> Tensor:
        x = x.sin()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return x @ self.weight.diag()

    def only_the_last(self: Any, x: Tensor) -> Tensor:
        if self is model.layers[-1]:
            return function(self, x)
        return x.sin() @ self.weight.diag()

    torch.manual_seed(0)
    model, x = OwnForward(only_the_last), torch.randn(2, 4)
    with torch.no_grad():
        expected = model(x)
    found, counts = share(model, x)
    assert counts == [2]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_what_the_first_layer_makes_for_all_is_no_part_of_it() -> None:
    def function(self: Any, x: Tensor) -> Tensor:
        if self is model.layers[0]:
            made.append(x.new_full((4,), 2.0))
        return (x * self.weight).sin() + made[-1]

    made: list[Tensor] = []
    torch.manual_seed(0)
    model, x = OwnForward(function), torch.randn(2, 4)
    found, counts = share(model, x)
    assert counts == [3]
    with torch.no_grad():
        torch.testing.assert_close(found, model(x))


def test_sizes_that_vary() -> None:
    torch.manual_seed(0)
    model = OwnForward(lambda self, x: x.view(1, x.shape[0], -1)[0] * self.weight + x.shape[0])
    compiled_counts = []
    for length in (3, 5, 6):
        x = torch.randn(length, 4)
        torch._dynamo.reset()

        def backend(gm: fx.GraphModule, example_inputs: Any) -> Any:
            share_layers_pass(gm)
            compiled_counts.append(sum(node.target is call_shared for node in gm.graph.nodes))
            return torch._dynamo.lookup_backend("aot_eager")(gm, example_inputs)

        with torch.no_grad():
            found = torch.compile(model, backend=backend, dynamic=True)(x)
            torch.testing.assert_close(found, model(x))
    assert compiled_counts == [3, 3, 3]


def double(self: Any, x: Tensor) -> Tensor:
    return (x * self.weight).sin() * 2


def treble(self: Any, x: Tensor) -> Tensor:
    return (x * self.weight).sin() * 3


@pytest.mark.inductor
def test_caches_tell_layers_by_what_is_in_them(tmp_path: Path) -> None:
    """Where layers are alike but for a number, of two graphs or of one, each gets its own code."""
    inner, x = Inner("inductor", {}), torch.randn(2, 3, 4)
    counters = torch._dynamo.utils.counters
    found = []
    with fresh_cache(dir=str(tmp_path)):
        for kind in (double, treble, double, ("plain", "scaled", "plain", "scaled")):
            torch.manual_seed(0)
            model = Stack(kind) if isinstance(kind, tuple) else OwnForward(kind)
            torch._dynamo.reset()
            counters.clear()
            compiled = torch.compile(model, backend=lambda gm, xs: inner(share_layers_pass(gm), xs))
            with torch.no_grad():
                torch.testing.assert_close(compiled(x), model(x))
            cache = counters["aot_autograd"]
            found.append((cache["autograd_cache_hit"], cache["autograd_cache_bypass"]))
    assert found == [(0, 0), (0, 0), (1, 0), (0, 0)]
