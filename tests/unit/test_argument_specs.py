"""Every role's argument_specs say what its defaults say: the same variables, the same values, each one described."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

ROLES = sorted(path for path in (Path(__file__).resolve().parents[2] / "roles").iterdir() if (path / "tasks").is_dir())


def load(path: Path) -> dict:
    """Return a file's mapping, empty where there is none."""
    return (yaml.safe_load(path.read_text()) if path.exists() else {}) or {}


def test_there_are_roles():
    assert len(ROLES) >= 8


@pytest.mark.parametrize("role", ROLES, ids=lambda path: path.name)
def test_defaults_are_those_of_the_argument_specs(role):
    defaults = load(role / "defaults" / "main.yml")
    options = load(role / "meta" / "argument_specs.yml")["argument_specs"]["main"].get("options", {})
    assert set(defaults) <= set(options), "a default that is not described"
    described = {name: option["default"] for name, option in options.items() if "default" in option}
    assert described == {name: value for name, value in defaults.items() if value is not None}
    undecided = {name for name, option in options.items() if "default" not in option and not option.get("required")}
    assert undecided == {name for name, value in defaults.items() if value is None}


@pytest.mark.parametrize("role", ROLES, ids=lambda path: path.name)
def test_every_variable_is_described(role):
    specs = load(role / "meta" / "argument_specs.yml")["argument_specs"]["main"]
    assert specs["short_description"]
    for name, option in specs.get("options", {}).items():
        assert option.get("description"), name
        assert option.get("type"), name


@pytest.mark.parametrize("role", ROLES, ids=lambda path: path.name)
def test_variables_carry_the_name_of_their_role(role):
    shared = ("cluster_", "cuda_version", f"{role.name}_")
    for name in load(role / "defaults" / "main.yml"):
        assert name.startswith(shared), name
