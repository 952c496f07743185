"""Put the graphs of regions that a user marked in the graph that calls them.

Regions are what ``torch.compiler.nested_compile_region`` marks: Dynamo traces such a function once,
and calls that graph every time.
"""

from __future__ import annotations

import torch
from torch import fx

from blindsight.passes.graph import dotted_path, source_name


def has_regions(gm: fx.GraphModule) -> bool:
    """Whether a graph calls regions marked by ``torch.compiler.nested_compile_region``."""
    return any(_is_region(node) for node in gm.graph.nodes)


def inline_regions(gm: fx.GraphModule) -> fx.GraphModule:
    """Put the graphs of marked regions where they are called, in place.

    Dynamo traces a region once and calls it for every layer, so what it noted of the modules is
    the first call's. Each copy is given its own, told by where its parameters come from; where
    that is ambiguous it is given none.

    Raises:
        ValueError: A region holds regions or constants of its own.
    """
    first_sources: dict[object, list[str]] = {}
    for node in list(gm.graph.nodes):
        if not _is_region(node):
            continue
        get_region, _, *operands = node.args
        region = getattr(gm, get_region.target)
        sources = [source_name(x) if isinstance(x, fx.Node) else "" for x in operands]
        moves = _moved_paths(first_sources.setdefault(get_region.target, sources), sources)
        copied: dict[fx.Node, fx.Node] = {}
        inputs = iter(operands)
        with gm.graph.inserting_before(node):
            for inner in region.graph.nodes:
                if inner.op == "placeholder":
                    copied[inner] = next(inputs)
                elif inner.op in ("get_attr", "call_module"):
                    raise ValueError(
                        "a nested_compile_region with attention must have operators only, got "
                        f"{inner.format_node()}. Mark the decoder layers, and nothing in them."
                    )
                elif inner.op != "output":
                    copied[inner] = gm.graph.node_copy(inner, copied.__getitem__)
                    copied[inner].meta = _moved_meta(inner.meta, moves)
        outputs = fx.map_arg(region.graph.output_node().args[0], copied.__getitem__)
        for user in list(node.users):
            # An operator of higher order returns a tuple, of which Dynamo takes the parts.
            user.replace_all_uses_with(outputs[user.args[1]])
            gm.graph.erase_node(user)
        gm.graph.erase_node(node)
        if not get_region.users:
            gm.graph.erase_node(get_region)
    gm.graph.lint()
    gm.recompile()
    return gm


def _is_region(node: fx.Node) -> bool:
    return node.target is torch.ops.higher_order.invoke_subgraph


def _moved_paths(first: list[str], sources: list[str]) -> dict[str, str] | None:
    """Return how module paths of a region's first call are renamed in another call.

    Returns:
        ``{"self.layers.0": "self.layers.3"}`` for example; None where that is ambiguous.
    """
    moves: dict[str, str] = {}
    for before, after in zip(first, sources, strict=True):
        old, new = before.split("."), after.split(".")
        differ = [at for at, (a, b) in enumerate(zip(old, new, strict=False)) if a != b]
        if before and after and differ:
            if len(old) != len(new) or len(differ) > 1:
                return None
            end = differ[0] + 1
            source, target = ".".join(old[:end]), ".".join(new[:end])
            if moves.setdefault(source, target) != target:
                return None
    return moves if moves or first == sources else None


def _moved_meta(meta: dict[str, object], moves: dict[str, str] | None) -> dict[str, object]:
    result = dict(meta)
    stack = meta.get("nn_module_stack")
    if isinstance(stack, dict):
        result["nn_module_stack"] = {
            key: (_moved(dotted_path(path), moves), kind)
            for key, (path, kind) in stack.items()
            if moves is not None
        }
    return result


def _moved(path: str, moves: dict[str, str]) -> str:
    for before, after in moves.items():
        if path == before or path.startswith(before + "."):
            return after + path[len(before) :]
    return path
