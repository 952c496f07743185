"""Where the images of a prompt are: the rule against the oracle, on random tokens."""

from dataclasses import replace
from itertools import groupby

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from blindsight import TemplateRule
from blindsight.template import is_all_text, span_edges, template_of_ids
from blindsight.videos import mark_by_positions
from oracles import oracle_template
from strategies import Template, templates

TEXT, IMAGE, PART, START, END, BOTH, LEADING, TRAILING = range(8)
SINK_OFFSETS = (0, 2, 2**20)
TILED = TemplateRule(
    image_token_ids=(IMAGE, PART),
    start_token_ids=(START, BOTH),
    end_token_ids=(END, BOTH),
    sink_offsets=SINK_OFFSETS,
    leading_tile_ids=(LEADING,),
    trailing_tile_ids=(TRAILING,),
)
UNTILED = TemplateRule((IMAGE, PART), (START, BOTH), (END, BOTH), SINK_OFFSETS)
# marks that are delimiters too, as in SmolVLM and MiniCPM-V
DELIMITED = TemplateRule(
    image_token_ids=(IMAGE, PART),
    start_token_ids=(START, BOTH, LEADING, TRAILING),
    end_token_ids=(END, BOTH),
    sink_offsets=SINK_OFFSETS,
    leading_tile_ids=(LEADING,),
    trailing_tile_ids=(TRAILING,),
)

RULES = st.sampled_from([TILED, UNTILED, DELIMITED])
# mostly images, so that runs are long enough for every offset
TOKENS = st.sampled_from([IMAGE, IMAGE, IMAGE, IMAGE, *range(8)])
ROWS = st.integers(1, 60).flatmap(
    lambda length: st.lists(
        st.lists(TOKENS, min_size=length, max_size=length), min_size=1, max_size=2
    )
)


