"""A report as text: it fits a terminal, says what happened and why, and what to do about it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from blindsight.report import Report, Verdict
from blindsight.text_tables import aligned

NO_IMAGE = "dense: no query in a second image"
MIXED = "8 DENSE, 4 SINK, 8 DOCUMENT, 8 DOCUMENT_SINK"


def row(graph: int, layer: int | None, **given: Any) -> Verdict:
    fields: dict[str, Any] = {
        "path": "" if layer is None else f"self.layers.{layer}.self_attn",
        "tier": 1,
        "mask": "",
        "categories": MIXED,
        "rewritten": True,
        "reason": "each head keeps what its category keeps",
        "own_runs": Counter({NO_IMAGE: 1} if graph else {"sparse, sorted, split": 1}),
    }
    return Verdict(graph=graph, layer=layer, **{**fields, **given})


def report(rows: list[Verdict], *, missing: tuple[int, ...] = (), num_layers: int = 36) -> str:
    return str(Report(tuple(rows), missing, tuple(range(num_layers))))


def test_many_layers_and_graphs_are_a_few_short_lines() -> None:
    text = report([row(graph, layer) for graph in range(9) for layer in range(36)])
    assert text.splitlines() == [
        "36 of the 36 layers of the profile met, in 9 graphs; each with sparse heads ran 9 times:",
        "     1 sparse",
        f"     8 {NO_IMAGE} (text, a single image, or a decoded token)",
        "",
        "layers  heads                                         runs",
        "------  --------------------------------------------  --------------------------------",
        f"0-35    {MIXED}  1 sparse, sorted, split; 8 dense",
    ]


@pytest.mark.parametrize("num_kinds", [1, 4, 36])
def test_it_fits_100_columns(num_kinds: int) -> None:
    rows = [
        row(
            graph,
            layer,
            tier=1 + layer % 3,
            mask="the value of a very long operation is nothing that can be told in short" * 2,
            categories=f"{layer % num_kinds} DENSE, 8 SINK, 8 DOCUMENT, 8 DOCUMENT_SINK",
            estimate=f"{layer % num_kinds} ms fused, 0.001 ms split, 0.002 ms dense",
        )
        for graph in range(3)
        for layer in range(36)
    ]
    rows.append(row(4, None, path="visual.blocks.3.attn", rewritten=False, reason="x " * 300))
    lines = report(rows, missing=tuple(range(0, 36, 2))).splitlines()
    assert max(map(len, lines)) <= 100
    assert len(lines) < 40 + 2 * num_kinds


def test_layers_that_are_alike_share_a_row() -> None:
    dense = {
        "categories": "28 DENSE",
        "rewritten": False,
        "reason": "all its heads are dense",
        "own_runs": Counter({"dense: all its heads are dense": 1}),
    }
    text = report([row(0, layer, **(dense if layer in (1, 2) else {})) for layer in range(6)])
    assert f"0, 3-5  {MIXED}  1 sparse, sorted, split\n" in text
    assert text.endswith("1-2     28 DENSE                                      1 dense")


def test_layers_that_ran_differently_say_why_themselves() -> None:
    text = report([row(0, 0), row(1, 1)])
    assert "all their attention together ran 2 times:" in text
    assert text.endswith(f"1       {MIXED}  1 {NO_IMAGE}")


def test_a_frame_that_serves_several_layers() -> None:
    text = report([row(0, None, categories="as the layer's")])
    assert "36 of the 36 layers" in text
    assert "several, at one  as the layer's  1 sparse, sorted, split\nframe" in text


def test_what_is_missing_and_what_to_do() -> None:
    text = report([row(0, 0)], missing=(1, 2, 3), num_layers=4)
    assert "1 of the 4 layers of the profile met" in text
    assert "Layers not met: 1-3." in text
    assert "model.compile(backend=backend)" in text
    assert "recompile_limit" in text


def test_masks_estimates_and_what_is_left_alone() -> None:
    known = {"tier": 2, "mask": "a sum is unbounded", "estimate": "1 ms"}
    text = report(
        [
            row(0, 0, **known),
            row(0, 1, **known),
            row(1, None, path="visual.blocks.0.attn", rewritten=False, reason="not the decoder's"),
            row(1, None, path="visual.blocks.1.attn", rewritten=False, reason="not the decoder's"),
        ]
    )
    assert text.endswith(
        "\n\nThe mask of layers 0-1 is evaluated element by element: a sum is unbounded.\n"
        "Estimated of the last prompt, layers 0-1: 1 ms.\n"
        "Left as it is, visual.blocks.*.attn: not the decoder's."
    )


def test_nothing_was_compiled() -> None:
    text = report([], missing=(0, 1))
    assert "No attention was compiled with this backend" in text
    assert "torch.compile(model).generate runs the uncompiled model" in " ".join(text.split())
    assert "model.compile(backend=backend)" in text


def test_a_report_is_shown_as_it_is_printed() -> None:
    shown = Report((row(0, 0),), (), (0,))
    assert repr(shown) == str(shown)


def test_cells_of_several_lines() -> None:
    assert aligned([("a", "b"), ("1\n22", "3")]).splitlines() == ["a   b", "--  -", "1   3", "22"]
