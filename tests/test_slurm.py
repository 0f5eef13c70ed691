"""What srun sets becomes what torchrun would have set, and nothing else is touched."""

from __future__ import annotations

from cytoclip import slurm

SRUN = {"SLURM_PROCID": "9", "SLURM_NTASKS": "11", "SLURM_LOCALID": "1", "SLURM_NODEID": "2"}
HERE = {"MASTER_ADDR": "node1", "SLURM_STEP_TASKS_PER_NODE": "4(x2),3"}


def adopted(environment: dict[str, str]) -> dict[str, str]:
    """What was added or changed."""
    after = dict(environment)
    slurm.adopt(after)
    assert after.keys() >= environment.keys()
    return {name: value for name, value in after.items() if environment.get(name) != value}


def test_each_task_is_a_process_of_the_run() -> None:
    ranks = {"RANK": "9", "WORLD_SIZE": "11", "LOCAL_RANK": "1"}
    assert adopted(SRUN | HERE) == ranks | {"LOCAL_WORLD_SIZE": "3", "MASTER_PORT": "29500"}
    assert adopted(SRUN | HERE | {"SLURM_NODEID": "1"})["LOCAL_WORLD_SIZE"] == "4"
    assert adopted(SRUN | HERE | {"MASTER_PORT": "1234"}) == ranks | {"LOCAL_WORLD_SIZE": "3"}
    assert adopted(SRUN | {"MASTER_ADDR": "node1"}) == ranks | {"MASTER_PORT": "29500"}


def test_a_launcher_or_an_allocation_alone_changes_nothing() -> None:
    assert adopted(SRUN | HERE | {"RANK": "0"}) == {}
    assert adopted(SRUN) == {}
    assert adopted(HERE) == {}
    assert adopted({}) == {}
