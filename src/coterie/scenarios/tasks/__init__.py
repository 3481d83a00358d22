"""The user's task queue: five kinds of verifiable tasks over a difficulty from 0 to 1."""

from coterie.scenarios.tasks.scenario import Tasks, TasksOptions

__all__ = ["Tasks", "TasksOptions"]
