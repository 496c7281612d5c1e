"""Which repositories a node's apt sources name, in both formats."""

from __future__ import annotations

from ansible_collections.onprem.torch.plugins.module_utils import apt_sources
from ansible_collections.onprem.torch.plugins.module_utils.apt_sources import Source

URL = "https://developer.download.nvidia.com/compute/cuda/repos/debian12/x86_64"
OWN = "/etc/apt/sources.list.d/onprem-torch-nvidia.sources"


def test_one_line_format():
    text = (
        "# deb http://commented/ /\n"
        f"deb [arch=amd64 signed-by=/usr/share/keyrings/cuda-archive-keyring.gpg] {URL}/ /\n"
        f"deb {URL} /\n"
        "deb-src http://deb.debian.org/debian bookworm main\n"
        "deb http://deb.debian.org/debian bookworm main contrib\n"
    )
    assert apt_sources.parse_list("cuda.list", text) == [
        Source("cuda.list", f"{URL}/", "/", "/usr/share/keyrings/cuda-archive-keyring.gpg"),
        Source("cuda.list", f"{URL}/", "/", ""),
        Source("cuda.list", "http://deb.debian.org/debian/", "bookworm", ""),
    ]


def test_deb822_format():
    text = (
        f"# Managed by somebody.\nTypes: deb\nURIs: {URL}/\nSuites: /\nSigned-By: /usr/share/keyrings/x.gpg\n\n"
        f"Types: deb\nURIs: {URL}/\nSuites: /\nEnabled: no\n\n"
        "Types: deb-src\nURIs: http://source/\nSuites: a\n \n"
        "types: deb deb-src\nURIs: http://one http://two\n http://three\nSuites: a b\nComponents: main\n"
        "Signed-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n abc\n -----END PGP PUBLIC KEY BLOCK-----\n"
    )
    found = apt_sources.parse_deb822("x.sources", text)
    assert found[0] == Source("x.sources", f"{URL}/", "/", "/usr/share/keyrings/x.gpg")
    assert [(entry.url, entry.suite) for entry in found[1:]] == [
        (f"http://{name}/", suite) for name in ("one", "two", "three") for suite in ("a", "b")
    ]
    assert found[1].signed_by.startswith("-----BEGIN")


def test_others_of_the_same_flat_repository(tmp_path):
    folder = tmp_path / "etc/apt/sources.list.d"
    folder.mkdir(parents=True)
    (tmp_path / "etc/apt/sources.list").write_text(f"deb {URL} /\n")
    (folder / "cuda.list").write_text(f"deb [signed-by=/a.gpg] {URL}// /\ndeb {URL}/ other main\ndeb {URL}2/ /\n")
    (folder / "own.sources").write_text(f"Types: deb\nURIs: {URL}\nSuites: /\nSigned-By: /own.asc\n")
    (folder / "cuda.list.save").write_text(f"deb {URL} /\n")
    sources = apt_sources.collect(str(tmp_path))
    others = apt_sources.flat(sources, URL, str(folder / "own.sources"))
    assert [(entry.path, entry.signed_by) for entry in others] == [
        (str(tmp_path / "etc/apt/sources.list"), ""),
        (str(folder / "cuda.list"), "/a.gpg"),
    ]
    assert apt_sources.flat(sources, "", OWN) == []
