"""No text that people see holds a secret: not as it is, not quoted, not cut off."""

from __future__ import annotations

import base64
from urllib.parse import quote

import pytest
from ansible_collections.onprem.torch.plugins.module_utils import secret_texts, variables
from ansible_collections.onprem.torch.plugins.module_utils.plan import Host, agreeing, job_settings, Release
from ansible_collections.onprem.torch.plugins.module_utils.problems import Problem, report
from ansible_collections.onprem.torch.plugins.plugin_utils import catalog
from builders import reader
from hypothesis import given
from hypothesis import strategies as st

# Capitals and digits that stand in no sentence of ours.
SECRETS = st.text("QXZ0123456789@:%/ '\"\\é&+=#", max_size=70).map(lambda text: f"QXZ{len(text)}7{text}QZX9")


@given(st.text("QXZ09-._~!$&'()*+,;=:@%#?", min_size=1, max_size=30), st.sampled_from(["", " and more", "/simple", "/a@b, x@y"]))
def test_no_url_keeps_user_or_password(userinfo, rest):
    shown = secret_texts.redacted(f"GET https://{userinfo}@index.example{rest} failed")
    # What may be the end of a password is hidden with it.
    assert shown == f"GET https://***@{'b, x@y' if '@' in rest else f'index.example{rest}'} failed"
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


ASCII = "".join(map(chr, range(33, 127)))
# Of which no beginning stands in what is around it.
PASSWORDS = st.text(ASCII, min_size=8, max_size=40)
SPACED = st.tuples(st.sampled_from(ASCII), st.text(ASCII + " ", min_size=8, max_size=40)).map("".join)
SCHEMES = st.sampled_from(["https", "HTTPS", "http", "git+https", "git+ssh", "ssh", "s3", "file"])
TEXTS = st.sampled_from(
    ["{}", "GET {} failed", "could not fetch ({}): 401", "[{}]", "_{}", "index=https://h.example/a,{} x", "{} {}", "https://h.example/a@b {}"]
)
PLACES = ["svc:{}@pypi.lan", "svc:{}@10.0.0.1:8080/a", ":{}@h/simple/"]
ODD_PLACES = ["svc:{}@pypi.lan", "john.doe:{}@10.0.0.1:8080/a", "{}@h/simple/", "{}:@h"]


def in_the_clear(secret, text):
    """Return which form of a secret a text shows: whole, quoted, its beginning."""
    return [form for form in (secret, quote(secret, safe=""), quote(secret), secret[:8], quote(secret[:8], safe="")) if form in text]


@given(PASSWORDS.filter(lambda text: not text[0].isdigit()), SCHEMES, st.sampled_from(PLACES), TEXTS)
def test_a_password_with_unquoted_characters_is_shown_nowhere(password, scheme, rest, around):
    url = f"{scheme}://{rest.format(password)}"
    text = around.replace("{}", url)
    assert not in_the_clear(password, secret_texts.redacted(text))
    assert not in_the_clear(password, secret_texts.redacted(f"?next={quote(url, safe='')}"))
    assert not in_the_clear(password, secret_texts.redacted(f"?next={quote(quote(url, safe=''), safe='')}"))


@given(SPACED, SCHEMES, st.sampled_from(ODD_PLACES), st.sampled_from([str, lambda text: [text, "x"]]))
def test_a_mistyped_url_is_shown_without_its_password_also_where_it_is_cut(password, scheme, rest, form):
    value = form(f"{scheme}://{rest.format(password)}")
    assert not in_the_clear(password, variables.shown(value)), variables.shown(value)
    assert not in_the_clear(repr(password)[1:-1], variables.shown(value))


@given(SPACED.filter(lambda text: not text[0].isdigit()))
def test_a_password_with_spaces_is_hidden_where_it_can_be_nothing_else(password):
    assert password not in secret_texts.redacted(f"cannot read https://svc:{password}@host/simple (401)")


