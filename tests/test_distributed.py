"""Several processes: tensor-parallel ranks take their own heads, and runs share their samples.

All ranks of a group of cases run in one launch (tests/on_ranks.py), as starting them takes longest.
"""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import distributed
from torch.distributed.tensor import DTensor, Shard
from torch.nn.functional import scaled_dot_product_attention

from blindsight import Profile, blindsight_backend
from blindsight.calibration import measure
from blindsight.cli import main
from blindsight.evaluation.outcomes import Outcome, OutcomeFile
from blindsight.evaluation.prefill import Decoder
from blindsight.ranks import Ranks, _ranks, check_is_alone
from models import generation_options, tiny_model, valid_positions, without_vision
from on_ranks import categories_of, model_of, profile_of, prompt, template_of
from oracles import (
    assert_close_to_reference,
    generate_reference,
    reference_copy,
    run_reference,
)
from processors import tiny_processor
from questions import rows, samples

NUM_RANKS = 2
TESTS = Path(__file__).parent

needs_gloo = pytest.mark.skipif(
    not distributed.is_available() or not distributed.is_gloo_available(),
    reason="needs torch.distributed with gloo",
)
pytestmark = needs_gloo
needs_accelerate = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None,
    reason="transformers loads sharded models with accelerate: pip install '.[compose]'",
)


def launch(folder: Path, cases: list[dict[str, Any]], size: int = NUM_RANKS) -> None:
    """Run cases on all ranks; each leaves ``<name>.<rank>.pt`` in the folder."""
    run_on_ranks("on_ranks.py", str(folder), json.dumps(cases), size=size)


