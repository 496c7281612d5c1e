# What a provision that changes nothing looks at, as a bare script; run as root on a node by tests/bench/nochange.py.
set -eu
job=/var/lib/torchrun/train
id torchrun
cat /etc/os-release /etc/machine-id /proc/meminfo /proc/sys/net/ipv4/ip_local_port_range
uname -a
df -B1 /opt /var/lib/torchrun /dev/shm
date +%s.%N
ip -json address
ip -json route
ss --tcp --listening --numeric --processes
ls /sys/bus/pci/devices /dev/shm 2>/dev/null || true   # a machine may have no PCI bus
systemctl show torchrun-* nftables.service --property=Id,ActiveState,SubState,MainPID,ControlGroup,UnitFileState
nft --stateless list ruleset
# Some of these are there only where a role has something to say: no GPU, no nccl.conf.
find /etc/nftables* /etc/nccl.conf /etc/sysctl.d /etc/security/limits.d -type f -exec sha256sum {} + 2>/dev/null || true
find /etc/systemd/system -name 'torchrun-*' -type f -exec sha256sum {} +
find "$job" -maxdepth 2 -printf '%M %u %g %p\n'
find "$job/releases" -type f -exec sha256sum {} +
# Asked as the modules do; that one is not installed is an answer.
dpkg-query --show nftables python3-venv 2>/dev/null || true
find /opt/onprem.torch -maxdepth 5 -name '*.dist-info'
