# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run the suites side by side and print what took how long; tools/test.sh calls this. Fails if one suite failed.

Each suite has a bridge and a subnet of its own, so as many run at once as there are cores. Those whose verdict depends on what
the machine has left run alone, at the end. A suite's output is in build/tests/SUITE.log while it runs; when it has ended, all
of it is printed if it failed, else its end.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import fcntl
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
import typing as t

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "build" / "tests"
LOCK = pathlib.Path("/run/onprem-torch-test.lock")
LAST_LINES = 12     # of a suite that has passed
SLOWEST = 5         # tests in the table of a suite


class Suite(t.NamedTuple):
    """A suite's name, its command for bash, and whether it needs the machine for itself."""

    name: str
    command: str
    alone: bool = False


# The longest first, so that the lanes end together.
SUITES = (
    Suite("lint", "ansible-lint --offline && yamllint --strict . && antsibull-changelog lint"),
    Suite("faults", "pytest -q tests/faults"),
    Suite("unit", "pytest -q -n 2 tests/unit"),
    Suite("newest", "tools/newest.sh 'pytest -q -n 2 --ignore-glob=*/test_supervisor_* tests/unit && molecule test --scenario-name debian13'"),
    Suite("nvidia", "pytest -q tests/nvidia"),
    Suite("interrupts", "pytest -q tests/interrupts"),
    Suite("quickstart", "pytest -q tests/quickstart"),
    Suite("inventory", "pytest -q tests/inventory"),
    Suite("molecule-firewall", "molecule test --scenario-name firewall"),
    Suite("molecule-default", "molecule test --scenario-name default"),
    Suite("molecule-nvidia", "molecule test --scenario-name nvidia"),
    Suite("sanity", "tools/sanity.sh"),
    Suite("collection", "pytest -q tests/collection"),
    Suite("verify", "pytest -q tests/verify", alone=True),
)


class Result(t.NamedTuple):
    """What came of a suite: seconds it took, tests that pytest counts as passed, and (seconds, test) of the slowest ones."""

    suite: str
    passed: bool
    seconds: float
    tests: int
    slowest: list[tuple[float, str]]


def tests_passed(text: str) -> int:
    """Return how many tests passed in what pytest has printed, over all of its runs."""
    return sum(int(found) for found in re.findall(r"^(?:=+ )?(?:\d+ \w+, )*(\d+) passed\b", text, re.MULTILINE))


def slowest_tests(text: str) -> list[tuple[float, str]]:
    """Return the tests that took longest with their set-up, in seconds, from pytest's --durations."""
    spent: collections.Counter[str] = collections.Counter()
    for seconds, test in re.findall(r"^(\d+\.\d+)s (?:setup|call|teardown) +(\S+)", text, re.MULTILINE):
        spent[test] += float(seconds)
    return [(round(seconds, 1), test) for test, seconds in spent.most_common(SLOWEST)]


class Runner:
    """Suites that run at the same time, each in a process group of its own."""

    def __init__(self, suites: t.Sequence[Suite]) -> None:
        self.waiting = list(suites)
        self.results: list[Result] = []
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.lock = threading.Lock()
        self.ended = False

    def say(self, text: str) -> None:
        """Print whole lines, whatever the other lanes print."""
        with self.lock:
            print(text, flush=True)

    def run(self, suite: Suite) -> None:
        """Run one suite and print its output once it has ended."""
        log = RESULTS / f"{suite.name}.log"
        self.say(f"=== {suite.name}: {suite.command}")
        began = time.monotonic()
        environment = {**os.environ, "PYTEST_ADDOPTS": f"{os.environ.get('PYTEST_ADDOPTS', '')} --durations=0 --durations-min=1"}
        with log.open("wb") as output:
            process = subprocess.Popen(["bash", "-c", suite.command], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
                                       stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
            self.running[suite.name] = process
            passed = process.wait() == 0
        del self.running[suite.name]
        text = log.read_text(encoding="utf-8", errors="replace")
        result = Result(suite.name, passed, round(time.monotonic() - began, 1), tests_passed(text), slowest_tests(text))
        self.results.append(result)
        kept = [line for line in text.splitlines() if not re.match(r"\d+\.\d+s (setup|call|teardown) ", line)]
        shown = kept[-LAST_LINES:] if passed else kept
        self.say("\n".join([*(f"{suite.name}: {line}" for line in shown), f"=== {row(result)}"]))

    def lane(self) -> None:
        """Run one suite after the other until none waits."""
        while not self.ended:
            with self.lock:
                if not self.waiting:
                    return
                suite = self.waiting.pop(0)
            self.run(suite)

    def work(self, lanes: int) -> None:
        """Run all suites in this many lanes."""
        threads = [threading.Thread(target=self.lane, daemon=True) for _lane in range(lanes)]
        for thread in threads:
            thread.start()
        for thread in threads:
            # Without a limit, no signal would get through on some Pythons.
            while thread.is_alive():
                thread.join(1.0)

    def stop(self) -> None:
        """Ask what runs to end, as Ctrl-C would, and wait for it: suites take their nodes down."""
        self.ended = True
        for process in list(self.running.values()):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT)
        for process in list(self.running.values()):
            process.wait()


def row(result: Result) -> str:
    """Return the table's row of a suite."""
    return f"{result.suite:20} {'passed' if result.passed else 'FAILED':7} {result.seconds:6.0f} s {result.tests or '':>6}"


def table(results: t.Sequence[Result], seconds: float) -> str:
    """Return the table for people: a row a suite, its slowest tests below it."""
    lines = [f"=== all suites, {seconds:.0f} s", f"{'suite':20} {'':7} {'':>8} {'tests':>6}"]
    for result in results:
        lines.append(row(result))
        lines += [f"    {spent:8.1f} s  {test}" for spent, test in result.slowest]
    failed = sum(not result.passed for result in results)
    return "\n".join([*lines, f"{len(results) - failed} passed, {failed} failed"])


def chosen(words: t.Sequence[str]) -> list[Suite]:
    """Return the suites of these names, all without a name. Ends the program for a name that no suite has."""
    names = [suite.name for suite in SUITES]
    for word in words:
        if word not in names:
            sys.exit(f"test: there is no suite {word}; there are: {' '.join(names)}")
    return [suite for suite in SUITES if not words or suite.name in words]


def main() -> int:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description="Run the suites side by side.")
    parser.add_argument("suite", nargs="*", help="names of suites; all of them where none is given")
    parser.add_argument("--repeat", type=int, default=1, help="how many times each suite runs")
    parser.add_argument("--lanes", type=int, default=os.cpu_count() or 1, help="how many suites run at once")
    asked = parser.parse_args()
    suites = chosen(asked.suite)
    RESULTS.mkdir(parents=True, exist_ok=True)
    with LOCK.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit("test: another run of the tests is under way on this machine; wait for its end")
        began = time.monotonic()
        results: list[Result] = []
        for _time in range(asked.repeat):
            for lanes, alone in ((asked.lanes, False), (1, True)):
                runner = Runner([suite for suite in suites if suite.alone == alone])
                try:
                    runner.work(lanes)
                except KeyboardInterrupt:
                    runner.stop()
                    return 130
                results += runner.results
        seconds = time.monotonic() - began
    (RESULTS / "results.json").write_text(json.dumps([result._asdict() for result in results], indent=1) + "\n", encoding="utf-8")
    print(table(results, seconds))
    return 0 if all(result.passed for result in results) else 1


if __name__ == "__main__":
    # SIGTERM ends the run as Ctrl-C does, so that no node is left. A shell starts what runs in its background with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
