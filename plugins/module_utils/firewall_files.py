# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the firewall role keeps on a node: paths, the restoring script, the unit, the drop-in and the roll-back script.

Pure: everything is text. The shell scripts are POSIX sh and awk, so that they work at boot and when Ansible is gone.
"""

from __future__ import annotations

import os
import shlex
from typing import Iterable, Mapping, Optional

from ansible_collections.onprem.torch.plugins.module_utils import firewall_ufw as ufw
from ansible_collections.onprem.torch.plugins.module_utils.firewall_nft import HEADER, OWN_FAMILY, OWN_TABLE, PREFIX, rule_comment, jump_rule

JOBS_DIR = "/etc/onprem.torch/firewall.d"
RULES_DIR = "/etc/onprem.torch/firewall"
GUARD_FILE = RULES_DIR + "/guard.nft"
JUMPS_FILE = RULES_DIR + "/jumps"
IPSETS_FILE = RULES_DIR + "/ipsets"
BEFORE_FILE = RULES_DIR + "/before.json"
SCRIPT = "/usr/local/lib/onprem.torch/firewall_restore"
UNIT = "onprem-torch-firewall.service"
UNIT_FILE = "/etc/systemd/system/" + UNIT
UNIT_LINK = "/etc/systemd/system/sysinit.target.wants/" + UNIT
DROP_IN = "/etc/systemd/system/nftables.service.d/50-onprem-torch-firewall.conf"
# Files are read by name, and the last one wins: an administrator's 99-tuning.conf must not.
SYSCTL_FILE = "/etc/sysctl.d/zz-onprem-torch-firewall.conf"
RANGE_SYSCTL = "/proc/sys/net/ipv4/ip_local_port_range"
RUN_DIR = "/run/onprem.torch"
# What an unconfirmed change is put back from. Not below /run: a node that is restarted meanwhile must not keep the change.
ROLLBACK_DIR = "/var/lib/onprem.torch/firewall-rollback"
ROLLBACK_UNIT = "onprem-torch-firewall-rollback"
ROLLBACK_UNIT_FILE = f"/etc/systemd/system/{ROLLBACK_UNIT}.service"
ROLLBACK_UNIT_LINK = f"/etc/systemd/system/sysinit.target.wants/{ROLLBACK_UNIT}.service"
# Below /run on purpose: they tell of this boot. The change that is live and unconfirmed, the one whose time was up, the one
# confirmed last.
CHANGED_FILE = RUN_DIR + "/firewall-changed"
EXPIRED_FILE = RUN_DIR + "/firewall-expired"
CONFIRMED_FILE = RUN_DIR + "/firewall-confirmed"


def opening_file(family: str, table: str) -> str:
    """Where the opening for a table of the user's is kept."""
    return f"{RULES_DIR}/opening_{family}_{table}.nft"


def restore_script() -> str:
    """The script that makes the live ruleset hold what the files say; the units run it.

    With `--clean` it first takes out all that is ours. A missing table or chain of the user's is skipped: it may come
    later, with the service that makes it, and the role's next run reports it.
    """
    comment = rule_comment(jump_rule())
    return f"""#!/bin/sh
{HEADER}# Loads the rules of onprem.torch; harmless to repeat. With --clean: takes all of them out first.
# Run by {UNIT}, and by nftables.service after it has loaded the node's own rules.
PATH=/usr/sbin:/usr/bin:/sbin:/bin
failed=0

if [ "${{1:-}}" = --clean ] && command -v nft >/dev/null; then
    nft -a list ruleset | awk '
        $1 == "table" {{ family = $2; table = $3; next }}
        table == "{OWN_TABLE}" {{ if (!own++) last = last "delete table {OWN_FAMILY} {OWN_TABLE}\\n"; next }}
        $1 == "chain" {{
            chain = $2
            if (chain == "{PREFIX}") middle = middle "flush chain " family " " table " " chain "\\ndelete chain " family " " table " " chain "\\n"
            next
        }}
        $1 == "set" {{ if (index($2, "{PREFIX}_") == 1) last = last "delete set " family " " table " " $2 "\\n"; next }}
        chain != "{PREFIX}" && index($0, "comment \\"{comment}\\"") {{ printf "delete rule %s %s %s handle %s\\n", family, table, chain, $NF }}
        END {{ printf "%s%s", middle, last }}
    ' | nft -f - || failed=1
fi

if [ -e {GUARD_FILE} ]; then
    nft -f {GUARD_FILE} || failed=1
fi

for file in {RULES_DIR}/opening_*.nft; do
    [ -e "$file" ] || continue
    name=${{file##*/opening_}}
    name=${{name%.nft}}
    nft list table "${{name%%_*}}" "${{name#*_}}" >/dev/null 2>&1 || continue
    nft -f "$file" || failed=1
done

if [ -e {JUMPS_FILE} ]; then
    while read -r family table chain; do
        listing=$(nft list chain "$family" "$table" "$chain" 2>/dev/null) || continue
        case $listing in *'comment "{comment}"'*) continue ;; esac
        nft insert rule "$family" "$table" "$chain" {jump_rule()} comment '"{comment}"' || failed=1
    done <{JUMPS_FILE}
fi
{_ufw_part()}
exit $failed
"""


