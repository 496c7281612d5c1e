"""What tests of a scenario share. A skipped test fails the run: it would have proven nothing."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import yaml


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fail where a test was skipped or none ran."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter and (reporter.stats.get("skipped") or not reporter.stats.get("passed")):
        session.exitstatus = 1


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Add the end of the node's journal to the report of a test that failed."""
    outcome = yield
    report = outcome.get_result()
    host = item.funcargs.get("host") if hasattr(item, "funcargs") else None
    if report.failed and host is not None:
        with host.sudo():
            journal = host.run("journalctl --unit 'torchrun-*' --unit 'onprem-*' --no-pager --lines 60").stdout
        report.sections.append(("journal of the node", journal))


@pytest.fixture(scope="session")
def inventory(request: pytest.FixtureRequest) -> Path:
    """Return the scenario's inventory."""
    path = Path(request.config.getoption("--ansible-inventory"))
    assert path.is_dir()
    return path


@pytest.fixture(scope="session")
def addresses(inventory: Path) -> dict[str, str]:
    """Return the nodes' addresses by name; never empty."""
    hosts = yaml.safe_load((inventory / "hosts.yml").read_text())["train"]["hosts"]
    assert len(hosts) >= 2
    return {name: entry["ansible_host"] for name, entry in hosts.items()}


@pytest.fixture(scope="session")
def lab(inventory: Path) -> dict:
    """Return the variables of the scenario's lab."""
    return yaml.safe_load((inventory / "group_vars" / "all.yml").read_text())


@pytest.fixture(scope="session")
def plan(inventory: Path) -> dict:
    """Return the plan, as the playbook prints it for programs."""
    words = ["ansible-playbook", "onprem.torch.plan", "-i", str(inventory), "-e", "plan_format=json"]
    output = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    return json.JSONDecoder().raw_decode(output[output.index('\n{\n') + 1 :])[0]


@pytest.fixture
def node(host, plan) -> dict:
    """Return the plan's entry for the host under test."""
    return plan["nodes"][host.backend.get_hostname()]
