"""Evaluation: explicit masks against the reference, compiled against explicit, costs, statistics,
resuming, and what a user sees of bad input."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import blindsight.evaluate as evaluation
import blindsight.evaluation.timing as timing
from blindsight.backend import blindsight_backend
from blindsight.calibration.measure import measure
from blindsight.categories import HeadCategory
from blindsight.cli import main
from blindsight.cost import attention_flops
from blindsight.data.processors import model_inputs
from blindsight.data.rows import Sample
from blindsight.data.samples import load_samples
from blindsight.evaluate import Evaluation, evaluate
from blindsight.evaluation.answering import divergence
from blindsight.evaluation.bootstrap import Estimate, mean_over_tasks, paired_differences, share
from blindsight.evaluation.compiled_decoder import CompiledDecoder, check_distance
from blindsight.evaluation.masked_model import (
    EVERYTHING,
    HeadMask,
    MaskedCall,
    ProfileMasking,
    masked,
)
from blindsight.evaluation.outcomes import Outcome, OutcomeFile
from blindsight.evaluation.prefill import Batch, Decoder
from blindsight.evaluation.summary import summarize
from blindsight.evaluation.timing import time_prefill
from blindsight.profile import Profile
from blindsight.reference import kept_pairs, reference_logits
from blindsight.runtime.context import BlindsightWarning
from blindsight.runtime.inner import name_for_files
from models import FAMILIES, Image, make_inputs, tiny_model
from processors import tiny_processor
from questions import Watched, rows, samples

CATEGORIES = [[0, 1, 2, 3], [3, 2, 1, 1]]
I = Image()  # noqa: E741
PROMPTS = [[3, I, 5, I, I, 7], [2, I, 30, I, 4, I, 2, I, 6]]


def model_and_profile(family: str = "qwen2_5_vl", categories: Any = None) -> tuple[Any, Profile]:
    model = tiny_model(family)
    return model, Profile.for_model(model, CATEGORIES if categories is None else categories)


def decoder_and_batch(
    family: str = "qwen2_5_vl", prompts: Any = PROMPTS
) -> tuple[Decoder, Batch, Profile]:
    model, profile = model_and_profile(family)
    decoder = Decoder(model, profile)
    return decoder, decoder.prepare(make_inputs(family, prompts, pad_side="left")), profile


def run(number: int = 6, **options: Any) -> Evaluation:
    model, profile = model_and_profile()
    given = options.pop("given", None)
    options = {"repeats": 0, "batch_size": 3, **options}
    questions = samples(number) if given is None else given
    return evaluate(model, tiny_processor(), questions, profile, **options)


# What runs.


@pytest.mark.parametrize("family", FAMILIES)
def test_explicit_masks_are_those_of_the_reference(family: str) -> None:
    decoder, batch, profile = decoder_and_batch(family)
    masks = ProfileMasking(profile.categories).masks(batch.prompt)
    found = decoder.prefill(batch, masks).logits
    expected = reference_logits(decoder.model, batch.inputs, profile)[:, -1]
    dense = decoder.prefill(batch, None).logits
    unit = torch.finfo(torch.float32).eps * float(expected.abs().max())
    assert float((found - expected).abs().max()) < 16 * unit
    assert float((found - dense).abs().max()) > 1e4 * unit  # or the masks would not matter


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_compiled_equals_explicit_within_rounding(family: str) -> None:
    decoder, batch, profile = decoder_and_batch(family)
    compiled = CompiledDecoder(decoder, profile, inner="eager")
    exact_model = copy.deepcopy(decoder.model).double()
    exact = reference_logits(
        exact_model,
        {k: v.double() if v.dtype == torch.float32 else v for k, v in batch.inputs.items()},
        profile,
    )[:, -1]
    masks = ProfileMasking(profile.categories).masks(batch.prompt)
    explicit = decoder.prefill(batch, masks).logits
    found = compiled.prefill(batch, dense=False).logits
    rounding = float((explicit - exact).abs().max())
    unit = torch.finfo(torch.float32).eps * float(exact.abs().max())
    assert float((found - exact).abs().max()) <= 2 * rounding + unit
    dense = compiled.prefill(batch, dense=True).logits
    torch.testing.assert_close(dense, decoder.prefill(batch, None).logits)


def test_both_engines_give_the_same_table() -> None:
    explicit = run(6, max_new_tokens=2)
    compiled = run(6, max_new_tokens=2, engine="compiled", inner="eager")
    assert compiled.sparse.kl_mean == pytest.approx(explicit.sparse.kl_mean, rel=1e-3)
    for one, other in ((explicit.dense, compiled.dense), (explicit.sparse, compiled.sparse)):
        assert (one.accuracy, one.attention_flops) == (other.accuracy, other.attention_flops)
        assert one.num_changed == other.num_changed


def test_a_dense_profile_changes_nothing() -> None:
    model, profile = model_and_profile(categories="dense")
    found = evaluate(model, tiny_processor(), samples(6), profile, repeats=0)
    assert found.sparse == found.dense
    assert found.sparse.num_changed == 0
    assert found.sparse.kl_max == 0.0
    assert found.sparse.difference.mean == found.sparse.difference.worst == Estimate(0, 0, 0)


def test_masks_that_keep_everything_are_dense_to_the_bit() -> None:
    decoder, batch, profile = decoder_and_batch()

    class All:
        def head_masks(self, call: MaskedCall) -> list[HeadMask]:
            return [HeadMask([0, 2], torch.ones(1, 1, 1).bool()), HeadMask([1, 3], None)]

    found = decoder.prefill(batch, All()).logits  # type: ignore[arg-type]
    torch.testing.assert_close(found, decoder.prefill(batch, None).logits, rtol=0, atol=1e-6)
    dense = ProfileMasking(torch.zeros_like(profile.categories)).masks(batch.prompt)
    assert torch.equal(decoder.prefill(batch, dense).logits, decoder.prefill(batch, None).logits)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_decoding_is_that_of_generate(family: str) -> None:
    decoder, batch, _ = decoder_and_batch(family)
    output = decoder.prefill(batch, None, use_cache=True)
    found = decoder.decode(batch, None, output, max_new_tokens=4, stop_ids=[])
    model: Any = decoder.model
    expected = model.generate(**batch.inputs, max_new_tokens=4, do_sample=False)[:, -4:]
    assert found.tolist() == expected.tolist()


def test_decoding_ends_when_all_rows_have_stopped() -> None:
    decoder, batch, _ = decoder_and_batch()
    output = decoder.prefill(batch, None, use_cache=True)
    firsts = output.logits.argmax(-1).tolist()
    found = decoder.decode(batch, None, output, max_new_tokens=9, stop_ids=firsts)
    assert found.tolist() == [[first] for first in firsts]


def test_sparse_decoding_goes_on_from_the_sparse_cache() -> None:
    """Decoded rows are text, so the whole sequence in one prefill gives the same tokens."""
    decoder, batch, profile = decoder_and_batch(prompts=PROMPTS[:1])
    masks = ProfileMasking(profile.categories).masks(batch.prompt)
    output = decoder.prefill(batch, masks, use_cache=True)
    tokens = decoder.decode(batch, masks, output, max_new_tokens=4, stop_ids=[])
    longer = dict(batch.inputs)
    for name, added in (
        ("input_ids", tokens[:, :-1]),
        ("attention_mask", torch.ones(1, 3, dtype=torch.int64)),
        ("mm_token_type_ids", torch.zeros(1, 3, dtype=torch.int64)),
    ):
        longer[name] = torch.cat([longer[name], added], dim=1)
    expected = reference_logits(decoder.model, longer, profile)[:, -4:].argmax(-1)
    assert tokens.tolist() == expected.tolist()


def test_the_models_attention_is_as_before() -> None:
    decoder, batch, _ = decoder_and_batch()
    config: Any = decoder.model.config
    text = config.get_text_config()

    def fail() -> None:
        with masked(decoder.model, {}, None):
            assert text._attn_implementation == "blindsight_masked"
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert text._attn_implementation == "sdpa"
    model: Any = decoder.model
    with torch.no_grad():
        whole = model(**batch.inputs).logits[:, -1]
    torch.testing.assert_close(whole, decoder.prefill(batch, None).logits)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_a_decoder_that_was_put_in_has_a_config_of_its_own(family: str) -> None:
    rows = [[5, Image(), 4, Image(), 6]]
    model, inputs = tiny_model(family), make_inputs(family, rows)
    profile = Profile.for_model(model, "document")
    expected = reference_logits(model, inputs, profile)
    model.model.language_model = copy.deepcopy(model.model.language_model)
    assert torch.equal(reference_logits(model, inputs, profile), expected)
    decoder = Decoder(model, profile)
    batch = decoder.prepare(inputs)
    masks = ProfileMasking(profile.categories).masks(batch.prompt)
    found = decoder.prefill(batch, masks).logits
    torch.testing.assert_close(found, expected[:, -1], atol=1e-5, rtol=0)


def test_a_decoder_that_is_compiled_is_found() -> None:
    model, profile = model_and_profile()
    plain = evaluate(model, tiny_processor(), samples(2), profile, repeats=0)
    model.model.language_model = torch.compile(model.model.language_model, backend="eager")
    found = evaluate(model, tiny_processor(), samples(2), profile, repeats=0)
    assert found.sparse == plain.sparse and found.sparse.kl_mean > 0


def test_rows_and_a_file_will_do(tmp_path: Path) -> None:
    model, profile = model_and_profile()
    profile.save(tmp_path / "profile.safetensors")
    options: dict[str, Any] = {"repeats": 0, "batch_size": 2}
    found = evaluate(model, tiny_processor(), rows(2), tmp_path / "profile.safetensors", **options)
    for same in (samples(2), list(samples(2))):
        assert evaluate(model, tiny_processor(), same, profile, **options).sparse == found.sparse
    inputs = make_inputs("qwen2_5_vl", PROMPTS[:1])
    expected = reference_logits(model, inputs, profile)
    assert torch.equal(reference_logits(model, inputs, tmp_path / "profile.safetensors"), expected)


def test_each_part_gets_its_mode_back() -> None:
    model, profile = model_and_profile()
    model.train()
    model.model.visual.eval()
    evaluate(model, tiny_processor(), samples(2), profile, repeats=0)
    assert model.training and model.lm_head.training and not model.model.visual.training


def test_padding_on_the_right_is_an_error() -> None:
    decoder, _, _ = decoder_and_batch()
    with pytest.raises(ValueError, match="padded on the left"):
        decoder.prepare(make_inputs("qwen2_5_vl", PROMPTS, pad_side="right"))


# What it costs.


@pytest.mark.parametrize("family", FAMILIES)
def test_pairs_are_those_of_the_masks(family: str) -> None:
    decoder, batch, profile = decoder_and_batch(family)
    bases: dict[int, torch.Tensor] = {}

    class Record:
        def head_masks(self, call: MaskedCall) -> Any:
            bases[call.layer] = call.base
            return EVERYTHING

    decoder.prefill(batch, Record())  # type: ignore[arg-type]
    valid = batch.prompt.valid
    expected = torch.zeros(len(valid), dtype=torch.int64)
    for layer, row in enumerate(CATEGORIES):
        for code in row:
            keep = kept_pairs(batch.prompt.template, HeadCategory(code), slice(None))
            seen = keep & bases[layer][:, 0] & valid[:, :, None] & valid[:, None]
            expected += seen.sum((1, 2))
    masks = ProfileMasking(profile.categories).masks(batch.prompt)
    assert masks.count_pairs().tolist() == expected.tolist()
    assert masks.count_rows().tolist() == (2 * valid.sum(1)).tolist()


def test_flops_are_those_of_the_prompts() -> None:
    model, profile = model_and_profile()
    found = run(5)
    dense = sparse = num_tokens = 0
    for sample in samples(5):
        ids = model_inputs(tiny_processor(), [sample])["input_ids"]
        flops = attention_flops(profile.rule.template(ids), profile.categories, head_dim=16)
        dense, sparse = dense + flops.dense, sparse + flops.sparse
        num_tokens += ids.shape[1]
    assert (found.dense.attention_flops, found.sparse.attention_flops) == (dense, sparse)
    layers = model.model.language_model.layers
    weights = sum(p.numel() for p in layers.parameters() if p.dim() == 2)
    assert found.dense.decoder_flops == dense + 2 * num_tokens * weights


def test_prefill_is_timed_in_turn_and_checked() -> None:
    found = run(4, repeats=2, inner="eager").timing
    assert found is not None
    assert len(found.dense) == len(found.sparse) == 2
    assert all(seconds > 0 for seconds in (*found.dense, *found.sparse))
    assert found.runs and all(how.startswith("sparse") for how in found.runs)
    longest = max(model_inputs(tiny_processor(), [s])["input_ids"].shape[1] for s in samples(4))
    assert found.num_tokens == longest


def test_a_compiled_model_that_is_wrong_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, batch, profile = decoder_and_batch(prompts=PROMPTS[1:])
    other = Profile.for_model(decoder.model, "document")
    monkeypatch.setattr(
        timing, "CompiledDecoder", lambda d, _, inner: CompiledDecoder(d, other, inner=inner)
    )
    with pytest.raises(ValueError, match="compiled logits must be those with explicit masks"):
        time_prefill(decoder, batch, profile, inner="eager", repeats=1)


def test_what_cannot_be_compiled_is_not_timed_and_the_results_are_kept(tmp_path: Path) -> None:
    def broken(gm: Any, inputs: Any) -> Any:
        raise RuntimeError(f"no compiler was found\n{'tmp0 = ops.load(buf) ' * 5000}")

    path = tmp_path / "answers.jsonl"
    found = run(2, repeats=1, inner=broken, checkpoint=path)
    assert found.timing is None and found.sparse == run(2).sparse
    (remark,) = found.remarks
    assert "no compiler was found" in remark and "--repeats 0" in remark and len(remark) < 500
    assert remark in str(found)
    assert Evaluation.from_json(found.to_json()) == found
    # it is tried again, and nothing is answered again
    before = path.read_bytes()
    assert run(2, repeats=1, inner=broken, checkpoint=path) == found
    assert path.read_bytes() == before


def test_the_bound_follows_rounding() -> None:
    logits = torch.tensor([[4.0, -8.0]])
    unit = torch.finfo(torch.float32).eps * 8
    check_distance(79 * unit, 0.0, logits)
    check_distance(9.9, 1.0, logits)
    for distance, rounding in ((81 * unit, 0.0), (10.1, 1.0), (float("nan"), 1.0)):
        with pytest.raises(ValueError, match="compiled logits"):
            check_distance(distance, rounding, logits)


# Answers.


def answers_of(path: Path) -> dict[str, list[str]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    found: dict[str, list[str]] = {}
    outcomes = [line for line in lines if "note" not in line]
    for line in sorted(outcomes, key=lambda line: line["sample"]):
        found.setdefault(line["point"], []).append(line["answer"])
    return found


def test_the_models_own_answers_are_right_whatever_their_case(tmp_path: Path) -> None:
    run(8, max_new_tokens=3, checkpoint=tmp_path / "answers.jsonl")
    (dense, _) = answers_of(tmp_path / "answers.jsonl").values()
    assert all(len(answer) <= 3 for answer in dense) and len(set(dense)) > 1
    known = rows(8)
    for row, answer in zip(known, dense, strict=True):
        row["answer"] = f"  {answer.upper()} "
    found = run(given=load_samples(known), max_new_tokens=3)
    assert found.dense.mean.value == 1.0
    assert found.sparse.mean.value <= 1.0
    # by default as many tokens as the expected answer has; these have blanks around them
    known[0]["answer"] = "no such answer"
    found = run(given=load_samples(known), max_new_tokens=3)
    number = sum(row["task"] == known[0]["task"] for row in known)
    assert found.dense.accuracy[known[0]["task"]].value == pytest.approx(1 - 1 / number)


def test_every_answer_has_as_many_tokens_as_its_own_expected_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    letters = tiny_processor().tokenizer("xyz", add_special_tokens=False)["input_ids"]
    asked = []

    def decode(self: Decoder, batch: Batch, *_: Any, max_new_tokens: int, **__: Any) -> Any:
        asked.append(max_new_tokens)
        return torch.tensor([letters[:max_new_tokens]] * len(batch.inputs["input_ids"]))

    monkeypatch.setattr(Decoder, "decode", decode)
    known = rows(4)
    for row, answer in zip(known, ("x", "xyz", "x", "xy"), strict=True):
        row["answer"] = answer
    run(given=load_samples(known), batch_size=4, checkpoint=tmp_path / "answers.jsonl")
    (dense, _) = answers_of(tmp_path / "answers.jsonl").values()
    assert [answer.replace(" ", "") for answer in dense] == ["x", "xyz", "x", "xy"]
    assert asked == [3, 3]
    run(given=load_samples(known), batch_size=4, max_new_tokens=2)
    assert asked == [3, 3, 2, 2]


def test_changed_answers_are_counted(tmp_path: Path) -> None:
    found = run(16, max_new_tokens=4, checkpoint=tmp_path / "answers.jsonl")
    dense, sparse = answers_of(tmp_path / "answers.jsonl").values()
    changed = sum(a != b for a, b in zip(dense, sparse, strict=True))
    assert found.sparse.num_changed == changed > 0
    assert found.sparse.changed == changed / 16


def test_the_order_of_batches_does_not_matter() -> None:
    one, other = run(7, batch_size=1), run(7, batch_size=4)
    assert one.sparse.accuracy == other.sparse.accuracy
    assert one.sparse.kl_mean == pytest.approx(other.sparse.kl_mean, rel=1e-3)
    assert one.sparse.attention_flops == other.sparse.attention_flops


def test_divergence_is_that_of_torch() -> None:
    p, q = torch.randn(2, 3, 11, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.kl_div(
        q.double().log_softmax(-1), p.double().log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    torch.testing.assert_close(divergence(p, q), expected)
    assert divergence(p, p).tolist() == [0, 0, 0]


# Statistics.


def test_shares_of_known_cases() -> None:
    # R. Newcombe, Two-sided confidence intervals for the single proportion, 1998, table I
    assert share(81, 263) == pytest.approx((81 / 263, 0.2553, 0.3662), abs=5e-5)
    assert share(15, 148) == pytest.approx((15 / 148, 0.0624, 0.1605), abs=5e-5)
    assert share(0, 20) == pytest.approx((0, 0, 0.1611), abs=5e-5)
    assert share(29, 29) == pytest.approx((1, 0.8830, 1), abs=5e-5)
    with pytest.raises(ValueError, match=r"num_right must be 0\.\.num"):
        share(3, 2)


def test_differences_of_a_known_case() -> None:
    """Of 400 questions 100 become right: a share with a standard error of 0.0217."""
    before, after = {"a": [0.0] * 400}, {"a": [0.0] * 300 + [1.0] * 100}
    found = paired_differences(before, after)
    assert found.mean == found.worst == found.tasks["a"]
    assert found.mean.value == 0.25
    half = 1.96 * (0.25 * 0.75 / 400) ** 0.5
    assert found.mean.low == pytest.approx(0.25 - half, abs=0.005)
    assert found.mean.high == pytest.approx(0.25 + half, abs=0.005)
    assert paired_differences(before, after) == found
    assert paired_differences(before, after, seed=1) != found


def test_tasks_count_alike_and_the_worst_is_the_lowest() -> None:
    before = {"a": [1.0] * 10, "b": [1.0] * 90}
    after = {"a": [0.0] * 10, "b": [1.0] * 90}
    found = paired_differences(before, after)
    assert found.mean == Estimate(-0.5, -0.5, -0.5)
    assert found.worst == Estimate(-1, -1, -1)
    with pytest.raises(ValueError, match="the same questions"):
        paired_differences(before, {"a": after["a"]})


def test_the_worst_task_is_the_one_that_loses_most() -> None:
    decoder, _, _ = decoder_and_batch()

    def outcomes(right: dict[str, bool]) -> list[Outcome]:
        return [
            Outcome("", at, task, "x", is_right, 0.5, 9, 2, 100, 18)
            for at, (task, is_right) in enumerate(right.items())
        ]

    dense = outcomes({"a": True, "b": True, "c": False})
    found = summarize(decoder, dense, outcomes({"a": True, "b": False, "c": True}))
    assert found.worst_task == "b"
    assert found.difference.worst.value == -1.0
    assert found.attention_flops == 4 * 16 * 300
    assert found.kl_mean == found.kl_p95 == found.kl_max == 0.5


def test_pairing_narrows_the_interval() -> None:
    random = np.random.default_rng(0)
    before = (random.random(300) < 0.5).astype(float)
    after = before.copy()
    after[:10] = 1 - after[:10]
    shuffled = random.permutation(after)
    paired = paired_differences({"a": list(before)}, {"a": list(after)}).mean
    unpaired = paired_differences({"a": list(before)}, {"a": list(shuffled)}).mean
    assert 2 * (paired.high - paired.low) < unpaired.high - unpaired.low


@pytest.mark.parametrize("kind", ["difference", "mean"])
def test_intervals_cover_the_truth_as_often_as_they_say(kind: str) -> None:
    random = np.random.default_rng(0)
    rates = {"a": (0.9, 0.2, 0.1), "b": (0.6, 0.1, 0.3)}  # right before, lost, won
    sizes = {"a": 80, "b": 50}
    covered, trials = 0, 400
    for trial in range(trials):
        before, after = {}, {}
        for task, (right, lost, won) in rates.items():
            first = random.random(sizes[task]) < right
            luck = random.random(sizes[task])
            before[task] = first.astype(float)
            after[task] = np.where(first, luck >= lost, luck < won).astype(float)
        if kind == "difference":
            truth = np.mean([(1 - r) * won - r * lost for r, lost, won in rates.values()])
            found = paired_differences(
                {task: list(x) for task, x in before.items()},
                {task: list(x) for task, x in after.items()},
                num_resamples=800,
                seed=trial,
            ).mean
        else:
            truth = np.mean([right for right, _, _ in rates.values()])
            found = mean_over_tasks([share(int(x.sum()), len(x)) for x in before.values()])
        covered += bool(found.low <= truth <= found.high)
    assert 0.92 <= covered / trials <= 0.98


# Going on.


def test_an_interrupted_run_goes_on_to_the_same_result(tmp_path: Path) -> None:
    whole = run(20, batch_size=2)
    path = tmp_path / "deep" / "answers.jsonl"
    first = Watched(samples(20), stop_at=17)
    with pytest.raises(KeyboardInterrupt):
        run(given=first, batch_size=2, checkpoint=path)
    assert first.opened == list(range(17))
    # killed in the middle of a line
    path.write_bytes(path.read_bytes()[:-7])
    second = Watched(samples(20))
    found = run(given=second, batch_size=2, checkpoint=path)
    assert (found.dense, found.sparse) == (whole.dense, whole.sparse)
    third = Watched(samples(20), stop_at=0)
    again = run(given=third, batch_size=2, checkpoint=path)
    assert again.to_json() == found.to_json()
    assert third.opened == []


def as_it_is(gm: Any, inputs: Any) -> Any:
    return gm


@pytest.mark.parametrize("inner", ["eager", as_it_is])
def test_timing_is_not_measured_again(inner: Any, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    options = {"repeats": 1, "checkpoint": path}
    first = run(4, inner=inner, **options)
    assert first.to_json() == run(4, inner=inner, **options).to_json()
    assert name_for_files(inner) in path.read_text()
    nameless = [lambda gm, inputs: gm, lambda gm, inputs: gm]
    assert len({*map(name_for_files, nameless), name_for_files(inner)}) == 3


@pytest.mark.parametrize(
    ("options", "name"),
    [({"number": 5}, "other samples"), ({"max_new_tokens": 2}, "max_new_tokens=None")],
)
def test_the_answers_of_another_run_are_an_error_until_that_is_finished(
    tmp_path: Path, options: dict[str, Any], name: str
) -> None:
    path = tmp_path / "answers.jsonl"
    run(4, checkpoint=path)
    finished = path.read_bytes()
    path.write_bytes(finished[: finished[:-1].rfind(b"\n") + 1])  # the line that says so
    other = {"number": 4, **options}
    with pytest.raises(ValueError, match=rf"answers.jsonl must .* an unfinished run with {name}\."):
        run(**other, checkpoint=path)
    run(4, checkpoint=path)
    assert path.read_bytes() == finished
    with pytest.warns(BlindsightWarning, match=rf"{name}. They are kept as answers-1\.jsonl"):
        found = run(**other, checkpoint=path)
    assert found == run(**other)
    assert path.with_name("answers-1.jsonl").read_bytes() == finished != path.read_bytes()
    with pytest.warns(BlindsightWarning, match=r"kept as answers-2\.jsonl"):
        run(4, checkpoint=path)


def test_a_finished_run_that_is_added_to_is_unfinished(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    run(4, checkpoint=path)
    known = OutcomeFile(path, json.loads(path.read_text().partition("\n")[0]))
    known.add([Outcome("another masking", 0, "a", "x", True, 0.0, 9, 2, 100, 18)])
    with pytest.raises(ValueError, match="an unfinished run with other samples"):
        run(5, checkpoint=path)
    known.finish()
    with pytest.warns(BlindsightWarning, match="are kept as"):
        run(5, checkpoint=path)


@pytest.mark.parametrize(
    "content", [b"no JSON\n", b'{"a": 1}', b"\x00\xff\n\x00", b'{"a": 1}\n{"b', b"[1]\n5\n"]
)
def test_a_file_of_something_else_is_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"answers\.jsonl must be (a file of outcomes|of the run)"):
        run(4, checkpoint=path)
    assert path.read_bytes() == content


def test_a_header_that_was_cut_off_is_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    run(2, checkpoint=path)
    first, *_ = path.read_bytes().splitlines()
    path.write_bytes(first[:40])
    run(2, checkpoint=path)
    assert path.read_bytes().splitlines()[0] == first


def test_a_run_that_is_refused_is_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    unanswered = [*rows(40), {**rows(1)[0], "answer": None}]
    for given, options in ((None, {"max_new_tokens": 0}), (load_samples(unanswered), {})):
        with pytest.raises(ValueError, match=r"max_new_tokens must|sample 40 must have"):
            run(given=given, checkpoint=path, **options)
        assert not path.exists()


@pytest.mark.parametrize("change", ["processor", "weights"])
def test_answers_of_another_model_or_processor_are_kept_aside(tmp_path: Path, change: str) -> None:
    model, profile = model_and_profile()
    processor, path = tiny_processor(), tmp_path / "answers.jsonl"
    evaluate(model, processor, samples(2), profile, repeats=0, checkpoint=path)
    if change == "processor":
        processor.chat_template += "."
    else:
        model.model.language_model.layers[0].mlp.up_proj.weight.data[9:11] += 1
    words = {"processor": "another processor", "weights": "another model or dtype"}[change]
    with pytest.warns(BlindsightWarning, match=f"a finished run with {words}. They are kept"):
        evaluate(model, processor, samples(2), profile, repeats=0, checkpoint=path)


@pytest.mark.parametrize("how", ["model", "decoder", "decoder.forward"])
def test_what_is_compiled_in_place_is_left_aside(how: str) -> None:
    """Its own compiled code knows nothing of the profile that is evaluated."""
    model, profile = model_and_profile()
    expected = evaluate(model, tiny_processor(), samples(4), profile, repeats=0)
    other = blindsight_backend(profile.with_categories("dense"), inner="eager")
    part = model if how == "model" else model.model.language_model
    if how.endswith("forward"):
        part.forward = torch.compile(part.forward, backend=other)
    else:
        part.compile(backend=other)
    options: dict[str, Any] = {"engine": "compiled", "inner": "eager", "repeats": 0}
    found = evaluate(model, tiny_processor(), samples(4), profile, **options)
    assert expected.sparse.kl_mean > 1e-4
    assert found.sparse.kl_mean == pytest.approx(expected.sparse.kl_mean, rel=1e-3)


@pytest.mark.parametrize("num_text", [0, 4])
def test_the_compiled_engine_is_checked(num_text: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the first prompts are of text, which any profile leaves dense."""
    monkeypatch.setattr(evaluation, "CompiledDecoder", of_another_profile)
    text = [{"role": "user", "content": "What?"}]
    given = [*[{"messages": text, "images": [], "answer": "x"}] * num_text, *rows(4)]
    with pytest.raises(ValueError, match="compiled logits must be those with explicit masks"):
        run(given=load_samples(given), engine="compiled", inner="eager")


