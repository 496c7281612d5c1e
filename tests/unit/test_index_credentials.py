"""User and password of an index: pip and uv get them, a command line and a message never have them."""

from __future__ import annotations

import base64
import functools
import http.server
import os
import subprocess
import threading
from urllib.parse import quote

import pytest
from ansible_collections.onprem.torch.plugins.module_utils import environment
from ansible_collections.onprem.torch.plugins.plugin_utils import catalog, wheelhouse
from test_wheelhouse import PLATFORM, index  # noqa: F401  pylint: disable=unused-import

USER, PASSWORD = "bot", "s3 cr/et@T0K%en"
USERINFO = f"{USER}:{quote(PASSWORD, safe='')}"
HEADER = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
FORMS = {PASSWORD, quote(PASSWORD, safe=""), HEADER.split()[1]}


class Index(http.server.SimpleHTTPRequestHandler):
    """A package index that knows one user; below /closed it lets nobody in."""

    def do_GET(self):
        status = 403 if self.path.startswith("/closed") else 200 if self.headers.get("Authorization") == HEADER else 401
        if status == 200:
            return super().do_GET()
        self.send_response(status)
        self.send_header("WWW-Authenticate", 'Basic realm="index"')
        self.send_header("Content-Length", "0")
        self.end_headers()
        return None

    def log_message(self, *_words):
        """Say nothing."""


@pytest.fixture
def served(index):  # noqa: F811
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Index, directory=str(index)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def wanted(url, *requirements):
    arguments = {"requirements": requirements, "platform": PLATFORM, "index_url": catalog.without_credentials(url)}
    return wheelhouse.wanted_of(arguments, catalog.credentials_of(url))


def failure(tmp_path, asked):
    with pytest.raises(wheelhouse.WheelhouseError) as caught:
        wheelhouse.provide(str(tmp_path / "house"), asked)
    text = str(caught.value)
    assert not [form for form in FORMS if form in text], text
    return text


def test_the_right_password_downloads_and_shows_nowhere(served, tmp_path, monkeypatch):
    seen = []
    run = wheelhouse.subprocess.run

    def watched(words, check=False, **options):
        seen.append(words)
        return run(words, check=check, **options)

    monkeypatch.setattr(wheelhouse.subprocess, "run", watched)
    asked = wanted(f"http://{USERINFO}@{served}/simple", "onpremexample")
    folder, wheels = wheelhouse.provide(str(tmp_path / "house"), asked)
    assert "onpremexample-2.0-py3-none-any.whl" in wheels
    assert seen and not [word for words in seen for word in words if any(form in word for form in FORMS)]
    assert wheelhouse.key(asked) == wheelhouse.key(wanted(f"http://other:one@{served}/simple", "onpremexample"))
    assert not any(form in name for name in [folder, *os.listdir(folder)] for form in FORMS)


def test_a_refused_user_is_no_absent_package(served, tmp_path):
    place = f"http://{served}/simple"
    text = failure(tmp_path, wanted(f"http://{USER}:wr0ng@{served}/simple"))
    assert text == f"the index {place} refuses the user or password of pytorch_index_url (401); correct them"
    assert failure(tmp_path, wanted(place)).startswith(f"the index {place} wants a user and password (401); put them into pytorch_index_url")
    closed = failure(tmp_path, wanted(f"http://{USERINFO}@{served}/closed"))
    assert closed.startswith(f"the index http://{served}/closed refuses access to the user of pytorch_index_url (403)")


@pytest.mark.parametrize(("place", "found"), [("simple", "401"), ("closed", "403")])
def test_uv_is_understood_and_shows_no_password(served, tmp_path, place, found):
    userinfo = f"{USER}:wr0ng-password" if place == "simple" else USERINFO
    index = f"http://{served}/{place}"
    subprocess.run(["uv", "venv", "--quiet", str(tmp_path / "venv")], check=True)
    told = {"UV_DEFAULT_INDEX": f"http://{userinfo}@{served}/{place}", "UV_CACHE_DIR": str(tmp_path / "cache"), "UV_NO_CONFIG": "1"}
    words = ["uv", "pip", "install", "--python", str(tmp_path / "venv/bin/python"), "onpremexample"]
    text = subprocess.run(words, env={**os.environ, **told}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False).stdout
    assert environment.refused(" ".join(text.split()), {index: userinfo}) == (index, found), text
    assert environment.refused(" ".join(text.split()), {}) == ((index, found) if found == "401" else ("", ""))
    cached = b"".join(path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file())
    for form in {*FORMS, "wr0ng-password"}:
        assert form not in text and form.encode() not in cached


def test_an_absent_package_is_no_refused_user(served, tmp_path):
    text = failure(tmp_path, wanted(f"http://{USERINFO}@{served}/simple", "nothere"))
    assert "wheels for nothere cannot be downloaded" in text and "401" not in text
