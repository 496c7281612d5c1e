"""apt itself sends the user and password that lie in auth.conf.d, and tells who refused them."""

from __future__ import annotations

import base64
import http.server
import shutil
import subprocess
import threading

import pytest
from ansible_collections.onprem.torch.plugins.module_utils import apt_state, packages_source

pytestmark = pytest.mark.skipif(not shutil.which("apt-get"), reason="apt is needed to ask it")
PASSWORD = "s3cr/et@T0K%en"
SEEN = []


class Repository(http.server.BaseHTTPRequestHandler):
    """Knows one user, and has nothing."""

    def do_GET(self):
        SEEN.append(self.headers.get("Authorization"))
        right = SEEN[-1] == "Basic " + base64.b64encode(f"bot:{PASSWORD}".encode()).decode()
        self.send_response(404 if right else 401)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_words):
        """Say nothing."""


@pytest.fixture
def update(tmp_path):
    """What apt-get update says of a repository whose user has a password."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Repository)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/private/repo/"
    for name in ("lists/partial", "cache/archives/partial", "auth"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "ours.sources").write_text(apt_state.source(url, "/nothing.asc"))
    options = {
        "Dir::Etc::SourceList": tmp_path / "ours.sources", "Dir::Etc::SourceParts": "/dev/null", "Dir::State::Lists": tmp_path / "lists",
        "Dir::Cache": tmp_path / "cache", "Dir::Etc::netrcparts": tmp_path / "auth", "Dir::Etc::netrc": "/dev/null",
        "APT::Sandbox::User": "", "Debug::NoLocking": "1", "Acquire::Retries": "0", "Acquire::http::Proxy": "DIRECT",
    }
    words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]

    def ask(password):
        SEEN.clear()
        file = tmp_path / "auth/ours.conf"
        file.write_text(packages_source.auth_line(url, "bot", password))
        file.chmod(0o600)
        environment = {"LC_ALL": "C", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
        done = subprocess.run(["apt-get", *words, "update"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, env=environment)
        return done.stdout

    yield ask
    server.shutdown()
    server.server_close()


def test_apt_sends_what_the_file_says_and_shows_none_of_it(update):
    text = update(PASSWORD)
    assert SEEN and "404" in text and apt_state.refused(text) == "" and PASSWORD not in text


def test_a_refused_user_is_told(update):
    text = update("wr0ng-password")
    assert SEEN and apt_state.refused(text) == "401" and "wr0ng" not in text