def of_another_profile(decoder: Decoder, profile: Profile, **options: Any) -> CompiledDecoder:
    return CompiledDecoder(decoder, profile.with_categories("document"), **options)


# What is written.


def test_results_survive_json_and_markdown_names_all(tmp_path: Path) -> None:
    found = run(6, repeats=1, inner="eager")
    found.save(tmp_path / "new" / "found.json")
    found.save(tmp_path / "new" / "found.md")
    assert Evaluation.from_json((tmp_path / "new" / "found.json").read_text()) == found
    assert found._repr_markdown_() == str(found)
    assert repr(found).startswith("Evaluation(6 questions: mean accuracy ")
    assert "answers changed" in repr(found) and len(repr(found)) < 160
    text = (tmp_path / "new" / "found.md").read_text()
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["found.json", "found.md"]
    for words in (
        "| measure", "whatever the length",
        "| task", "mean of the tasks", "attention FLOPs", "answers changed", "KL of the next token",
        "prefill of", f"{found.sparse.attention_flops:,}", "two images or more", "torch 2.",
    ):  # fmt: skip
        assert words in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    first = [line for line in tables if line.count("|") == 6]
    second = [line for line in tables if line.count("|") == 5]
    assert len(first) + len(second) == len(tables)
    assert {len(line) for line in first} == {len(first[0])}


