#!/bin/sh
# Makes build/bundle, all that `make gpu` and the lab role's host root mode need on a host without network: wheels for the
# control node's Python and Debian packages for the nodes. The packages are those of the distribution that runs this, and
# work on every Debian or Ubuntu whose C library is as new. BUNDLE_PYTHON=3.13 makes one for another Python than 3.12,
# BUNDLE=folder elsewhere.
set -eu
cd "$(dirname "$0")/.."

python=${BUNDLE_PYTHON:-3.12}
folder=${BUNDLE:-build/bundle}
limit=50   # MB

# What a node boots from, what the host itself needs, and the libraries of both that a small host may lack. A library that
# the host has is not unpacked.
packages="
    systemd systemd-sysv systemd-container libsystemd-shared dbus dbus-bin dbus-daemon dbus-session-bus-common
    dbus-system-bus-common openssh-server openssh-client openssh-sftp-server iproute2 nftables procps sudo
    libacl1 libapparmor1 libargon2-1 libbpf1 libbsd0 libcap2 libcbor0.8 libcom-err2 libcryptsetup12 libdb5.3 libdbus-1-3
    libdevmapper1.02.1 libedit2 libelf1 libexpat1 libfdisk1 libffi8 libfido2-1 libgssapi-krb5-2 libip4tc2 libjansson4
    libjson-c5 libk5crypto3 libkeyutils1 libkmod2 libkrb5-3 libkrb5support0 libmd0 libmnl0 libnftables1 libnftnl11 libnsl2
    libp11-kit0 libproc2-0 libseccomp2 libtirpc3 libwrap0 libxtables12"

fail() {
    echo "bundle: $1" >&2
    exit 1
}

command -v apt-get >/dev/null || fail "apt-get is needed to fetch Debian packages; make the bundle on Debian or Ubuntu"
machine=$(uname -m)
rm -rf "$folder.partial"
mkdir -p "$folder.partial/wheels" "$folder.partial/packages"

# The ansible-core that this checkout's checks run with.
core=$("${VENV:-.venv}/bin/python" -c 'from importlib.metadata import version; print(version("ansible-core"))')
set -- --only-binary=:all: --implementation cp --python-version "$python" --dest "$folder.partial/wheels"
for glibc in 39 36 35 34 31 28 27 17; do set -- "$@" --platform "manylinux_2_${glibc}_$machine"; done
set -- "$@" --platform "manylinux2014_$machine"
"${VENV:-.venv}/bin/python" -m pip download --quiet --disable-pip-version-check "$@" "ansible-core==$core" ||
    fail "the wheels of ansible-core $core for Python $python cannot be fetched; see pip's message above"

# Names differ between distributions (libelf1 or libelf1t64): what this one does not have is left out.
known=$(for name in $packages; do echo "$name" "${name}t64"; done | xargs apt-cache policy |
    awk '/^[^ ]+:$/ { name = substr($1, 1, length($1) - 1) } /^ *Candidate: [^(]/ { print name }')
wanted=$(echo "$known" | tr '\n' ' ')
case " $wanted " in *" systemd-container "*) ;; *) fail "apt knows no systemd-container; run apt-get update first" ;; esac
# shellcheck disable=SC2086  # a list of names
(cd "$folder.partial/packages" && apt-get --quiet=2 -o APT::Sandbox::User=root download $wanted) ||
    fail "the Debian packages cannot be fetched; run apt-get update, and see apt's message above"

echo "$python" >"$folder.partial/python"
(cd "$folder.partial" && find wheels packages -type f -exec sha256sum {} + | sort -k 2 >SHA256SUMS)
size=$(du --summarize --block-size=1000000 "$folder.partial" | cut -f 1)
[ "$size" -lt "$limit" ] || fail "the bundle has $size MB, but less than $limit MB was expected"
rm -rf "$folder"
mv "$folder.partial" "$folder"
echo "bundle: $folder, $size MB: $(find "$folder/wheels" -type f | wc -l) wheels for Python $python, \
$(find "$folder/packages" -type f | wc -l) packages of $(. /etc/os-release && echo "$PRETTY_NAME")"
