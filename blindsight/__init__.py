"""BlindSight: a sparse attention category for every head of a vision-language model.

model = torch.compile(model, backend=blindsight.blindsight_backend(profile))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "BlindsightWarning",
    "HeadCategory",
    "Profile",
    "Report",
    "TemplateRule",
    "blindsight_backend",
    "disabled",
    "explain",
    "export",
    "use_template",
]

_HOMES = {
    "BlindsightWarning": "blindsight.runtime.context",
    "HeadCategory": "blindsight.categories",
    "Profile": "blindsight.profile",
    "Report": "blindsight.report",
    "TemplateRule": "blindsight.template",
    "blindsight_backend": "blindsight.backend",
    "disabled": "blindsight.runtime.context",
    "explain": "blindsight.explanation",
    "export": "blindsight.exported",
    "use_template": "blindsight.runtime.context",
}

if TYPE_CHECKING:
    from blindsight.backend import blindsight_backend
    from blindsight.categories import HeadCategory
    from blindsight.explanation import explain
    from blindsight.exported import export
    from blindsight.profile import Profile
    from blindsight.report import Report
    from blindsight.runtime.context import BlindsightWarning, disabled, use_template
    from blindsight.template import TemplateRule


# Modules that the documentation speaks of.
# calibrate, evaluate and sweep are called as their functions.
_MODULES = (
    "cache_keys",
    "calibrate",
    "evaluate",
    "exported",
    "passes",
    "ranks",
    "reference",
    "sweep",
)


def __dir__() -> list[str]:
    of_python = (name for name in globals() if name.startswith("__"))
    return sorted({*of_python, *__all__, *_MODULES})


def __getattr__(name: str) -> Any:
    # Imported on first use: `import blindsight` alone does not wait for torch.
    from importlib import import_module

    if name in _MODULES:
        return import_module(f"blindsight.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
