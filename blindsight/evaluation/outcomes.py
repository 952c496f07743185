"""Answers of one model under many maskings, question by question, in a file that grows.

Every answer is written at once, so that an interrupted run can be resumed.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from blindsight.files import write_text
from blindsight.ranks import current_ranks
from blindsight.runtime.context import BlindsightWarning

FORMAT, VERSION = "blindsight-outcomes", 1

_FINISHED = "finished"  # a note: nothing is missing in the file
# What each part of the header says when it differs, with the value in the file.
_DIFFERENCES = {
    "format": "no outcomes",
    "version": "another version of this format",
    "weights": "another model or dtype",
    "rule": "another rule that finds images",
    "samples": "other samples",
    "processor": "another processor",
    "max_new_tokens": "max_new_tokens={}",
    "is_right": "another is_right",
    "process": "process {}",
}


@dataclass(frozen=True)
class Outcome:
    """The answer to one question under one masking.

    Attributes:
        point: Key of the masking.
        sample: Position among the samples.
        task: The kind of question.
        answer: What was decoded, normalised.
        is_right: Whether it is right, by default if it equals the expected answer, normalised;
            None without an expected answer.
        kl: KL(dense || this) of the next token after the prompt, in nats.
        num_tokens: Length of the prompt.
        num_spans: Number of images in the prompt.
        pairs: Pairs of a query and a key that the prefill computed, in all layers and heads.
        rows: Tokens that the layers computed, all layers together.
    """

    point: str
    sample: int
    task: str
    answer: str
    is_right: bool | None
    kl: float
    num_tokens: int
    num_spans: int
    pairs: int
    rows: int


class OutcomeFile:
    """A file of JSON lines: a header that identifies the run, then one outcome per line.

    Args:
        path: The file, created if it is missing; None keeps everything in memory. In a
            :func:`~blindsight.ranks.shared_run` each process writes a part, named after it.
        header: What must be the same for the run to be resumed: the model, the questions.

    Raises:
        ValueError: The file is of another run, which was not finished, or not one of these files.
    """

    def __init__(self, path: str | os.PathLike[str] | None, header: Mapping[str, str]) -> None:
        self._path = self._whole = None if path is None else Path(path)
        self._header = {"format": FORMAT, "version": VERSION, **header}
        self._unwritten: list[Mapping[str, Any]] = []  # at the top of the file
        self._outcomes: dict[str, dict[int, Outcome]] = {}
        self.notes: dict[str, Any] = {}
        ranks = current_ranks()
        if ranks.size == 1 or path is None:
            self._open(self._header)
        else:
            # What earlier runs finished together, and what this process has done of this one.
            for line in self._known_lines(self._header) or ():
                self._take(line)
            self._path = ranks.own(path)
            self._open({**self._header, "process": ranks.name})

    def finish(self) -> None:
        """Note that nothing is missing: another run may then have the name of the file."""
        if not self.notes.get(_FINISHED):
            self.note(_FINISHED, True)

    def merge(self) -> None:
        """Bring together the outcomes of all processes of a shared run, in the order of samples.

        Afterwards every process knows all of them. The first process writes the whole file and
        continues it; the parts are removed.
        """
        ranks = current_ranks()
        if ranks.size == 1:
            return
        for outcomes, notes in ranks.gather(lambda: (self._outcomes, self.notes)):
            for key, found in outcomes.items():
                self._outcomes.setdefault(key, {}).update(found)
            self.notes.update(notes)
        rows: list[dict[str, Any]] = [self._header]
        for key in self._outcomes:
            by_sample = sorted(self._outcomes[key].items())
            self._outcomes[key] = dict(by_sample)
            rows += [asdict(outcome) for _, outcome in by_sample]
        rows += [{"note": name, "value": value} for name, value in self.notes.items()]
        part, whole = self._path, self._whole
        self._path, self._unwritten = whole if ranks.is_first else None, []
        if whole is not None and part is not None:
            target = whole
            ranks.on_first(lambda: write_text(target, _lines(rows)))
            part.unlink(missing_ok=True)  # only now that the whole is on the disk

    def _open(self, header: Mapping[str, Any]) -> None:
        known = self._known_lines(header)
        # With the first outcome: a run that is refused before must not be gone on with.
        self._unwritten = [header] if known is None else []
        for line in known or ():
            self._take(line)

    def _known_lines(self, header: Mapping[str, Any]) -> list[dict[str, Any]] | None:
        """Return what a file of this run holds, or None if there is none.

        A last line that was cut off in the middle is removed, of no file but of this run.
        """
        if self._path is None or not self._path.exists():
            return None
        data = self._path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        lines = self._parsed(whole)
        if lines:
            self._check(lines[0], header)
        elif not _lines([header]).encode().startswith(data):
            raise self._no_outcomes("a line without an end")
        if len(whole) < len(data):
            with open(self._path, "r+b") as file:
                file.truncate(len(whole))
        return lines[1:] if lines else None

    def _parsed(self, data: bytes) -> list[dict[str, Any]]:
        try:
            return _parse_lines(data)
        except ValueError as error:
            raise self._no_outcomes(str(error)) from None

    def _no_outcomes(self, found: str) -> ValueError:
        return ValueError(
            f"{self._path} must be a file of outcomes, got {found}. Give another, or remove it."
        )

    def outcomes(self, key: str) -> dict[int, Outcome]:
        """Return the known outcomes of a point, by sample."""
        return self._outcomes.get(key, {})

    def has(self, key: str, samples: Iterable[int]) -> bool:
        """Whether all of these samples are answered at a point."""
        known = self.outcomes(key)
        return all(at in known for at in samples)

    def add(self, outcomes: Sequence[Outcome]) -> None:
        """Write the answers to a batch of questions."""
        if self.notes.get(_FINISHED):
            self.note(_FINISHED, False)  # other maskings of the same run
        self._write([asdict(outcome) for outcome in outcomes])
        for outcome in outcomes:
            self._outcomes.setdefault(outcome.point, {})[outcome.sample] = outcome

    def note(self, name: str, value: Any) -> None:
        """Write something else that should not be measured again."""
        self._write([{"note": name, "value": value}])
        self.notes[name] = value

    def _take(self, line: dict[str, Any]) -> None:
        if "note" in line:
            self.notes[line["note"]] = line["value"]
        else:
            outcome = Outcome(**line)
            self._outcomes.setdefault(outcome.point, {})[outcome.sample] = outcome

    def _check(self, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
        if found.get("format") != FORMAT:
            raise self._no_outcomes("lines of another kind")
        if different := _differences(found, expected):
            raise ValueError(
                f"{self._path} must be of the run that is to go on, got an unfinished run with "
                f"{', '.join(different)}. Finish that one, give another folder, or remove the file "
                "to begin anew."
            )

    def _write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(_lines([*self._unwritten, *rows]))
            file.flush()
            os.fsync(file.fileno())
        self._unwritten = []


def set_aside_finished(path: str | os.PathLike[str], header: Mapping[str, str]) -> None:
    """Rename the file of another run, with a warning, if that run was finished.

    Files of unfinished runs, and of something else, stay: :class:`OutcomeFile` refuses them.
    """
    path = Path(path)
    try:
        lines = _parse_lines(path.read_bytes())
    except (OSError, ValueError):
        return
    if not lines or lines[0].get("format") != FORMAT:
        return
    different = _differences(lines[0], {"format": FORMAT, "version": VERSION, **header})
    finished = [line["value"] for line in lines if line.get("note") == _FINISHED]
    if not different or not finished or not finished[-1]:
        return
    number = 1
    while (kept := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
        number += 1
    path.rename(kept)
    warnings.warn(
        f"{path} had the answers of a finished run with {', '.join(different)}. They are kept as "
        f"{kept.name}, and this run begins anew.",
        BlindsightWarning,
        stacklevel=2,
    )


def _parse_lines(data: bytes) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in data.splitlines()]
    if not all(isinstance(line, dict) for line in lines):
        raise ValueError("lines of another kind")
    return lines


def _differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Return in words where the header of a file is not the expected one."""
    return [
        _DIFFERENCES.get(name, f"another {name}").format(found.get(name))
        for name in dict.fromkeys([*expected, *found])
        if found.get(name) != expected.get(name)
    ]


def _lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows)
