"""What is known of a graph before it runs: :mod:`blindsight.runtime.planner` finds it out.

Shapes: B batch, H query heads, Q and K lengths in tokens, D head dim.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import fx

from blindsight.passes.find_attention import Attention
from blindsight.passes.graph import fake_tensor
from blindsight.passes.lift_mask import Lifted
from blindsight.profile import Profile
from blindsight.report import Verdict
from blindsight.runtime.sizes import compiled_sizes, expression_of

DENSE_HEADS = "all its heads are dense"


@dataclass(frozen=True)
class PlannedCall:
    """An attention call of the decoder, what its mask is, and its row of the report."""

    attention: Attention
    layer: int | None  # None: told per call by the parameters
    lifted: Lifted
    verdict: Verdict


@dataclass(frozen=True)
class CacheInputs:
    """Where a graph finds and leaves the keys of one cache (see ``KeyCache``), by position.

    ``has_new`` says that what is found holds the call's own keys already: a frame that Dynamo
    resumed after the cache was updated. ``call`` is the number of a call that attends to them,
    or, if they are not ``is_read``, to those that it writes there.
    """

    before: int | None = None
    has_new: bool = False
    after: tuple[int, ...] = ()
    length: int | None = None
    in_place: bool = False
    is_read: bool = True
    call: int = field(default=0, compare=False)


class KeptKeys(NamedTuple):
    """Positions of the tensors that hold the caches' keys after a graph has run.

    Attributes:
        left: Outputs that hold them.
        written: Inputs that hold them, then.
        calls: For both in turn: a call that attends to them.
        befores: For both in turn: the input that held what was in the cache before, or None.
        found: Inputs that hold keys of the graph's own tokens when it begins.
    """

    left: tuple[int, ...]
    written: tuple[int, ...]
    calls: tuple[int, ...]
    befores: tuple[int | None, ...]
    found: tuple[int, ...]


class Sizes(NamedTuple):
    """Sizes of a graph's attention in one call.

    Attributes:
        batch: B.
        num_queries: Q of the first attention call.
        num_keys: The largest K.
        see_all: Whether each attention call has at least as many keys as any has queries: where
            some have fewer, tokens were dropped on the way, or keys are of something else.
    """

    batch: int
    num_queries: int
    num_keys: int
    see_all: bool


@dataclass
class Plan:
    """What is known of a graph before it runs.

    Attributes:
        gm: A copy of the graph, to be copied again for each variant that is compiled.
        profile: The user's; of a tensor-parallel rank, the rows of its heads.
        calls: The decoder's attention that may be rewritten.
        problem: Why the profile cannot be applied (strict), or None.
        input_ids_at: Position of the input that shows the prompt's tokens, or None.
        embeds_other_tokens: Whether the graph makes other tokens of these, and runs on them.
        video_grid_at, position_ids_at: Positions of inputs that show the frames of its videos, or
            None.
        runs_head: Whether the graph computes logits: when it runs, the decoder has run.
        caches: Those of its layers. The first tells the sequence's history.
        symbols: Positions of the inputs that are symbolic sizes, by symbol.
        runs: How often all calls ran dense, by reason.
        numbers: Positions of the inputs that are floats in the shape of 0-d tensors, by the name
            of the node that reads them: what Dynamo makes of a float that varies.
    """

    gm: fx.GraphModule
    profile: Profile
    calls: list[PlannedCall] = field(default_factory=list)
    problem: str | None = None
    input_ids_at: int | None = None
    embeds_other_tokens: bool = False
    video_grid_at: int | None = None
    position_ids_at: int | None = None
    runs_head: bool = False
    caches: tuple[CacheInputs, ...] = ()
    symbols: dict[object, int] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)
    runs: Counter[str] = field(default_factory=Counter)
    _functions: dict[object, Callable[..., int]] = field(default_factory=dict, repr=False)

    @property
    def shows_prompt(self) -> bool:
        """Whether an input says something of the prompt's images."""
        shown = (self.input_ids_at, self.video_grid_at, self.position_ids_at)
        return any(at is not None for at in shown)

    @property
    def cache(self) -> CacheInputs:
        """The cache that stands for all."""
        return self.caches[0] if self.caches else CacheInputs()

    @cached_property
    def repeats_layers(self) -> bool:
        """Whether a layer attends twice: it is not known whose tokens are whose."""
        layers = [call.layer for call in self.calls if call.layer is not None]
        return len(set(layers)) < len(layers)

    @cached_property
    def kept_keys(self) -> KeptKeys:
        left = [(at, cache) for cache in self.caches for at in cache.after]
        inputs = [(cache.before, cache) for cache in self.caches if cache.before is not None]
        written = [(at, cache) for at, cache in inputs if cache.in_place]
        return KeptKeys(
            left=tuple(at for at, _ in left),
            written=tuple(at for at, _ in written),
            calls=tuple(cache.call for _, cache in (*left, *written)),
            befores=tuple(cache.before for _, cache in (*left, *written)),
            found=tuple(at for at, cache in inputs if cache.has_new),
        )

    @property
    def device(self) -> torch.device:
        query = fake_tensor(self.calls[0].attention.query)
        return torch.device("cpu") if query is None else query.device

    @property
    def dtype(self) -> torch.dtype:
        query = fake_tensor(self.calls[0].attention.query)
        return torch.float32 if query is None else query.dtype

    def size_of(self, args: Sequence[Any]) -> Callable[[int | torch.SymInt], int]:
        """Return the function that gives the graph's sizes their values for these inputs."""
        values = [args[at] for at in self.symbols.values()]
        return lambda size: self._function_of(size)(*values)

    @property
    def query_sizes(self) -> tuple[int | torch.SymInt, int | torch.SymInt]:
        """B and Q of the graph's first attention call, as the graph knows them."""
        batch, _, num_queries, _ = _shape(self.calls[0].attention.query)
        return batch, num_queries

    def sizes(self, args: Sequence[Any]) -> Sizes:
        """Return the sizes of the graph's attention for these inputs."""
        batch, *lengths = self._sizes(*[args[at] for at in self.symbols.values()])
        num_queries = len(self._lengths[0])
        queries, keys = lengths[:num_queries], lengths[num_queries:]
        return Sizes(batch, queries[0], max(keys), min(keys) >= max(queries))

    @cached_property
    def _lengths(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Every Q that there is, the first call's first, and every K, once."""
        lengths = [tuple(map(expression_of, call.attention.lengths)) for call in self.calls]
        queries, keys = (tuple(dict.fromkeys(each)) for each in zip(*lengths, strict=True))
        return queries, keys

    @cached_property
    def _sizes(self) -> Callable[..., Sequence[int]]:
        """A function of the symbols' values: B, and these lengths."""
        batch, _ = self.query_sizes
        queries, keys = self._lengths
        return compiled_sizes([expression_of(batch), *queries, *keys], list(self.symbols))

    def _function_of(self, size: int | torch.SymInt) -> Callable[..., int]:
        """Return a size as a function of the symbols' values; substituting takes long."""
        expression = expression_of(size)
        if expression not in self._functions:
            sizes = compiled_sizes([expression], list(self.symbols))
            self._functions[expression] = lambda *values: sizes(*values)[0]
        return self._functions[expression]


def _shape(node: fx.Node) -> Sequence[int | torch.SymInt]:
    tensor = fake_tensor(node)
    if tensor is None:
        raise ValueError(f"node {node} must be a tensor with a known shape, and Dynamo gave none.")
    return tensor.shape
