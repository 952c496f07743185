"""The backend by its name: ``torch.compile(model, backend="blindsight", options={...})``.

Dynamo takes two compiled models with equal options for the same, and lets them share graphs: so
models with equal options share a backend.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from blindsight.backend import BlindsightBackend, blindsight_backend


class _Named:
    """A backend that was asked for by name.

    Args:
        options: The dict that torch.compile was given, known by identity.
        mode: Given with it.
        backend: Made for the two.
    """

    def __init__(
        self, options: dict[str, Any], mode: str | None, backend: BlindsightBackend
    ) -> None:
        self.contents = dict(options), mode
        self.backend = backend
        self._options = options
        self._file = _stamp(options["profile"])

    def check(self) -> None:
        """Check that nothing changed of which models that are compiled would not hear.

        Raises:
            ValueError: The options did.
        """
        if self._options != self.contents[0]:
            raise ValueError(
                "options of torch.compile must stay as they were given, and were changed since: "
                "models that were compiled with them before would not hear of it. Give another "
                "dict."
            )
        if self._file != _stamp(self._options["profile"]):
            self.backend.state.forwards.warn_once(
                f"the profile {self._options['profile']} was written to since it was read, and the "
                "old one is in use. Call torch.compiler.reset() to read it anew."
            )


def _stamp(profile: object) -> tuple[int, int] | None:
    """Return what changes when the file of a profile does, if it is one."""
    if not isinstance(profile, (str, os.PathLike)):
        return None
    try:
        found = os.stat(profile)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


# By the id of their options.
_by_options: dict[int, _Named] = {}


def _named(options: dict[str, Any] | None, mode: str | None) -> _Named | None:
    """Return what was asked for with these options, or with equal ones."""
    if (found := _by_options.get(id(options))) is not None:
        return found
    return next((x for x in _by_options.values() if x.contents == (options, mode)), None)


def blindsight(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile for ``torch.compile(model, backend="blindsight", options={"profile": ...})``.

    ``options`` are the arguments of :func:`blindsight_backend`.
    """
    if not options or "profile" not in options:
        raise ValueError(
            "backend 'blindsight' must be given a profile, got options "
            f"{sorted(options or ())}. Say torch.compile(model, backend='blindsight', "
            "options={'profile': path})."
        )
    named = _named(options, mode)
    if named is None:
        arguments = dict(options)
        if mode is not None:
            arguments.setdefault("mode", mode)
        named = _Named(options, mode, blindsight_backend(arguments.pop("profile"), **arguments))
        named.backend.state.check_unchanged = named.check
        _by_options[id(options)] = named
    named.check()
    return named.backend(gm, example_inputs)


def _backend_for(options: dict[str, Any] | None, mode: str | None) -> BlindsightBackend | None:
    """Return the backend of models that were compiled by this name with these options."""
    named = _named(options, mode)
    return None if named is None else named.backend


blindsight.backend_for = _backend_for  # type: ignore[attr-defined]
blindsight.reset = _by_options.clear  # type: ignore[attr-defined]  # torch.compiler.reset calls it
