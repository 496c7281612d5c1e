# Everything of the node's own that a firewall role could touch: files with their modes and bytes, live rules, settings.
# Counters and handles are left out: they change by themselves. So are firewalld's backups (*.old).
find /etc/ufw /etc/default/ufw /etc/firewalld /etc/nftables.conf /etc/systemd/system /etc/sysctl.d /etc/onprem.torch /usr/local/lib /var/lib/onprem.torch \
    ! -name '*.old' \( -type f -o -type l \) -printf '%p %m %u %l\n' 2>/dev/null | sort
find /etc/ufw /etc/default/ufw /etc/firewalld /etc/nftables.conf /etc/systemd/system /etc/sysctl.d /etc/onprem.torch /usr/local/lib/onprem.torch \
    -type f ! -name '*.old' -exec sha256sum {} + 2>/dev/null | sort -k 2
nft --stateless list ruleset 2>/dev/null
iptables -S; ip6tables -S
ipset list -n
cat /proc/sys/net/ipv4/ip_local_port_range
systemctl is-enabled nftables ufw firewalld
if systemctl --quiet is-active firewalld; then
    # Rich rules are a set, which firewalld prints in any order.
    for zone in $(firewall-cmd --get-zones); do firewall-cmd --zone="$zone" --list-all | sort; done
    firewall-cmd --get-ipsets; firewall-cmd --get-policies
fi
true
