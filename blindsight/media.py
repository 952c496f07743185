"""Images and videos of a dataset: opened from whatever a row holds, as processors take them.

Shapes: N frames, W and H in pixels.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True, eq=False)
class Video:
    """A video of a prompt: frames that were chosen already, or a file that they are chosen from.

    Attributes:
        frames: In RGB and of one size; none where there is a file.
        path: Of the file, or None.
        fps: Frames per second of these frames, or to take from the file; None if nobody said.
        num_frames: How many to take from the file instead.
    """

    frames: tuple[Image.Image, ...] = ()
    path: str | None = None
    fps: float | None = None
    num_frames: int | None = None

    @property
    def size(self) -> int:
        """Orders videos of a kind: pixels of the frames, bytes of the file."""
        if self.path is not None:
            return os.path.getsize(self.path)
        return sum(frame.width * frame.height for frame in self.frames)

    def identity(self) -> object:
        """Return what tells a video from others, pixels included, a file by name and size."""
        pixels = [hashlib.sha256(frame.tobytes()).hexdigest() for frame in self.frames]
        return self.path, self.size, self.fps, self.num_frames, pixels


def open_image(image: Any, what: str, folder: Path | None) -> Image.Image:
    """Return an image in RGB.

    Args:
        image: A path, an opened image, encoded bytes, or a mapping with one of these, as
            ``datasets`` keeps what it has not decoded.
        what: What to call it in an error.
        folder: What paths are relative to.

    Raises:
        ValueError: It is none of these, or damaged.
    """
    from PIL import Image

    if isinstance(image, Mapping):
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    try:
        if isinstance(image, (str, os.PathLike)):
            with Image.open(_in(folder, image)) as opened:
                return opened.convert("RGB")
        if isinstance(image, bytes):
            with Image.open(io.BytesIO(image)) as opened:
                return opened.convert("RGB")
        if isinstance(image, Image.Image):
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for damaged files
        raise ValueError(
            f"{what} must be an image file, got {error}. Replace the file, or remove the sample."
        ) from error
    raise ValueError(
        f"{what} must be a path, an opened image or bytes, got {type(image).__name__}."
    )


def open_video(video: Any, what: str, folder: Path | None) -> Video:
    """Return a video, its frames opened, its file not.

    Args:
        video: A list of images; a path; or a mapping with ``frames`` and ``fps``, or with ``path``
            and one of ``fps`` and ``num_frames``.
        what, folder: As for :func:`open_image`.

    Raises:
        ValueError: It is none of these, its frames are not of one size, or there is no such file.
    """
    given = video if isinstance(video, Mapping) else {"frames": video}
    if isinstance(video, (str, os.PathLike)):
        given = {"path": video}
    names = ("frames", "path", "fps", "num_frames")
    source, path, fps, num_frames = (given.get(name) for name in names)
    for name, number, kinds in (("fps", fps, (int, float)), ("num_frames", num_frames, int)):
        if number is not None and not (isinstance(number, kinds) and number > 0):
            raise ValueError(f"{name} of {what} must be a positive number, got {number!r}.")
    if isinstance(source, (list, tuple)):
        return _video_of_frames(source, fps, what, folder)
    if not isinstance(path, (str, os.PathLike)):
        found = f"a mapping of {', '.join(map(str, given))}" if given is video else repr(video)[:60]
        raise ValueError(
            f"{what} must be a list of frames, a path, or a mapping with frames or a path, got "
            f"{found}."
        )
    if fps is not None and num_frames is not None:
        raise ValueError(f"{what} must say fps or num_frames, got both.")
    file = _in(folder, path)
    if not file.is_file():
        raise ValueError(f"{what} must be a file, got {path!r}. Remove the sample, or add it.")
    return Video(path=os.fspath(file), fps=fps, num_frames=num_frames)


def _video_of_frames(
    frames: Sequence[Any], fps: float | None, what: str, folder: Path | None
) -> Video:
    opened = tuple(
        open_image(frame, f"frame {number} of {what}", folder)
        for number, frame in enumerate(frames, start=1)
    )
    sizes = sorted({frame.size for frame in opened})
    if len(sizes) != 1:
        found = ", ".join(f"{width} x {height}" for width, height in sizes) or "none"
        raise ValueError(f"frames of {what} must be of one size, got {found}.")
    return Video(opened, fps=fps)


def identity_of(media: Any, folder: Path | None) -> object:
    """Return what tells an image or a video of a row from others, without opening files."""
    if isinstance(media, Mapping):
        return {name: identity_of(media[name], folder) for name in sorted(media)}
    if isinstance(media, (list, tuple)):
        return [identity_of(part, folder) for part in media]
    if isinstance(media, (str, os.PathLike)):
        path = _in(folder, media)
        return os.fspath(media), path.stat().st_size if path.is_file() else -1
    if media is None or isinstance(media, (int, float)):
        return media
    pixels = media if isinstance(media, bytes) else getattr(media, "tobytes", lambda: b"")()
    return hashlib.sha256(cast(bytes, pixels)).hexdigest()


def video_arguments(processor: Any, videos: Sequence[Sequence[Video]]) -> dict[str, Any]:
    """Return what a processor is given for videos.

    Args:
        processor: Of transformers.
        videos: Of each prompt. Frames are taken as they are. A file is decoded, and
            sampled as it says, or as the processor does by itself.

    Raises:
        ValueError: The processor takes no videos, or a file cannot be read.
    """
    part = getattr(processor, "video_processor", None)
    if part is None:
        raise ValueError(
            f"processor must take videos, got a {type(processor).__name__} without a video "
            "processor. Install torchvision, if the model reads videos: pip install "
            '"blindsight[video]".'
        )
    found = [[_frames_of(video, part) for video in of_prompt] for of_prompt in videos]
    return {
        "videos": [[frames for frames, _ in of_prompt] for of_prompt in found],
        "videos_kwargs": {
            "video_metadata": [metadata for of_prompt in found for _, metadata in of_prompt],
            "do_sample_frames": False,
        },
    }


def _frames_of(video: Video, video_processor: Any) -> tuple[Any, Any]:
    """Return frames ``[N, H, W, 3]`` uint8, and what transformers wants to know of them."""
    from transformers.video_utils import VideoMetadata

    if video.path is None:
        number, frames = len(video.frames), np.stack([np.asarray(x) for x in video.frames])
        return frames, VideoMetadata(number, fps=video.fps, frames_indices=list(range(number)))
    sample = None
    asked = {"fps": video.fps, "num_frames": video.num_frames}
    if video_processor.do_sample_frames or any(x is not None for x in asked.values()):
        sample = partial(video_processor.sample_frames, **asked)
    try:
        return cast("tuple[Any, Any]", _decode(video.path, sample, video_processor))
    except Exception as error:  # of whichever library decodes
        raise ValueError(
            f"{video.path} must be a video that can be read: {' '.join(str(error).split())} "
            'Decoders come with pip install "blindsight[video]"; or give its frames as images.'
        ) from error


def _decode(path: str, sample: Any, video_processor: Any) -> Any:
    if importlib.util.find_spec("av") is None:
        return video_processor.fetch_videos(path, sample_indices_fn=sample)
    from transformers.video_utils import load_video

    of_path: Any = load_video  # which is said to take URLs, and takes paths
    return of_path(path, backend="pyav", sample_indices_fn=sample)


def _in(folder: Path | None, path: str | os.PathLike[str]) -> Path:
    return Path(path) if folder is None else folder / path
