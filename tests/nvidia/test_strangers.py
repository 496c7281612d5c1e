"""What others have done to a node's apt before: sources, pins, locks, packages of the same names."""

from __future__ import annotations

import apt_repository
from sets import NEW, OLD, UPDATE, UPGRADE, WHOLE, driver, library, refused, succeeded

LIST = "/etc/apt/sources.list.d/stranger.list"
KEYRING = "/usr/share/keyrings/stranger.gpg"
READS = "LC_ALL=C apt-cache policy libc6 2>&1"
NCCL = "2.28.9-1+cuda13.0"


def fetch(url: str, path: str) -> str:
    """Return the command that fetches a file as a node can."""
    return f"/usr/lib/apt/apt-helper download-file {url} {path} >/dev/null"


def whole(version: str) -> list[dict[str, str]]:
    return [dict.fromkeys(WHOLE, version)] * 2


def test_a_source_of_the_same_repository_is_joined_where_its_keyring_holds_the_key(nodes, source):
    """As the package cuda-keyring makes it: apt reads no sources at all where two name a repository with different keyrings."""
    source.repository.offer(apt_repository.nccl(NCCL))
    url = source.settings["url"]
    nodes.run(f"{fetch(url + 'key.gpg', KEYRING)} && echo 'deb [signed-by={KEYRING}] {url} /' >{LIST}")
    succeeded(nodes.bring(library(source, NCCL)))
    assert all("E:" not in text for text in nodes.run(READS).values())
    succeeded(nodes.bring(library(source, NCCL)), changed=False)
    # Once it is gone, the node needs a keyring of its own again.
    nodes.run(f"rm {LIST} {KEYRING}")
    succeeded(nodes.bring(library(source, NCCL)))
    nodes.run(UPDATE)
    succeeded(nodes.bring(library(source, NCCL)), changed=False)


def test_a_source_of_the_same_repository_with_another_key_is_named(nodes, source, keys):
    source.repository.offer(apt_repository.nccl(NCCL))
    (source.repository.folder / "strange.gpg").write_bytes(keys[1].gpg("--export", keys[1].fingerprint))
    url = source.settings["url"]
    nodes.run(f"{fetch(url + 'strange.gpg', KEYRING)} && echo 'deb [signed-by={KEYRING}] {url} /' >{LIST}")
    for message in refused(nodes.bring(library(source, NCCL))):
        assert f"{LIST} names the repository {url} with the keyring {KEYRING}, which does not hold" in message and "remove that source" in message
    assert nodes.versions() == [{}, {}] and "onprem" not in nodes.files()
    assert all("E:" not in text for text in nodes.run(READS).values()), "apt works as before"


def test_a_source_of_the_same_repository_without_a_key_works_or_is_named(nodes, source):
    """apt 2 (Debian 12) takes it where it comes first in the order of names and refuses it behind ours; apt 3 takes both."""
    source.repository.offer(apt_repository.nccl(NCCL))
    url = source.settings["url"]
    nodes.run(f"echo 'deb {url} /' >{LIST}")
    old, new = nodes.bring(library(source, NCCL))
    refused([old])
    assert f"Signed-By regarding source {url} /" in old["msg"] and f"remove the repository from {LIST}" in old["msg"]
    succeeded([new])
    nodes.run(f"mv {LIST} /etc/apt/sources.list.d/a-{LIST.rsplit('/', 1)[1]}")
    old, new = nodes.bring(library(source, NCCL))
    succeeded([old])
    succeeded([new], changed=False)
    assert all("E:" not in text for text in nodes.run(READS).values())


def test_sources_that_apt_cannot_read_are_named(nodes, source):
    source.repository.offer(apt_repository.nccl(NCCL))
    nodes.run(f"printf 'deb [signed-by=/a.gpg] http://one.invalid/ /\\ndeb [signed-by=/b.gpg] http://one.invalid/ /\\n' >{LIST}")
    for message in refused(nodes.bring(library(source, NCCL))):
        assert "apt cannot read this node's sources (Conflicting values set for option Signed-By regarding source http://one.invalid/" in message
    assert nodes.versions() == [{}, {}] and "onprem" not in nodes.files()