def _ufw_part() -> str:
    """The part of the restoring script that makes ipsets and the live rules in ufw's chains hold what the files say.

    At boot ufw's chains are not there yet: then only the sets are made, which ufw's own start relies on.
    """
    return f"""
command -v ipset >/dev/null || exit $failed

if [ -e {IPSETS_FILE} ]; then
    ipset destroy {ufw.SPARE_SET} 2>/dev/null
    ipset -exist restore <{IPSETS_FILE} || failed=1
fi

# ufw_rules PROGRAM CHAIN FILE: our rules in the chain become those of our block in the file, as one step. They go
# before the jump to the user's rules, which is where ufw loads them when it starts.
ufw_rules() {{
    [ -e "$3" ] && "$1" -S "$2" >/dev/null 2>&1 || return 0
    "$1" -S "$2" | awk -v chain="$2" '
        NR == FNR && /^-A/ && index($0, "--comment \\"{ufw.MARKER} ") {{ out = out "-D" substr($0, 3) "\\n"; next }}
        NR == FNR && /^-A/ {{ count++; if ($0 ~ /-j ufw6?-user-input$/) place = count; next }}
        /^# begin {ufw.MARKER}/ {{ ours = 1 }}
        /^# end {ufw.MARKER}/ {{ ours = 0 }}
        NR != FNR && ours && /^-A/ {{ rule[++rules] = substr($0, length("-A " chain " ")) }}
        END {{
            printf "*filter\\n%s", out
            if (place) for (i = rules; i > 0; i--) print "-I " chain " " place rule[i]
            else for (i = 1; i <= rules; i++) print "-A " chain rule[i]
            print "COMMIT"
        }}
    ' - "$3" | "$1-restore" --noflush || failed=1
}}
ufw_rules {ufw.PROGRAMS[4]} {ufw.CHAINS[4]} {ufw.RULES_FILES[4]}
ufw_rules {ufw.PROGRAMS[6]} {ufw.CHAINS[6]} {ufw.RULES_FILES[6]}

for name in $(ipset list -n | grep -E '^onp_(p[46]|m[46]_[0-9]+)_'); do
    grep -qs "^create $name " {IPSETS_FILE} || ipset destroy "$name" || failed=1
done
"""


def unit_file(before: str = "") -> str:
    """The unit that loads the rules at boot, before the network is up. `before`: a service that relies on our sets."""
    return f"""{HEADER}[Unit]
Description=Firewall rules of onprem.torch jobs
Documentation=man:nft(8)
After=nftables.service
Before={before}network-pre.target shutdown.target
Wants=network-pre.target
Conflicts=shutdown.target
DefaultDependencies=no
# Not there any more where a change was put back while the node started.
ConditionPathExists={SCRIPT}

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart={SCRIPT}
ExecReload={SCRIPT}

[Install]
WantedBy=sysinit.target
"""


