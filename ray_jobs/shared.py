"""On a cluster of several nodes a local OUT must be the same directory on each of them (NFS, say)."""

from __future__ import annotations

from captioner.errors import ClusterError
from captioner.files import is_uri
from captioner.store.directory import Directory


def check_shared(out: Directory, file: str) -> None:
    """Raise ClusterError naming a node that does not see `file` in a local `out`. Nothing to do for a URI."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    if is_uri(out.location) or len(nodes) < 2:
        return

    def sees_file() -> bool:
        return out.exists(file)

    task = ray.remote(num_cpus=0)(sees_file)
    for node in nodes:
        strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        if not ray.get(task.options(scheduling_strategy=strategy).remote()):
            raise ClusterError(
                f"{out.location} is not shared: node {node['NodeManagerAddress']} does not see it; "
                "give an OUT on shared storage (s3://, gs://, NFS)"
            )
