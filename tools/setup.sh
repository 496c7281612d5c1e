#!/bin/sh
# Makes .venv in the checkout with everything that plays, checks and tests need. Repeatable; a second run takes no time.
set -eu
cd "$(dirname "$0")/.."

as_root() {
    if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo -n "$@"; fi
}

fail() {
    echo "setup: $1" >&2
    exit 1
}

python=${PYTHON:-python3}
command -v "$python" >/dev/null || fail "no $python was found; install Python 3.11 or newer or set PYTHON"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$python is $("$python" -V 2>&1), but ansible-core 2.19 needs Python 3.11 or newer; set PYTHON to a newer one"

venv=${VENV:-.venv}
stamp="$venv/.complete"
wanted="$("$python" -V) $(cksum <requirements.txt)"
[ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && exit 0

echo "setup: making $venv with $("$python" -V)"
rm -f "$stamp"
if ! "$python" -m venv --clear "$venv" 2>/dev/null; then
    command -v apt-get >/dev/null || fail "$python has no venv module; install it"
    as_root apt-get update -q >/dev/null || fail "root or passwordless sudo is needed to install python3-venv"
    as_root apt-get install -y -q python3-venv >/dev/null
    "$python" -m venv --clear "$venv"
fi
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check uv
"$venv/bin/uv" pip install --quiet --python "$venv/bin/python" --requirement requirements.txt
echo "$wanted" >"$stamp"