def test_a_source_of_somebody_else_that_fails_hinders_nothing(nodes, source):
    source.repository.offer(apt_repository.nccl(NCCL))
    nodes.run(f"echo 'deb [trusted=yes] {source.settings['url']}nowhere/ /' >{LIST}")
    succeeded(nodes.bring(library(source, NCCL)))


def test_a_branchs_pins_of_nvidias_own_package_give_way(nodes, source):
    """nvidia-driver-pinning-580 lets apt prefer the newest 580, whatever a package of 580.105.08 depends on."""
    source.repository.offer([*apt_repository.driver(OLD), *apt_repository.driver(NEW)])
    pins = "Package: *nvidia* libcuda*\\nPin: version 580.*\\nPin-Priority: 1000\\n"
    nodes.run(f"printf '{pins}' >/etc/apt/preferences.d/nvidia-driver-pin")
    succeeded(nodes.bring(driver(source)))
    assert nodes.versions() == whole(OLD)


def test_the_distributions_own_packages_of_the_same_version_stay_out(nodes, source, distribution):
    """Debian and Ubuntu package the same release under the same names, and NVIDIA's packages ask for their own revision."""
    # What NVIDIA's packages build upon comes from Debian nevertheless.
    common = apt_repository.Package("nvidia-kernel-common", "20220217+3~deb12u1")
    mine = {package.name: package for package in apt_repository.driver(OLD)}
    dkms = mine["nvidia-kernel-open-dkms"]
    mine[dkms.name] = dkms._replace(depends=f"{dkms.depends}, {common.name}")
    source.repository.offer(mine.values())
    theirs = [package._replace(depends="", conflicts="") for package in apt_repository.driver("580.105.08-4")]
    distribution.repository.offer([*theirs, common])
    nodes.run(f"echo 'deb [trusted=yes] {distribution.settings['url']} /' >{LIST}")
    nodes.run(f"apt-get -o Dir::Etc::SourceList={LIST} -o Dir::Etc::SourceParts=/dev/null update")
    succeeded(nodes.bring(driver(source, refuse_distribution=True)))
    with_common = [{**found, common.name: common.version} for found in whole(OLD)]
    assert nodes.versions() == with_common
    assert all(common.name not in held for held in nodes.held())
    nodes.run("apt-mark showhold | xargs apt-mark unhold")
    nodes.run(UPGRADE)
    assert nodes.versions() == with_common, "not without the holds either"
    nodes.run("rm /etc/apt/preferences.d/*onprem-torch-*")
    nodes.run(UPGRADE)
    assert nodes.versions()[0]["libcuda1"] == "580.105.08-4", "without the pins they were really on offer"


def test_what_has_no_such_version_stays_as_it_is(nodes, source):
    """Firmware of an older branch, whose name has its version, is nothing that a new version could replace."""
    old = apt_repository.Package("nvidia-firmware-535-535.183.01", "535.183.01-0ubuntu1")
    source.repository.offer([*apt_repository.driver(OLD), old])
    name = f"{old.name}_{old.version}_all.deb"
    nodes.run(f"{fetch(source.settings['url'] + name, '/tmp/old.deb')} && dpkg --install /tmp/old.deb; rm /tmp/old.deb")
    succeeded(nodes.bring(driver(source)))
    succeeded(nodes.bring(driver(source)), changed=False)
    # What an administrator has torn apart is another matter, with apt's lists or without.
    nodes.run("apt-mark showhold | xargs apt-mark unhold >/dev/null")
    source.repository.offer([*apt_repository.driver(OLD), *apt_repository.driver(NEW), old])
    nodes.run(f"rm /etc/apt/preferences.d/*onprem-torch-* && {UPDATE} && {UPGRADE} && rm -rf /var/lib/apt/lists/*")
    succeeded(nodes.bring(driver(source)))
    assert nodes.versions() == [{**dict.fromkeys(WHOLE, OLD), old.name: old.version}] * 2


