"""The command line: help, errors in one line, what `show` prints, and a tiny demo."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import CONFIG_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

import blindsight
import family_models
from blindsight.cli import main
from blindsight.cli.models import load_model
from blindsight.demo import DemoOptions, run_demo
from blindsight.fingerprints import in_words
from blindsight.profile import Profile
from blindsight.ranks import local_device
from models import tiny_model

TINY = ["--tokens", "300", "--num-images", "4", "--layers", "2", "--inner", "eager"]


@pytest.fixture
def profile_path(tmp_path: Path) -> Path:
    categories = [[0, 1, 2, 3], [2, 2, 2, 0]]
    path = tmp_path / "tiny.safetensors"
    Profile.for_model(tiny_model("qwen2_5_vl"), categories).save(path)
    return path


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 2
    output, error = capsys.readouterr()
    assert output == ""
    assert error.count("\n") == 1 and error.startswith("blindsight: error: ")
    return error


def test_help_names_the_commands_and_does_not_wait_for_torch() -> None:
    code = (
        "import sys\n"
        "from blindsight.cli import main\n"
        "try:\n"
        "    main(['--help'])\n"
        "finally:\n"
        "    assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for command in ("demo", "show", "explain", "select"):
        assert re.search(rf"^\s+{command}\s", found.stdout, re.MULTILINE)


@pytest.mark.parametrize("arguments", [[], ["calibrat"], ["show"], ["demo", "--dtype", "int8"]])
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: blindsight" in capsys.readouterr().err


def test_show_prints_counts_by_layer_and_the_digest(
    profile_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", str(profile_path)]) == 0
    output = capsys.readouterr().out
    assert Profile.load(profile_path).digest in output
    assert "architecture=qwen2_5_vl" in output and "layer_types=2 x full_attention" in output
    assert "attention FLOPs" not in output  # by hand: there is no telling
    rows = [line.split() for line in output.splitlines()[-5:]]
    assert rows == [
        ["layer", "DENSE", "SINK", "DOCUMENT", "DOCUMENT_SINK"],
        ["0", "1", "1", "1", "1"],
        ["1", "1", "0", "3", "0"],
        ["all", "2", "1", "4", "1"],
        ["25%", "12%", "50%", "12%"],
    ]


TESTBED = Path(__file__).parent.parent / "profiles" / "testbed.safetensors"


def test_select_chooses_by_another_budget(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new.safetensors"
    assert main(["select", str(TESTBED), "--budget", "0.05", "-o", str(path)]) == 0
    output = capsys.readouterr().out
    assert Profile.load(path) == Profile.load(TESTBED).at_budget(0.05)
    before, after = map(float, re.findall(r"budget \S+: ([\d.]+)% less", output))
    assert re.search(r"before, budget 0\.005: .*\n  after, budget 0\.05: .* heads changed", output)
    assert before < after
    assert main(["select", str(path), "--budget", "0.005", "-o", str(path)]) == 0
    assert Profile.load(path) == Profile.load(TESTBED)


def test_select_needs_evidence(profile_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = error_of(capsys, "select", str(profile_path), "--budget", "1", "-o", str(profile_path))
    assert "must hold the evidence of its calibration" in error


def test_a_missing_profile_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = str(tmp_path / "none.safetensors")
    assert missing in error_of(capsys, "show", missing)
    explain = ["explain", "--model", "nowhere", "--profile", missing]
    assert missing in error_of(capsys, *explain)


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="draws")
def test_a_picture_has_an_ending_that_is_known(
    profile_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = profile_path.with_name("heads.png")
    assert main(["show", str(profile_path), "--plot", str(picture.with_suffix(""))]) == 0
    assert capsys.readouterr().out.endswith(f"\nsaved to {picture}\n")
    assert picture.read_bytes().startswith(b"\x89PNG")
    found = error_of(capsys, "show", str(profile_path), "--plot", str(profile_path))
    assert "a picture's path must end in one of" in found and "got 'safetensors'" in found


def test_layers_of_one_type_are_counted() -> None:
    types = ["sliding_attention"] * 5 + ["full_attention"]
    for number, expected in (
        (1, "5 x sliding_attention, 1 x full_attention"),
        (6, "30 x sliding_attention, 6 x full_attention"),
    ):
        assert in_words({"layer_types": ",".join(types * number)})["layer_types"] == expected


def test_traceback_is_shown_on_request(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        main(["show", str(tmp_path / "none.safetensors"), "--traceback"])


def test_the_error_of_a_compiler_is_cut_to_a_line(
    profile_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    message = f"backend='inductor' raised:\nNo compiler found\n{'buf0 = ops.load(0)' * 9000}"

    def fail(path: Path) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(Profile, "load", fail)
    expected = "backend='inductor' raised: No compiler found (--traceback shows all)"
    assert error_of(capsys, "show", str(profile_path)) == f"blindsight: error: {expected}\n"
    message = "one line" * 9000
    assert len(error_of(capsys, "show", str(profile_path))) < 400
    message = "several lines\nthat are short"
    found = error_of(capsys, "show", str(profile_path))
    assert found == "blindsight: error: several lines that are short\n"


def test_a_folder_that_is_missing_or_without_images_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = str(tmp_path / "none")
    assert "existing folder" in error_of(capsys, "demo", "--images", missing)
    (tmp_path / "notes.txt").write_text("no image")
    found = error_of(capsys, "demo", "--images", str(tmp_path))
    assert ".jpg" in found and str(tmp_path) in found


def test_a_file_that_is_no_image_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    assert "broken.png" in error_of(capsys, "demo", "--images", str(tmp_path))


def test_a_family_that_is_not_listed_needs_a_rule(tmp_path: Path) -> None:
    kind = CONFIG_MAPPING["vipllava"]
    parts = {
        "text_config": family_models._sized(kind().text_config, family_models.TEXT_SIZES, {}),
        "vision_config": family_models._sized(kind().vision_config, family_models.VISION_SIZES, {}),
    }
    config = kind(**parts, **family_models._known(kind, family_models.SPECIAL_IDS))
    model_class = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[kind]
    model_class._from_config(config, attn_implementation="sdpa").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model type must be one of .* --rule, a file"):
        load_model(str(tmp_path), device="cpu")
    assert load_model(str(tmp_path), device="cpu", has_rule=True).config.model_type == "vipllava"


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == blindsight.__version__


def test_the_demo_asks_the_testbed_alone(capsys: pytest.CaptureFixture[str]) -> None:
    found = error_of(capsys, "demo", "--part", "answers", "--profile", "mine.safetensors")
    assert "part 'answers' runs on the testbed only, got profile of your own" in found


@pytest.mark.parametrize(
    ("command", "option", "value", "expected"),
    [
        ("demo", "--num-images", "0", "a whole number of at least 1"),
        ("calibrate", "--limit", "many", "a whole number of at least 1"),
        ("calibrate", "--budget", "nan", "a number of at least 0"),
        ("calibrate", "--quantile", "3", "a number from 0 to 1"),
        ("refine", "--budget", "low", "a number of at least 0"),
        ("evaluate", "--repeats", "-1", "a whole number of at least 0"),
    ],
)
def test_numbers_are_checked_before_anything_is_loaded(
    command: str, option: str, value: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([command, option, value])
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.endswith(f"argument {option}: must be {expected}, got {value!r}")


@pytest.mark.parametrize(("command", "resumes"), [("sweep", True), ("refine", False)])
def test_an_interruption_says_whether_the_command_resumes(
    command: str,
    resumes: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Profile, "load", interrupt)
    arguments = ["--model", "m", "--profile", "p", "--data", "d"]
    output = ["-o", "p.safetensors"] if command == "refine" else ["--no-plot"]
    assert main([command, *arguments, *output]) == 130
    expected = "; the same command resumes" if resumes else ""
    assert capsys.readouterr().err == f"blindsight: interrupted{expected}\n"


def test_the_profile_of_another_model_is_one_line(
    profile_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = error_of(capsys, "demo", *TINY, "--profile", str(profile_path))
    assert "model has num_heads=8" in error and "full_attention,full" not in error


def test_the_long_prompt_of_the_demo_agrees_with_its_reference() -> None:
    options = DemoOptions(
        num_images=4, tokens=300, layers=2, inner="eager", repeats=1, part="speed"
    )
    found = run_demo(options)
    assert found.answers is None and found.note == ""
    result = found.speed
    assert result is not None
    assert len(result.image_tokens) == 4
    assert len(set(result.image_tokens)) > 1
    assert 200 < result.num_tokens < 450
    assert 0 < result.flops.sparse < result.flops.dense
    assert result.difference is not None
    assert result.difference.sparse < 1e-4 * result.difference.magnitude
    assert result.difference.dense < 1e-4 * result.difference.magnitude
    # or the masks would not have mattered
    assert result.difference.effect > 0.01 * result.difference.magnitude
    assert result.difference.same_tokens == result.num_decoded == 8
    assert result.report.num_rewritten == len(result.report.rows)
    assert not result.report.missing_layers
    assert "random weights" in str(found)


def test_the_answers_of_the_demo_are_right_dense_and_sparse() -> None:
    found = run_demo(DemoOptions(inner="eager", part="answers"))
    assert found.speed is None and found.note == ""
    result = found.answers
    assert result is not None
    num = len(result.answers)
    assert len({answer.task for answer in result.answers}) == 6
    assert num >= 12
    assert sum(answer.dense == answer.right for answer in result.answers) >= 0.75 * num
    assert sum(answer.sparse == answer.right for answer in result.answers) >= 0.75 * num
    assert result.difference < 1e-4 * result.magnitude < result.effect
    assert result.flops.sparse < 0.7 * result.flops.dense
    text = str(found)
    assert all(answer.question in text for answer in result.answers)


def test_the_demo_without_the_testbed_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blindsight.demo.answers.MODEL", tmp_path / "gone")
    found = run_demo(DemoOptions(inner="eager", part="answers"))
    assert found.answers is None
    assert "gone is missing" in str(found)


def test_the_demo_takes_the_users_images_and_profile(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = torch.Generator().manual_seed(0)
    for number, (height, width) in enumerate([(60, 90), (200, 40), (64, 64)]):
        pixels = torch.randint(0, 256, (height, width, 3), generator=generator)
        Image.fromarray(pixels.byte().numpy()).save(tmp_path / f"{number}.png")
    arguments = ["demo", *TINY, "--images", str(tmp_path), "--no-check", "--dtype", "bfloat16"]
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert "bfloat16" in output and "4 images" in output
    assert "reference" not in output


def test_a_model_is_put_where_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("qwen2_5_vl").to(torch.bfloat16).save_pretrained(tmp_path)
    on_cpu = load_model(str(tmp_path), device="cpu")
    assert (on_cpu.dtype, on_cpu.device.type) == (torch.float32, "cpu")
    default = load_model(str(tmp_path), device=None)
    assert str(default.device).startswith(local_device())
    if find_spec("accelerate"):
        spread = load_model(str(tmp_path), device="auto")
        assert (spread.dtype, spread.device.type) == (torch.bfloat16, default.device.type)
    assert load_model(str(tmp_path), "bfloat16").dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"device must be one that torch .* got 'gpu'"):
        load_model(str(tmp_path), device="gpu")
    monkeypatch.setattr("blindsight.ranks.is_launched_with_others", lambda: True)
    with pytest.raises(ValueError, match=r"several processes, got 'auto'.*--device cuda"):
        load_model(str(tmp_path), device="auto")


def test_weights_that_do_not_fit_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("qwen2_5_vl")
    model.save_pretrained(tmp_path)
    model.lm_head.to("meta")  # as accelerate leaves what it keeps elsewhere
    monkeypatch.setattr(
        "transformers.AutoModelForImageTextToText.from_pretrained", lambda *_, **__: model
    )
    with pytest.raises(ValueError, match="must fit in the memory of the GPUs"):
        load_model(str(tmp_path), device="auto")
