"""What a backend did with each attention call, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from blindsight.attention.base_mask import Tier
from blindsight.report_text import text_of


@dataclass
class Verdict:
    """What became of one attention call of one compiled graph.

    Attributes:
        graph: Number of the graph, in the order in which Dynamo compiled them.
        path: Dotted path of the module, seen from the compiled frame.
        layer: Layer of the profile, or None (not the decoder's, or one graph serves several).
        tier: How much is known of the model's own mask. An expression is evaluated and an opaque
            mask read, element by element, unless it is an input of the graph whose elements turn
            out to be intervals.
        mask: Why it is not known as intervals.
        categories: For example ``"2 DENSE, 6 SINK"``.
        rewritten: Whether prompts with several images run the rewritten call.
        reason: Why the call is, or is not, rewritten.
        own_runs, runs_of_graph: How often it ran: the first counts this call alone, the second
            its whole graph.
        estimate: What ``lowering="auto"`` estimated of the last prompt.
    """

    graph: int
    path: str
    layer: int | None
    tier: Tier
    mask: str
    categories: str
    rewritten: bool
    reason: str
    own_runs: Counter[str] = field(default_factory=Counter)
    runs_of_graph: Counter[str] = field(default_factory=Counter)
    estimate: str = ""

    @property
    def runs(self) -> Counter[str]:
        """How often it ran: sparse, by form and lowering (``"sparse, sorted, fused"``), or dense.

        See :mod:`blindsight.attention.mask_forms` and
        :class:`~blindsight.attention.lowering.Lowering`. A dense run says why.
        """
        return self.own_runs + self.runs_of_graph

    def copy(self) -> Verdict:
        """Return a copy, in which nothing is counted any more."""
        return replace(
            self, own_runs=Counter(self.own_runs), runs_of_graph=Counter(self.runs_of_graph)
        )


@dataclass(frozen=True, repr=False)
class Report:
    """What became of attention: ``print`` shows totals, and a table over layers that are alike.

    Attributes:
        rows: One for each attention call that was compiled, in the order of the graphs.
        missing_layers: Layers of the profile whose attention was not met.
        layers: All layers of the profile that have attention.
    """

    rows: Sequence[Verdict]
    missing_layers: Sequence[int]
    layers: Sequence[int] = ()

    @property
    def num_rewritten(self) -> int:
        return sum(row.rewritten for row in self.rows)

    def __str__(self) -> str:
        return text_of(self)

    __repr__ = __str__
