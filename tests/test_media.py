"""Videos of datasets: what rows may hold, what processors are given, and what comes of it."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.video_utils import VideoMetadata

import models
from blindsight import Profile, TemplateRule
from blindsight.calibrate import calibrate
from blindsight.data.processors import model_inputs
from blindsight.data.samples import load_samples
from blindsight.evaluate import evaluate
from family_processors import HAS_TORCHVISION
from models import tiny_model
from processors import tiny_processor, with_videos

Entry = dict[str, str]


def frame(shade: int, width: int = 16, height: int = 8) -> Image.Image:
    return Image.new("RGB", (width, height), (shade, 255 - shade, 7))


def clip(shade: int = 0, number: int = 4, **size: int) -> list[Image.Image]:
    return [frame(shade + 20 * at, **size) for at in range(number)]


def row(*kinds: str, text: str = "what?", **media: Any) -> dict[str, Any]:
    content: list[Entry] = [{"type": kind} for kind in kinds]
    content.append({"type": "text", "text": text})
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "a"}]
    return {"messages": turns, **media}


def rows(number: int = 4) -> list[dict[str, Any]]:
    """Prompts of two videos and an image, and of one video, in turn."""
    several = row("video", "image", "video", videos=[clip(0), clip(9, 6)], images=[frame(3)])
    single = row("video", text="and this?", video={"frames": clip(5), "fps": 4})
    return [several if at % 2 == 0 else single for at in range(number)]


def test_frames_in_files_and_in_memory(tmp_path: Path) -> None:
    for at, opened in enumerate(clip()):
        opened.save(tmp_path / f"{at}.png")
    names = [f"{at}.png" for at in range(4)]
    lines = [row("video", video=names), row("video", videos=[{"frames": names, "fps": 2}])]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    samples = load_samples(tmp_path)
    (bare,), (timed,) = samples[0].videos, samples[1].videos
    (expected,) = load_samples([row("video", videos=[clip()])])[0].videos
    assert bare.identity() == expected.identity() != timed.identity()
    assert (bare.fps, timed.fps) == (None, 2)
    before = samples.digest()
    frame(99, width=64).save(tmp_path / "3.png")
    assert load_samples(tmp_path).digest() != before
    with pytest.raises(ValueError, match=r"frames of video 1 of sample 0 .* 16 x 8, 64 x 8\."):
        load_samples(tmp_path)[0]


@pytest.mark.parametrize(
    ("video", "message"),
    [
        ([], "must be of one size, got none"),
        (3, "must be a list of frames, a path, bytes, or a mapping .*, got int"),
        (np.zeros((2, 8, 16, 3)), "must be a list of frames, .*, got ndarray"),
        ({}, "must be a list of frames, .*, got none"),
        ({"bytes": b""}, r"must be a list .*, got bytes \(bytes\)"),
        ({"frames": "a.png"}, r"must be a list .*, got frames \(str\)"),
        ({"path": __file__, "FPS": 1}, r"must be a list .*, got path \(str\), FPS \(int\)"),
        ("nothing.mp4", "video 1 of sample 0 of list must be a file, got 'nothing.mp4'"),
        ({"path": __file__, "fps": 1, "num_frames": 8}, "must say fps or num_frames, got both"),
        ({"path": __file__, "frames": clip()}, "must be of frames and their fps, or of a file"),
        ({"num_frames": 2, "frames": clip()}, "must be of frames and their fps, or of a file"),
        ({"path": __file__, "fps": -1}, "fps of video 1 .* positive number, got -1"),
        ({"path": __file__, "fps": float("inf")}, "fps of video 1 .* positive number, got inf"),
        ({"path": __file__, "fps": True}, "fps of video 1 .* positive number, got True"),
        ({"path": __file__, "num_frames": 2.5}, "num_frames of video 1 .* whole positive number"),
        (["nothing.png"], "frame 1 of video 1 of sample 0 of list must be an image file"),
    ],
)
def test_what_is_no_video(video: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_samples([row("video", videos=[video])])[0]


def test_columns_without_media_are_none() -> None:
    """Tables have columns for rows of either kind."""
    rows_of_both = [
        row("video", videos=[clip()], images=None),
        row("image", videos=None, image=frame(1)),
        row("image", "image", video=[], image=[frame(1), frame(2)]),
    ]
    samples = load_samples(rows_of_both)
    assert [len(x.videos) for x in samples] == [1, 0, 0]
    assert [len(x.images) for x in samples] == [0, 1, 2]
    plain = [{k: v for k, v in each.items() if v} for each in rows_of_both]
    assert load_samples(plain)[:1].digest() != load_samples(plain)[1:2].digest()


def test_the_shape_of_frames_counts() -> None:
    flat, tall = (row("video", video=clip(width=w, height=h)) for w, h in ((16, 8), (8, 16)))
    (one,), (other,) = (load_samples([each])[0].videos for each in (flat, tall))
    assert one.identity() != other.identity()


def test_each_video_has_its_place() -> None:
    with pytest.raises(ValueError, match=r"one video for each .* got 2 videos for 1"):
        load_samples([row("video", videos=[clip(), clip()])])[0]
    with pytest.raises(ValueError, match="must have images or videos, got only messages"):
        load_samples([row()])


def test_a_batch_of_videos_becomes_frames_that_are_spans() -> None:
    processor = with_videos(tiny_processor())
    inputs = model_inputs(processor, list(load_samples(rows(2))))
    assert inputs["video_grid_thw"][:, 0].tolist() == [2, 3, 2]  # two frames each are one
    (given,) = processor.video_processor.given
    assert given["do_sample_frames"] is False
    assert [each.fps for each in given["video_metadata"]] == [None, None, 4]
    assert [len(each.frames_indices) for each in given["video_metadata"]] == [4, 6, 4]
    model = tiny_model("qwen2_5_vl")
    template = TemplateRule.from_config(model.config).template_of_inputs(inputs)
    assert template.span_id.amax(1).tolist() == [6, 2]  # the image is one of six
    with torch.no_grad():
        assert model(**inputs).logits.shape[:2] == inputs["input_ids"].shape


def test_a_processor_without_videos() -> None:
    with pytest.raises(ValueError, match=r"Qwen2_5_VLProcessor without .* needs torchvision"):
        model_inputs(tiny_processor(), list(load_samples(rows(1))))


@pytest.mark.skipif(importlib.util.find_spec("av") is not None, reason="av reads the file instead")
@pytest.mark.parametrize("samples_itself", [False, True])
def test_a_file_is_read_by_the_processor_and_sampled_as_asked(
    samples_itself: bool, tmp_path: Path
) -> None:
    processor = with_videos(tiny_processor())
    processor.video_processor.do_sample_frames = samples_itself

    def fetch_videos(path: str, sample_indices_fn: Any) -> tuple[Any, VideoMetadata]:
        if path.endswith("broken.mp4"):
            raise RuntimeError("no frames.")
        if path.endswith("unknown.mp4"):
            raise ImportError("no such library.")
        assert Path(path).read_bytes() == content
        metadata = VideoMetadata(24, fps=8.0)
        taken = range(24) if sample_indices_fn is None else sample_indices_fn(metadata=metadata)
        metadata.frames_indices = list(taken)
        return np.zeros((len(taken), 8, 16, 3), dtype=np.uint8), metadata

    processor.video_processor.fetch_videos = fetch_videos
    content = b"of another library"
    for name in ("a.mp4", "broken.mp4", "unknown.mp4"):
        (tmp_path / name).write_bytes(content)
    asked = [{}, {"fps": 2}, {"num_frames": 4}, {"num_frames": 25}]
    files = [*[{"path": "a.mp4", **how} for how in asked], "broken.mp4", "unknown.mp4"]
    lines = [row("video", video=file) for file in files]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    samples = load_samples(tmp_path)
    found = [model_inputs(processor, [samples[at]])["video_grid_thw"][0, 0] for at in range(3)]
    assert list(map(int, found)) == [1 if samples_itself else 12, 3, 2]
    metadata = [given["video_metadata"][0] for given in processor.video_processor.given]
    assert list(metadata[1].frames_indices) == [0, 4, 8, 12, 16, 20]
    for at, kind, message in (
        (3, ValueError, "a.mp4 must be .*: num_frames must be at most 24, which it has, got 25"),
        (
            4,
            ValueError,
            "broken.mp4 must be a video that can be read and sampled: no frames. Or give",
        ),
        (5, ImportError, r"unknown.mp4 needs a decoder of videos: no such library. .*\[video\]"),
    ):
        with pytest.raises(kind, match=message):
            model_inputs(processor, [samples[at]])
    in_bytes = load_samples([row("video", video={"bytes": content, "path": "a", "fps": 2})])
    assert int(model_inputs(processor, [in_bytes[0]])["video_grid_thw"][0, 0]) == 3
    (video,), (alike,) = in_bytes[0].videos, load_samples([row("video", video=content)])[0].videos
    assert video.size == alike.size == len(content) and video.identity() != alike.identity()


def test_videos_are_calibrated_and_evaluated_on() -> None:
    model, processor = tiny_model("qwen2_5_vl"), with_videos(tiny_processor())
    profile = calibrate(model, processor, rows(), batch_size=2, budget=1e-4)
    assert int(profile.calibration["num_samples"]) == 4
    assert bool((profile.evidence["effect"] > 0).any())  # a video restricts: its frames are spans
    sparse = Profile.for_model(model, "document")
    found = evaluate(model, processor, load_samples(rows()), sparse, repeats=0, batch_size=2)
    assert found.sparse.attention_flops < found.dense.attention_flops
    assert found.sparse.kl_mean > 0


@pytest.mark.skipif(not HAS_TORCHVISION, reason="needs torchvision: blindsight[video]")
@pytest.mark.parametrize("source", ["frames", "path", "bytes"])
def test_a_processor_of_transformers(source: str, tmp_path: Path) -> None:
    from transformers import Qwen2VLVideoProcessor

    if source != "frames":
        av = pytest.importorskip("av", reason="needs av: blindsight[video]")
        with av.open(str(tmp_path / "a.mp4"), "w") as file:
            stream = file.add_stream("mpeg4", rate=8)
            stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
            for opened in [*clip(number=10, width=64, height=32)]:
                file.mux(stream.encode(av.VideoFrame.from_image(opened)))
            file.mux(stream.encode())
        video: Any = {"path": str(tmp_path / "a.mp4"), "fps": 3}  # 4 frames of 10, at 8 a second
        if source == "bytes":
            video["bytes"] = (tmp_path / "a.mp4").read_bytes()
            (tmp_path / "a.mp4").unlink()
    else:
        video = {"frames": clip(width=64, height=32), "fps": 2}
    processor = tiny_processor()
    processor.video_processor = Qwen2VLVideoProcessor(
        patch_size=models.PATCH_SIZE,
        merge_size=models.MERGE_SIZE,
        temporal_patch_size=models.TEMPORAL_PATCH_SIZE,
        size={"shortest_edge": 8 * 8, "longest_edge": 64 * 64},
    )
    inputs = model_inputs(processor, list(load_samples([row("video", video=video)])))
    assert inputs["video_grid_thw"].tolist() == [
        [2, 32 // models.PATCH_SIZE, 64 // models.PATCH_SIZE]
    ]
    model = tiny_model("qwen2_5_vl")
    template = TemplateRule.from_config(model.config).template_of_inputs(inputs)
    assert template.span_id.amax() == 2
    with torch.no_grad():
        model(**inputs)