def oracle_of(
    rule: TemplateRule, ids: torch.Tensor, num_frames: tuple[int, ...] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    return oracle_template(
        ids,
        rule.image_token_ids,
        rule.start_token_ids,
        rule.end_token_ids,
        rule.sink_offsets,
        rule.leading_tile_ids,
        rule.trailing_tile_ids,
        rule.video_token_ids,
        num_frames,
    )


@given(rule=RULES, rows=ROWS)
def test_the_rule_equals_its_definition(rule: TemplateRule, rows: list[list[int]]) -> None:
    ids = torch.tensor(rows)
    span_id, is_sink = oracle_of(rule, ids)
    for found in (rule.template(ids).tensors(), template_of_ids(ids, rule.to_json())):
        assert torch.equal(found[0].long(), span_id)
        assert torch.equal(found[1], is_sink)


@given(rule=RULES, rows=ROWS, data=st.data())
def test_tokens_to_come_change_nothing(
    rule: TemplateRule, rows: list[list[int]], data: st.DataObject
) -> None:
    """But for a start delimiter right at the end, whose image is not known yet."""
    ids = torch.tensor(rows)
    length = data.draw(st.integers(1, ids.shape[1]))
    first, whole = rule.template(ids[:, :length]), rule.template(ids)
    is_known = ~torch.isin(ids[:, :length], torch.tensor(rule.start_token_ids))
    is_known[:, :-1] = True
    assert torch.equal(first.span_id[is_known], whole.span_id[:, :length][is_known])


L, T = LEADING, TRAILING


@pytest.mark.parametrize(
    ("rule", "ids", "span_id"),
    [
        # Idefics 3: tiles, then the whole; an image of one; a prompt that ends in a tile
        (DELIMITED, [L, 1, 1, 4, L, 1, 0, L, 1, 0, 3, 1, 4, 3, 1, 4], "1111110110111222"),
        (DELIMITED, [3, 1, 4, 0, L, 1, 0, 0], "11102200"),
        # MiniCPM-V: the whole, then tiles
        (DELIMITED, [3, 1, 1, 4, T, 1, 4, 0, T, 1, 4, 0, 3, 1, 4], "111111101110222"),
        # a tile that has nothing before it; a mark without an image after it
        (DELIMITED, [T, 1, 4, 0, 3, 1, 4, 0, T, 0], "1110222000"),
        # marks that are text, not next to their tile
        (TILED, [L, 0, 1, 0, L, 0, 0, 1, 0, 1, 0, 1], "001000010102"),
        # Aya: the mark of a tile is a word like any other, unless an image has begun
        (TILED, [3, L, 0, 1, L, 1, 0, 1, 4, 0, L, 0, 3, 0, 1, 4, 0, 3, 1], "0001010110000022033"),
    ],
)
def test_tiles_of_an_image_are_one_span(rule: TemplateRule, ids: list[int], span_id: str) -> None:
    found, is_sink = rule.template(torch.tensor([ids])).tensors()
    assert "".join(map(str, found[0].tolist())) == span_id
    expected, sinks = oracle_of(rule, torch.tensor([ids]))
    assert torch.equal(found.long(), expected) and torch.equal(is_sink, sinks)


def video_rule(rule: TemplateRule) -> TemplateRule:
    return replace(rule, video_token_ids=(PART,))


@given(rule=RULES.map(video_rule), rows=ROWS, data=st.data())
def test_frames_of_videos_are_spans(
    rule: TemplateRule, rows: list[list[int]], data: st.DataObject
) -> None:
    # each video token is a few
    ids = torch.tensor(rows).repeat_interleave(torch.where(torch.tensor(rows[0]) == PART, 6, 1), 1)
    runs = [
        len(list(run))
        for row in ids.tolist()
        for is_video, run in groupby(row, lambda token: token == PART)
        if is_video
    ]
    num_frames = tuple(
        data.draw(st.sampled_from([n for n in range(1, length + 1) if length % n == 0]))
        for length in runs
    )
    grid = torch.tensor(
        [[n, 2, 2 * length // n] for n, length in zip(num_frames, runs, strict=True)]
    ).view(-1, 3)
    span_id, is_sink = oracle_of(rule, ids, num_frames)
    found = rule.template(ids, grid)
    assert torch.equal(found.span_id.long(), span_id)
    assert torch.equal(found.is_sink, is_sink)


V = PART


@pytest.mark.parametrize(
    ("ids", "grids", "span_id"),
    [
        ([START, V, V, V, V, END, 0, V, V, V], [[2, 2, 4], [3, 2, 2]], "1112220345"),
        ([START, V, V, V, V, END, 0, V, V, V], [[4, 2, 2], [1, 2, 6]], "1123440555"),
        # runs that are frames, or some of them (sound is between)
        ([START, V, V, END, 0, START, V, V, END], [[2, 2, 4]], "111102222"),
        ([V, V, V, V, 0, V, V, V, V], [[4, 2, 4]], "112203344"),
        ([V, V, V, 0, V, V, V, V, V], [[4, 2, 4]], "112034455"),
        # after an image that nothing divides from it
        ([IMAGE, IMAGE, V, V, V, V], [[2, 2, 4]], "112233"),
        # a part of a video; others: of another size, not there, one too many, none at all
        ([START, V, V], [[2, 4, 4]], "111"),
        ([START, V, V, V, END], [[2, 2, 2]], "11111"),
        ([START, IMAGE, IMAGE, END], [[2, 2, 2]], "1111"),
        ([START, V, V, V, V, END], [[2, 2, 2], [0, 2, 2]], "111111"),
        ([START, V, V, V, V, END], [], "111111"),
        ([START, IMAGE, IMAGE, END], [], "1111"),
    ],
)
def test_videos_that_are_cut_and_that_are_not(
    ids: list[int], grids: list[list[int]], span_id: str
) -> None:
    grid = torch.tensor(grids, dtype=torch.int64).view(-1, 3)
    found = video_rule(UNTILED).template(torch.tensor([ids]), grid)
    assert "".join(map(str, found.span_id[0].tolist())) == span_id


def test_no_video_is_of_two_rows() -> None:
    ids = torch.tensor([[START, V, V, END, 0], [START, V, V, V, V]])
    for grids, cut in (([[1, 2, 4], [2, 2, 4]], True), ([[3, 2, 4]], False)):
        span_id = video_rule(UNTILED).template(ids, torch.tensor(grids)).span_id
        assert span_id.tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 2, 2] if cut else [1] * 5]


@given(
    grids=st.lists(st.tuples(*[st.integers(1, 4)] * 3), min_size=1, max_size=4),
    gap=st.integers(0, 2),
    data=st.data(),
)
def test_positions_tell_what_grids_tell(
    grids: list[tuple[int, int, int]], gap: int, data: st.DataObject
) -> None:
    """Positions as M-RoPE defines them; frames may share their time, as Qwen2.5-VL's do."""
    ids, positions, start = [0], [(0, 0, 0)], 1
    slow = data.draw(st.booleans())
    for frames, height, width in grids:
        ids += [START, *[V] * (frames * height * width), END, *[0] * gap]
        positions.append((start,) * 3)
        corner = start + 1
        positions += [
            (corner + (0 if slow else t), corner + row, corner + column)
            for t in range(frames)
            for row in range(height)
            for column in range(width)
        ]
        start = 1 + max(max(place) for place in positions)
        positions += [(start + at,) * 3 for at in range(gap + 1)]
        start += gap + 1
    rule = video_rule(UNTILED)
    kinds = rule.classify(torch.tensor([ids]))
    position_ids = torch.tensor(positions).T[:, None]
    of_text = torch.arange(len(ids)).expand(4, 1, -1)
    patches = torch.tensor(grids) * torch.tensor([1, 2, 2])
    expected = rule.template(torch.tensor([ids]), patches).span_id
    marked = mark_by_positions(kinds, *position_ids[-2:])
    assert marked is not None
    assert torch.equal(rule.template_of_kinds(marked).span_id, expected)
    longest = max(frames * height * width for frames, height, width in grids)
    assert (mark_by_positions(kinds, *of_text[-2:]) is None) == (longest > 1)


def test_tokens_of_text_share_what_they_are() -> None:
    rule = TemplateRule((3,), (1,), (2,))
    text, image = torch.tensor([[7], [8]]), torch.tensor([[7], [3]])
    shared = rule.shared_kinds(text)
    assert shared is rule.shared_kinds(text + 1) and is_all_text(shared)
    for ids in (text, image, torch.zeros(1, 0, dtype=torch.long), torch.full((4, 9), 3)):
        assert torch.equal(rule.shared_kinds(ids), rule.classify(ids))
        assert is_all_text(rule.classify(ids)) == (not rule.classify(ids).any())
    rule.classify(text).fill_(1)  # which is the caller's
    assert not rule.shared_kinds(text).any()
    others = torch.full((2, 5), 9)
    with FakeTensorMode():
        rule.shared_kinds(others)
    assert type(rule.shared_kinds(others)) is torch.Tensor


def test_video_tokens_are_image_tokens() -> None:
    with pytest.raises(ValueError, match=r"video_token_ids must be among.*got \[9\] beside"):
        TemplateRule(image_token_ids=(1, 2), video_token_ids=(2, 9))


@given(drawn=templates(max_spans=6, max_span=8, max_text=3, text_inside=True))
def test_edges_are_the_first_and_last_token_of_a_span(drawn: Template) -> None:
    first, last = span_edges(drawn.span_id)
    for b, spans in enumerate(drawn.span_id.tolist()):
        for t, span in enumerate(spans):
            if span:
                tokens = [at for at, other in enumerate(spans) if other == span]
                assert (first[b, t], last[b, t]) == (tokens[0], tokens[-1])
