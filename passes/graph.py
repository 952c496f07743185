"""Small tools on Dynamo's graphs that every pass needs."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, fx
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

# Attributes that Dynamo keeps on the graph module and AOTAutograd reads from it.
_DYNAMO_ATTRIBUTES = ("_param_name_to_source", "_source_to_user_stacks")


def copy_graph_module(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a copy whose graph may be edited: Dynamo goes on using the one it handed out."""
    graph = fx.Graph(tracer_cls=getattr(gm.graph, "_tracer_cls", None))
    copied: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(gm.graph, copied)
    old_output = gm.graph.output_node()
    graph.output(output).meta = copy.copy(old_output.meta)
    for old, new in copied.items():
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    result = fx.GraphModule(gm, graph)
    result.meta = copy.copy(gm.meta)
    for name in _DYNAMO_ATTRIBUTES:
        if hasattr(gm, name):
            setattr(result, name, getattr(gm, name))
    return result


def placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.op == "placeholder"]


def add_placeholder(gm: fx.GraphModule, name: str) -> fx.Node:
    """Append an input to the graph."""
    with gm.graph.inserting_after(placeholders(gm)[-1]):
        node = gm.graph.placeholder(name)
    # Read by AOTAutograd; None says that the input comes from no Python object of the frame.
    node._dynamo_source = None
    return node


def traced_value(node: fx.Node) -> object:
    """Return what a node gave when it was traced, by Dynamo or by ``torch.export``, if known."""
    return node.meta.get("example_value", node.meta.get("val"))


def fake_tensor(node: object) -> Tensor | None:
    """Return the fake tensor that a node gave when it was traced, if it is a node with a tensor."""
    value = traced_value(node) if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def source_name(node: fx.Node) -> str:
    """Return where a placeholder comes from, as a dotted path ("" where Dynamo does not say)."""
    source = getattr(node, "_dynamo_source", None)
    # A property in some versions of torch, a method in others.
    name = getattr(source, "name", "")
    return dotted_path(name() if callable(name) else name)


def input_name(node: fx.Node) -> str:
    """Return what the model calls a placeholder."""
    # An exported program names its inputs, Dynamo says where they come from.
    return source_name(node).rpartition(".")[2] or node.name


def dotted_path(path: str) -> str:
    """Normalize Dynamo's spellings: ``L['self']._modules['a'].b`` becomes ``self.a.b``."""
    path = re.sub(r"\._(?:modules|parameters|buffers)\['(\w+)'\]", r".\1", path)
    path = re.sub(r"\['?(\w+)'?\]", r".\1", path)
    # A wrapper keeps the forward that it replaced, as accelerate's hooks do.
    path = re.sub(r"\.(?:_old_)?forward\.__self__", "", path)
    return path.removeprefix("L.").removeprefix("G.")


def module_of(node: fx.Node) -> tuple[str, str]:
    """Return the dotted path and the class name of the innermost module that made a node."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return "", ""
    path, module_class = list(stack.values())[-1]
    name = module_class if isinstance(module_class, str) else module_class.__name__
    return dotted_path(path), name.rpartition(".")[2]


def same_size(a: object, b: object) -> bool:
    """Whether two sizes are known to be equal; asks without adding a guard."""
    if isinstance(a, torch.SymInt) or isinstance(b, torch.SymInt):
        return str(a) == str(b)
    return a == b


def size_symbols(gm: fx.GraphModule) -> dict[object, fx.Node]:
    """Return the placeholders that are symbolic sizes, by symbol."""
    return {
        value.node.expr: node
        for node in placeholders(gm)
        if isinstance(value := traced_value(node), torch.SymInt)
    }


def node_of_size(gm: fx.GraphModule, size: int | torch.SymInt) -> fx.Node | int:
    """Return what computes a size of the graph from its symbolic inputs, where nodes are inserted.

    Args:
        gm: A graph of Dynamo's.
        size: As a fake tensor of the graph has it.
    """
    if isinstance(size, int):
        return size
    tracer = fx.proxy.GraphAppendingTracer(gm.graph)
    symbols = {symbol: fx.Proxy(node, tracer) for symbol, node in size_symbols(gm).items()}
    found = sympy_interp(PythonReferenceAnalysis, symbols, size.node.expr)
    return found.node if isinstance(found, fx.Proxy) else int(found)


def ancestors(
    node: fx.Node, *, through: Callable[[fx.Node], bool] = lambda _: True
) -> Iterator[fx.Node]:
    """Yield a node and everything that it is computed from, each once.

    Args:
        node: A node of a graph.
        through: Which nodes are followed; the others are left out, with what only they lead to.
    """
    seen, waiting = {node}, [node]
    while waiting:
        current = waiting.pop()
        yield current
        for parent in current.all_input_nodes:
            if parent not in seen and through(parent):
                seen.add(parent)
                waiting.append(parent)
