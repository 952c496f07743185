"""The curve and its baselines: masks against plain definitions, costs, resuming, pictures."""

import json
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import blindsight.evaluation.sweep_plot as sweep_plot
import blindsight.evaluation.timing as timing
from blindsight.calibration.selection import select_categories
from blindsight.cli import main
from blindsight.evaluation.baselines import PruningMasking, WindowMasking, shuffled_categories
from blindsight.evaluation.masked_model import MaskedCall
from blindsight.evaluation.prefill import Batch, Decoder
from blindsight.evaluation.sweep_plot import plot_sweep
from blindsight.evaluation.sweep_points import (
    BY_ERROR,
    BY_HEAD,
    BY_LAYER,
    OWN,
    PRUNING,
    RANDOM,
    WINDOW,
    category_plans,
    selection_of,
    spread_budgets,
)
from blindsight.evaluation.sweep_result import Sweep
from blindsight.plots import CATEGORY_COLORS, _spread, plot_masks, plot_profile
from blindsight.profile import Profile
from blindsight.ranks import Ranks
from blindsight.sweep import sweep
from blindsight.template import Template, find_sinks
from models import Image, make_inputs, tiny_model
from processors import tiny_processor
from questions import Watched, rows, samples

NUM_LAYERS, NUM_HEADS = 4, 4
I = Image()  # noqa: E741
PROMPTS = [[3, I, 5, I, I, 7], [2, I, 30, I, 4, Image(2, 5), 2, I, 6]]
PAIRS = [100.0, 10.0, 50.0, 60.0]


def evidence(seed: int = 0) -> dict[str, torch.Tensor]:
    """Errors that fall with what a category keeps."""
    generator = torch.Generator().manual_seed(seed)
    largest = torch.rand(NUM_LAYERS, NUM_HEADS, 1, generator=generator)
    error = largest * torch.tensor([0.0, 1.0, 0.7, 0.4])
    return {"error": error, "pairs": torch.tensor(PAIRS).expand_as(error).contiguous()}


def model_and_profile(family: str = "qwen2_5_vl") -> tuple[Any, Profile]:
    model = tiny_model(family, num_layers=NUM_LAYERS)
    bare = Profile.for_model(model, "dense")
    found = Profile(
        bare.categories, rule=bare.rule, fingerprint=bare.fingerprint, evidence=evidence()
    )
    return model, found


def decoder_and_batch(family: str = "qwen2_5_vl", prompts: Any = PROMPTS) -> tuple[Decoder, Batch]:
    model, profile = model_and_profile(family)
    decoder = Decoder(model, profile)
    side = "left" if len(prompts) > 1 else None
    return decoder, decoder.prepare(make_inputs(family, prompts, pad_side=side))


def run(**options: Any) -> Sweep:
    model, profile = model_and_profile()
    given = options.pop("given", None)
    options = {"num_points": 5, "num_seeds": 2, "batch_size": 4, **options}
    return sweep(
        model, tiny_processor(), samples(9) if given is None else given, profile, **options
    )


@pytest.fixture(scope="module")
def curve() -> Sweep:
    return run()


def base_masks(decoder: Decoder, batch: Batch) -> dict[int, torch.Tensor]:
    found: dict[int, torch.Tensor] = {}

    class Record:
        def head_masks(self, call: MaskedCall) -> Any:
            found[call.layer] = call.base
            return [(None, None)]

    decoder.prefill(batch, Record())  # type: ignore[arg-type]
    return found


# The curve.


def test_costs_fall_as_the_knob_is_turned(curve: Sweep) -> None:
    points = sorted(curve.series(BY_HEAD), key=lambda point: point.knob)
    costs = [point.summary.attention_flops for point in points]
    assert len(points) >= 4
    assert curve.dense.attention_flops > costs[0]
    assert costs == sorted(costs, reverse=True) and len(set(costs)) == len(costs)
    # everything sparse at last: the cheapest category in every head
    assert points[-1].heads == {"DENSE": 0, "SINK": 16, "DOCUMENT": 0, "DOCUMENT_SINK": 0}
    for point in points:
        assert 0 < curve.attention_share(point) < curve.decoder_share(point) < 1


