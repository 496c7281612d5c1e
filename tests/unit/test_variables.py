"""Types and names of the user's variables."""

from __future__ import annotations

import pytest
from ansible_collections.onprem.torch.plugins.module_utils import variables
from builders import reader, specification
from hypothesis import given
from hypothesis import strategies as st

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.parametrize(
    ("value", "spec", "wanted"),
    [
        (29500, {"type": "int"}, 29500),
        ("29500", {"type": "int"}, 29500),
        (True, {"type": "bool"}, True),
        (5, {"type": "str"}, "5"),
        (["a", 1], {"type": "list", "elements": "str"}, ["a", "1"]),
        ({"A": 1}, {"type": "dict"}, {"A": 1}),
        (2, {"type": "float"}, 2.0),
        ("0.5", {"type": "float"}, 0.5),
        (None, {"type": "int"}, None),
        ("x", {"type": "str", "choices": ["x", "y"]}, "x"),
    ],
)
def test_values_that_fit(value, spec, wanted):
    assert variables.convert(value, spec) == (wanted, "")


@pytest.mark.parametrize(
    ("value", "spec", "expected"),
    [
        ("false", {"type": "bool"}, "true or false without quotes"),
        (1, {"type": "bool"}, "true or false without quotes"),
        ("first", {"type": "int"}, "a whole number"),
        (True, {"type": "int"}, "a whole number"),
        (1.5, {"type": "int"}, "a whole number"),
        ("--epochs 3", {"type": "list", "elements": "str"}, "a list"),
        ([["a"]], {"type": "list", "elements": "str"}, "a list of which each element is text"),
        (["A=1"], {"type": "dict"}, "a mapping of names to values"),
        (["x"], {"type": "str"}, "text"),
        ("fast", {"type": "float"}, "a number"),
        ("z", {"type": "str", "choices": ["x", "y"]}, "one of x, y"),
        (None, {"type": "str", "required": True}, "a value"),
    ],
)
def test_values_that_do_not_fit(value, spec, expected):
    assert variables.convert(value, spec) == (None, expected)


@given(ANYTHING, st.sampled_from(["bool", "int", "float", "str", "path", "raw", "dict", "list"]))
def test_no_value_raises_and_what_is_accepted_has_the_type(value, kind):
    converted, expected = variables.convert(value, {"type": kind})
    if expected or converted is None:
        return
    types = {"bool": bool, "int": int, "float": float, "str": str, "path": str, "raw": object, "dict": dict, "list": list}
    assert isinstance(converted, types[kind])


def test_every_default_of_the_roles_fits_its_own_specification():
    specs = specification()
    for name, value in specs.defaults.items():
        if isinstance(value, str) and "{{" in value:
            continue
        assert variables.convert(value, specs.specs[name])[1] == "", name


@given(st.sampled_from(sorted(specification().specs)), st.data())
def test_a_letter_too_many_or_too_few_is_noticed_or_is_another_variable(name, data):
    position = data.draw(st.integers(name.index("_") + 1, len(name) - 1))
    letter = data.draw(st.sampled_from(["", "x"]))
    slip = name[:position] + letter + name[position + 1 :]
    found = variables.unknown_names([slip], specification().specs)
    if slip in specification().specs:
        assert found == {}
    elif slip.startswith(variables.OWN_PREFIXES):
        assert slip in found
        assert found[slip] == "" or found[slip] in specification().specs


def test_other_peoples_variables_are_left_alone():
    names = ["ansible_host", "my_torchrun", "site_name", "cluster_plan", "_torchrun_x", "firewall_zone_of_mine"]
    assert variables.unknown_names(names, specification().specs) == {}


def test_the_nearest_name_is_offered():
    assert variables.unknown_names(["torchrun_arg"], specification().specs) == {"torchrun_arg": "torchrun_args"}


@pytest.mark.parametrize("name", ["cluster_take_over", "torchrun_accept_lost_progress"])
def test_what_is_made_for_the_command_line_takes_the_text_that_it_gives(name):
    for given, meant in (("true", True), ("False", False), (True, True)):
        assert reader({"n1": {name: given}}).value("n1", name) is meant
    problems = reader({"n1": {name: "maybe"}}).host("n1")[1]
    assert [problem.variable for problem in problems] == [name]
