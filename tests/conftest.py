"""Settings that all tests share: hypothesis profiles, and a fresh Dynamo for every test."""

import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

if "PYTEST_XDIST_WORKER" in os.environ:  # as many of them as there are cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# one example may draw thousands of tokens, or compile
_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]

settings.register_profile("dev", max_examples=10, deadline=None, suppress_health_check=_SLOW)
settings.register_profile(
    "ci",
    max_examples=50,
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=_SLOW,
)
settings.register_profile(
    "nightly", max_examples=1000, deadline=None, print_blob=True, suppress_health_check=_SLOW
)
settings.load_profile(os.environ.get("BLINDSIGHT_HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(scope="session")
def in_process(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Of :mod:`without_gpu`; what all processes need is built once."""
    import without_gpu

    return partial(without_gpu.in_process, folder=tmp_path_factory.mktemp("without_gpu"))


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """What one test compiled must not serve, or count against the limits of, the next."""
    yield
    # not imported by tests that never compile
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
