"""Runs side by side, each in a process of its own."""

import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

from experiments.base_model import base_model
from experiments.report import console

Task = TypeVar("Task")
Result = TypeVar("Result")


def run_all(function: Callable[[Task], Result], tasks: Iterable[Task], jobs: int) -> list[Result]:
    """Call the function on every task, `jobs` processes at a time; say when each is done."""
    base_model()  # once, before several want it
    waiting = list(tasks)
    context = multiprocessing.get_context("spawn")
    results = []
    with ProcessPoolExecutor(max_workers=jobs, mp_context=context) as pool:
        for task, result in zip(waiting, pool.map(function, waiting), strict=True):
            console.print(f"  {task}", markup=False)
            results.append(result)
    return results
