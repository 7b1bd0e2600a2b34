"""Many nodes on one machine: some slow, some that join late, are preempted or die while a job captions.

    python -m benchmarks.nodes [--nodes 4] [--chunks 40] [--seconds 1.0]

Starts raylets of two counted CPUs and one counted GPU (`ray.cluster_utils`), so that each node has one caption worker,
and captions --chunks chunks for each node with the fake captioner, which sleeps for --seconds with each chunk. Of each
eight nodes

    1     takes four times as long for a chunk
    2     is killed, raylet and workers, when 30 % of the chunks are captioned: no notice
    3     joins when 20 % are captioned
    5     is told at 50 % that it goes in --notice seconds (Ray's drain request and SIGTERM), and is then killed

and the others do nothing special. The last line is one JSON object:

    lost, doubled, proven   by `captioner verify`
    captioned_twice         chunks that were captioned a second time, and the workers that were lost
    busy_share              of each node: of the time from its first chunk on, as long as chunks were left to begin
    tail_seconds            from the first worker that found no chunk left to the end of captioning
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import tempfile
import threading
import time
from collections import defaultdict
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa

from ray_jobs.stages import CaptionStage

ROWS_PER_CHUNK = 16
DEVICE = threading.Lock()  # one chunk at a time, as on a GPU; the worker has others ready
LABEL, SECONDS, LOG = "BENCHMARK_NODE", "BENCHMARK_SECONDS", "BENCHMARK_LOG"  # environment variables of a raylet


class SleepingCaptionStage(CaptionStage):
    """Sleeps for as long as its node takes for a chunk, and notes the beginning and the end of each."""

    def __call__(self, block: pa.Table) -> pa.Table:
        chunk = json.loads(block["chunk"][0].as_py())["chunk"]
        name = f"{chunk['part']}-{chunk['index']}"
        with DEVICE:
            self._note("begin", name)
            time.sleep(float(os.environ[SECONDS]))
            captioned = super().__call__(block)
            self._note("end", name)
        return captioned

    def _note(self, event: str, chunk: str) -> None:
        line = {
            "node": os.environ.get(LABEL, ""),
            "pid": os.getpid(),
            "event": event,
            "chunk": chunk,
            "at": time.time(),
        }
        with (Path(os.environ[LOG]) / f"{os.getpid()}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


@dataclass(frozen=True)
class Call:
    """One chunk on one worker. `end`: None where the worker died."""

    node: str
    pid: int
    chunk: str
    begin: float
    end: float | None


def read_calls(log: Path) -> list[Call]:
    """Return all calls so far. Workers append whole lines."""
    calls = []
    for file in sorted(log.glob("*.jsonl")):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        ends = {line["chunk"]: line["at"] for line in lines if line["event"] == "end"}
        calls += [
            Call(line["node"], line["pid"], line["chunk"], line["at"], ends.get(line["chunk"]))
            for line in lines
            if line["event"] == "begin"
        ]
    return calls


class Nodes:
    """A head without CPUs and nodes that begin, join, are told to go and die by the share of chunks that is done."""

    def __init__(self, number: int, seconds: float, notice: float, log: Path) -> None:
        from ray.cluster_utils import Cluster

        self._seconds, self._notice, self._log = seconds, notice, log
        head = {"num_cpus": 0, "object_store_memory": 80 * 2**20, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes: dict[int, Any] = {}
        self.lost: list[str] = []
        for index in range(number):
            if index % 8 != 3:
                self.add(index)
        late = [(0.2, self.add, index) for index in range(3, number, 8)]
        killed = [(0.3, self.kill, index) for index in range(2, number, 8)]
        preempted = [(0.5, self.preempt, index) for index in range(5, number, 8)]
        self._events = sorted(late + killed + preempted, key=lambda event: event[0])
        self._threads: list[threading.Thread] = []

    def add(self, index: int) -> None:
        slow = index % 8 == 1
        environment = {LABEL: str(index), SECONDS: str(self._seconds * (4 if slow else 1)), LOG: str(self._log)}
        self.nodes[index] = self.cluster.add_node(
            num_cpus=2, num_gpus=1, object_store_memory=80 * 2**20, env_vars=environment
        )

    def kill(self, index: int) -> None:
        self.lost.append(str(index))
        self.cluster.remove_node(self.nodes.pop(index), allow_graceful=False)

    def preempt(self, index: int) -> None:
        """Tell a node that it goes, as a cloud does, and kill it when the time is over."""
        from ray._raylet import GcsClient  # type: ignore[attr-defined]  # of Cython
        from ray.core.generated import autoscaler_pb2

        node = self.nodes[index]
        deadline = int(1_000 * (time.time() + self._notice))
        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        GcsClient(address=self.cluster.gcs_address).drain_node(node.node_id, reason, "preemption", deadline)
        (raylet,) = node.all_processes["raylet"]

        def go() -> None:
            time.sleep(self._notice)
            os.kill(raylet.process.pid, signal.SIGTERM)
            self.kill(index)

        self._threads.append(threading.Thread(target=go, daemon=True))
        self._threads[-1].start()

    def follow(self, num_chunks: int, captioning: Future[int]) -> None:
        """Let each event happen when its share of the chunks is captioned."""
        while self._events and not captioning.done():
            wait([captioning], timeout=0.2)
            done = len({call.chunk for call in read_calls(self._log) if call.end}) / num_chunks
            while self._events and self._events[0][0] <= done:
                _, action, index = self._events.pop(0)
                print(f"{done:.0%}: {action.__name__} {index}", flush=True)
                action(index)
        for thread in self._threads:
            thread.join()


def facts_of(calls: list[Call], lost: list[str]) -> dict[str, Any]:
    """Return how busy each node was, and what was captioned twice."""
    last_begin = max(call.begin for call in calls)
    finished = [call for call in calls if call.end]
    by_worker: dict[tuple[str, int], list[Call]] = defaultdict(list)
    for call in calls:
        by_worker[call.node, call.pid].append(call)
    busy: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for (node, _), theirs in by_worker.items():
        began = min(call.begin for call in theirs)
        ended = max(call.end or call.begin for call in theirs) if node in lost else last_begin
        worked = sum(min(call.end or call.begin, last_begin) - call.begin for call in theirs)
        busy[node].append((worked, max(0.0, min(ended, last_begin) - began)))
    shares = {
        node: round(sum(worked for worked, _ in each) / max(1e-9, sum(window for _, window in each)), 3)
        for node, each in sorted(busy.items(), key=lambda item: int(item[0]))
    }
    last_of = {worker: max(call.end or call.begin for call in theirs) for worker, theirs in by_worker.items()}
    alive = [end for (node, _), end in last_of.items() if node not in lost]
    return {
        "workers": len(by_worker),
        "calls": len(calls),
        "captioned_twice": len(calls) - len({call.chunk for call in calls}),
        "lost_workers": len({worker for worker in by_worker if worker[0] in lost}),
        "busy_share": shares,
        "chunks_of_node": {node: sum(call.node == node for call in finished) for node in shares},
        "captioning_seconds": round(max(last_of.values()) - min(call.begin for call in calls), 1),
        "tail_seconds": round(max(alive) - min(alive), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--chunks", type=int, default=40, help="for each node")
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--notice", type=float, default=30.0)
    options = parser.parse_args()
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])  # of the workers, which import this module
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(run(options, Path(temporary))))


def run(options: argparse.Namespace, root: Path) -> dict[str, Any]:
    import ray

    from benchmarks.nodes import SleepingCaptionStage  # of the module that the workers import, not of __main__
    from captioner import pipeline
    from captioner.config import CaptionConfig
    from captioner.run import job
    from captioner.store.table import open_table
    from captioner.store.verify import verify
    from captioner.testing import make_folder
    from ray_jobs.caption import RayEngine

    num_chunks = options.nodes * options.chunks
    archive, out, log = make_folder(root / "archive", num_chunks * ROWS_PER_CHUNK, width=16), root / "out", root / "log"
    log.mkdir()
    nodes = Nodes(options.nodes, options.seconds, options.notice, log)
    ray.init(address=nodes.cluster.address, log_to_driver=False, logging_level="ERROR")
    config = CaptionConfig.model_validate(
        {
            "source": {"path": str(archive)},
            "model": {"name": "fake", "device": "cpu"},
            "cluster": {"num_workers": f"{len(nodes.nodes)}:{options.nodes}", "gpus_per_worker": 1},
            "output": {"path": str(out)},
        }
    )
    started = time.perf_counter()
    with (
        mock.patch.object(job, "ROWS_PER_CHUNK", ROWS_PER_CHUNK),
        mock.patch("ray_jobs.caption.CaptionStage", SleepingCaptionStage),
        ThreadPoolExecutor(1) as thread,
    ):
        captioning = thread.submit(pipeline.run, config, RayEngine(config))
        nodes.follow(num_chunks, captioning)  # Ray starts raylets in the main thread only
        code = captioning.result()
    seconds = time.perf_counter() - started
    result = verify(open_table(str(out)))
    ray.shutdown()
    nodes.cluster.shutdown()
    return {
        "nodes": options.nodes,
        "chunks": num_chunks,
        "exit_code": code,
        "lost": result.lost,
        "doubled": result.doubled,
        "proven": result.proven,
        "whole_seconds": round(seconds, 1),
        **facts_of(read_calls(log), nodes.lost),
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version()},
    }


if __name__ == "__main__":
    main()
