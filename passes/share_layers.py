"""Let layers that are alike share one region, which a compiler then compiles once.

A decoder's layers do the same with different weights. Dynamo writes them out one after the other,
and Inductor would schedule, fuse and write each of them again, which is most of the time that
compiling takes. Dynamo itself shares layers that the user marks
(``torch.compiler.nested_compile_region``); here the graph tells which layers are alike.
"""

from __future__ import annotations

import hashlib
import logging
import operator
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, fx

from blindsight.attention.attend import attend, attend_in_region
from blindsight.attention.region import call_in_region
from blindsight.passes.graph import fake_tensor, module_of
from blindsight.passes.memory import acts, storage_of

logger = logging.getLogger(__name__)

# What functions of a layer may come from. Compile caches look at the calls of the whole graph, not
# at those inside a region: whatever they might not know has to stay where they see it.
_KNOWN_MODULES = {"torch", "_operator", "math", "builtins", "blindsight"}
# Names of functions that switch a mode for the calls that follow, or check something of them.
_EFFECTS = ("_enter_", "_exit_", "_set_", "set_", "_check", "_assert")
_CONSTANTS = (
    *(bool, int, float, str, type(None), type(...)),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)


def call_shared(layer: fx.GraphModule, digest: str, *args: Any) -> Any:
    """Return ``layer(*args)``; all calls of one layer share what is compiled.

    Args:
        layer: Made by :func:`share_layers_pass`.
        digest: Tells what the layer does to compile caches, which do not look inside.
        args: The layer's inputs.
    """
    return call_in_region(f"layer_{digest[:16]}", layer, *args)


def share_layers_pass(gm: fx.GraphModule, example_inputs: object = None) -> fx.GraphModule:
    """Call one submodule for all layers of a graph that are alike, each with its own weights.

    A layer is what comes from one module in a list of modules. It stays as it is if it has no
    equal, changes a tensor in place, returns what it is given, or has weights of a tensor
    subclass, which regions do not know.

    Args:
        gm: A graph of Dynamo's, which tells for each node which module it comes from. Edited in
            place.
        example_inputs: Not read; the usual signature of a pass.
    """
    del example_inputs
    alike: dict[object, list[_Layer]] = defaultdict(list)
    for layer in _find_layers(gm):
        targets = tuple(node.target for node in layer.nodes)
        alike[layer.text, targets].append(layer)
    shared = [layers for layers in alike.values() if len(layers) > 1]
    # All of them before any is replaced: a layer's nodes then read what stands for another.
    modules = [layers[0].as_module(gm) for layers in shared]
    now: dict[fx.Node, fx.Node] = {}
    for number, (layers, module) in enumerate(zip(shared, modules, strict=True)):
        name = f"blindsight_layer_{number}"
        gm.add_submodule(name, module)
        digest = hashlib.sha256(f"{name}\n{layers[0].text}".encode()).hexdigest()
        for layer in layers:
            now.update(layer.replace(gm, name, digest, now))
    if shared:
        gm.graph.lint()
        gm.recompile()
    logger.info("shared %s layers", " and ".join(str(len(layers)) for layers in shared) or "no")
    return gm


@dataclass(frozen=True)
class _Layer:
    """Nodes that can become one call, what they read from outside, and those that others read."""

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    text: str  # what they do, in terms of their inputs

    def as_module(self, gm: fx.GraphModule) -> fx.GraphModule:
        graph = fx.Graph(tracer_cls=getattr(gm.graph, "_tracer_cls", None))
        copied: dict[fx.Node, fx.Node] = {}
        for number, node in enumerate(self.inputs):
            copied[node] = graph.placeholder(f"arg_{number}")
        for node in self.nodes:
            copied[node] = graph.node_copy(node, copied.__getitem__)
            # Of this layer alone, and kept alive for as long as the region is.
            copied[node].meta = {}
            if node.target is attend_in_region:
                copied[node].target = attend
        graph.output(tuple(copied[node] for node in self.outputs))
        return fx.GraphModule({}, graph)

    def replace(
        self, gm: fx.GraphModule, name: str, digest: str, now: Mapping[fx.Node, fx.Node]
    ) -> dict[fx.Node, fx.Node]:
        """Call the submodule in the layer's place; return the node that replaces each output."""
        last = self.nodes[-1]
        inputs = tuple(now.get(node, node) for node in self.inputs)
        with gm.graph.inserting_before(last.next):
            module = gm.graph.get_attr(name)
            call = gm.graph.call_function(call_shared, (module, digest, *inputs))
            outputs = [
                gm.graph.call_function(operator.getitem, (call, number))
                for number in range(len(self.outputs))
            ]
        call.meta["nn_module_stack"] = last.meta["nn_module_stack"]
        call.meta["blindsight"] = f"a layer, shared as {name}"
        for node, output in zip(self.outputs, outputs, strict=True):
            output.meta = dict(node.meta)
            node.replace_all_uses_with(output)
        for node in reversed(self.nodes):
            gm.graph.erase_node(node)
        return dict(zip(self.outputs, outputs, strict=True))


