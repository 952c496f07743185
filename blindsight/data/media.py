"""Open the images and videos of a dataset, in whatever form a row holds them, for processors.

Shapes: N frames, W and H in pixels.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import io
import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from blindsight.error_text import on_one_line, shortened

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image


@dataclass(frozen=True, eq=False)
class Video:
    """A video of a prompt: frames that are chosen already, or a file to choose frames from.

    Attributes:
        frames: In RGB, all of one size; none if there is a file.
        path: Path of the file, or None.
        data: Contents of the file, if there is no path.
        fps: Frames per second, of ``frames`` or to take from the file; None if not given.
        num_frames: How many frames to take from the file instead.
    """

    frames: tuple[Image.Image, ...] = ()
    path: str | None = None
    fps: float | None = None
    num_frames: int | None = None
    data: bytes | None = None

    @property
    def size(self) -> int:
        """A number that orders videos of a kind: pixels of the frames, or bytes of the file."""
        if self.path is not None:
            return os.path.getsize(self.path)
        if self.data is not None:
            return len(self.data)
        return sum(frame.width * frame.height for frame in self.frames)

    def identity(self) -> object:
        """Return what tells this video from others: pixels, or name and size of the file."""
        frames = [(frame.size, _digest(frame.tobytes())) for frame in self.frames]
        name = None if self.path is None else os.path.basename(self.path)
        encoded = [] if self.data is None else [_digest(self.data)]
        return name, self.size, self.fps, self.num_frames, frames, *encoded


def open_image(image: Any, what: str, folder: Path | None, *, decode: bool = True) -> Image.Image:
    """Return an image in RGB.

    Args:
        image: A path, a ``data:`` URL, an opened image, encoded bytes, pixels ``[H, W, 3]`` as a
            uint8 array of numpy, or a mapping with ``path`` or ``bytes``, which is how ``datasets``
            keeps images that it has not decoded.
        what: What error messages call the image.
        folder: The folder that paths are relative to.
        decode: If false, only the header is read, and the returned image has no pixels.

    Raises:
        ValueError: It is none of these, or damaged.
    """
    from PIL import Image, ImageOps

    def upright(opened: Image.Image) -> Image.Image:
        """Return an image turned as its EXIF data says, which transformers does as well."""
        if not decode:
            return opened
        turned = ImageOps.exif_transpose(opened)
        return (_in_bytes(turned) if turned.mode[0] in "IF" else turned).convert("RGB")

    if isinstance(image, Mapping):
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    if isinstance(image, str) and re.match(r"https?://", image):
        raise ValueError(f"{what} must be a file, got {shortened(image)}. Download it first.")
    try:
        if isinstance(image, str) and image.startswith("data:"):
            image = _decoded(image, what)
        if isinstance(image, (str, os.PathLike)):
            with Image.open(_in(folder, image)) as opened:
                return upright(opened)
        if isinstance(image, bytes):
            with Image.open(io.BytesIO(image)) as opened:
                return upright(opened)
        if isinstance(image, np.ndarray):
            image = Image.fromarray(image)
        if isinstance(image, Image.Image):
            return upright(image)
    except Exception as error:  # Pillow raises all kinds of errors for damaged or huge files
        raise ValueError(
            f"{what} must be an image file, got {shortened(str(error))}. Replace the file, or "
            "remove the sample."
        ) from error
    raise ValueError(
        f"{what} must be a path, an opened image or bytes, got {type(image).__name__}."
    )


def _in_bytes(image: Image.Image) -> Image.Image:
    """Return a grey image of 8 bits of one of 16, of which Pillow would cut off what is brighter.

    Raises:
        ValueError: Its values are not 0..65535: nothing tells which is white.
    """
    from PIL import Image

    values = np.asarray(image)
    lowest, highest = (values.min(), values.max()) if values.size else (0, 0)
    if image.mode == "F":
        raise ValueError("grey values must be integers, got floats")
    if lowest < 0 or highest > 0xFFFF:
        raise ValueError(f"grey values must be of 8 or 16 bits, got {lowest}..{highest}")
    is_of_8 = image.mode == "I" and highest <= 0xFF
    return Image.fromarray((values if is_of_8 else values // 257).astype(np.uint8))


_KEYS = ("frames", "path", "bytes", "fps", "num_frames")


def open_video(video: Any, what: str, folder: Path | None) -> Video:
    """Return a video with its frames opened, or with its file not yet opened.

    Args:
        video: A list of images; a path; an encoded video in bytes; or a mapping with ``frames``
            and ``fps``, or with ``path`` or ``bytes`` and one of ``fps`` and ``num_frames``.
        what, folder: As for :func:`open_image`.

    Raises:
        ValueError: It is none of these, its frames differ in size, or there is no such file.
    """
    if isinstance(video, Video):
        return video
    given = as_mapping(video)
    if isinstance(path := given.get("path"), str) and path.startswith("data:"):
        given = {**given, "bytes": _decoded(path, what)}
    if isinstance(given.get("bytes"), bytes):
        given.pop("path", None)  # its name, as datasets keeps it
    frames, path, data, fps, num_frames = map(given.get, _KEYS)
    is_encoded = isinstance(data, bytes) and len(data) > 0
    is_file = is_encoded or isinstance(path, (str, os.PathLike))
    if not (is_file or isinstance(frames, (list, tuple))) or not set(given).issubset(_KEYS):
        found = type(video).__name__
        if isinstance(video, Mapping):
            found = ", ".join(f"{name} ({type(x).__name__})" for name, x in given.items()) or "none"
        raise ValueError(
            f"{what} must be a list of frames, a path, bytes, or a mapping of {', '.join(_KEYS)}, "
            f"got {found}."
        )
    if frames is not None and (is_file or num_frames is not None):
        raise ValueError(f"{what} must be of frames and their fps, or of a file, got both.")
    if fps is not None and num_frames is not None:
        raise ValueError(f"{what} must say fps or num_frames, got both.")
    if fps is not None and not (_is_number(fps, Real) and 0 < fps < math.inf):
        raise ValueError(f"fps of {what} must be a positive number, got {fps!r}.")
    if num_frames is not None and not (_is_number(num_frames, Integral) and num_frames > 0):
        raise ValueError(f"num_frames of {what} must be a whole positive number, got {num_frames}.")
    if frames is not None:
        return _video_of_frames(frames, fps, what, folder)
    if is_encoded:
        return Video(fps=fps, num_frames=num_frames, data=data)
    file = _in(folder, given["path"])
    if not file.is_file():
        name = shortened(repr(path))
        raise ValueError(f"{what} must be a file, got {name}. Remove the sample, or add it.")
    return Video(path=os.fspath(file), fps=fps, num_frames=num_frames)


def as_mapping(video: Any) -> dict[str, Any]:
    """Return the mapping form of what :func:`open_video` takes, without entries that are None."""
    if isinstance(video, Mapping):
        return {name: value for name, value in video.items() if value is not None}
    if isinstance(video, (list, tuple)):
        return {"frames": video}
    return {"bytes" if isinstance(video, bytes) else "path": video}


def _decoded(url: str, what: str) -> bytes:
    """Return the contents of a ``data:`` URL."""
    try:
        return base64.b64decode(url.partition(",")[2], validate=True)
    except ValueError as error:
        raise ValueError(f"{what} must be in base64, got {shortened(url)}: {error}.") from None


def _is_number(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


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
    """Return what tells an image or video of a row from others, without opening files."""
    if isinstance(media, Mapping):
        return {name: identity_of(media[name], folder) for name in sorted(media)}
    if isinstance(media, (list, tuple)):
        return [identity_of(part, folder) for part in media]
    if isinstance(media, (str, os.PathLike)):
        name = os.fspath(media)
        if name.startswith("data:"):
            return _digest(name.encode())
        try:
            return name, _in(folder, media).stat().st_size
        except OSError:  # also for names that no file can have
            return name, -1
    if isinstance(media, Video):
        return media.identity()
    if media is None or isinstance(media, (int, float)):
        return media
    pixels = media if isinstance(media, bytes) else getattr(media, "tobytes", lambda: b"")()
    return _digest(pixels)


def _digest(pixels: bytes) -> str:
    return hashlib.sha256(pixels).hexdigest()


def video_arguments(processor: Any, videos: Sequence[Sequence[Video]]) -> dict[str, Any]:
    """Return the arguments of a processor that give it videos.

    Args:
        processor: A processor of transformers.
        videos: The videos of each prompt. Frames are taken as they are. A file is decoded and
            sampled as the video says, or else as the processor does by itself.

    Raises:
        ValueError: The processor takes no videos, or a file cannot be read.
        ImportError: No decoder of videos is installed.
    """
    part = getattr(processor, "video_processor", None)
    if part is None:
        raise ValueError(
            f"processor must take videos, got a {type(processor).__name__} without a video "
            "processor. If the model reads videos, that needs torchvision (pip install "
            '"blindsight[video]"), and the files of the model must have it.'
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
    """Return frames ``[N, H, W, 3]`` uint8, and the metadata that transformers wants."""
    from transformers.video_utils import VideoMetadata

    if video.frames:
        number, frames = len(video.frames), np.stack([np.asarray(x) for x in video.frames])
        return frames, VideoMetadata(number, fps=video.fps, frames_indices=list(range(number)))
    sample: Any = None
    if video.fps is not None or video.num_frames is not None:
        sample = partial(_evenly, video)
    elif video_processor.do_sample_frames:
        sample = video_processor.sample_frames
    name = "the video in bytes" if video.path is None else video.path
    try:
        with _as_file(video) as path:
            return cast("tuple[Any, Any]", _decode(path, sample, video_processor))
    except ImportError as error:
        raise ImportError(
            f"{name} needs a decoder of videos: {on_one_line(error)} Install one "
            '(pip install "blindsight[video]"), or give the frames as images.'
        ) from error
    except Exception as error:  # of whichever library decodes the file
        raise ValueError(
            f"{name} must be a video that can be read and sampled: "
            f"{on_one_line(error)} Or give its frames as images."
        ) from error


@contextmanager
def _as_file(video: Video) -> Iterator[str]:
    """Yield the path of a video's file, of a temporary one if it has no path."""
    if video.path is not None:
        yield video.path
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "video")
        file.write_bytes(cast("bytes", video.data))
        yield os.fspath(file)


def _evenly(video: Video, metadata: Any, **_: Any) -> NDArray[np.int64]:
    """Return which frames of a file to take: as many as asked for, evenly spaced from the first.

    Not all processors do what they are asked for.
    """
    total, number = metadata.total_num_frames, video.num_frames
    if number is None:
        if not metadata.fps:
            raise ValueError("it does not say its frames per second, so ask for num_frames.")
        number = min(total, max(1, round(total / metadata.fps * (video.fps or 1))))
    if number > total:
        raise ValueError(f"num_frames must be at most {total}, which it has, got {number}.")
    indices: NDArray[np.int64] = np.arange(number) * total // number
    return indices


def _decode(path: str, sample: Any, video_processor: Any) -> Any:
    if importlib.util.find_spec("av") is None:
        return video_processor.fetch_videos(path, sample_indices_fn=sample)
    from transformers.video_utils import load_video

    of_path: Any = load_video  # typed to take URLs, but takes paths too
    return of_path(path, backend="pyav", sample_indices_fn=sample)


def _in(folder: Path | None, path: str | os.PathLike[str]) -> Path:
    name = os.fspath(path).removeprefix("file://")
    return Path(name) if folder is None else folder / name