def test_budgets_spread_costs_evenly() -> None:
    found = evidence()
    select = selection_of(model_and_profile()[1])
    budgets = spread_budgets(found, select, 5)
    pairs = [
        float(found["pairs"].gather(2, select(found, budget).long()[..., None]).sum())
        for budget in budgets
    ]
    assert pairs[0] == 1600 and pairs[-1] == 160
    for cost, wanted in zip(pairs, (1600, 1240, 880, 520, 160), strict=True):
        assert wanted - 100 < cost <= wanted
    with pytest.raises(ValueError, match="num_points must be at least 2, got 1"):
        spread_budgets(found, select, 1)


def test_given_budgets_are_answered_and_equal_points_are_one() -> None:
    found = run(budgets=[0.0, 1e9, 1e10], baselines=False)
    assert [(point.series, point.knob) for point in found.points] == [(BY_HEAD, 1e9)]


def test_the_profile_that_was_given_is_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, profile = model_and_profile()
    given = profile.with_categories("sink")  # the sparsest of the curve
    options: dict[str, Any] = {"budgets": [1e9], "baselines": False, "batch_size": 4}
    path = tmp_path / "answers.jsonl"
    found = sweep(model, tiny_processor(), samples(4), given, checkpoint=path, **options)
    own, curve = found.points
    assert (own.series, curve.series) == (OWN, BY_HEAD) and own.summary == curve.summary
    assert len(path.read_text().splitlines()) == 1 + 2 * 4 + 1  # it is answered once
    drawn = []
    monkeypatch.setattr(sweep_plot, "plot_curves", lambda panels, *_, **__: drawn.extend(panels))
    plot_sweep(found, tmp_path / "sweep.png")
    share = 100 * found.attention_share(own)
    assert [panel.marks for panel in drawn[1:]] == [
        [(share, 100 * own.summary.scores[1].worst.value)],
        [(share, own.summary.kl_mean)],
    ]
    assert "| as given" in str(found) and "| budget" in str(found) and "|  |" not in str(found)


def test_the_criterion_is_that_of_calibration() -> None:
    _, profile = model_and_profile()
    other = {**evidence(), "lost_mass": evidence(1)["error"]}
    noted = {"criterion": "attention_mass", "allocation": "global", "budget": "0.1"}
    marked = Profile(
        profile.categories,
        rule=profile.rule,
        fingerprint=profile.fingerprint,
        evidence=other,
        calibration=noted,
    )
    expected = select_categories(other, 0.3, criterion="attention_mass", allocation="global")
    assert torch.equal(selection_of(marked)(other, 0.3), expected)
    assert not torch.equal(expected, selection_of(profile)(other, 0.3))


def test_a_refined_profile_is_compared_with_its_own_errors() -> None:
    _, profile = model_and_profile()
    noted = {"criterion": "next_token", "allocation": "per_head"}
    both = {**evidence(), "effect": evidence(1)["error"] / 100}
    refined = replace(profile, evidence=both, calibration=noted)
    select = selection_of(refined)
    budgets = spread_budgets(both, select, 4)
    plans = category_plans(refined, budgets, select, 0, True)
    found = [plan for plan in plans if plan.series == BY_ERROR]
    assert len(found) >= 3
    for plan in found:
        assert plan.categories is not None
        assert torch.equal(
            plan.categories, select_categories(both, plan.knob, criterion="output_error")
        )
    assert not any(
        plan.series == BY_ERROR
        for plan in category_plans(profile, budgets, selection_of(profile), 0, True)
    )