def _find_layers(gm: fx.GraphModule) -> Iterator[_Layer]:
    graph = list(gm.graph.nodes)
    order = {node: number for number, node in enumerate(graph)}
    num_effects = [0, *accumulate(not _is_pure(node) for node in graph)]  # before each node
    of_path: dict[str, list[fx.Node]] = defaultdict(list)
    paths = _layer_paths(gm)
    for node, path in paths.items():
        of_path[path].append(node)
    for path, nodes in of_path.items():
        begin, end = order[nodes[0]], order[nodes[-1]] + 1
        effects = num_effects[begin]
        if num_effects[end] > effects:
            continue
        members: list[fx.Node] = []
        after = set()  # members, and what follows from them
        for node in graph[begin:end]:
            follows = any(x in after for x in node.all_input_nodes)
            if paths.get(node) == path:
                # What several layers read is made once, before them, wherever it was traced.
                of_others = any(paths.get(user, path) != path for user in node.users)
                if follows or not of_others:
                    members.append(node)
                    after.add(node)
            elif follows:
                break  # it reads what the layer has only begun
        else:
            if (layer := _layer_of(tuple(members), effects)) is not None:
                yield layer


def _layer_paths(gm: fx.GraphModule) -> dict[fx.Node, str]:
    """Return each node's layer: the path of the outermost module around it that has siblings."""
    found: dict[fx.Node, list[tuple[str, str]]] = {}
    siblings: dict[str, set[str]] = defaultdict(set)
    for node in gm.graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        parts = module_of(node)[0].split(".")
        found[node] = [
            (".".join(parts[:at]), part) for at, part in enumerate(parts) if part.isdigit()
        ]
        for whole, number in found[node]:
            siblings[whole].add(number)
    paths = {}
    for node, positions in found.items():
        for whole, number in positions:
            if len(siblings[whole]) > 1:
                paths[node] = f"{whole}.{number}"
                break
    return paths


def _layer_of(nodes: tuple[fx.Node, ...], effects: int) -> _Layer | None:
    """Return the layer that these nodes are, or None if they cannot be one call.

    Args:
        nodes: In the graph's order.
        effects: How many nodes before them have an effect, such as entering a mode.
    """
    members = set(nodes)
    inputs = tuple(
        dict.fromkeys(x for node in nodes for x in node.all_input_nodes if x not in members)
    )
    outputs = tuple(node for node in nodes if any(user not in members for user in node.users))
    if not outputs or not _are_own_tensors(outputs, inputs):
        return None
    numbers = {node: f"%{number}" for number, node in enumerate(nodes)}
    numbers |= {node: f"@{number}" for number, node in enumerate(inputs)}
    try:
        lines = [
            f"{_name(node)}({_text(node.args, numbers)}, {_text(dict(node.kwargs), numbers)})"
            for node in nodes
        ]
    except TypeError:  # of a constant of which the text does not tell all
        return None
    lines += [_text(outputs, numbers), f"{effects} effects before it"]
    return _Layer(nodes, inputs, outputs, "\n".join(lines))


def _is_pure(node: fx.Node) -> bool:
    """Whether a call does nothing but return what follows from its arguments."""
    if node.op not in ("call_function", "call_method"):
        return True
    if acts(node):
        return False
    if node.op == "call_method":
        return True
    name = getattr(node.target, "__name__", "")
    module = getattr(node.target, "__module__", None) or type(node.target).__module__
    return not name.startswith(_EFFECTS) and module.partition(".")[0] in _KNOWN_MODULES


def _are_own_tensors(outputs: tuple[fx.Node, ...], inputs: tuple[fx.Node, ...]) -> bool:
    """Whether all are plain tensors and outputs have memory of their own, as a region requires."""
    memory: set[int | None] = {None}  # what is not known may be that of another
    for node in inputs:
        tensor = fake_tensor(node)
        if tensor is None:
            if node.op == "get_attr":
                return False  # a graph, of an operator of higher order
            continue
        if _is_subclass(tensor):
            return False
        memory.add(storage_of(node))
    for node in outputs:
        tensor = fake_tensor(node)
        if tensor is None or _is_subclass(tensor) or storage_of(node) in memory:
            return False
        memory.add(storage_of(node))
    return True


def _is_subclass(tensor: Tensor) -> bool:
    """Whether a tensor is made of others: quantised weights, DTensors."""
    return hasattr(tensor, "__tensor_flatten__")


def _name(node: fx.Node) -> str:
    if isinstance(node.target, str):
        return f"method {node.target}"
    target: Any = node.target
    module, name = getattr(target, "__module__", ""), getattr(target, "__qualname__", target)
    return f"{module}.{name}"


def _text(value: Any, numbers: dict[fx.Node, str]) -> str:
    """Write an argument, with the numbers of nodes.

    Raises:
        TypeError: It holds something else than nodes and plain constants.
    """
    if isinstance(value, fx.Node):
        return numbers[value]
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key!r}: {_text(value[key], numbers)}' for key in sorted(value))}}}"
    if isinstance(value, (tuple, list)):  # torch.Size is one of them
        return f"({', '.join(_text(item, numbers) for item in value)},)"
    if isinstance(value, slice):
        return f"slice{_text((value.start, value.stop, value.step), numbers)}"
    if isinstance(value, _CONSTANTS):
        return repr(value)
    raise TypeError(f"no text for {type(value).__name__}")
