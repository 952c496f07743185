"""Profiles: making, saving, loading and checking them."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import pickle
import random
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import ColQwen2Config, Gemma3Config, Qwen2_5_VLConfig

from blindsight.categories import HeadCategory
from blindsight.profile import Profile
from blindsight.template import TemplateRule

NUM_LAYERS, NUM_HEADS = 3, 4


def make_config(num_layers: int = NUM_LAYERS, num_heads: int = NUM_HEADS) -> Qwen2_5_VLConfig:
    return Qwen2_5_VLConfig(
        text_config={
            "num_hidden_layers": num_layers,
            "num_attention_heads": num_heads,
            "num_key_value_heads": 2,
            "hidden_size": 8 * num_heads,
        }
    )


def make_profile(**changes: Any) -> Profile:
    """Return a profile in which no part is empty."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.arange(NUM_LAYERS * NUM_HEADS).reshape(NUM_LAYERS, NUM_HEADS) % 4
    parts: dict[str, Any] = {
        "evidence": {
            "error": torch.rand(NUM_LAYERS, NUM_HEADS, 4, generator=generator),
            "mass": torch.rand(NUM_LAYERS, NUM_HEADS, 5, generator=generator),
        },
        "calibration": {"dataset": "collages", "num_samples": "8"},
        "model": {"id": "a/model", "revision": "main"},
    }
    return dataclasses.replace(Profile.for_model(make_config(), codes), **(parts | changes))


def write(path: Path, tensors: dict[str, torch.Tensor] | None = None, **changes: Any) -> Path:
    """Write a profile's file with the library, with other tensors or metadata (None: without)."""
    profile = make_profile()
    good = path.parent / "good.safetensors"
    profile.save(good)
    with safe_open(good, framework="pt") as file:
        metadata = {**file.metadata(), **changes}
    metadata.pop("digest")
    if tensors is None:
        tensors = {"categories": profile.categories}
    save_file(tensors, path, {key: text for key, text in metadata.items() if text is not None})
    return path


token_ids = st.lists(st.integers(0, 300_000), max_size=3).map(tuple)
rules = st.builds(
    lambda image_token_ids, **others: TemplateRule(
        image_token_ids, video_token_ids=image_token_ids[1:], **others
    ),
    image_token_ids=token_ids.filter(bool),
    start_token_ids=token_ids,
    end_token_ids=token_ids,
    leading_tile_ids=token_ids,
    trailing_tile_ids=token_ids,
    sink_offsets=st.lists(st.integers(-4, 4), max_size=3).map(tuple),
    layer_pattern=st.sampled_from([r"layers\.(\d+)\.", "\N{LATIN SMALL LETTER E WITH ACUTE}(.)"]),
)


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    num_layers, num_heads = draw(st.integers(1, 5)), draw(st.sampled_from([2, 4, 6]))
    codes = draw(
        st.lists(
            st.lists(st.integers(0, 3), min_size=num_heads, max_size=num_heads),
            min_size=num_layers,
            max_size=num_layers,
        )
    )
    profile = Profile.for_model(make_config(num_layers, num_heads), codes, rule=draw(rules))
    strings = st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3)
    evidence = {}
    if draw(st.booleans()):
        evidence["error"] = torch.full((num_layers, num_heads, 4), draw(st.floats(width=32)))
    return dataclasses.replace(
        profile, evidence=evidence, calibration=draw(strings), model=draw(strings)
    )


