"""A function on Arrow tables, run on the cluster's CPUs by Ray Data, one result for each table, in order."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import pyarrow as pa

# One Ray Data execution takes this many tables: its records stay small, and an endless stream can be fed.
TABLES_PER_EXECUTION = 256


def map_tables(
    function: Callable[[pa.Table], pa.Table], tables: Iterable[pa.Table], num_cpus: float = 1
) -> Iterator[pa.Table]:
    """Order and tables are kept: one block is one table. Works in the driver and inside a Ray Train worker."""
    import ray.data
    from ray.data import DataContext

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_errored_blocks = 0
    context.target_max_block_size = 2**30
    waiting = iter(tables)
    while window := list(islice(waiting, TABLES_PER_EXECUTION)):
        blocks = [ray.put(table) for table in window]
        dataset = ray.data.from_arrow_refs(blocks).map_batches(
            function, batch_size=None, batch_format="pyarrow", zero_copy_batch=True, num_cpus=num_cpus
        )
        yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)
