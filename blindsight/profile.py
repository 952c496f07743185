"""A profile: the category of every query head of one model, and how it was found.

Shapes: L layers, H query heads, C categories, R regions of attention mass.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from blindsight.calibration.selection import (
    CRITERIA,
    check_budget,
    select_categories,
)
from blindsight.calibration.selection import (
    check_evidence as check_can_select,
)
from blindsight.categories import NUM_CATEGORIES, HeadCategory, summarize_categories
from blindsight.configs import attends, config_of
from blindsight.files import write_whole
from blindsight.fingerprints import (
    differences,
    each_layer,
    fingerprint,
    layer_types_of,
    of_shard,
    of_stage,
    stage_of,
)
from blindsight.profile_checks import (
    DAMAGED,
    FORMAT,
    METADATA,
    VERSION,
    check_categories,
    check_evidence,
    check_fingerprint,
    check_format,
    check_has_heads,
    check_keys,
    parse_categories,
    strings,
)
from blindsight.template import TemplateRule


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Profile:
    """The category of every query head, for one model. Treat all of it as immutable.

    Args:
        categories: ``[L, H]`` uint8, codes of :class:`~blindsight.HeadCategory`. Copied.
        rule: How the images of a prompt are found.
        fingerprint: What the model must be like, see :func:`blindsight.fingerprints.fingerprint`.
        evidence: What calibration measured, float32 ``[L, H, ...]``: ``error``,
            ``error_spread``, ``effect``, ``lost_mass``, ``margin`` and ``pairs`` ``[L, H, C]``,
            ``mass`` ``[L, H, R]``. Copied.
        calibration: Dataset, number of samples, seed, thresholds, library versions.
        model: ``id`` and ``revision`` of the model, where known.

    Attributes:
        digest: Hex sha256 of all of the above; the same in every process. Profiles are equal
            when their digests are.

    Raises:
        ValueError: A part is malformed, or does not fit the others; the message says which.
    """

    categories: Tensor
    _: KW_ONLY
    rule: TemplateRule
    fingerprint: Mapping[str, str]
    evidence: Mapping[str, Tensor] = field(default_factory=dict)
    calibration: Mapping[str, str] = field(default_factory=dict)
    model: Mapping[str, str] = field(default_factory=dict)
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        check_categories(self.categories)
        if not isinstance(self.rule, TemplateRule):
            raise ValueError(f"rule must be a TemplateRule, got {type(self.rule).__name__}.")
        for name in ("fingerprint", "calibration", "model"):
            object.__setattr__(self, name, strings(name, getattr(self, name)))
        check_fingerprint(self.fingerprint, tuple(self.categories.shape))
        check_has_heads(self.categories, self.layer_types)
        check_evidence(self.evidence, tuple(self.categories.shape))
        evidence = {name: _own(self.evidence[name]) for name in sorted(self.evidence)}
        object.__setattr__(self, "categories", _own(self.categories))
        object.__setattr__(self, "evidence", evidence)
        object.__setattr__(self, "digest", _digest(self._tensors(), self._metadata()))

    @classmethod
    def for_model(
        cls, model_or_config: Any, categories: Any, *, rule: TemplateRule | None = None
    ) -> Profile:
        """Return a profile for a model, without evidence.

        Args:
            model_or_config: A transformers model, its config, or anything with ``.config``.
            categories: Array-like ``[L, H]`` of categories, codes or names in any case, or one
                of these for all heads. Layers without attention are ``DENSE``.
            rule: How images are found; by default what the model's family needs.

        Raises:
            ValueError: The shape is not the model's, an entry is no category, or the family is
                not known and ``rule`` is not given.
        """
        found = _fingerprint_of(model_or_config)
        types = layer_types_of(found)
        config = config_of(model_or_config)
        identity = {
            "id": getattr(config, "_name_or_path", None),
            "revision": getattr(config, "_commit_hash", None),
        }
        return cls(
            parse_categories(categories, types, int(found["num_heads"])),
            rule=TemplateRule.from_config(config) if rule is None else rule,
            fingerprint=found,
            model={name: str(value) for name, value in identity.items() if value},
        )

    @classmethod
    def of(cls, profile: Profile | str | os.PathLike[str]) -> Profile:
        """Return a profile unchanged, or load it from a path.

        Raises:
            ValueError: It is neither, or the file is damaged.
        """
        if isinstance(profile, Profile):
            return profile
        if not isinstance(profile, (str, os.PathLike)):
            raise ValueError(
                f"profile must be a Profile or the path of one, got {type(profile).__name__}."
            )
        return cls.load(profile)

    @property
    def num_layers(self) -> int:
        """L, layers without attention included."""
        return self.categories.shape[0]

    @property
    def num_heads(self) -> int:
        return self.categories.shape[1]

    def counts(self) -> dict[HeadCategory, int]:
        """Return the number of heads of each category in its layers, zeros included."""
        codes = self.categories[list(self.layers)].flatten().long()
        counts = torch.bincount(codes, minlength=NUM_CATEGORIES)
        return {category: int(counts[category]) for category in HeadCategory}

    def layer_is_dense(self, layer: int) -> bool:
        """Whether all heads of a layer are ``DENSE``.

        Raises:
            ValueError: There is no such layer.
        """
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"layer must be in 0..{self.num_layers - 1}, got {layer}.")
        return not bool(self.categories[layer].any())

    def with_categories(self, categories: Any) -> Profile:
        """Return the profile with other categories, which its calibration then says.

        Args:
            categories: As for :meth:`for_model`.

        Raises:
            ValueError: The shape is not the profile's, or an entry is no category.
        """
        parsed = parse_categories(categories, self.layer_types, self.num_heads)
        noted = dict(self.calibration)
        if noted and not torch.equal(parsed, self.categories):
            noted["edited"] = "by hand"
        return replace(self, categories=parsed, calibration=noted)

    def at_budget(self, budget: float) -> Profile:
        """Return the profile that its calibration leads to with another budget.

        Chosen from the evidence that the profile keeps, by the criterion of its calibration:
        nothing is measured again, and the result is that of calibrating with this budget.

        Args:
            budget: The most that any one head may lose, see
                :func:`~blindsight.calibrate.calibrate`.

        Raises:
            ValueError: The budget is no number of at least 0, or the profile has no evidence, or
                is a part of another's (:meth:`shard`, :meth:`stage`).
        """
        check_budget(budget)
        if part := {"shard", "stage"} & set(self.fingerprint):
            raise ValueError(
                f"profile must be of a whole model, got a {part.pop()} of one. Choose the budget "
                "first: profile.at_budget(budget).shard(...) or .stage(...)."
            )
        check_can_select(self.evidence)
        noted = {**self.calibration, "budget": repr(float(budget))}
        noted.pop("edited", None)  # nothing is left of that
        criterion = noted.setdefault("criterion", "next_token")
        options = {"allocation": noted["allocation"]} if "allocation" in noted else {}
        categories = select_categories(self.evidence, float(budget), criterion=criterion, **options)
        evidence = {**self.evidence, "margin": budget - self.evidence[CRITERIA[criterion]]}
        return replace(self, categories=categories, evidence=evidence, calibration=noted)

    def shard(self, rank: int, world_size: int) -> Profile:
        """Return the profile of the heads that one tensor-parallel process computes.

        Heads are split in order: process ``rank`` of ``world_size`` has as many as any other, and
        the key/value heads of its own query heads.

        Raises:
            ValueError: There is no such rank, the heads or the key/value heads cannot be split
                evenly, or the profile is such a part already.
        """
        own = of_shard(self.fingerprint, rank, world_size)
        if world_size == 1:
            return self
        first, last = (at * int(own["num_heads"]) for at in (rank, rank + 1))
        return replace(
            self,
            categories=self.categories[:, first:last],
            fingerprint=own,
            evidence={name: values[:, first:last] for name, values in self.evidence.items()},
        )

    def stage(self, first: int, stop: int, *, keeps_numbers: bool) -> Profile:
        """Return the profile of the layers ``first <= layer < stop``: those of a pipeline stage.

        Args:
            first, stop: Numbers of layers. A backend can be given the stage's module as ``model=``
                where the module's names match ``rule.layer_pattern``.
            keeps_numbers: Whether the layers of the stage are still numbered as in the whole model
                (``layers.8`` is the ninth). If not, they are numbered from 0.

        Raises:
            ValueError: There are no such layers, or the profile is of a stage already.
        """
        own = of_stage(self.fingerprint, first, stop, keeps_numbers=keeps_numbers)
        if (first, stop) == (0, self.num_layers):
            return self
        if keeps_numbers:
            categories = torch.zeros_like(self.categories)
            categories[first:stop] = self.categories[first:stop]
            evidence = self.evidence
        else:
            categories = self.categories[first:stop]
            evidence = {name: values[first:stop] for name, values in self.evidence.items()}
        return replace(self, categories=categories, fingerprint=own, evidence=evidence)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers with attention that the profile covers, as the model numbers them."""
        stage = stage_of(self.fingerprint)
        numbers, types = range(self.num_layers), self.layer_types
        if stage is not None and stage.num_layers == self.num_layers:
            numbers = range(stage.first, stage.stop)
        return tuple(at for at in numbers if attends(types[at]))

    @property
    def layer_types(self) -> list[str]:
        """What transformers calls each layer, such as ``sliding_attention``: L names."""
        return layer_types_of(self.fingerprint)

    def head_dim(self, layer: int) -> int:
        """Elements of a query head of a layer."""
        return each_layer(self.fingerprint["head_dim"], self.num_layers)[layer]

    def validate(self, model_or_config: Any, *, part_is_fine: bool = False) -> None:
        """Check that the profile was made for this model.

        Args:
            model_or_config: A transformers model, its config, or anything with ``.config``.
            part_is_fine: Whether the profile may be of a part of the model's heads and layers,
                from :meth:`shard` and :meth:`stage`.

        Raises:
            ValueError: It was not; the message names every field that differs.
        """
        found = _fingerprint_of(model_or_config)
        different = differences(self.fingerprint, found, part_is_fine=part_is_fine)
        if different:
            raise ValueError(
                f"profile must be made for this model, got another's: {'; '.join(different)}. "
                "Use the model's own profile, or calibrate one."
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the profile as safetensors, the same bytes each time.

        The file appears whole or not at all.

        Raises:
            OSError: The file cannot be written; what was there before is untouched.
            ValueError: Its tensors were written to since it was made.
        """
        if _digest(self._tensors(), self._metadata()) != self.digest:
            raise ValueError(
                "the tensors of a profile must not be written to, and were. Make another: "
                "profile.with_categories(...)."
            )
        data = serialize(self._tensors(), {**self._metadata(), "digest": self.digest})
        write_whole(path, _sort_header(data))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Read a profile; nothing in a file is ever executed.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is no profile, or a damaged one, or of another version.
        """
        with open(path, "rb"):  # Python's own errors for a missing file, a folder, no permission
            pass
        try:
            return cls._read(path)
        except ValueError as error:
            raise ValueError(f"cannot load profile {os.fspath(path)}: {error}") from None

    @classmethod
    def _read(cls, path: str | os.PathLike[str]) -> Profile:
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                # Before any tensor is read: a path of gigabytes of weights is a likely mistake.
                check_format(metadata)
                tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"file must be safetensors, got {error}. {DAMAGED}") from None
        try:
            check_keys("metadata", metadata, METADATA)
            if "categories" not in tensors:
                raise ValueError(f"tensors must include 'categories', got {list(tensors)}.")
            profile = cls(
                tensors.pop("categories"),
                rule=TemplateRule.from_json(metadata["rule"]),
                fingerprint=_from_json("fingerprint", metadata),
                evidence=tensors,
                calibration=_from_json("calibration", metadata),
                model=_from_json("model", metadata),
            )
            if (digest := metadata.get("digest", profile.digest)) != profile.digest:
                raise ValueError(f"digest must be {profile.digest}, got {digest!r}.")
        except ValueError as error:
            raise ValueError(f"{error} {DAMAGED}") from None
        except (OverflowError, RecursionError) as error:  # hostile patterns and JSON
            raise ValueError(f"metadata must be a profile's, got {error}. {DAMAGED}") from None
        return profile

    def _tensors(self) -> dict[str, Tensor]:
        return {"categories": self.categories, **self.evidence}

    def _metadata(self) -> dict[str, str]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "model": _to_json(self.model),
            "fingerprint": _to_json(self.fingerprint),
            "rule": self.rule.to_json(),
            "calibration": _to_json(self.calibration),
        }

    def __repr__(self) -> str:
        return (
            f"Profile({self.fingerprint['architecture']}, {len(self.layers)} layers x "
            f"{self.num_heads} heads: "
            f"{summarize_categories(self.categories[list(self.layers)].flatten().tolist())}; "
            f"digest {self.digest[:8]})"
        )

    def __eq__(self, other: object) -> bool:
        return self.digest == other.digest if isinstance(other, Profile) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest)


def _fingerprint_of(model_or_config: Any) -> dict[str, str]:
    try:
        return fingerprint(model_or_config)
    except AttributeError as error:
        raise ValueError(
            "model must be a transformers model or the config of one, got "
            f"{type(model_or_config).__name__}: {error}."
        ) from None


def _own(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _to_json(mapping: Mapping[str, str]) -> str:
    return json.dumps(dict(mapping), sort_keys=True, separators=(",", ":"))


def _from_json(name: str, metadata: Mapping[str, str]) -> Any:
    try:
        return json.loads(metadata[name])
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} must be JSON, got {metadata[name][:80]!r}: {error}.") from None


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Hash contents, not a file: files of equal profiles may differ by safetensors version."""
    shapes = {name: [str(t.dtype), list(t.shape)] for name, t in sorted(tensors.items())}
    digest = hashlib.sha256(json.dumps([dict(metadata), shapes], sort_keys=True).encode())
    for name in shapes:
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


def _sort_header(data: bytes) -> bytes:
    """Return safetensors with a sorted header: the library writes metadata in random order."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the tensors stay aligned
    return len(header).to_bytes(8, "little") + header + data[end:]