def test_layers_alike_are_alike() -> None:
    seen = []
    plans = category_plans(
        model_and_profile()[1], [0.2, 0.5], selection_of(model_and_profile()[1]), 1, True
    )
    for plan in plans:
        assert plan.categories is not None
        if plan.series == BY_LAYER:
            assert all(len(set(row)) == 1 for row in plan.categories.tolist())
            seen.append(plan.categories.tolist())
        elif plan.series == BY_HEAD:
            assert any(len(set(row)) > 1 for row in plan.categories.tolist())
    mean = evidence()["error"].mean(1)
    expected = [[1 if row[1] <= 0.5 else 2 if row[2] <= 0.5 else 3] * 4 for row in mean.tolist()]
    assert expected in seen


def test_random_points_have_the_density_of_their_point(curve: Sweep) -> None:
    by_knob = {point.knob: point for point in curve.series(BY_HEAD)}
    draws = curve.series(RANDOM)
    assert {point.seed for point in draws} == {0, 1}
    for point in draws:
        other = by_knob[point.knob]
        assert point.heads == other.heads
        assert point.summary.attention_flops == other.summary.attention_flops
    assert len({point.key for point in draws}) > len(draws) / 2


def test_shuffling_is_seeded_and_keeps_counts() -> None:
    categories = torch.arange(24).view(4, 6).remainder(4).to(torch.uint8)
    layers = range(len(categories))
    first, again, other = (shuffled_categories(categories, layers, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(first.flatten().bincount(), categories.flatten().bincount())
    assert not torch.equal(first, categories)


def test_all_series_are_there_and_cost_about_the_same(curve: Sweep) -> None:
    series = (BY_HEAD, BY_LAYER, RANDOM, WINDOW, PRUNING)
    assert {point.series for point in curve.points} == set(series)
    costs = sorted(curve.attention_share(point) for point in curve.series(BY_HEAD))
    for name in (WINDOW, PRUNING):
        points = sorted(curve.series(name), key=lambda point: point.knob)
        assert [point.knob for point in points] == pytest.approx(costs)
        for point in points:
            # at most what was asked for, and a token less would be clearly less
            assert point.knob - 0.03 < curve.attention_share(point) <= point.knob
    assert [point.series for point in run(baselines=False).points] == [BY_HEAD] * 4


# StreamingLLM's mask.


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_window_masks_are_those_of_the_definition(family: str) -> None:
    prompts = PROMPTS if family != "gemma3" else [PROMPTS[0], [2, I, 30, I, 4, I, 2, I, 6]]
    decoder, batch = decoder_and_batch(family, prompts)
    masks = WindowMasking(0.5, num_sinks=3).masks(batch.prompt)
    bases = base_masks(decoder, batch)
    dense = sum(int((base[:, 0] & batch.prompt.valid[:, :, None]).sum()) for base in bases.values())
    total = 0
    windows: list[int] = masks.window.tolist()  # type: ignore[attr-defined]
    for layer, base in bases.items():
        queries = torch.zeros(2, NUM_HEADS, base.shape[2], 8)
        call = MaskedCall(layer, queries, queries, queries, base, 1.0, base.shape[3])
        (mask,) = masks.head_masks(call)
        assert mask.heads is None and mask.keep is not None
        for b, window in enumerate(windows):
            begin = int((~batch.prompt.valid[b]).sum())
            for q in range(begin, base.shape[2]):
                for k in range(begin, base.shape[3]):
                    kept = k - begin < 3 or q - k < window
                    assert bool(mask.keep[b, q, k]) == kept
                    total += kept and bool(base[b, 0, q, k])
    assert int(masks.count_pairs().sum()) == NUM_HEADS * total
    assert total <= 0.5 * dense


def test_the_window_is_the_longest_that_fits() -> None:
    _, batch = decoder_and_batch()
    masks: Any = WindowMasking(0.4).masks(batch.prompt)
    limit = 0.4 * batch.prompt.visible[:, :, 0].sum(0)
    assert bool((masks._pairs_of_head(masks.window) <= limit).all())
    assert bool((masks._pairs_of_head(masks.window + 1) > limit).all())
    everything: Any = WindowMasking(1.0).masks(batch.prompt)
    assert everything.count_pairs().tolist() == (4 * batch.prompt.visible[:, :, 0].sum(0)).tolist()


def test_a_window_of_everything_is_dense_and_a_short_one_is_not() -> None:
    decoder, batch = decoder_and_batch()
    dense = decoder.prefill(batch, None).logits
    whole = decoder.prefill(batch, WindowMasking(1.0).masks(batch.prompt)).logits
    torch.testing.assert_close(whole, dense)
    short = decoder.prefill(batch, WindowMasking(0.3).masks(batch.prompt)).logits
    assert float((short - dense).abs().max()) > 1e-2


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
@pytest.mark.parametrize("masking", [WindowMasking(0.4), PruningMasking(0.6)])
@pytest.mark.parametrize("seed", range(4))
def test_baselines_go_on_in_decoding(family: str, masking: Any, seed: int) -> None:
    """As one prefill of the whole sequence under the same masks gives, at every token."""
    model, profile = model_and_profile(family)
    decoder = Decoder(model, profile)
    batch = decoder.prepare(make_inputs(family, [[2, I, 30, I, 4, I, 2, I, 6]], seed=seed))
    masks: Any = masking.masks(batch.prompt)
    output = decoder.prefill(batch, masks, use_cache=True)
    tokens = decoder.decode(batch, masks, output, max_new_tokens=8, stop_ids=[])
    for number in range(1, 8):
        longer = dict(batch.inputs)
        for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0), ("token_type_ids", 0)):
            if name in longer:
                added = torch.full((1, number), value, dtype=longer[name].dtype)
                longer[name] = torch.cat([longer[name], added], dim=1)
        longer["input_ids"] = torch.cat([longer["input_ids"], tokens[:, :number]], dim=1)
        whole = decoder.prepare(longer)
        same: Any = masking.masks(whole.prompt)
        if isinstance(masking, WindowMasking):
            same.window = masks.window
        else:
            same._dropped = torch.nn.functional.pad(masks._dropped, (0, number))
        expected = decoder.prefill(whole, same).logits.argmax(-1)
        assert expected.tolist() == tokens[:, number].tolist()