def drop_in() -> str:
    """nftables.service flushes every table when it starts or reloads; with this, ours come back right after."""
    return f"""{HEADER}[Service]
ExecStartPost=-{SCRIPT}
ExecReload=-{SCRIPT}
"""


def sysctl_file(first: int, last: int) -> str:
    """The ephemeral range, kept over reboots."""
    return f"{HEADER}net.ipv4.ip_local_port_range = {first} {last}\n"


def rollback_unit_file() -> str:
    """The unit that puts an unconfirmed change back: a timer starts it, and a restarted node before any firewall loads."""
    return f"""{HEADER}[Unit]
Description=Put the firewall back unless the last change of onprem.torch is confirmed
RequiresMountsFor={ROLLBACK_DIR}
Before=systemd-sysctl.service nftables.service firewalld.service ufw.service {UNIT} network-pre.target shutdown.target
Conflicts=shutdown.target
DefaultDependencies=no
ConditionPathIsDirectory=|{ROLLBACK_DIR}
ConditionPathIsDirectory=|{ROLLBACK_DIR}.running

[Service]
Type=oneshot
ExecStart=/bin/sh -c 'if [ -d {ROLLBACK_DIR} ]; then exec /bin/sh {ROLLBACK_DIR}/rollback.sh expired; else exec /bin/sh {ROLLBACK_DIR}.running/rollback.sh; fi'

[Install]
WantedBy=sysinit.target
"""


def rollback_script(
    files: Mapping[str, bool], commands: Iterable[str], links: Optional[Mapping[str, bool]] = None, kernel_range: Optional[tuple[int, int]] = None
) -> str:
    """The script that puts the files back unless the change is confirmed, then runs `commands` where the change is live.

    files: path to whether it existed before (its copy then lies under ROLLBACK_DIR/files).
    links: the same for symbolic links of enabled units. kernel_range: the range to set, None to leave it.
    It begins by taking the snapshot's folder for itself (a rename), so that it and a confirmation exclude each other.
    After a restart nothing of the change is live: firewalls load the files afterwards, also where the restart came in the
    midst of this script.
    """
    running = f"{ROLLBACK_DIR}.running"
    lines = [
        "#!/bin/sh",
        "# Puts the firewall back as it was before the last change of onprem.torch, unless that was confirmed.",
        "PATH=/usr/sbin:/usr/bin:/sbin:/bin",
        f"live=no; [ -e {CHANGED_FILE} ] && live=yes",
        f"mv -T {ROLLBACK_DIR} {running} 2>/dev/null || {{ [ $live = no ] && [ -d {running} ]; }} || exit 0",
    ]
    for path, existed in sorted(files.items()):
        quoted = shlex.quote(path)
        if existed:
            lines.append(f"mkdir -p $(dirname {quoted}) && cp -p {running}/files{quoted} {quoted}")
        else:
            lines.append(f"rm -f {quoted}")
    for path, existed in sorted((links or {}).items()):
        quoted = shlex.quote(path)
        lines.append(f"ln -sf /etc/systemd/system/{shlex.quote(path.rsplit('/', 1)[-1])} {quoted}" if existed else f"rm -f {quoted}")
    if kernel_range:
        lines.append(f"echo {kernel_range[0]} {kernel_range[1]} >{RANGE_SYSCTL}")
    lines += ["systemctl daemon-reload", "if [ $live = yes ]; then"]
    folders = " ".join((RULES_DIR, JOBS_DIR, os.path.dirname(RULES_DIR), os.path.dirname(SCRIPT), os.path.dirname(DROP_IN)))
    lines += [*commands, "fi", f"rmdir {folders} 2>/dev/null"]
    lines.append(f'[ $live = yes ] && {{ [ "$1" = expired ] && cp {CHANGED_FILE} {EXPIRED_FILE}; rm {CHANGED_FILE}; }}')
    lines += [f"rm -rf {running}", f"rm -f {ROLLBACK_UNIT_LINK} {ROLLBACK_UNIT_FILE}", f"rmdir {os.path.dirname(ROLLBACK_DIR)} 2>/dev/null", ""]
    return "\n".join(lines)
