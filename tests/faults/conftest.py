# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""Four booted nodes and a job that trains on them; the table of what was measured."""
from __future__ import annotations

import json
import os
import pathlib
import statistics
import sys

import pytest

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from job import FOREVER, Job
from machines import ROOT, Hall

RESULTS = []


@pytest.fixture(scope="session")
def job():
    """The job, deployed by train.yml; FAULTS_KEEP=1 leaves the nodes running afterwards."""
    hall = Hall()
    hall.power_on()
    made = Job(hall)
    made.deploy()
    yield made
    if not os.environ.get("FAULTS_KEEP"):
        hall.close()


@pytest.fixture
def training(job):
    """The job, surely training."""
    job.target(FOREVER)
    if set(job.units()) != {"active"}:
        job.start_again()
    job.trains(0, 180)
    return job


@pytest.fixture
def measured():
    return RESULTS.append


def table(results):
    """Lines for people."""
    lines = [f"{'fault':20} {'node':>4} {'to start':>9} {'from return':>12} {'torch':>7} {'to new step':>12}   (seconds)"]
    lines += [f"{row['fault']:20} {row['node'] + 1:4} {row['to_start']:9.1f} {row['start_from_return']:12.1f} {row['torch']:7.1f} "
              f"{row['to_step']:12.1f}" for row in results]
    if results:
        lines.append(f"median, from the moment recovery is possible to the start of the new generation: "
                     f"{statistics.median(row['start_from_return'] for row in results):.1f} s")
    return lines


def pytest_terminal_summary(terminalreporter):
    if RESULTS:
        terminalreporter.section("from fault to training")
        for line in table(RESULTS):
            terminalreporter.write_line(line)
        (ROOT / "build").mkdir(exist_ok=True)
        (ROOT / "build" / "faults.json").write_text(json.dumps(RESULTS, indent=1) + "\n")
