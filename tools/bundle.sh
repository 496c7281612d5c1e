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

# What a node boots from, and what the host itself needs. The libraries of these come along: a library that the host has is
# not unpacked there. The C library and what every Debian or Ubuntu has are left out.
packages="systemd systemd-sysv systemd-container dbus openssh-server openssh-client iproute2 nftables procps sudo"
companions="dbus-bin dbus-daemon dbus-session-bus-common dbus-system-bus-common openssh-sftp-server"
everywhere="libc6 libgcc-s1 libcrypt1 libpam-modules libpam-modules-bin libpam-runtime"

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

# What apt would install on a machine that has nothing.
: >"$folder.partial/nothing"
# shellcheck disable=SC2086  # a list of names
all=$(apt-get install --simulate --yes --no-install-recommends -o Debug::NoLocking=1 \
    -o "Dir::State::Status=$PWD/$folder.partial/nothing" $packages 2>"$folder.partial/why" | awk '/^Inst / { print $2 }')
[ -n "$all" ] || fail "apt does not know all of $packages; run apt-get update ($(tail -n 1 "$folder.partial/why"))"
wanted=$(for name in $all; do
    case " $everywhere " in *" $name "*) continue ;; esac
    case "$name" in *perl*) continue ;; lib*) echo "$name" ;; esac
    case " $packages $companions " in *" $name "*) echo "$name" ;; esac
done)
rm "$folder.partial/nothing" "$folder.partial/why"
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
