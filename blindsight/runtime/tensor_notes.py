"""Notes on tensors, dropped when a tensor dies or is written to."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class _Batch(Generic[T]):
    """Tensors that are noted together: a note and a label for each."""

    def __init__(
        self, tensors: Sequence[Tensor], notes: Sequence[T], labels: Sequence[int]
    ) -> None:
        self.numbers = list(map(id, tensors))
        self.references = list(map(weakref.ref, tensors))
        self.versions = list(map(version_of, tensors))
        self.notes = notes
        self.labels = labels
        self._watches_end = False

    def holds(self, at: int, tensor: Tensor | None) -> bool:
        """Whether ``tensor`` is the one noted at this place, unchanged since."""
        if tensor is None or self.references[at]() is not tensor:
            return False
        return self.versions[at] == version_of(tensor)

    def watch(self, forget: Callable[[weakref.ref[Tensor]], None], ref: Any = weakref.ref) -> bool:
        """Call ``forget`` when a tensor dies that is still there; False if none is.

        The last, or else the first: a forward replaces the keys of its layers in turn, from
        whichever end, and the other end's live longest.
        """
        self._watches_end = not self._watches_end
        places = range(len(self.references))
        for at in reversed(places) if self._watches_end else places:
            tensor = self.references[at]()
            if tensor is not None:
                self.references[at] = ref(tensor, forget)  # modules may be gone at exit
                return True
        return False


class TensorNotes(Generic[T]):
    """What is known of tensors; a note dies with its tensor, and with any change of it.

    Tensors are noted together, as there are as many as layers for every token that is decoded, and
    little time. What is left of a note goes when all of its tensors are gone.
    """

    def __init__(self) -> None:
        self._batches: dict[int, _Batch[T]] = {}  # by the ids of their tensors
        # Garbage collection may end the life of a tensor in the midst of writing a note.
        self._lock = threading.RLock()

    def get(self, tensor: Tensor) -> T | None:
        batch = self._batches.get(id(tensor))
        if batch is None:
            return None
        at = batch.numbers.index(id(tensor))
        return batch.notes[at] if batch.holds(at, tensor) else None

    def find_equal(self, tensor: Tensor, label: int) -> list[T]:
        """Return the notes of other tensors ``[..., N, D]`` that hold the very same.

        Args:
            tensor: Comparing it with another one waits for its device.
            label: Which of the tensors that are noted together it can be, such as a layer.
        """
        kind, first = (tensor.shape, tensor.dtype, tensor.device), tensor[..., :1, :]
        with self._lock:
            batches = dict.fromkeys(self._batches.values())
        found = []
        for batch in batches:
            for at, its_label in enumerate(batch.labels):
                other = batch.references[at]() if its_label == label else None
                if other is None or other is tensor or not batch.holds(at, other):
                    continue
                is_like = (other.shape, other.dtype, other.device) == kind
                # Other prompts' tensors mostly differ in their first rows already.
                if is_like and torch.equal(other[..., :1, :], first) and torch.equal(other, tensor):
                    found.append(batch.notes[at])
        return found

    def put(self, tensors: Sequence[Tensor], notes: Sequence[T], labels: Sequence[int]) -> None:
        """Take note of tensors, of each with a label."""
        batch = _Batch(tensors, notes, labels)
        batches, lock, reference = self._batches, self._lock, weakref.ref(batch)

        def forget(dead: weakref.ref[Tensor]) -> None:
            with lock:
                known = reference()
                if known is None or known.watch(forget):
                    return
                for number in known.numbers:
                    if batches.get(number) is known:
                        del batches[number]

        batch.watch(forget)
        with lock:
            batches.update(dict.fromkeys(batch.numbers, batch))

    def drop(self, tensor: Tensor) -> None:
        """Forget what a tensor holds: something unknown was written to it."""
        with self._lock:
            self._batches.pop(id(tensor), None)


def version_of(tensor: Tensor) -> int | None:
    """Return the count of in-place changes; None for inference tensors, which keep none."""
    return None if tensor.is_inference() else tensor._version
