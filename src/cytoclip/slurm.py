"""Slurm's names for what torchrun calls RANK and WORLD_SIZE, where srun starts the workers itself."""

from __future__ import annotations

import re
from collections.abc import MutableMapping

_NAMES = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}


def adopt(environment: MutableMapping[str, str]) -> None:
    """Set RANK and its kin from what srun set, where no launcher did and MASTER_ADDR says where to meet.

    Without MASTER_ADDR nothing happens: a command inside of an allocation is one process unless it is told otherwise.
    """
    if "RANK" in environment or "MASTER_ADDR" not in environment:
        return
    if any(theirs not in environment for theirs in _NAMES.values()):
        return
    environment.update({ours: environment[theirs] for ours, theirs in _NAMES.items()})
    tasks = _tasks(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node = int(environment.get("SLURM_NODEID", "0"))
    if node < len(tasks):
        environment.setdefault("LOCAL_WORLD_SIZE", str(tasks[node]))
    environment.setdefault("MASTER_PORT", "29500")


def _tasks(written: str) -> list[int]:
    """`4(x2),3` → [4, 4, 3], the tasks of each node."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", written)
    return [int(tasks) for tasks, nodes in found for _ in range(int(nodes or 1))]
