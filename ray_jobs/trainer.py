"""Ray Train's trainer without what this program does not use.

`ray.train.torch` has the same trainer, but imports torch, which the process that starts a run does not need. And for
each start of the workers Ray Train starts an actor that hands out shards of datasets, also where there are none. Not in
`process_group`, which the workers import: they would import Ray's trainer too, for 0.2 s.
"""

from __future__ import annotations

from typing import Any

from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

UNUSED_CALLBACKS = {"DatasetsCallback"}  # by name: where Ray renames one, runs start as before, with more processes


class Trainer(DataParallelTrainer):
    """A trainer whose workers get no datasets: they read pairs themselves."""

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [callback for callback in callbacks if type(callback).__name__ not in UNUSED_CALLBACKS]