HOLD_LOCK = "import fcntl, time; lock = open('/var/lib/dpkg/lock-frontend', 'w'); fcntl.lockf(lock, fcntl.LOCK_EX); time.sleep({})"


def test_dpkgs_lock_is_waited_for_whatever_needs_it(nodes, source):
    source.repository.offer(apt_repository.nccl(NCCL))
    succeeded(nodes.bring(library(source, NCCL)))
    # Only the holds lack: dpkg itself does not wait for anybody.
    lock = f'systemd-run --quiet --collect --unit=stranger python3 -c "{HOLD_LOCK.format(7)}"; sleep 1'
    nodes.run(f"apt-mark unhold libnccl2 libnccl-dev >/dev/null; {lock}")
    succeeded(nodes.bring(library(source, NCCL)))
    assert nodes.held() == [{"libnccl2", "libnccl-dev"}] * 2


def test_a_lock_that_is_never_given_back_is_named_with_who_holds_it(nodes, source):
    source.repository.offer(apt_repository.nccl(NCCL))
    nodes.run(f'systemd-run --quiet --collect --unit=stranger python3 -c "{HOLD_LOCK.format(120)}"; sleep 1')
    for message in refused(nodes.bring(library(source, NCCL), lock_timeout=3)):
        assert "has held dpkg's lock for 3 s" in message and "(python3, process " in message
    assert nodes.versions() == [{}, {}]
    nodes.run("systemctl stop stranger")
    succeeded(nodes.bring(library(source, NCCL)))


def test_packages_that_somebody_else_is_installing_right_now_are_not_broken(nodes, source):
    """As unattended upgrades do after a node's first boot."""
    source.repository.offer([apt_repository.Package("cuda-stranger", "1", slow=True), *apt_repository.nccl(NCCL)])
    succeeded(nodes.bring(library(source, NCCL)))
    nodes.run("touch /run/slow-build; systemd-run --quiet --collect apt-get --yes install cuda-stranger")
    nodes.run("systemd-run --quiet --collect sh -c 'sleep 8; rm /run/slow-build'")
    nodes.run("until dpkg-query -W -f '${db:Status-Status}' cuda-stranger 2>/dev/null | grep -q half; do sleep 0.2; done")
    for answer in succeeded(nodes.bring(library(source, NCCL)), changed=False):
        assert answer["healed"] == []
    assert all("cuda-stranger" in found for found in nodes.versions())


def test_a_configuration_file_that_an_administrator_changed_stays_through_an_upgrade(nodes, source):
    source.repository.offer([*apt_repository.driver(OLD), *apt_repository.driver(NEW)])
    succeeded(nodes.bring(driver(source)))
    nodes.run("echo '# mine' >/etc/nvidia-stand-in.conf")
    succeeded(nodes.bring(driver(source, "580.159.03")))
    assert set(nodes.run("cat /etc/nvidia-stand-in.conf").values()) == {"# mine\n"}


def test_unattended_upgrades_leave_the_set_alone(nodes, source):
    source.repository.offer(apt_repository.driver(OLD))
    succeeded(nodes.bring(driver(source)))
    source.repository.offer([*apt_repository.driver(OLD), *apt_repository.driver(NEW)])
    try:
        nodes.run("apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq --yes --no-install-recommends install unattended-upgrades")
        pattern = 'Unattended-Upgrade::Origins-Pattern {\\"origin=NVIDIA\\";};'
        nodes.run(f'printf "#clear Unattended-Upgrade::Origins-Pattern;\\n{pattern}\\n" >/etc/apt/apt.conf.d/99stranger')
        nodes.run("unattended-upgrade")
        assert nodes.versions() == whole(OLD)
        nodes.run("apt-mark showhold | xargs apt-mark unhold; rm /etc/apt/preferences.d/*onprem-torch-*; unattended-upgrade")
        assert nodes.versions() == whole(NEW), "without hold and pin it upgrades them"
    finally:
        nodes.run("rm -f /etc/apt/apt.conf.d/99stranger; apt-get -qq --yes purge unattended-upgrades")
