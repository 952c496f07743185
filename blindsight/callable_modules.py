"""Modules that are called as the function they are named for.

``blindsight.calibrate`` is the module, however it was imported first, and a user who writes
``blindsight.calibrate(model, ...)`` can mean only one thing.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class CallableModule(ModuleType):
    """A module that holds a function of its own name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)


def make_callable(name: str) -> None:
    """Have a module be called as its function; a module says so of itself, by ``__name__``."""
    sys.modules[name].__class__ = CallableModule