# FastV's rule.


@pytest.mark.parametrize("share", [0.95, 0.9, 0.85, 0.8])
def test_dropped_tokens_are_those_of_the_definition(share: float) -> None:
    decoder, batch = decoder_and_batch(prompts=PROMPTS[1:])
    masks: Any = PruningMasking(share).masks(batch.prompt)
    decoder.prefill(batch, masks)
    model = tiny_model("qwen2_5_vl", num_layers=NUM_LAYERS, attn_implementation="eager")
    with torch.no_grad():
        attentions = model(**batch.inputs, output_attentions=True).attentions
    weights = attentions[1][0].mean(0)[-1]  # of the second layer, from the last token
    image = batch.prompt.is_image[0].nonzero().flatten().tolist()
    number = int(masks.num_dropped[0])
    assert 0 < number < len(image)
    expected = sorted(sorted(image, key=lambda at: float(weights[at]))[:number])
    dropped = masks._dropped_tokens[0].nonzero().flatten().tolist()
    assert dropped == expected
    num_tokens = batch.prompt.valid.shape[1]
    kept = num_tokens - number
    causal, late = num_tokens * (num_tokens + 1) // 2, kept * (kept + 1) // 2
    assert int(masks.count_pairs()) == NUM_HEADS * (2 * causal + 2 * late)
    assert int(masks.count_rows()) == 2 * num_tokens + 2 * kept
    assert 2 * causal + 2 * late <= share * 4 * causal
    more = (kept + 1) * (kept + 2) // 2
    assert 2 * causal + 2 * more > share * 4 * causal


