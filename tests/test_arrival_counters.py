"""The counters by which split programs know who comes last."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor
from two_threads import in_two_threads

pytest.importorskip("triton", reason="the append kernels need it")


from spec_compile.ops.kernels.split_kv import ArrivalCounters


def test_threads_never_share_arrival_counters() -> None:
    """XQA's semaphores: two kernels that count in one stretch would merge before their parts are there."""

    class SlowToRead(dict):
        def get(self, *args: object) -> object:
            value = super().get(*args)
            time.sleep(0.1)
            return value

    counters = ArrivalCounters()
    counters._next = SlowToRead()
    taken: list[Tensor] = []

    def take() -> None:
        taken.append(counters.take(torch.device("cpu"), 20))

    in_two_threads(take, take)
    assert sorted(stretch.storage_offset() for stretch in taken) == [0, 32]
    assert taken[0].untyped_storage().data_ptr() == taken[1].untyped_storage().data_ptr()
