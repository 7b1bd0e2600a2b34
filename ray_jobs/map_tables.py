"""A function on Arrow tables, run on the cluster's CPUs by Ray tasks, one result for each table, in order.

Plain tasks, not a Ray Data pipeline: a training worker needs the first table of an evaluation or of its first step at
once, and a Ray Data execution starts processes of its own before its first block.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyarrow as pa

LEAST_AHEAD, MOST_AHEAD = 4, 32  # tables under way at once, whatever the number of CPUs


def map_tables(
    function: Callable[[pa.Table], pa.Table], tables: Iterable[pa.Table], num_cpus: float = 1
) -> Iterator[pa.Table]:
    """Yield `function(table)` for each table, in order, a bounded number of them ahead.

    Works in the driver and inside a Ray Train worker; a task whose process or node dies is run again.
    """
    import ray

    def call(mapped: Callable[[pa.Table], pa.Table], table: pa.Table) -> pa.Table:
        return mapped(table)

    # A worker's own placement group holds its CPUs and no others: tasks are placed anywhere.
    task = ray.remote(num_cpus=num_cpus, scheduling_strategy="SPREAD")(call)
    mapped, ahead = ray.put(function), _tables_ahead()
    waiting: deque[Any] = deque()
    try:
        for table in tables:
            waiting.append(task.remote(mapped, table))
            if len(waiting) >= ahead:
                yield ray.get(waiting.popleft())
        while waiting:
            yield ray.get(waiting.popleft())
    finally:
        for reference in waiting:
            ray.cancel(reference)


def _tables_ahead() -> int:
    import ray

    return min(max(LEAST_AHEAD, int(ray.cluster_resources().get("CPU", 1))), MOST_AHEAD)