class TestForModel:
    @pytest.mark.parametrize(
        "category",
        [2, 2.0, "document", " Document ", HeadCategory.DOCUMENT, np.int64(2), torch.tensor(2)],
    )
    def test_one_category_for_all_heads(self, category: object) -> None:
        profile = Profile.for_model(make_config(), category)
        assert profile.categories.dtype == torch.uint8
        assert profile.categories.tolist() == [[2] * NUM_HEADS] * NUM_LAYERS

    @pytest.mark.parametrize(
        "convert",
        [
            lambda rows: rows,
            lambda rows: tuple(tuple(row) for row in rows),
            lambda rows: [[HeadCategory(code).name.lower() for code in row] for row in rows],
            lambda rows: [[HeadCategory(code) for code in row] for row in rows],
            lambda rows: np.array(rows, dtype=np.int8),
            lambda rows: np.array(rows, dtype=np.float64),
            lambda rows: torch.tensor(rows, dtype=torch.bfloat16),
            lambda rows: torch.tensor(rows).t().contiguous().t(),
            lambda rows: [torch.tensor(row) for row in rows],
        ],
    )
    def test_array_likes(self, convert: Any) -> None:
        rows = [[0, 1, 2, 3], [3, 2, 1, 0], [1, 1, 0, 0]]
        profile = Profile.for_model(make_config(), convert(rows))
        assert profile.categories.tolist() == rows
        assert profile.categories.is_contiguous()

    def test_mixed_names_and_codes(self) -> None:
        row = ["SINK", 0, HeadCategory.DOCUMENT, "document_sink"]
        profile = Profile.for_model(make_config(), [row] * NUM_LAYERS)
        assert profile.categories[0].tolist() == [1, 0, 2, 3]

    def test_model_and_config_agree(self) -> None:
        config = make_config()
        assert Profile.for_model(SimpleNamespace(config=config), 1) == Profile.for_model(config, 1)

    def test_rule_and_model(self) -> None:
        config = make_config()
        assert Profile.for_model(config, 0).rule == TemplateRule.from_config(config)
        assert Profile.for_model(config, 0).model == {}
        config._name_or_path, config._commit_hash = "a/model", "abc"
        rule = TemplateRule(image_token_ids=(7,))
        profile = Profile.for_model(config, 0, rule=rule)
        assert profile.rule == rule
        assert profile.model == {"id": "a/model", "revision": "abc"}

    @pytest.mark.parametrize(
        ("categories", "found"),
        [
            ([0] * NUM_HEADS, r"\[4\]"),
            (torch.zeros(NUM_HEADS, NUM_LAYERS), r"\[4, 3\]"),
            (np.zeros((NUM_LAYERS, NUM_HEADS, 1)), r"\[3, 4, 1\]"),
            ([[0] * 4, [0] * 4, [0] * 3], r"\[3\]"),
            ([], r"\[0\]"),
            ([[[0, 1]], [[0]], 3], "shape"),
        ],
    )
    def test_wrong_shape(self, categories: object, found: str) -> None:
        with pytest.raises(ValueError, match=rf"must have shape .*\[3, 4\].*got.*{found}"):
            Profile.for_model(make_config(), categories)

    @pytest.mark.parametrize("bad", ["dens", 4, -1, 1.5, float("nan"), None, "2", True, {}])
    def test_no_category(self, bad: object) -> None:
        with pytest.raises(ValueError, match=r"layer 0, head 0: category must be .*got "):
            Profile.for_model(make_config(), bad)
        rows: list[list[object]] = [[0] * NUM_HEADS for _ in range(NUM_LAYERS)]
        rows[2][1] = bad
        with pytest.raises(ValueError, match=r"layer 2, head 1: category must be .*got "):
            Profile.for_model(make_config(), rows)

    def test_unknown_name_lists_the_names(self) -> None:
        with pytest.raises(ValueError, match=r"DENSE, SINK, DOCUMENT, DOCUMENT_SINK.*'documents'"):
            Profile.for_model(make_config(), "documents")

    @pytest.mark.parametrize("model", ["a/model", None, SimpleNamespace(config=None)])
    def test_no_model(self, model: object) -> None:
        with pytest.raises(ValueError, match="model must be a transformers model or the config"):
            Profile.for_model(model, 0)

    def test_a_model_around_another(self) -> None:
        with pytest.raises(ValueError, match=r"got 'colqwen2'.*inside, of which vlm_config is"):
            Profile.for_model(ColQwen2Config(), 0)


