"""One thread a test process: small models gain nothing from more, and two processes would fight over the cores. One trace of
models that are alike, too: see ``trace_once``."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: names that do not exist are not looked for

from trace_once import trace_once

from spec_compile.runtime.engine import Engine

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests begin: none of them may keep the other processes waiting at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session", autouse=True)
def _trace_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        trace_once(patch)
        yield


@pytest.fixture(scope="session", autouse=True)
def _few_collections() -> Iterator[None]:
    """What is imported stays, and traces leave millions of objects: looking at them all, again and again, took 5 % of it."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)
    yield
    gc.set_threshold(*before)
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of up to five run in five rows, padded as a GPU's buckets are: one capture serves them all."""
    monkeypatch.setattr(Engine, "bucket", lambda self, batch: max(batch, 5))


@pytest.fixture
def fresh_seed() -> None:
    """Other random inputs in every run: for modules that say ``pytestmark = pytest.mark.usefixtures("fresh_seed")``."""
    seed = random.SystemRandom().randrange(1 << 31)
    print("seed", seed)  # shown when a test fails
    torch.manual_seed(seed)
    random.seed(seed)