def test_masked_tokens_are_as_good_as_removed() -> None:
    """Logits are those of a decoder whose later layers never get the dropped tokens."""
    decoder, batch = decoder_and_batch(prompts=PROMPTS[1:])
    masks: Any = PruningMasking(0.8).masks(batch.prompt)
    found = decoder.prefill(batch, masks).logits
    text: Any = decoder.decoder
    hidden = batch.decoder_inputs["inputs_embeds"]
    cosines, sines = text.rotary_emb(hidden, batch.decoder_inputs["position_ids"])
    kept = ~masks._dropped_tokens[0]
    with torch.no_grad():
        for number, layer in enumerate(text.layers):
            if number == 2:
                hidden, cosines, sines = hidden[:, kept], cosines[..., kept, :], sines[..., kept, :]
            causal = torch.ones(hidden.shape[1], hidden.shape[1]).tril().bool()[None, None]
            hidden = layer(hidden, attention_mask=causal, position_embeddings=(cosines, sines))
        expected = decoder.head(text.norm(hidden)[:, -1])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert float((found - decoder.prefill(batch, None).logits).abs().max()) > 1e-2


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_pruned_pairs_are_those_of_the_masks(family: str) -> None:
    prompts = PROMPTS if family != "gemma3" else [PROMPTS[0], [2, I, 30, I, 4, I, 2, I, 6]]
    decoder, batch = decoder_and_batch(family, prompts)
    masks: Any = PruningMasking(0.8).masks(batch.prompt)
    decoder.prefill(batch, masks)
    kept = batch.prompt.valid & ~masks._dropped_tokens
    total = torch.zeros(2, dtype=torch.int64)
    for layer, base in base_masks(decoder, batch).items():
        rows_, keys = (kept, kept) if layer >= 2 else (batch.prompt.valid,) * 2
        total += (base[:, 0] & rows_[:, :, None] & keys[:, None]).sum((1, 2))
    assert masks.count_pairs().tolist() == (NUM_HEADS * total).tolist()
    assert bool((masks.num_dropped > 0).all())


def test_text_and_delimiters_are_never_dropped() -> None:
    decoder, batch = decoder_and_batch()
    masks: Any = PruningMasking(0.0).masks(batch.prompt)
    decoder.prefill(batch, masks)
    assert torch.equal(masks._dropped_tokens, batch.prompt.is_image)
    with pytest.raises(ValueError, match=r"num_layers must be 1\.\.3, .* got 4"):
        PruningMasking(0.5, num_layers=4).masks(batch.prompt)
    with pytest.raises(ValueError, match="after the prefill"):
        PruningMasking(0.5).masks(batch.prompt).count_pairs()


# Going on, and what is written.


def test_an_interrupted_sweep_goes_on_to_the_same_files(curve: Sweep, tmp_path: Path) -> None:
    options: dict[str, Any] = {"checkpoint": tmp_path / "answers.jsonl", "batch_size": 1}
    whole = run(batch_size=1)
    with pytest.raises(KeyboardInterrupt):
        run(given=Watched(samples(9), stop_at=8), **options)
    known = len((tmp_path / "answers.jsonl").read_text().splitlines())
    assert known > 8 * 10
    second = Watched(samples(9))
    found = run(given=second, **options)
    assert found.points == whole.points and found.dense == whole.dense
    assert second.opened[0] == 8  # what was answered is not opened for the first pass
    third = Watched(samples(9), stop_at=0)
    assert run(given=third, **options).to_json() == found.to_json()
    assert third.opened == []


def test_results_survive_json_and_markdown_has_all_series(curve: Sweep, tmp_path: Path) -> None:
    curve.save(tmp_path)
    assert Sweep.from_json((tmp_path / "sweep.json").read_text()) == curve
    text = (tmp_path / "sweep.md").read_text()
    for name in (BY_HEAD, BY_LAYER, RANDOM, WINDOW, PRUNING):
        assert f"**{name}**" in text
    for number in ("2309.17453", "2403.06764"):
        assert number in text
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.endswith("|")


def test_points_are_timed_on_request() -> None:
    found = run(budgets=[0.3, 1e9], baselines=False, repeats=1, inner="eager")
    assert all(point.timing is not None for point in found.points)
    assert "prefill" in found.to_markdown() == str(found)