def test_a_dataset_that_the_profile_was_made_with_is_named(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, profile = model_and_profile()
    noted = {"dataset": str(workplace / "data" / "data.jsonl"), "refinement_dataset": "list"}
    made = replace(profile, calibration=noted)
    options: dict[str, Any] = {"repeats": 0, "batch_size": 2}
    monkeypatch.chdir(workplace)
    given = load_samples("data", limit=2)
    (remark,) = evaluate(model, tiny_processor(), given, made, **options).remarks
    assert "was calibrated on a dataset of this very name, data/data.jsonl" in remark
    assert evaluate(model, tiny_processor(), rows(2), made, **options).remarks == ()


# Bad input.


def test_a_model_without_a_vision_part_is_named() -> None:
    config = Qwen2Config(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=96,
    )  # fmt: skip
    _, profile = model_and_profile()
    with pytest.raises(ValueError, match="model must have a vision part, got 'qwen2'"):
        evaluate(Qwen2ForCausalLM(config), tiny_processor(), samples(2), profile)


def test_the_profile_of_another_model_is_named() -> None:
    profile = Profile.for_model(tiny_model("qwen2_5_vl", num_layers=3), "sink")
    with pytest.raises(ValueError, match="profile has num_layers=3, model has num_layers=2"):
        evaluate(tiny_model("qwen2_5_vl"), tiny_processor(), samples(2), profile)


def test_questions_without_answers_are_named() -> None:
    known = rows(3)
    del known[1]["answer"]
    with pytest.raises(ValueError, match="sample 1 must have an answer, got none"):
        run(given=load_samples(known))


def test_without_answers_all_but_accuracy_is_compared(tmp_path: Path) -> None:
    known = rows(3)
    for row in known:
        del row["answer"]
    path = tmp_path / "answers.jsonl"
    found = run(given=load_samples(known), max_new_tokens=2, checkpoint=path)
    expected = run(3, max_new_tokens=2)
    assert found.sparse.kl_mean == pytest.approx(expected.sparse.kl_mean)
    assert found.sparse.attention_flops == expected.sparse.attention_flops
    assert (found.sparse.accuracy, found.sparse.mean, found.sparse.difference) == ({}, None, None)
    assert found.sparse.num_changed == expected.sparse.num_changed
    text = str(found)
    assert text.startswith("| ") and "accuracy is left out" in text and "task" not in text
    assert Evaluation.from_json(found.to_json()) == found
    known[1]["answer"] = "x"
    with pytest.raises(ValueError, match="or none of them, got one in sample 1 and none in the f"):
        run(given=load_samples(known))


def test_without_answers_their_length_has_a_default(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def decode(self: Decoder, batch: Batch, *_: Any, max_new_tokens: int, **__: Any) -> Any:
        asked.append(max_new_tokens)
        return torch.ones(len(batch.inputs["input_ids"]), 1, dtype=torch.int64)

    monkeypatch.setattr(Decoder, "decode", decode)
    run(given=load_samples([{**rows(1)[0], "answer": None}]))
    assert asked == [32, 32]


@pytest.mark.parametrize("column", ["answer", "answers"])
def test_a_list_of_answers_is_named(column: str) -> None:
    known = rows(2)
    for row in known:
        del row["answer"]
        row[column] = ["9"]
    with pytest.raises(
        ValueError, match=rf"must be one string .*, got a list as '{column}': \['9'"
    ):
        run(given=load_samples(known))


def test_answers_are_judged_as_asked(tmp_path: Path) -> None:
    seen = []

    def judge(answer: str, sample: Sample) -> bool:
        seen.append((answer, sample.answer))
        return sample.index == 1

    path = tmp_path / "answers.jsonl"
    given = [{**row, "task": "a"} for row in rows(2)]
    found = run(given=load_samples(given), is_right=judge, max_new_tokens=3, checkpoint=path)
    assert found.dense.mean is not None and found.dense.mean.value == 0.5
    assert len(seen) == 4 and {expected for _, expected in seen} <= set("xyz")
    assert "right: judge() says so" in str(found)
    again = run(given=load_samples(given), is_right=judge, max_new_tokens=3, checkpoint=path)
    assert again == found and len(seen) == 4
    for row in given:
        row["answer"] = None  # type: ignore[assignment]
    assert run(given=load_samples(given), is_right=judge, max_new_tokens=3).dense.mean is not None


def test_differences_from_a_model_that_is_always_wrong_say_nothing() -> None:
    known = [{**row, "answer": "no such answer"} for row in rows(2)]
    found = run(given=load_samples(known), max_new_tokens=1)
    assert "right in 0.0 % only: the difference says nothing" in str(found)


def test_questions_without_images_are_named() -> None:
    known = rows(3)
    for row in known:
        row["images"] = []
        row["messages"] = [{"role": "user", "content": "Which one?"}]
    with pytest.raises(
        ValueError, match="samples must have images or videos, got none in the first 3"
    ):
        run(given=load_samples(known))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"given": []}, "dataset must have at least one sample, got none in list"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"repeats": -2}, "repeats must be at least 0, got -2"),
        ({"num_resamples": 0}, "num_resamples must be at least 1, got 0"),
        ({"engine": "fast"}, "engine must be one of reference, compiled, got 'fast'"),
    ],
)
def test_arguments_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(**options)


