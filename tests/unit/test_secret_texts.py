"""No text that people see holds a secret: not as it is, not quoted, not cut off."""

from __future__ import annotations

import base64
from urllib.parse import quote

import pytest
from ansible_collections.onprem.torch.plugins.module_utils import secret_texts, variables
from ansible_collections.onprem.torch.plugins.module_utils.plan import Host, agreeing, job_settings, Release
from ansible_collections.onprem.torch.plugins.module_utils.problems import Problem, report
from hypothesis import given
from hypothesis import strategies as st

# Capitals and digits that stand in no sentence of ours.
SECRETS = st.text("QXZ0123456789@:%/ '\"\\é&+=#", max_size=70).map(lambda text: f"QXZ{len(text)}7{text}QZX9")


@given(st.text("QXZ09-._~!$&'()*+,;=:@%#?", min_size=1, max_size=30), st.sampled_from(["", " and more", "/simple", "/a@b, x@y"]))
def test_no_url_keeps_user_or_password(userinfo, rest):
    shown = secret_texts.redacted(f"GET https://{userinfo}@index.example{rest} failed")
    assert shown == f"GET https://***@index.example{rest} failed"
    once_more = secret_texts.redacted(f"?next={quote(f'https://{userinfo}@index.example/', safe='')} x")
    assert once_more == "?next=https%3A%2F%2F***%40index.example%2F x"


@pytest.mark.parametrize("text", ["https://index.example/simple/a@b", "bob@index.example", "file:///a@b", "a: b@c", "http://h/ https://i/@"])
def test_what_is_no_user_stays(text):
    assert secret_texts.redacted(text) == text


@given(st.text("QXZ09-._~%41", min_size=1, max_size=20).map(lambda text: text.replace("%", "%25")), st.text("QXZ09@:%/# ", max_size=20))
def test_a_url_is_split_and_joined(user, password):
    userinfo = f"{user}:{quote(password, safe='')}" if password else user
    url = f"https://{userinfo}@index.example:8443/simple"
    plain, found = secret_texts.split_url(url)
    assert (plain, found) == ("https://index.example:8443/simple", userinfo)
    assert secret_texts.join_url(plain, found) == url
    assert secret_texts.with_credentials(f"{plain}/torch/", {plain: found, "https://index.example:8443/simp": "x:y"}) == f"{url}/torch/"
    assert secret_texts.with_credentials("https://index.example:8443/simpler", {plain: found}) == "https://index.example:8443/simpler"
    assert secret_texts.user_and_password(userinfo)[1] == password


FORMS = [str, repr, lambda text: repr([text, 1]), lambda text: quote(text, safe=""), variables.shown, lambda text: variables.shown([text])]


@given(SECRETS, st.sampled_from(FORMS))
def test_a_vaulted_value_is_in_no_sentence(secret, form):
    for problem in (Problem("n1", "v", f"v is {form(secret)}, but a number was expected", "correct it"),):
        masked = secret_texts.masked(problem.sentence(), [secret])
        assert secret_texts.VAULTED in masked
        assert secret not in masked and repr(secret)[1:-1] not in masked and secret[:8] not in masked


def test_short_secrets_hide_words_and_not_letters():
    assert secret_texts.masked("1 problem: port is 1, but 10 was expected", ["1"]) == "(vaulted) problem: port is (vaulted), but 10 was expected"


@given(SECRETS, SECRETS)
def test_hosts_that_differ_in_an_environment_are_told_by_name(one, other):
    hosts = [Host(name, {"torchrun_environment": {"TOKEN": value, "SAME": "x"}}) for name, value in (("n1", one), ("n2", other))]
    text = report(agreeing(hosts))
    if one != other:
        assert "n2: torchrun_environment differs from n1's in TOKEN, but a job has one; set it once for the group." in text
    assert one not in text and other not in text


def test_a_plan_holds_names_and_a_changed_value_is_another_release():
    def settings(**environment):
        return job_settings({"torchrun_environment": environment}, "train", Release("abc", "train.py"))

    one, other = settings(TOKEN="QXZ-one"), settings(TOKEN="QXZ-two")
    assert one["environment_names"] == ["TOKEN"] and "QXZ" not in str(one)
    assert one["release"] != other["release"] == settings(TOKEN="QXZ-two")["release"]
    assert settings(NUMBER=1)["release"] == settings(NUMBER="1")["release"]


def test_a_header_is_among_the_forms_of_a_password():
    forms = secret_texts.of_userinfo("bot:T0K%20en%2F")
    assert {"T0K%20en%2F", "T0K en/", base64.b64encode(b"bot:T0K en/").decode()} <= forms and "bot" not in forms
    assert "T0KEN" in secret_texts.of_userinfo("T0KEN")