def run_on_ranks(script: str, *arguments: str, size: int = NUM_RANKS) -> None:
    """Run a script of the tests' folder in so many processes."""
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(size), str(TESTS / script)]
    done = subprocess.run(
        [*command, *arguments],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


def results(folder: Path, name: str, size: int = NUM_RANKS) -> list[Any]:
    return [torch.load(folder / f"{name}.{rank}.pt") for rank in range(size)]


# Tensor parallel.

# Of all heads 3 in 4 are sparse; half of rank 0's, and all of rank 1's.
AUTO = {"family": "qwen2_5_vl", "how": "graph", "lowering": "auto", "only_text": True}
SPLIT = [
    {"name": "qwen2_5_vl graph", "family": "qwen2_5_vl", "how": "graph"},
    {"name": "gemma3 graph", "family": "gemma3", "how": "graph"},
    {**AUTO, "name": "auto", "gains_from": 0.6},
    {**AUTO, "name": "auto, dense", "gains_from": 0.8},
    {"name": "wrong shard", "family": "qwen2_5_vl", "how": "wrong shard", "only_text": True},
]
BY_HAND = [
    {"name": "by hand", "family": "qwen2_5_vl", "how": "by hand", "only_text": True},
    {"name": "by hand, shard", "family": "qwen2_5_vl", "how": "by hand, shard", "only_text": True},
    {"name": "unknown class", "family": "qwen2_5_vl", "how": "by hand, unknown class"},
]
NIGHTLY = [
    {"name": "qwen2_5_vl model", "family": "qwen2_5_vl", "how": "model"},
    {"name": "qwen2_5_vl shard", "family": "qwen2_5_vl", "how": "shard"},
    {"name": "qwen2_5_vl layers", "family": "qwen2_5_vl", "how": "layers"},
    {"name": "qwen2_5_vl pass", "family": "qwen2_5_vl", "how": "pass"},
    {"name": "qwen2_vl graph", "family": "qwen2_vl", "how": "graph"},
    {"name": "qwen3_vl model", "family": "qwen3_vl", "how": "model"},
    {"name": "by hand, model", "family": "qwen2_5_vl", "how": "by hand, shard and model"},
    {"name": "inductor", "family": "qwen2_5_vl", "how": "graph", "inner": "inductor"},
    {"name": "gemma3 inductor", "family": "gemma3", "how": "graph", "inner": "inductor"},
]
APART = {
    "name": "split",
    "family": "qwen2_5_vl",
    "how": "graph",
    "inner": "inductor",
    "lowering": "split",
    "is_padded": False,
}
GENERATE = [
    {"name": "generate", "family": "qwen2_5_vl", "what": "run_generate", "cache": "dynamic"},
    {"name": "generate, gemma3", "family": "gemma3", "what": "run_generate", "cache": "static"},
    {"name": "generate, qwen3_vl", "family": "qwen3_vl", "what": "run_generate", "cache": "static"},
]
FOUR_RANKS = [
    {"name": "gemma3 graph", "family": "gemma3", "how": "graph"},
    {"name": "qwen3_vl model", "family": "qwen3_vl", "how": "model"},
    {"name": "by hand, shard", "family": "gemma3", "how": "by hand, shard", "only_text": True},
]


def launch_tensor_parallel(
    folder: Path,
    cases: list[dict[str, Any]],
    others: Sequence[dict[str, Any]] = (),
    size: int = NUM_RANKS,
) -> Path:
    for family in {case["family"] for case in cases}:
        model_of(family, size).save_pretrained(folder / family)
    launch(folder, [*({"what": "run_backend", **case} for case in cases), *others], size)
    return folder


def check_sparse(
    folder: Path, name: str, family: str, *, size: int = NUM_RANKS, is_padded: bool = True
) -> list[Any]:
    """Check that every rank has the logits of one process, by the reference of the whole model."""
    model, inputs = model_of(family, size), prompt(family, is_padded=is_padded)
    categories = torch.tensor(categories_of(size))
    references = [
        run_reference(m, categories, *template_of(inputs), inputs, use_cache=False).logits
        for m in (model, reference_copy(model))
    ]
    found = results(folder, name, size)
    for result in found:
        assert_close_to_reference(result["logits"], *references, valid_positions(inputs))
    return found


def test_attention_of_dtensors_is_an_error(tmp_path: Path) -> None:
    """As of torch's context_parallel, which would give each rank a part of the sequence."""
    model, inputs = tiny_model("qwen2_5_vl"), prompt("qwen2_5_vl")
    without_vision(model)
    backend = blindsight_backend(profile_of(model), inner="eager")

    def with_dtensors(gm: Any, example_inputs: Any) -> Any:
        for node in gm.graph.find_nodes(op="call_function", target=scaled_dot_product_attention):
            query = node.args[0].meta["example_value"]
            part = torch.zeros(query.shape)
            node.args[0].meta["example_value"] = DTensor.from_local(part, mesh, [Shard(2)])
        return backend(gm, example_inputs)

    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1
    )
    try:
        mesh = distributed.init_device_mesh("cpu", (1,))
        with torch.no_grad(), pytest.raises(ValueError, match=r"got DTensors.*whole sequences"):
            torch.compile(model, backend=with_dtensors)(**inputs, use_cache=False)
    finally:
        distributed.destroy_process_group()