class TestParts:
    def test_own_copies(self) -> None:
        codes = torch.zeros(NUM_LAYERS, NUM_HEADS, dtype=torch.uint8)
        error = torch.zeros(NUM_LAYERS, NUM_HEADS, 4)
        calibration = {"seed": "0"}
        profile = make_profile(categories=codes, evidence={"error": error}, calibration=calibration)
        codes.fill_(1)
        error.fill_(1.0)
        calibration["seed"] = "1"
        assert not profile.categories.any()
        assert not profile.evidence["error"].any()
        assert profile.calibration == {"seed": "0"}

    def test_frozen(self) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            make_profile().digest = ""  # type: ignore[misc]

    def test_questions(self) -> None:
        profile = Profile.for_model(make_config(), [[0] * 4, [0, 0, 0, 1], [3] * 4])
        assert (profile.num_layers, profile.num_heads) == (NUM_LAYERS, NUM_HEADS)
        assert profile.counts() == {
            HeadCategory.DENSE: 7,
            HeadCategory.SINK: 1,
            HeadCategory.DOCUMENT: 0,
            HeadCategory.DOCUMENT_SINK: 4,
        }
        assert [profile.layer_is_dense(layer) for layer in range(NUM_LAYERS)] == [
            True,
            False,
            False,
        ]
        for layer in (-1, NUM_LAYERS):
            with pytest.raises(ValueError, match=rf"layer must be in 0\.\.2, got {layer}"):
                profile.layer_is_dense(layer)

    def test_repr(self) -> None:
        shown = repr(make_profile())
        assert "qwen2_5_vl" in shown
        assert "3 layers x 4 heads: 3 DENSE, 3 SINK, 3 DOCUMENT, 3 DOCUMENT_SINK" in shown
        assert len(shown) < 160

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"categories": [[0]]}, r"uint8 tensor, got list"),
            ({"categories": torch.zeros(3, 4)}, r"torch\.uint8 tensor, got torch\.float32"),
            ({"categories": torch.zeros(4, dtype=torch.uint8)}, r"num_heads\], got \[4\]"),
            ({"categories": torch.zeros(0, 4, dtype=torch.uint8)}, r"got \[0, 4\]"),
            ({"categories": torch.full((3, 4), 9, dtype=torch.uint8)}, r"0\.\.3, got 9"),
            ({"categories": torch.zeros(3, 5, dtype=torch.uint8)}, r"\[3, 5\], got .*num_heads=4"),
            ({"categories": torch.zeros(2, 4, dtype=torch.uint8)}, r"\[2, 4\], got num_layers=3"),
            ({"rule": None}, r"TemplateRule, got NoneType"),
            ({"fingerprint": {"architecture": "x"}}, r"got no num_layers, num_heads"),
            ({"calibration": {"seed": 1}}, r"calibration must map strings to strings"),
            ({"model": None}, r"model must map strings to strings, got None"),
            ({"evidence": {"categories": torch.zeros(3, 4)}}, r"names other than"),
            ({"evidence": {"error": torch.zeros(3, 4, 3)}}, r"\[3, 4, 4\], got \[3, 4, 3\]"),
            ({"evidence": {"error_spread": torch.zeros(3, 4)}}, r"\[3, 4, 4\], got \[3, 4\]"),
            ({"evidence": {"mass": torch.zeros(4, 3, 5)}}, r"\[3, 4, \.\.\.\], got \[4, 3, 5\]"),
            ({"evidence": {"mass": torch.zeros(3, 4, 5).double()}}, r"float32 tensor, got torch"),
        ],
    )
    def test_parts_that_do_not_fit(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            make_profile(**changes)


class TestAtBudget:
    @pytest.fixture
    def calibrated(self) -> Profile:
        return Profile.load(Path(__file__).parent.parent / "profiles" / "testbed.safetensors")

    def test_its_own_budget_changes_nothing(self, calibrated: Profile) -> None:
        assert calibrated.at_budget(float(calibrated.calibration["budget"])) == calibrated

    def test_another_budget_is_noted_and_nothing_else(self, calibrated: Profile) -> None:
        other = calibrated.at_budget(0.05)
        assert other.calibration == {**calibrated.calibration, "budget": "0.05"}
        loss = other.evidence["effect"].gather(2, other.categories.long()[..., None])
        assert 0.005 < float(loss.max()) <= 0.05
        assert torch.equal(other.evidence["margin"], 0.05 - other.evidence["effect"])
        assert other.at_budget(0.005) == calibrated

    def test_the_ends(self, calibrated: Profile) -> None:
        assert float(calibrated.at_budget(math.inf).counts()[HeadCategory.DENSE]) == 0
        exact = calibrated.at_budget(0)
        loss = exact.evidence["effect"].gather(2, exact.categories.long()[..., None])
        assert float(loss.max()) == 0

    def test_edits_by_hand_are_gone(self, calibrated: Profile) -> None:
        edited = calibrated.with_categories("sink")
        assert "edited" in edited.calibration
        assert edited.at_budget(0.005) == calibrated

    @pytest.mark.parametrize("budget", [-1, math.nan, "0.1", None])
    def test_a_budget_that_is_none(self, calibrated: Profile, budget: Any) -> None:
        with pytest.raises(ValueError, match=r"budget must be a number of at least 0, got"):
            calibrated.at_budget(budget)

    def test_without_evidence(self) -> None:
        with pytest.raises(ValueError, match=r"must hold the evidence of its calibration.*pairs"):
            Profile.for_model(make_config(), "sink").at_budget(0.1)

    def test_parts_of_a_profile(self, calibrated: Profile) -> None:
        with pytest.raises(ValueError, match="must be of a whole model, got a stage"):
            calibrated.stage(0, 2, keeps_numbers=False).at_budget(0.1)


class TestRule:
    def test_json_is_what_it_was_before_tiles_and_videos(self) -> None:
        text = (
            '{"end_token_ids":[4],"image_token_ids":[5,6],"layer_pattern":"layers.(.)",'
            '"sink_offsets":[0],"start_token_ids":[3]}'
        )
        rule = TemplateRule((5, 6), (3,), (4,), layer_pattern="layers.(.)")
        assert rule.to_json() == text
        assert TemplateRule.from_json(text) == rule
        with pytest.raises(ValueError, match="must be an object with the keys"):
            TemplateRule.from_json(text.replace("sink_offsets", "offsets"))


class TestWithCategories:
    def test_array_like_ones_replace_them_and_are_noted(self) -> None:
        profile = make_profile()
        changed = profile.categories.numpy().copy()
        changed[0, 1] = (changed[0, 1] + 1) % 4
        other = profile.with_categories(changed)
        assert torch.equal(other.categories, torch.from_numpy(changed))
        assert other.calibration == {**profile.calibration, "edited": "by hand"}
        assert other.evidence.keys() == profile.evidence.keys()
        assert bool((profile.with_categories("sink").categories == 1).all())

    def test_the_same_ones_change_nothing(self) -> None:
        assert make_profile().with_categories(make_profile().categories) == make_profile()

    def test_a_wrong_shape(self) -> None:
        with pytest.raises(ValueError, match=r"num_heads\] = \[3, 4\], or be one .* got shape"):
            make_profile().with_categories([[0]])


class TestDigest:
    @pytest.mark.parametrize(
        "changes",
        [
            {"categories": torch.zeros(NUM_LAYERS, NUM_HEADS, dtype=torch.uint8)},
            *(
                {"rule": dataclasses.replace(make_profile().rule, **{name: value})}
                for name, value in {
                    "image_token_ids": (1, 151656),
                    "start_token_ids": (1,),
                    "end_token_ids": (),
                    "sink_offsets": (0, 1),
                    "leading_tile_ids": (2,),
                    "trailing_tile_ids": (2,),
                    "video_token_ids": (),
                    "layer_pattern": r"layers\.(\d+)",
                }.items()
            ),
            {"fingerprint": {**make_profile().fingerprint, "head_dim": "128"}},
            {"evidence": {}},
            {"evidence": {"errors": make_profile().evidence["error"]}},
            {"calibration": {"dataset": "other"}},
            {"model": {}},
        ],
    )
    def test_every_part_counts(self, changes: dict[str, Any]) -> None:
        assert make_profile(**changes).digest != make_profile().digest
        assert make_profile(**changes) != make_profile()

    def test_every_head_counts(self) -> None:
        digests = set()
        for index in range(NUM_LAYERS * NUM_HEADS):
            codes = torch.zeros(NUM_LAYERS * NUM_HEADS, dtype=torch.uint8)
            codes[index] = 1
            profile = make_profile(categories=codes.reshape(NUM_LAYERS, NUM_HEADS))
            digests.add(profile.digest)
        assert len(digests) == NUM_LAYERS * NUM_HEADS

    def test_order_of_keys_does_not_count(self) -> None:
        profile = make_profile()
        turned = {
            name: dict(reversed(getattr(profile, name).items()))
            for name in ("evidence", "calibration", "fingerprint", "model")
        }
        assert make_profile(**turned).digest == profile.digest

    def test_same_in_another_process(self, tmp_path: Path) -> None:
        profile, path, again = make_profile(), tmp_path / "a", tmp_path / "b"
        profile.save(path)
        code = (
            "import sys; from blindsight.profile import Profile; "
            "p = Profile.load(sys.argv[1]); p.save(sys.argv[2]); print(p.digest)"
        )
        root = str(Path(__file__).resolve().parent.parent)
        result = subprocess.run(
            [sys.executable, "-c", code, str(path), str(again)],
            env={**os.environ, "PYTHONPATH": root, "PYTHONHASHSEED": "7"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert result.stdout.strip() == profile.digest
        assert again.read_bytes() == path.read_bytes()

    def test_equality_and_hash(self) -> None:
        assert make_profile() == make_profile()
        assert len({make_profile(), make_profile(), make_profile(model={})}) == 2
        assert make_profile() != make_profile().digest

    @pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, dataclasses.replace])
    def test_copies_are_equal(self, duplicate: Any) -> None:
        assert duplicate(make_profile()) == make_profile()
        assert pickle.loads(pickle.dumps(make_profile())) == make_profile()


class TestSaveAndLoad:
    @given(profile=profiles())
    @settings(deadline=None, max_examples=60)
    def test_round_trip(self, profile: Profile, tmp_path_factory: pytest.TempPathFactory) -> None:
        path = tmp_path_factory.mktemp("profiles") / "profile.safetensors"
        profile.save(path)
        loaded = Profile.load(path)
        assert loaded == profile
        assert torch.equal(loaded.categories, profile.categories)
        for name in ("rule", "fingerprint", "calibration", "model"):
            assert getattr(loaded, name) == getattr(profile, name)
        assert list(loaded.evidence) == list(profile.evidence)
        for name, tensor in profile.evidence.items():
            torch.testing.assert_close(
                loaded.evidence[name], tensor, rtol=0, atol=0, equal_nan=True
            )

    def test_same_bytes_each_time(self, tmp_path: Path) -> None:
        contents = set()
        for number in range(5):
            path = tmp_path / str(number)
            make_profile().save(path)
            contents.add(path.read_bytes())
        assert len(contents) == 1

    def test_format(self, tmp_path: Path) -> None:
        path = tmp_path / "profile.safetensors"
        profile = make_profile()
        profile.save(str(path))
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            assert sorted(file.keys()) == ["categories", "error", "mass"]
            assert torch.equal(file.get_tensor("categories"), profile.categories)
        assert (metadata["format"], metadata["version"]) == ("blindsight-profile", "1")
        assert metadata["model"] == '{"id":"a/model","revision":"main"}'
        assert json.loads(metadata["fingerprint"]) == profile.fingerprint
        assert TemplateRule.from_json(metadata["rule"]) == profile.rule
        assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0

    def test_file_of_another_writer(self, tmp_path: Path) -> None:
        loaded = Profile.load(write(tmp_path / "other"))
        assert loaded == make_profile(evidence={})

    def test_what_was_written_to_is_not_saved(self, tmp_path: Path) -> None:
        profile = make_profile()
        profile.categories[0, 0] = 2
        with pytest.raises(ValueError, match=r"must not be written to.*with_categories"):
            profile.save(tmp_path / "profile.safetensors")
        assert not list(tmp_path.iterdir())
        other = dataclasses.replace(profile, categories=profile.categories)
        other.save(tmp_path / "profile.safetensors")
        assert Profile.load(tmp_path / "profile.safetensors") == other

    def test_failed_save_leaves_all_as_it_was(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "profile.safetensors"
        make_profile().save(path)
        before = path.read_bytes()

        def fail(*_: object) -> None:
            raise OSError("disk full")

        for name in ("replace", "fsync"):
            with monkeypatch.context() as patch:
                patch.setattr(os, name, fail)
                with pytest.raises(OSError, match="disk full"):
                    make_profile(model={}).save(path)
            assert os.listdir(tmp_path) == [path.name]
            assert path.read_bytes() == before
        make_profile(model={}).save(path)
        assert Profile.load(path) == make_profile(model={})

    def test_save_to_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="missing"):
            make_profile().save(tmp_path / "missing" / "profile")

    @pytest.mark.skipif(os.name != "posix", reason="permissions and links of posix")
    def test_permissions_and_links(self, tmp_path: Path) -> None:
        path, link, plain = (tmp_path / name for name in ("profile", "link", "plain"))
        link.symlink_to(path.name)
        plain.touch()
        make_profile().save(link)
        assert link.is_symlink()
        assert Profile.load(path) == make_profile()
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


class TestDamagedFiles:
    def check(self, path: Path, *words: str) -> None:
        """Check that loading fails with one error that names the path and each of the words."""
        with pytest.raises(ValueError, match="cannot load profile") as caught:
            Profile.load(path)
        message = str(caught.value)
        for word in (str(path), "must ", "got ", *words):
            assert word in message
        assert message.rstrip().endswith(".")
        assert "\n" not in message

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="nothing"):
            Profile.load(tmp_path / "nothing")
        with pytest.raises(OSError, match=tmp_path.name):
            Profile.load(tmp_path)

    @pytest.mark.parametrize(
        "content",
        [b"", b"x", b"not a profile", b'{"categories": 1}' * 9, b"\0" * 64, b"\xff" * 64],
        ids=["empty", "one byte", "text", "json", "zeros", "ones"],
    )
    def test_no_safetensors(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "file"
        path.write_bytes(content)
        self.check(path, "safetensors", "copy it again")

    def test_truncated_anywhere(self, tmp_path: Path) -> None:
        path = tmp_path / "profile"
        make_profile().save(path)
        content = path.read_bytes()
        for length in range(0, len(content), 7):
            path.write_bytes(content[:length])
            self.check(path, "safetensors")
        path.write_bytes(content + b"\0")
        self.check(path, "safetensors")

    def test_changed_bytes(self, tmp_path: Path) -> None:
        path = tmp_path / "profile"
        make_profile().save(path)
        content = path.read_bytes()
        flips = random.Random(0)
        survivors = 0
        for position in range(len(content)):
            changed = bytearray(content)
            changed[position] ^= 1 << flips.randrange(8)
            path.write_bytes(changed)
            try:
                loaded = Profile.load(path)
            except ValueError as error:
                assert str(path) in str(error)  # noqa: PT017
            else:
                survivors += 1
                assert loaded == make_profile()
        assert survivors < 16  # white space and the name of the digest

    def test_changed_category_is_noticed(self, tmp_path: Path) -> None:
        path = tmp_path / "profile"
        make_profile(evidence={}).save(path)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        self.check(path, "digest", "edited")

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"format": "pt"}, ["format", "'blindsight-profile'", "'pt'"]),
            ({"format": None}, ["format", "'blindsight-profile'", "None"]),
            ({"version": "2"}, ["version", "'1'", "'2'", "release"]),
            ({"version": None}, ["version", "None"]),
            ({"rule": None}, ["metadata", "no rule"]),
            ({"rule": "{}"}, ["rule", "image_token_ids"]),
            ({"rule": "["}, ["rule", "JSON"]),
            ({"rule": "[" * 100_000}, ["metadata", "recursion"]),
            ({"fingerprint": "no"}, ["fingerprint must be JSON", "'no'"]),
            ({"fingerprint": "[]"}, ["fingerprint", "strings"]),
            ({"fingerprint": '{"architecture":"x"}'}, ["fingerprint", "no num_layers"]),
            ({"calibration": '{"seed":1}'}, ["calibration", "strings"]),
            ({"model": "1"}, ["model", "strings"]),
            ({"digest": "0"}, ["digest", "'0'"]),
        ],
    )
    def test_metadata(self, tmp_path: Path, changes: dict[str, Any], words: list[str]) -> None:
        digest = changes.pop("digest", None)
        path = write(tmp_path / "file", **changes)
        if digest is not None:
            with safe_open(path, framework="pt") as file:
                metadata = {**file.metadata(), "digest": digest}
            save_file({"categories": make_profile().categories}, path, metadata)
        self.check(path, *words)

    def test_weights_instead_of_a_profile(self, tmp_path: Path) -> None:
        path = tmp_path / "model.safetensors"
        save_file({"weight": torch.zeros(2, 2)}, path)
        self.check(path, "'blindsight-profile'", "Profile.save")

    @pytest.mark.parametrize(
        ("name", "tensor", "words"),
        [
            ("codes", torch.zeros(3, 4, dtype=torch.uint8), ["'categories'", "['codes']"]),
            ("categories", torch.zeros(3, 4), ["torch.uint8", "torch.float32"]),
            ("categories", torch.zeros(3, 4, dtype=torch.int8), ["torch.uint8", "torch.int8"]),
            ("categories", torch.zeros(12, dtype=torch.uint8), ["[num_layers, num_heads]", "[12]"]),
            ("categories", torch.full((3, 4), 4, dtype=torch.uint8), ["0..3", "got 4"]),
            ("categories", torch.zeros(4, 4, dtype=torch.uint8), ["[4, 4]", "num_layers=3"]),
            ("categories", torch.zeros(3, 2, dtype=torch.uint8), ["[3, 2]", "num_heads=4"]),
        ],
    )
    def test_categories(
        self, tmp_path: Path, name: str, tensor: torch.Tensor, words: list[str]
    ) -> None:
        self.check(write(tmp_path / "file", {name: tensor}), *words)

    @pytest.mark.parametrize(
        ("name", "shape", "words"),
        [
            ("error", (3, 4, 3), ["'error'", "[3, 4, 4]", "[3, 4, 3]"]),
            ("error_spread", (12,), ["'error_spread'", "[3, 4, 4]", "[12]"]),
            ("mass", (3, 5, 4), ["'mass'", "[3, 4, ...]", "[3, 5, 4]"]),
        ],
    )
    def test_evidence(
        self, tmp_path: Path, name: str, shape: tuple[int, ...], words: list[str]
    ) -> None:
        tensors = {"categories": make_profile().categories, name: torch.zeros(shape)}
        self.check(write(tmp_path / "file", tensors), *words)

    def test_hostile_pattern(self, tmp_path: Path) -> None:
        rule = {**json.loads(make_profile().rule.to_json()), "layer_pattern": "(a){99999999999}"}
        self.check(write(tmp_path / "file", rule=json.dumps(rule)), "edited")

    def test_layer_types(self, tmp_path: Path) -> None:
        fingerprint = {**make_profile().fingerprint, "layer_types": "full_attention"}
        path = write(tmp_path / "file", fingerprint=json.dumps(fingerprint))
        self.check(path, "[3, 4]", "1 layer_types")


