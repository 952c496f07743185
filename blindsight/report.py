"""What a backend did with each attention call, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from blindsight.attention.base_mask import Tier
from blindsight.text_tables import aligned, compact


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


_HEADER = ("graph", "layer", "attention", "mask", "categories", "verdict", "runs", "estimates")


def _cells(row: Verdict) -> tuple[str, ...]:
    return (
        str(row.graph),
        "-" if row.layer is None else str(row.layer),
        row.path or "(frame)",
        f"tier {row.tier}" + (f": {row.mask}" if row.mask else ""),
        row.categories or "-",
        f"{'rewritten' if row.rewritten else 'left alone'}: {row.reason}",
        "; ".join(f"{count} {how}" for how, count in sorted(row.runs.items())) or "-",
        row.estimate or "-",
    )


@dataclass(frozen=True)
class Report:
    """One row per attention call seen; ``str()`` gives a table.

    Attributes:
        rows: In the order in which graphs were compiled.
        missing_layers: Layers of the profile whose attention was not met.
    """

    rows: Sequence[Verdict]
    missing_layers: Sequence[int]

    @property
    def num_rewritten(self) -> int:
        return sum(row.rewritten for row in self.rows)

    def __str__(self) -> str:
        lines = []
        for (graph, layer, path, *rest), count in Counter(map(_cells, self.rows)).items():
            lines.append((graph, layer, f"{path} (x{count})" if count > 1 else path, *rest))
        table = aligned([_HEADER, *lines])
        if self.missing_layers:
            table += f"\nlayers of the profile not met: {compact(self.missing_layers)}"
        return table