def test_of_several_processes_the_first_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one measures nothing, and has the numbers of the first."""
    found = timing.Timing(9, "decoder", "eager", (2.0,), (1.0,), ("sparse",), 0.0, 0.0)

    class Second(Ranks):
        def on_first(self, work: Any) -> Any:
            return found

    monkeypatch.setattr(timing, "current_ranks", lambda: Second(1, 2))
    points = run(budgets=[0.3, 1e9], baselines=False, repeats=1, inner="eager").points
    assert [point.timing for point in points] == [found, found]
    assert found.ratio == 0.5


def test_pictures_are_drawn(curve: Sweep, tmp_path: Path) -> None:
    plot_sweep(curve, tmp_path / "sweep.png")
    plot_profile(model_and_profile()[1], tmp_path / "heads.png")
    plot_profile(model_and_profile()[1], tmp_path / "heads.svg")
    span_id = torch.tensor([[0, 1, 1, 0, 2, 2, 2, 0]], dtype=torch.int32)
    plot_masks(Template(span_id, find_sinks(span_id, (0,))), tmp_path / "masks.png")
    for name in ("sweep.png", "heads.png", "masks.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert len(set(CATEGORY_COLORS.values())) == 4
    with pytest.raises(ValueError, match=r"must end in one of .*png.*got 'xyz'"):
        plot_sweep(curve, tmp_path / "sweep.xyz")


def test_labels_never_overlap() -> None:
    sizes = [0.1, 0.2, 0.1, 0.1]
    for wanted in ([0.5, 0.5, 0.5, 0.5], [0.0, 0.9, 1.0, 1.0], [0.1, 0.4, 0.7, 0.95]):
        places = _spread(wanted, sizes)
        order = sorted(range(4), key=lambda at: places[at])
        for before, after in pairwise(order):
            gap = places[after] - places[before]
            assert gap >= (sizes[before] + sizes[after]) / 2 - 1e-9
        assert max(places) <= 1.0


# The command, and bad input.


def test_the_command_writes_tables_and_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, profile = model_and_profile()
    model.save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "model")
    profile.save(tmp_path / "profile.safetensors")
    with open(tmp_path / "data.jsonl", "w") as file:
        for at, row in enumerate(rows(3)):
            for number, image in enumerate(row["images"]):
                image.save(tmp_path / f"{at}-{number}.png")
            names = [f"{at}-{number}.png" for number in range(len(row["images"]))]
            file.write(json.dumps({**row, "images": names}) + "\n")
    options = {
        "model": tmp_path / "model",
        "profile": tmp_path / "profile.safetensors",
        "data": tmp_path / "data.jsonl",
        "out": tmp_path / "out",
        "points": 3,
        "seeds": 1,
    }
    arguments = [str(x) for name, value in options.items() for x in (f"--{name}", value)]
    assert main(["sweep", *arguments]) == 0
    out = tmp_path / "out"
    said = f"saved to {out / 'sweep.json'}, {out / 'sweep.md'} and {out / 'sweep.png'}\n"
    assert capsys.readouterr().out == f"{(out / 'sweep.md').read_text()}\n{said}"
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["answers.jsonl", "sweep.json", "sweep.md", "sweep.png"]
    heads = tmp_path / "heads.png"
    assert main(["show", str(options["profile"]), "--plot", str(heads)]) == 0
    assert heads.exists()


def test_a_missing_matplotlib_is_said_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    missing = str(tmp_path / "none")
    arguments = ["sweep", "--model", missing, "--profile", missing, "--data", missing]
    assert main(arguments) == 2
    assert "blindsight[viz]" in capsys.readouterr().err
    assert main([*arguments, "--no-plot"]) == 2
    assert "none" in capsys.readouterr().err


def test_a_profile_without_evidence_is_named() -> None:
    model, _ = model_and_profile()
    with pytest.raises(ValueError, match=r"evidence of its calibration, .* got no error, pairs"):
        sweep(model, tiny_processor(), samples(2), Profile.for_model(model, "sink"))