class TestValidate:
    def test_own_model(self) -> None:
        make_profile().validate(make_config())
        make_profile().validate(SimpleNamespace(config=make_config()))

    def test_names_every_difference(self) -> None:
        with pytest.raises(ValueError, match="profile must be made for this model") as caught:
            make_profile().validate(make_config(num_layers=5, num_heads=8))
        message = str(caught.value)
        assert "profile has num_layers=3, model has num_layers=5" in message
        assert "profile has num_heads=4, model has num_heads=8" in message
        assert "layer_types" in message
        assert "architecture" not in message
        assert "num_kv_heads" not in message

    def test_other_family(self) -> None:
        config = Gemma3Config(
            text_config={
                "num_hidden_layers": NUM_LAYERS,
                "num_attention_heads": NUM_HEADS,
                "num_key_value_heads": 2,
                "head_dim": 8,
            }
        )
        with pytest.raises(
            ValueError, match=r"architecture=qwen2_5_vl.*architecture=gemma3"
        ) as caught:
            make_profile().validate(config)
        assert "num_heads=" not in str(caught.value)

    def test_field_that_the_model_lacks(self) -> None:
        profile = make_profile(fingerprint={**make_profile().fingerprint, "extra": "1"})
        with pytest.raises(ValueError, match="profile has extra=1, model has extra=None"):
            profile.validate(make_config())
