"""A decode worker reads the next chunk while it decodes one."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pyarrow as pa
import pytest

from ray_jobs import stages


def test_one_chunk_is_read_while_another_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    both_read = threading.Barrier(stages.DecodeStage.AT_ONCE, timeout=30)
    decoding = threading.Lock()

    def decode(work: object, raw: int, decoder: object) -> int:
        assert decoding.acquire(blocking=False), "two chunks are decoded at once"
        if raw == 0:
            both_read.wait()  # passes only if the other chunk is read meanwhile
        decoding.release()
        return raw

    def read(work: object, chunk: SimpleNamespace) -> int:
        if chunk.index == 1:
            both_read.wait()
        return int(chunk.index)

    monkeypatch.setattr(stages, "Chunk", SimpleNamespace)
    monkeypatch.setattr(stages, "read", read)
    monkeypatch.setattr(stages, "decode", decode)
    monkeypatch.setattr(stages, "to_block", lambda rows: rows)
    decoder = SimpleNamespace(start=lambda: None)
    stage = stages.DecodeStage(SimpleNamespace(decoder=lambda: decoder))

    with ThreadPoolExecutor(stages.DecodeStage.AT_ONCE) as threads:
        done = list(threads.map(stage, [pa.table({"index": [number]}) for number in range(2)]))

    assert done == [0, 1]
