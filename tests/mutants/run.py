"""Plants every mutant in turn and runs the checks: defects have to be noticed, rewritings must not be.

    python tests/mutants/run.py --build DIR [--only PART OF A NAME] [--all] [--jobs N] [--report FILE]

DIR is what build.py made. The exit status is 0 if everything is as it should be.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS))

from mutants.table import MUTANTS, Mutant  # noqa: E402 - beside the tests


@dataclass(frozen=True, slots=True)
class Outcome:
    name: str
    noticed_by: list[str]  # names of checks; the first alone unless all were asked for
    message: str
    seconds: float
    right: bool  # a defect was noticed, or a rewriting was not


def run(number: int, *, every: bool) -> Outcome:
    """Plants mutant ``number``, counted from 1; 0 is the library as it is shipped."""
    import torch

    from foretoken import _core
    from mutants import checks

    torch.set_num_threads(1)
    _core.testing.set_mutant(number)
    started = time.perf_counter()
    noticed, message = [], ""
    for check in checks.CHECKS:
        try:
            check()
        except Exception as error:  # whatever a defect makes of the library
            message = message or f"{type(error).__name__}: {error}".split("\n")[0][:200]
            noticed.append(check.__name__)
            if not every:
                break
    _core.testing.set_mutant(0)
    mutant = MUTANTS[number - 1] if number else Mutant("the library itself", "", (), equivalent=True)
    right = bool(noticed) != mutant.equivalent
    return Outcome(mutant.name, noticed, message, time.perf_counter() - started, right)


def report(outcomes: list[Outcome]) -> str:
    lines = [
        f"{'ok ' if outcome.right else 'BAD'} {outcome.seconds:6.2f} s  {outcome.name:50} "
        f"{', '.join(outcome.noticed_by) or 'survived'}"
        for outcome in outcomes
    ]
    by_name = {outcome.name: outcome for outcome in outcomes}
    for equivalent, kind, wanted in ((False, "defects", "noticed"), (True, "rewritings", "survived")):
        these = [by_name[m.name] for m in MUTANTS if m.equivalent is equivalent and m.name in by_name]
        lines.append(f"{sum(outcome.right for outcome in these)} of {len(these)} {kind} {wanted}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--build", type=Path, required=True, help="the directory that build.py filled")
    parser.add_argument("--only", default="", help="mutants whose name holds this")
    parser.add_argument(
        "--all", action="store_true", help="run every check, not only up to the first that notices"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--report", type=Path, help="write the outcomes as JSON")
    arguments = parser.parse_args()
    sys.path.insert(0, str(arguments.build.resolve() / "python"))

    numbers = [n for n, mutant in enumerate(MUTANTS, 1) if arguments.only in mutant.name]
    with ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("fork")) as pool:
        shipped = pool.submit(run, 0, every=True).result()
        if not shipped.right:  # what the checks say of mutants means nothing then
            sys.stdout.write(f"{shipped.name}: {', '.join(shipped.noticed_by)}: {shipped.message}\n")
            return 1
        jobs = [pool.submit(run, number, every=arguments.all) for number in numbers]
        outcomes = [shipped, *(job.result() for job in jobs)]
    sys.stdout.write(report(outcomes) + "\n")
    wrong = [outcome for outcome in outcomes if not outcome.right]
    sys.stdout.write("".join(f"{outcome.name}: {outcome.message or 'not noticed'}\n" for outcome in wrong))
    if arguments.report:
        arguments.report.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