def stop_at_third_batch(arguments: list[str]) -> None:
    """Run a command in this process alone, which fails with two batches of four done."""
    prepare, num_begun = Decoder.prepare, 0

    def fail(self: Any, inputs: Any) -> Any:
        nonlocal num_begun
        num_begun += 1
        if num_begun == 3:
            raise ValueError("no more memory.")
        return prepare(self, inputs)

    with mock.patch.object(Decoder, "prepare", fail):
        assert main(arguments) == 2


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the ranks found, and what they made together of prompts and questions."""
    folder = tmp_path_factory.mktemp("ranks")
    write_questions(folder)
    calibrate, evaluate = commands(folder, "two")
    alone = commands(folder, "three")[1]
    stop_at_third_batch(alone)
    cases: list[dict[str, Any]] = [
        {"name": "evaluate, begun alone", "arguments": alone},
        {"name": "calibrate, failing", "arguments": calibrate, "fail_at": 2},
        {"name": "calibrate", "arguments": calibrate},
        {"name": "evaluate, failing", "arguments": evaluate, "fail_at": 2},
        {"name": "evaluate", "arguments": evaluate},
    ]
    shared = [{"what": "run_command", **case} for case in cases]
    can_load = importlib.util.find_spec("accelerate") is not None
    return launch_tensor_parallel(folder, [*(SPLIT if can_load else ()), *BY_HAND], shared)


@needs_accelerate
@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_each_rank_takes_its_own_heads(ranks: Path, family: str) -> None:
    found = check_sparse(ranks, f"{family} graph", family)
    own = [
        ["1 DENSE, 1 SINK", "1 DENSE, 1 DOCUMENT_SINK"],
        ["1 DOCUMENT, 1 DOCUMENT_SINK", "1 SINK, 1 DOCUMENT"],
    ]
    for result, categories in zip(found, own, strict=True):
        assert result["categories"] == categories
        assert set(result["runs"]) == {"sparse, ordered, fused"}
        assert result["runs"]["sparse, ordered, fused"] == 2


@needs_accelerate
def test_ranks_decide_alike_whether_sparse_is_faster(ranks: Path) -> None:
    """As one process would, not each by the heads that it has."""
    for result in check_sparse(ranks, "auto", "qwen2_5_vl"):
        assert all(how.startswith("sparse") for how in result["runs"])
    for result in results(ranks, "auto, dense"):
        assert result["runs"] == {"dense: estimated to be faster than sparse": 2}


def test_another_ranks_shard_is_an_error(ranks: Path) -> None:
    for rank, result in enumerate(results(ranks, "wrong shard")):
        assert f"must be shard {rank} of 2 for the weights of attention" in result["error"]
        assert f"got shard {1 - rank}" in result["error"]


def test_heads_that_nothing_tells_are_an_error_which_names_shard(ranks: Path) -> None:
    for result in results(ranks, "by hand"):
        assert "must be 4 as in the profile, got 2" in result["error"]
        assert "profile.shard(rank, 2)" in result["error"]


def test_heads_split_by_hand_take_a_shard(ranks: Path) -> None:
    for result in check_sparse(ranks, "by hand, shard", "qwen2_5_vl"):
        assert result["runs"] == {"sparse, ordered, fused": 2}


def test_a_frame_of_unknown_origin_is_not_left_dense_silently(ranks: Path) -> None:
    for result in results(ranks, "unknown class"):
        assert "must be 4 as in the profile, got 2" in result["error"]


@pytest.fixture(scope="module")
def more_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch_tensor_parallel(
        tmp_path_factory.mktemp("more_ranks"), [*NIGHTLY, APART], GENERATE
    )


@needs_accelerate
@pytest.mark.nightly
@pytest.mark.inductor
@pytest.mark.parametrize("case", NIGHTLY, ids=lambda case: case["name"])
def test_other_ways_to_say_whose_heads_they_are(more_ranks: Path, case: Any) -> None:
    for result in check_sparse(more_ranks, case["name"], case["family"]):
        if case["how"] != "pass":
            assert result["runs"] == {"sparse, ordered, fused": 2}


@needs_accelerate
@pytest.mark.nightly
@pytest.mark.inductor
def test_each_rank_puts_its_own_dense_heads_apart(more_ranks: Path) -> None:
    first, second = check_sparse(more_ranks, "split", "qwen2_5_vl", is_padded=False)
    assert first["runs"] == {"sparse, ordered, split": 2}
    assert second["runs"] == {"sparse, ordered, fused": 2}  # it has none


@needs_accelerate
@pytest.mark.nightly
@pytest.mark.parametrize("case", GENERATE, ids=lambda case: case["name"])
def test_ranks_generate_together(more_ranks: Path, case: Any) -> None:
    model, inputs = tiny_model(case["family"]), prompt(case["family"])
    categories = torch.tensor(categories_of(NUM_RANKS))
    template, options = template_of(inputs), generation_options(case["cache"])
    expected = generate_reference(model, categories, *template, inputs, **options)
    for result in results(more_ranks, case["name"]):
        assert torch.equal(result["tokens"], expected.sequences)
        for one, other in zip(result["scores"], expected.scores, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
        assert result["runs"]["sparse, ordered, fused"] == 2


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch_tensor_parallel(tmp_path_factory.mktemp("four_ranks"), FOUR_RANKS, size=4)


@needs_accelerate
@pytest.mark.nightly
@pytest.mark.parametrize("case", FOUR_RANKS, ids=lambda case: case["name"])
def test_four_ranks(four_ranks: Path, case: Any) -> None:
    found = check_sparse(four_ranks, case["name"], case["family"], size=4)
    assert all(result["runs"] == {"sparse, ordered, fused": 2} for result in found)


def test_the_order_of_samples_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """What two processes measure comes back by sample, as if they had been one."""

    def measured(*arguments: Any, **_: Any) -> measure.Measurements:
        samples = arguments[0]
        fields = dataclasses.fields(measure.Measurements)
        numbers = torch.tensor([float(sample.index) for sample in samples])
        return measure.Measurements(**{field.name: numbers for field in fields})

    def gather(ranks: Ranks, work: Any) -> list[Any]:
        return [measured_by(rank) for rank in range(ranks.size)]

    def measured_by(rank: int) -> Any:
        own = Ranks(rank, 2).positions(7, 2)
        return own, measured(questions.take(own))

    questions = samples(7)
    monkeypatch.setattr(measure, "_probe_all", measured)
    monkeypatch.setattr(Ranks, "gather", gather)
    token = _ranks.set(Ranks(0, 2))
    try:
        found = measure.measure(None, None, questions, rule=None, batch_size=2)  # type: ignore[arg-type]
    finally:
        _ranks.reset(token)
    assert found.num_rows.tolist() == list(range(7))


def test_a_shard_has_the_rows_of_its_heads() -> None:
    profile = profile_of(tiny_model("qwen2_5_vl"))
    shards = [profile.shard(rank, 2) for rank in range(2)]
    assert torch.equal(torch.cat([shard.categories for shard in shards], 1), profile.categories)
    assert [shard.fingerprint["num_heads"] for shard in shards] == ["2", "2"]
    assert [shard.fingerprint["num_kv_heads"] for shard in shards] == ["1", "1"]
    assert len({profile.digest, *(shard.digest for shard in shards)}) == 3
    assert profile.shard(0, 1) is profile
    with pytest.raises(ValueError, match=r"profile has num_heads=2, model has num_heads=4"):
        shards[0].validate(tiny_model("qwen2_5_vl"))
    shards[0].validate(tiny_model("qwen2_5_vl"), part_is_fine=True)
    for arguments, message in (
        ((2, 2), r"rank must be in 0\.\.1, got 2"),
        ((-1, 2), r"rank must be in 0\.\.1, got -1"),
        ((0, 3), "num_heads must be a multiple of world_size, got 4 for 3"),
        ((0, 4), "num_kv_heads must be a multiple of world_size, got 2 for 4"),
    ):
        with pytest.raises(ValueError, match=message):
            profile.shard(*arguments)
    with pytest.raises(ValueError, match="profile must be of a whole model, got shard 0/2"):
        shards[0].shard(0, 2)


# Shared samples.


@pytest.fixture(scope="module")
def shared(ranks: Path) -> Path:
    """The same folder, with what one process made."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the ranks
    for arguments in commands(ranks, "one"):
        assert main(arguments) == 0
    torch.set_num_threads(threads)
    return ranks


