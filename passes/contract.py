"""What a pass promises to the passes around it, and a list of passes run as one.

A *property* is a name for something that holds of a graph. Two have a meaning here; passes may
have others of their own:

    "sdpa"           the decoder's attention is calls of ``scaled_dot_product_attention``: holds of
                     the graphs that Dynamo hands over, and is needed to rewrite them
    "flex_attention" the decoder's attention is rewritten: holds of rewritten graphs
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import fx

from blindsight.passes.find_attention import count_attention
from blindsight.passes.graph import placeholders

SDPA, FLEX_ATTENTION = "sdpa", "flex_attention"

_OWN_NAME = "blindsight"


@dataclass(frozen=True)
class GraphPass:
    """A pass over a graph that is about to be compiled, with what it requires and what it leaves.

    Args:
        function: Takes a graph module, which it may edit in place: the graph is a copy that nobody
            else uses. Returns the module to go on with, or None for the one that it was given. The
            number and order of the graph's inputs and outputs must stay, and so must the shapes.
        when: ``"before"`` the attention is found and rewritten, or ``"after"``. A pass of either
            kind sees every graph of the model. One that runs before sees it once. One that runs
            after sees each variant that is compiled: the model's own and the rewritten ones,
            whose last inputs are ours: four, and three for each mask that is an input of the graph.
        requires: Properties that must hold of the graph that the pass is given.
        ensures: Properties that hold of the graph that it leaves.
        breaks: Properties that need not hold any more of the graph that it leaves.
        name: What messages call the pass; by default the function's name.
        uuid: Identifies what the pass does, and becomes a part of Inductor's cache keys; by
            default the function's own ``uuid()``, if it has one. Caches are keyed by the graph
            that a pass leaves in any case, so it matters only where a pass does more than its
            graph shows, such as setting ``node.meta``.

    Raises:
        ValueError: An argument is malformed.
    """

    function: Callable[[fx.GraphModule], Any]
    when: Literal["before", "after"] = field(default="after", kw_only=True)
    requires: frozenset[str] = field(default=frozenset(), kw_only=True)
    ensures: frozenset[str] = field(default=frozenset(), kw_only=True)
    breaks: frozenset[str] = field(default=frozenset(), kw_only=True)
    name: str = field(default="", kw_only=True)
    uuid: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise ValueError(
                f"a pass must be a function of a GraphModule, got {self.function!r}. Give a "
                "function, or a blindsight.passes.GraphPass."
            )
        if self.when not in ("before", "after"):
            raise ValueError(f"when must be 'before' or 'after', got {self.when!r}.")
        for name in ("requires", "ensures", "breaks"):
            value = getattr(self, name)
            if isinstance(value, str) or not all(isinstance(item, str) for item in value):
                raise ValueError(f"{name} must be a set of strings, got {value!r}.")
            object.__setattr__(self, name, frozenset(value))
        if not self.name:
            own = getattr(self.function, "__name__", type(self.function).__name__)
            object.__setattr__(self, "name", own)
        if not self.uuid and callable(found := getattr(self.function, "uuid", None)):
            object.__setattr__(self, "uuid", _as_text(found()))

    @classmethod
    def of(cls, function: Any) -> GraphPass:
        """Return a pass as it is, or a function as a pass that runs after and promises nothing."""
        return function if isinstance(function, cls) else cls(function)

    def __call__(self, gm: fx.GraphModule) -> fx.GraphModule:
        """Run the pass and check what it leaves.

        Raises:
            ValueError: The pass failed, or its graph is broken; the message names the pass.
        """
        before = _interface(gm)
        try:
            result = self.function(gm)
        except Exception as error:
            raise ValueError(
                f"pass {self.name!r} must run on every graph, got {type(error).__name__}: {error}."
            ) from error
        result = getattr(result, "graph_module", result)  # of a PassBase
        result = gm if result is None else result
        if not isinstance(result, fx.GraphModule):
            raise ValueError(
                f"pass {self.name!r} must return a GraphModule or None, got "
                f"{type(result).__name__}."
            )
        try:
            result.graph.lint()
            result.recompile()
        except Exception as error:
            raise ValueError(
                f"pass {self.name!r} must leave a graph that is well formed, got: {error}."
            ) from error
        if (after := _interface(result)) != before:
            raise ValueError(
                f"pass {self.name!r} must leave the graph's {before[0]} inputs and {before[1]} "
                f"outputs, got {after[0]} and {after[1]}."
            )
        return result


class PassList:
    """A user's passes before and after the rewriting, in the order in which they were given.

    Raises:
        ValueError: A pass requires what does not hold where it runs; the message names that pass
            and, if there is one, the pass that is the reason.
    """

    def __init__(self, passes: Sequence[Any]) -> None:
        if not isinstance(passes, Iterable) or isinstance(passes, (str, bytes)):
            raise ValueError(f"passes must be a list of functions, got {passes!r}.")
        known = [GraphPass.of(item) for item in passes]
        self._before = [item for item in known if item.when == "before"]
        self._after = [item for item in known if item.when == "after"]
        self._check()

    def __bool__(self) -> bool:
        return bool(self._before or self._after)

    @property
    def identities(self) -> dict[str, str]:
        """What the passes add to cache keys, by the number and name of each."""
        return {
            f"pass {number} {item.name}": item.uuid
            for number, item in enumerate((*self._before, *self._after))
            if item.uuid
        }

    def run_before(self, gm: fx.GraphModule) -> fx.GraphModule:
        """Run the passes that come before the rewriting.

        Raises:
            ValueError: A pass broke the graph, or left no attention to be rewritten.
        """
        for item in self._before:
            found = count_attention(gm)
            gm = item(gm)
            if SDPA not in item.breaks and count_attention(gm) < found:
                raise ValueError(
                    f"pass {item.name!r} must leave the {found} calls of "
                    f"scaled_dot_product_attention, which pass {_OWN_NAME!r} requires, got "
                    f"{count_attention(gm)}. Let it run after: when='after'."
                )
        return gm

    def run_after(self, gm: fx.GraphModule) -> fx.GraphModule:
        """Run the passes that come after the rewriting, on any variant of a graph."""
        for item in self._after:
            gm = item(gm)
        return gm

    def _check(self) -> None:
        own = GraphPass(
            lambda gm: gm,
            name=_OWN_NAME,
            requires=frozenset({SDPA}),
            ensures=frozenset({FLEX_ATTENTION}),
            breaks=frozenset({SDPA}),
        )
        order = [*self._before, own, *self._after]
        holds = {SDPA}
        broken_by: dict[str, str] = {}
        for at, item in enumerate(order):
            for name in sorted(item.requires - holds):
                raise ValueError(_missing(item, name, order[at + 1 :], broken_by.get(name)))
            broken_by.update(dict.fromkeys(item.breaks & holds, item.name))
            holds = (holds - item.breaks) | item.ensures


def _missing(item: GraphPass, name: str, later: Sequence[GraphPass], broken_by: str | None) -> str:
    text = f"pass {item.name!r} must have {name!r}, which it requires, "
    if broken_by is not None:
        return f"{text}and pass {broken_by!r}, which runs before it, breaks it. Change their order."
    makers = [other.name for other in later if name in other.ensures]
    if makers:
        return f"{text}and pass {makers[0]!r}, which ensures it, runs later. Change their order."
    return f"{text}and no pass before it ensures it. Add one that does."


def _interface(gm: fx.GraphModule) -> tuple[int, int]:
    outputs: Any = gm.graph.output_node().args[0]
    return len(placeholders(gm)), len(outputs) if isinstance(outputs, (tuple, list)) else 1


def _as_text(uuid: Any) -> str:
    return uuid.hex() if isinstance(uuid, bytes) else "" if uuid is None else str(uuid)
