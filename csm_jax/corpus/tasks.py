"""Which shards a process speaks: all, or those of its task in an array job.

An executor is no more than this: it decides on shards and calls `run_shards` with them.
"""

from __future__ import annotations

from collections.abc import Mapping

_SLURM = "SLURM_ARRAY_TASK_ID"
_KUBERNETES = "JOB_COMPLETION_INDEX"


def task_of(environment: Mapping[str, str], tasks: int | None) -> tuple[int, int]:
    """Returns (this task, number of tasks) of an array job of Slurm, or an indexed one of Kubernetes.

    Args:
        environment: The process's.
        tasks: How many tasks there are, counted from 0; None where Slurm says so.

    Raises:
        ValueError: The environment is that of neither, or does not say how many there are.
    """
    name = next((name for name in (_SLURM, _KUBERNETES) if name in environment), None)
    if name is None:
        raise ValueError(
            f"--executor task runs in an array job: neither {_SLURM} (Slurm) nor {_KUBERNETES} "
            "(Kubernetes) is set"
        )
    task = _number(environment, name)
    if tasks is None:
        if name == _KUBERNETES:
            raise ValueError("Kubernetes does not tell a task how many there are: give --tasks N")
        first, last, step, count = (
            _number(environment, f"SLURM_ARRAY_TASK_{part}")
            for part in ("MIN", "MAX", "STEP", "COUNT")
        )
        if step < 1 or (last - first) // step + 1 != count:
            raise ValueError(
                f"the array's {count} task ids have gaps between {first} and {last}, so that they do not "
                "tell how many tasks there are: give --tasks N, with ids counted from 0"
            )
        return (task - first) // step, count
    if not 0 <= task < tasks:
        raise ValueError(f"{name}={task} is not one of --tasks {tasks}, which count from 0")
    return task, tasks


def shards_of_task(task: int, tasks: int, shards: int) -> list[int]:
    """Returns the shards of one task: every `tasks`-th, so that each gets long rows and short ones."""
    return list(range(task, shards, tasks))


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"{name} must be a whole number, got {text!r}") from error
