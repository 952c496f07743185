"""What is known of tensors, and for how long."""

import gc
import weakref
from unittest import mock

import pytest
import torch
from torch import Tensor

from blindsight.runtime.tensor_notes import TensorNotes, _Batch


@pytest.fixture
def tensors() -> list[Tensor]:
    return [torch.full((1, 2, 3, 4), float(number)) for number in range(3)]


def noted(tensors: list[Tensor]) -> TensorNotes[str]:
    notes: TensorNotes[str] = TensorNotes()
    notes.put(tensors, ["it"] * len(tensors), range(len(tensors)))
    return notes


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_each_tensor_is_known_until_it_dies(tensors: list[Tensor], order: tuple[int, ...]) -> None:
    """As layer by layer replaces its keys: the others' must be known."""
    notes = noted(tensors)
    kept: dict[int, Tensor] = dict(enumerate(tensors))
    tensors.clear()
    for dead in order:
        assert [notes.get(each) for each in kept.values()] == ["it"] * len(kept)
        del kept[dead]
    assert not notes._batches


@pytest.mark.parametrize("backwards", [False, True])
def test_what_dies_in_turn_is_not_followed_one_by_one(backwards: bool) -> None:
    """A decoded token replaces the keys of all layers, from the first or from the last on."""
    tensors = [torch.zeros(1) for _ in range(36)]
    with mock.patch.object(_Batch, "watch", autospec=True, side_effect=_Batch.watch) as watch:
        notes = noted(tensors)
        while tensors:
            del tensors[-1 if backwards else 0]
    assert not notes._batches
    assert watch.call_count <= 3


def test_a_note_that_was_replaced_needs_no_garbage_collection(tensors: list[Tensor]) -> None:
    notes = noted(tensors)
    replaced = weakref.ref(next(iter(notes._batches.values())))
    gc.disable()
    try:
        notes.put(tensors, ["another"] * 3, range(3))
        assert replaced() is None
    finally:
        gc.enable()
    assert [notes.get(each) for each in tensors] == ["another"] * 3


def test_what_was_changed_or_dropped_is_unknown(tensors: list[Tensor]) -> None:
    notes = noted(tensors)
    tensors[0].add_(1)
    notes.drop(tensors[1])
    assert [notes.get(each) for each in tensors] == [None, None, "it"]
    assert notes.get(torch.zeros(1)) is None


def test_a_copy_is_found_by_its_label(tensors: list[Tensor]) -> None:
    notes = noted(tensors)
    copies = [each.clone() for each in tensors]
    for label, copy in enumerate(copies):
        found = [notes.find_equal(copy, each) for each in range(3)]
        assert found == [["it"] if each == label else [] for each in range(3)]
    more = [each.clone() for each in tensors]
    notes.put(more, ["another"] * 3, range(3))
    assert notes.find_equal(copies[1], 1) == ["it", "another"]
    tensors[1].add_(1)
    assert notes.find_equal(copies[1], 1) == ["another"]
