"""Shapes of tensors are checked at run time in all tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:  # threads of several processes on one core wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // WORKERS)))

import typechecking  # noqa: E402

typechecking.install("driftlens")

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

settings.register_profile("driftlens", deadline=None)  # a busy machine is no error
settings.load_profile("driftlens")

LONG = ("test_real_reproduce.py", "test_notebooks.py", "test_real_editors.py",
        "test_real_engines.py", "test_editors.py", "test_engines.py", "test_ray.py",
        "test_documentation.py", "test_site.py", "test_bench.py", "test_reproduce.py")  # fmt: skip
"""Files of long tests: they begin first, so that no process is left alone with one."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, the others in their order."""
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONG)))


THREADS = torch.get_num_threads()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item):
    """Tiny models run faster on one thread than on several; real ones do not. What a test shares
    with others is made under the same number of threads, else it differs in the last bits."""
    torch.set_num_threads(THREADS if item.get_closest_marker("real") else 1)
    try:
        return (yield)
    finally:
        torch.set_num_threads(THREADS)


@pytest.fixture(scope="session")
def smollm2():
    """The small real model, fetched once and cached."""
    import driftlens as dl

    return dl.load_model("smollm2-135m")
