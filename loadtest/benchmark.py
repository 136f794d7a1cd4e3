"""What benchmarks share: parts that are measured one by one, a report, a table in the documents."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from loadtest import figures, midway, results
from loadtest.figures import Figure, Goal
from loadtest.midway import Midway, NotMidway
from thumbloop.errors import ThumbloopError
from thumbloop.processes import ProcessFailed

TABLE = Path("docs/benchmarks.md")
_END = "<!-- end of figures -->"

Measure = Callable[[Midway, str, str, Path], Mapping[str, Figure]]
"""Measures in a dtype, by name, a part, into a folder that is there."""

console = Console()


@dataclass(frozen=True, slots=True)
class Benchmark:
    """`name` is the report's, `command` marks the table; `failures` end it with their own words."""

    name: str
    command: str
    parts: Sequence[str]
    dtypes: Sequence[str]
    goals: Mapping[str, Goal]
    failures: tuple[type[Exception], ...] = ()

    @property
    def marks(self) -> tuple[str, str]:
        """Return the lines of the documents between which the table stands."""
        return f"<!-- figures: {self.command} -->", _END

    def run(
        self,
        measure: Measure,
        *,
        dtypes: Sequence[str],
        parts: Sequence[str],
        repeats: int,
        seed: int,
        folder: Path,
    ) -> None:
        """Measure what is asked for, or all, and summarise. Exits where it cannot be done."""
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler)  # the same way out as Ctrl-C
        self._check("part", parts, self.parts)
        self._check("dtype", dtypes, self.dtypes)
        expected: tuple[type[Exception], ...] = (
            NotMidway,
            ProcessFailed,
            ThumbloopError,
            subprocess.CalledProcessError,
        )
        try:
            found = midway.find_or_make(folder / "policy", seed)
            console.print(
                f"version {found.number} of {folder / 'policy'},"
                f" {found.thumb_up_rate:.0%} of whose replies are liked"
            )
            under = results.conditions(found, repeats)
            for dtype in dtypes or self.dtypes:
                for part in parts or self.parts:
                    self._measure(measure, found, dtype, part, folder, under)
        except expected + self.failures as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            print("stopped; no process is left behind", file=sys.stderr)
            raise SystemExit(130) from None
        self.summarise(folder, under)

    def _check(self, option: str, given: Sequence[str], known: Sequence[str]) -> None:
        if unknown := set(given) - set(known):
            print(f"error: --{option}: no {unknown.pop()}; there are {', '.join(known)}")
            raise SystemExit(2)

    def _measure(
        self,
        measure: Measure,
        found: Midway,
        dtype: str,
        part: str,
        folder: Path,
        under: Mapping[str, Any],
    ) -> None:
        """Measure one part and keep it."""
        console.print(f"{dtype}: {part}")
        work = folder / dtype / part
        work.mkdir(parents=True, exist_ok=True)
        commit = results.checked_out()  # before: while it runs another may come
        measured = measure(found, dtype, part, work)
        for key, figure in measured.items():
            console.print(f"  {key} {figure.value:.3g} ({figure.low:.3g} to {figure.high:.3g})")
        results.keep(work, under, measured, commit=commit)

    def summarise(self, folder: Path, under: Mapping[str, Any]) -> None:
        """Write a report of all that is kept, and the documents' table once nothing is missing."""
        parts = {
            d: [results.kept(folder / d / part, under) for part in self.parts] for d in self.dtypes
        }
        found = {
            d: {k: f for part in of if part for k, f in part.figures.items()}
            for d, of in parts.items()
        }
        commits: dict[str, list[str]] = {}
        for dtype, of in parts.items():
            for name, part in zip(self.parts, of, strict=True):
                if part and part.figures:  # none of a GPU where there is none
                    commits.setdefault(part.commit, []).append(f"{name} in {dtype}")
        report = {
            "conditions": under,
            "commits": commits,
            "figures": {d: {k: f.rounded() for k, f in of.items()} for d, of in found.items()},
        }
        path = folder / f"{self.name}.json"
        path.write_text(json.dumps(report, indent=1) + "\n")
        words = figures.table(found, self.goals)
        if all(None not in of for of in parts.values()):
            about = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in under.items())
            self.write_table(TABLE, f"{about}, {_of_commits(commits)}.\n\n{words}")
        console.print(words, markup=False)
        console.print(f"Details: {path}")

    def write_table(self, path: Path, words: str) -> None:
        """Put the table between the marks of a document."""
        begin, end = self.marks
        document = path.read_text()
        before, mark, rest = document.partition(begin)
        _, closing, after = rest.partition(end)
        assert mark, f"{path} has no place for the table"
        assert closing, f"{path} does not say where the table ends"
        path.write_text(f"{before}{begin}\n{words}\n{end}{after}")


def _of_commits(commits: Mapping[str, Sequence[str]]) -> str:
    """Say of which commit most parts are, and which parts are of others."""
    most, *others = sorted(commits, key=lambda commit: -len(commits[commit]))
    return "; ".join([f"commit {most}", *(f"{', '.join(commits[c])}: {c}" for c in others)])