@given(SPACED.filter(lambda text: not text[0].isdigit()), SCHEMES, st.sampled_from(["svc:{}@host", "{}@host:80/simple", "svc:{}@h.example/a/feed@Release"]))
def test_a_url_whose_password_cannot_be_told_is_refused(password, scheme, rest):
    url = f"{scheme}://{rest.format(password)}"
    plain, found = secret_texts.split_url(url)
    if not secret_texts.unclear(url):
        # An @ with something that can only be a host behind it is taken for the last one.
        assert password in found or "@" in password
        assert not in_the_clear(password, plain)


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ("https://bot:a/b+c@host/simple", True), ("https://bot:12/b+c@host/simple", True), ("https://a/b@host", True), ("bot:pw@host/simple", True),
        ("//bot:pw@host/simple", True), ("https:/bot:pw@host", True), ("https://bot:a b@host.example", True),
        ("https://a:b@h.example https://c:d@i.example", True),
        ("https://bot:a%2Fb@host/simple", False), ("https://token@host", False), ("https://bot:pw@pkgs.example/o/feed@Release/simple", False),
        ("https://pkgs.example:8443/feed@Release", False), ("https://host/simple", False), ("/srv/mirror@2", False), ("file:///srv/mirror@2", False),
    ],
)
def test_which_urls_are_unclear(url, wanted):
    assert secret_texts.unclear(url) == wanted


URLS = ("cluster_mirror", "cuda_repository_url", "cuda_repository_key_url", "pytorch_index_url", "pytorch_extra_index_urls")


@pytest.mark.parametrize("variable", URLS)
@pytest.mark.parametrize(
    "url", ["https://bot:QXZTOKEN/b+c@host/simple", "bot:QXZTOKEN@host", "https://h.example/a?sig=QXZTOKEN", "https://bot:QXZTOKEN a@host"]
)
@pytest.mark.parametrize("mistyped", [False, True])
def test_a_variables_url_is_refused_and_not_shown(variable, url, mistyped):
    is_list = (variable == "pytorch_extra_index_urls") != mistyped
    host, problems = reader({"n1": {variable: [url] if is_list else url}}).host("n1")
    about = [problem for problem in problems if problem.variable == variable]
    assert about and "QXZ" not in report(problems) + str(problems) + str(host.variables[variable])
    if not mistyped:
        assert "has to be quoted; write / as %2F" in about[0].sentence() or "token behind its ?" in about[0].sentence()


@pytest.mark.parametrize("cut", range(60, 200, 7))
def test_a_template_that_fails_is_cut_without_its_password(cut):
    url = "https://svc:QXZTOKEN0123456789@host/simple"
    error = ValueError("x" * cut + f" {url}")
    assert "QXZ" not in catalog.unreadable("n1", "pytorch_index_url", error).text


@given(st.text(ASCII.replace("@", "").replace("/", ""), min_size=9, max_size=40), st.integers(8, 40), st.sampled_from(["…", "...", "…)", "...'"]))
def test_a_url_that_somebody_has_cut_off_shows_no_password(password, length, end):
    secret = f"q{password}"
    for url in (f"https://svc:{secret}", f"https://{secret}"):
        assert not in_the_clear(secret, secret_texts.redacted(f"bad {url[: 12 + length]}{end}"))


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://bot:a/b+c@host/simple", "https://***@host/simple"),
        ("https://bot:12/b+c@host/simple", "https://***@host/simple"),
        ("HTTPS://a/b+c@host/simple", "HTTPS://***@host/simple"),
        ("https://token@host/simple", "https://***@host/simple"),
        ("s3://AKIA:ab/cd@bucket", "s3://***@bucket"),
        ("https://bot:****@pkgs.example/feed@Release/simple", "https://***@pkgs.example/feed@Release/simple"),
        ("https://***@pkgs.example/feed@Release/simple", "https://***@pkgs.example/feed@Release/simple"),
        ("https://h.example/k?x=1&private_token=abc&y=2", "https://h.example/k?x=1&private_token=***&y=2"),
        ("https://h.example/k?sv=1&sig=a%2Fb", "https://h.example/k?sv=1&sig=***"),
    ],
)
def test_what_urls_look_like_then(url, shown):
    assert secret_texts.redacted(f"({url})") == f"({shown})"
    assert secret_texts.redacted(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "git+https://github.example/a/b@v1.2", "git+https://git:8443/a/b@v1.2", "https://git/a/b@main", "https://[::1]:80/a@b",
        "https://h.example:8080, or x@y", "https://h.example: refused for x@y", "torch @ https://h.example/x.whl#sha256=ab", "file:///a@b/x.whl",
    ],
)
def test_packages_at_a_version_have_no_password(text):
    assert not secret_texts.has_credentials(text)
    if "git:" not in text and "git/" not in text:
        assert secret_texts.redacted(text) == text


def test_hostile_texts_take_no_time():
    for text in ("://" * 200_000, "https://a:b " * 50_000, "https://***@" * 50_000, "a" * 1_000_000, "%3A%2F%2F" * 20_000, "https://a.b:x@" * 50_000):
        secret_texts.redacted(text)


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