def write_questions(folder: Path) -> None:
    """Write a model, its profile, and 7 questions."""
    model = tiny_model("gemma3")
    model.save_pretrained(folder / "model")
    tiny_processor("gemma3").save_pretrained(folder / "model")
    profile_of(model).save(folder / "profile")
    lines = []
    for at, row in enumerate(rows(7)):
        names = [f"{at}-{number}.png" for number in range(len(row["images"]))]
        for name, image in zip(names, row["images"], strict=True):
            image.save(folder / name)
        lines.append(json.dumps({**row, "images": names}))
    (folder / "data.jsonl").write_text("\n".join(lines))


def commands(folder: Path, name: str) -> tuple[list[str], list[str]]:
    """7 prompts in batches of 2: one process has batches 0 and 2, the other 1 and 3, one short."""
    both = ["--model", f"{folder / 'model'}", "--data", f"{folder / 'data.jsonl'}"]
    both += ["--batch-size", "2"]
    calibrate = ["-o", f"{folder / name}.profile", "--sink-offsets", "measure", "--limit", "7"]
    evaluate = ["--profile", f"{folder / 'profile'}", "--out", f"{folder / name}"]
    return (
        ["calibrate", *both, *calibrate, "--budget", "0.2"],
        ["evaluate", *both, *evaluate, "--repeats", "0"],
    )


