"""What was measured of a model, prompt by prompt, and the file that keeps it during the run.

Shapes: N prompts, L layers, H query heads, C categories, R regions.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from blindsight.files import write_whole

FORMAT = "blindsight-measurements"

# What is said where a setting differs whose values mean nothing to people.
_DIFFERENCES = {
    "model": "another model",
    "weights": "other weights or another dtype",
    "samples": "other samples",
    "processor": "another processor",
    "rule": "another rule that finds images and their sinks",
}
_SAVING = 0.05  # the share of the time that saving may take


@dataclass(frozen=True, eq=False)
class Measurements:
    """What was measured of each prompt, over the rows that categories restrict.

    Attributes:
        num_rows: ``[N]`` float32, the number of those rows; 0 for a prompt with fewer than two
            images.
        error: ``[N, L, H, C]`` float32, the norm of the change that a category makes to a head's
            output, relative to the norm of the output.
        lost_mass: ``[N, L, H, C]`` float32, the mean attention weight that a category hides.
        mass: ``[N, L, H, R]`` float32, the mean attention weight in each region.
        offset_mass: ``[N, L, H, NUM_OFFSETS + 1]`` float32, the mean attention weight on tokens
            of other spans, by offset; see :class:`~blindsight.calibration.probe.Losses`.
        effect: ``[N, L, H, C]`` float32, how far a category moves the next token after the prompt:
            the square root of the KL divergence in nats, to first order, as far as the likeliest
            tokens tell (four of them); nan if not measured.
        pairs: ``[N, L, C]`` float32, the pairs of a query and a key that a head computes.
    """

    num_rows: Tensor
    error: Tensor
    lost_mass: Tensor
    mass: Tensor
    offset_mass: Tensor
    effect: Tensor
    pairs: Tensor

    def __len__(self) -> int:
        return len(self.num_rows)

    def tensors(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def join(cls, parts: Sequence[Measurements]) -> Measurements:
        """Return the measurements of several sets of prompts as one, in order."""
        return cls(**{f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(cls)})


class MeasurementFile:
    """A file for what has been measured so far; it is complete at any time."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self._path = path
        self._settings = {name: str(value) for name, value in settings.items()}
        self._written = time.monotonic()
        self._cost = 0.0

    def load(self) -> list[Measurements]:
        """Return what the file holds; nothing if it does not exist.

        Raises:
            ValueError: The file is of another measurement, or not one of these files.
        """
        if not self._path.exists():
            return []
        advice = "Delete it to start over."
        try:
            with safe_open(self._path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"checkpoint must be one that calibration wrote, got {self._path}: {error}. "
                f"{advice}"
            ) from None
        if metadata.get("format") != FORMAT:
            raise ValueError(
                f"checkpoint must be one that calibration wrote, got {self._path} with format "
                f"{metadata.get('format')!r}. {advice}"
            )
        found = json.loads(metadata["settings"])
        different = [
            _DIFFERENCES.get(name, f"{name} {found.get(name)} and not {value}")
            for name, value in self._settings.items()
            if found.get(name) != value
        ]
        if different:
            raise ValueError(
                f"checkpoint {self._path} must be of this calibration, got an unfinished one with "
                f"{', '.join(different)}. Calibrate with the same settings to go on, give another "
                "checkpoint, or delete it to start over."
            )
        return [Measurements(**tensors)]

    def save(self, parts: Sequence[Measurements]) -> None:
        begin = time.monotonic()
        metadata = {"format": FORMAT, "settings": json.dumps(self._settings)}
        write_whole(self._path, serialize(Measurements.join(parts).tensors(), metadata))
        self._written = time.monotonic()
        self._cost = self._written - begin

    def save_now_and_then(self, parts: Sequence[Measurements]) -> None:
        """Save, unless saving would take too much of the time."""
        if self._cost <= _SAVING * (time.monotonic() - self._written):
            self.save(parts)
