"""The one error of the weights package: everything wrong with a checkpoint, in one go."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


class WeightsError(ValueError):
    """A checkpoint that cannot be read or written as asked.

    Attributes:
        where: The file or directory (or "params") the problems were found in.
        problems: Every problem, one sentence each, naming the tensor it is about.
    """

    def __init__(self, where: str | Path, problems: str | Sequence[str]):
        self.where = str(where)
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        if len(self.problems) == 1:
            message = f"{self.where}: {self.problems[0]}"
        else:
            lines = "".join(f"\n  - {problem}" for problem in self.problems)
            message = f"{self.where}: {len(self.problems)} problems{lines}"
        super().__init__(message)

    def __reduce__(self) -> tuple[type[WeightsError], tuple[str, tuple[str, ...]]]:
        return type(self), (self.where, self.problems)