def test_a_shared_calibration_is_that_of_one_process(shared: Path) -> None:
    one, two = (Profile.load(shared / f"{name}.profile") for name in ("one", "two"))
    assert one == two  # by digest: every number of the evidence
    assert one.categories.any()
    assert (shared / "one.profile").read_bytes() == (shared / "two.profile").read_bytes()
    first, second = results(shared, "calibrate")
    assert (first["code"], second["code"]) == (0, 0)
    assert "saved to" in first["out"] and second["out"] == ""
    assert first["files"] == []


def test_a_process_that_fails_ends_all_and_nothing_is_measured_twice(shared: Path) -> None:
    first, second = results(shared, "calibrate, failing")
    assert (first["code"], second["code"]) == (2, 2)
    assert "process 1 of 2 failed: no more memory." in first["err"]
    assert "no more memory" in second["err"] and "process 1" not in second["err"]
    assert first["files"] == [f"two.profile.partial.sinks.{rank}-of-2" for rank in range(2)]
    # Sinks, then all: two batches each, of which some were measured before.
    assert [result["done"] for result in results(shared, "calibrate")] == [2, 3]


def test_a_shared_evaluation_is_that_of_one_process(shared: Path) -> None:
    one, two, three = (
        json.loads((shared / name / "evaluation.json").read_text()) for name in (*names(), "three")
    )
    assert one == two == three
    assert [result["done"] for result in results(shared, "evaluate, begun alone")] == [1, 1]
    lines = [(shared / name / "answers.jsonl").read_text().splitlines() for name in names()]
    headers, answers = zip(*((part[0], part[1:]) for part in lines), strict=True)
    assert headers[0] == headers[1]
    assert sorted(answers[0]) == sorted(answers[1])
    points = [line for line in map(json.loads, answers[1]) if "note" not in line]
    for key in {point["point"] for point in points}:
        assert [p["sample"] for p in points if p["point"] == key] == list(range(7))
    first, second = results(shared, "evaluate")
    assert first["out"].startswith((shared / "two/evaluation.md").read_text())
    assert "evaluation.md" in first["out"] and second["out"] == ""
    assert first["files"] == []
    failed = results(shared, "evaluate, failing")
    assert [result["code"] for result in failed] == [2, 2]
    assert failed[0]["files"] == [f"answers.jsonl.{rank}-of-2" for rank in range(2)]
    # Process 0 had all its batches; process 1 has the one that was left.
    assert [result["done"] for result in results(shared, "evaluate")] == [0, 1]


def names() -> tuple[str, str]:
    return "one", "two"


def test_parts_of_another_number_of_processes_are_never_mixed(tmp_path: Path) -> None:
    def opened(ranks: Ranks) -> OutcomeFile:
        token = _ranks.set(ranks)
        try:
            return OutcomeFile(tmp_path / "answers", {"samples": "x"})
        finally:
            _ranks.reset(token)

    outcome = Outcome("dense", 0, "all", "a", True, 0.0, 5, 2, 15, 10)
    opened(Ranks(0, 2)).add([outcome])
    assert opened(Ranks(0, 2)).outcomes("dense") == {0: outcome}
    assert opened(Ranks(0, 3)).outcomes("dense") == {}
    assert opened(Ranks(1, 2)).outcomes("dense") == {}
    assert opened(Ranks()).outcomes("dense") == {}
    (tmp_path / "answers.0-of-2").rename(tmp_path / "answers.1-of-2")
    with pytest.raises(ValueError, match="an unfinished run with process 0 of 2"):
        opened(Ranks(1, 2))


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_every_sample_belongs_to_one_process(size: int, batch_size: int) -> None:
    parts = [Ranks(rank, size).positions(11, batch_size) for rank in range(size)]
    assert sorted(at for part in parts for at in part) == list(range(11))
    for part in parts:  # in batches of one process
        for begin in range(0, len(part), batch_size):
            batch = part[begin : begin + batch_size]
            assert batch[0] % batch_size == 0 and batch == list(range(batch[0], batch[-1] + 1))


def test_commands_that_share_nothing_run_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    check_is_alone("sweep")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="sweep must run in one process, got 2"):
        check_is_alone("sweep")