# The command.


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and its processor, a profile, and questions on disk."""
    folder = tmp_path_factory.mktemp("workplace")
    model, profile = model_and_profile()
    model.save_pretrained(folder / "model")
    tiny_processor().save_pretrained(folder / "model")
    profile.save(folder / "profile.safetensors")
    (folder / "data").mkdir()
    with open(folder / "data" / "data.jsonl", "w") as file:
        for at, row in enumerate(rows(4)):
            names = []
            for number, image in enumerate(row["images"]):
                names.append(f"{at}-{number}.png")
                image.save(folder / "data" / names[-1])
            file.write(json.dumps({**row, "images": names}) + "\n")
    return folder


def command(workplace: Path, out: Path, data: Path | None = None, **options: str) -> list[str]:
    arguments = {
        "model": str(workplace / "model"),
        "profile": str(workplace / "profile.safetensors"),
        "data": str(workplace / "data" if data is None else data),
        "out": str(out),
        "repeats": "0",
        **options,
    }
    return ["evaluate", *(x for name, value in arguments.items() for x in (f"--{name}", value))]


def test_the_command_writes_both_files_and_prints_the_table(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(workplace, tmp_path / "out")) == 0
    printed = capsys.readouterr().out
    names = [tmp_path / "out" / f"evaluation.{ending}" for ending in ("json", "md")]
    said = f"saved to {names[0]} and {names[1]}\n"
    assert printed == f"{names[1].read_text()}\n{said}"
    found = Evaluation.from_json((tmp_path / "out" / "evaluation.json").read_text())
    assert sum(found.num_questions.values()) == 4
    assert found.conditions["dataset"].endswith("data.jsonl")
    # once more: nothing is answered again, nothing changes
    before = (tmp_path / "out" / "answers.jsonl").read_bytes()
    assert main(command(workplace, tmp_path / "out")) == 0
    assert capsys.readouterr().out == printed
    assert (tmp_path / "out" / "answers.jsonl").read_bytes() == before


@pytest.mark.parametrize("checkpoint", ["file/answers.jsonl", "."])
def test_a_checkpoint_that_cannot_be_written_is_an_error_before_any_work(
    checkpoint: str, workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    given = Watched(samples(2), stop_at=0)
    with pytest.raises(ValueError, match="checkpoint must be a file that can be written, got"):
        run(given=given, checkpoint=tmp_path / checkpoint)
    model, profile = model_and_profile()
    with pytest.raises(ValueError, match=r"checkpoint must be a file in an existing folder, got"):
        measure(
            model,
            None,
            given,
            rule=profile.rule,
            checkpoint=tmp_path / checkpoint / "not-there" / "x",
        )
    assert main(command(workplace, tmp_path / "file")) == 2
    error = capsys.readouterr().err
    assert error.startswith("blindsight: error: answers.jsonl in --out must be a file that can")


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    _, profile = model_and_profile()
    path = tmp_path / "not-there" / "profile.safetensors"
    with pytest.raises(FileNotFoundError, match=r"not-there/profile\.safetensors'$"):
        profile.save(path)


def test_the_command_shows_how_far_it_is_as_asked(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(workplace, tmp_path / "shown", limit="2", repeats="1", inner="eager")
    assert main([*arguments, "--progress"]) == 0
    shown = capsys.readouterr().err
    for words in ("answering", "compiling to time prefill", "timing prefill"):
        assert words in shown
    assert main([*command(workplace, tmp_path / "hidden", limit="2"), "--no-progress"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.filterwarnings("default::blindsight.BlindsightWarning")
def test_the_command_says_what_it_replaces(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(workplace, tmp_path)) == 0
    capsys.readouterr()
    assert main(command(workplace, tmp_path, limit="2")) == 0
    printed, error = capsys.readouterr()
    kept = tmp_path / "answers-1.jsonl"
    assert kept.exists() and kept.name in error and error.startswith("blindsight: warning: ")
    digest = Profile.load(workplace / "profile.safetensors").digest[:12]
    replaced = f"replacing those of profile {digest} for 4 questions of data/data.jsonl\n"
    assert printed.endswith(replaced)


@pytest.mark.parametrize("kind", ["empty", "broken image", "no images", "text model"])
def test_bad_input_is_one_line(
    kind: str, workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, options = tmp_path / "data.jsonl", {}
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
    row: dict[str, Any] = {"images": ["bad.png"], "messages": messages, "answer": "x"}
    message = "bad.png"
    if kind == "empty":
        data.write_text("")
        message = "at least one sample"
    elif kind == "no images":
        data.write_text(json.dumps({"messages": messages, "answer": "x"}) + "\n")
        message = "dataset must have images"
    else:
        (tmp_path / "bad.png").write_bytes(b"no image")
        data.write_text(json.dumps(row) + "\n")
    if kind == "text model":
        config = Qwen2Config(hidden_size=16, num_attention_heads=2)
        config.save_pretrained(tmp_path / "text")
        options["model"] = str(tmp_path / "text")
        message = "model must have a vision part"
    assert main(command(workplace, tmp_path / "out", data, **options)) == 2
    output, error = capsys.readouterr()
    assert output == ""
    assert error.count("\n") == 1 and message in error


@pytest.mark.parametrize("batch_size", [1, 4])
def test_samples_may_begin_with_text(batch_size: int) -> None:
    """Whatever the batch size is, of which depends how many are looked at together."""
    text = [{"role": "user", "content": "What?"}]
    given = [{"messages": text, "images": [], "answer": "x"}] * 10
    found = run(given=load_samples([*given, *rows(1, seed=3)]), batch_size=batch_size)
    assert found.num_restricted == 1


def test_samples_of_text_alone_are_refused_again(tmp_path: Path) -> None:
    text = [{"role": "user", "content": "What?"}]
    given = load_samples([{"messages": text, "images": [], "answer": "x"}] * 70)
    for _ in range(2):
        with pytest.raises(ValueError, match="samples must have images or videos, got none in"):
            run(given=given, batch_size=1, checkpoint=tmp_path / "answers.jsonl")
