"""What compile caches must know of this package, so that they may keep its graphs.

AOTAutograd caches a graph only if it calls functions that it knows: what a function of ours does
is not in the graph's text. So every function that a rewritten graph calls is vouched for by a
digest of this package's sources, which becomes a part of the key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import blindsight
import blindsight.attention
import blindsight.passes
import blindsight.runtime
from blindsight.passes.replace_attention import GRAPH_FUNCTIONS
from blindsight.passes.share_layers import call_shared


@lru_cache(maxsize=1)
def source_digest() -> str:
    """Return the hex sha256 of this package's version and sources."""
    digest = hashlib.sha256(blindsight.__version__.encode())
    for package in (blindsight, blindsight.attention, blindsight.passes, blindsight.runtime):
        for folder in map(Path, package.__path__):
            for path in sorted(folder.glob("*.py")):
                digest.update(f"{package.__name__}/{path.name}".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()


def cacheable_functions(identities: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return what Inductor's ``unsafe_marked_cacheable_functions`` must hold of ours.

    Args:
        identities: Whatever else shall be in the key, by a name that is no function's.
    """
    names = (
        f"{function.__module__}.{function.__name__}" for function in (*GRAPH_FUNCTIONS, call_shared)
    )
    return {**dict.fromkeys(names, source_digest()), **(identities or {})}
