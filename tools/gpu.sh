#!/bin/sh
# Runs the whole way on this machine's GPUs (make gpu): needs Python 3.11 or newer, root, and the bundle, which it makes where
# there is none. Neither network, systemd, iproute2 nor SSH have to be there, and nothing is installed.
#
# PYTORCH=folder   environment with PyTorch and scikit-learn; default: the one of python3
# NODES=n          nodes that share the GPUs; default: one for each
# NCCL_TESTS=file  all_reduce_perf of nccl-tests, to compare with; built by you for the NCCL of that PyTorch
# GPU=0            the same on CPUs, to try it out
set -eu
cd "$(dirname "$0")/.."

fail() {
    echo "gpu: $1" >&2
    exit 1
}

[ "$(id -u)" -eq 0 ] || fail "root is needed to boot nodes; use sudo make gpu"
# Not the checkout's own environment, which make puts first.
PATH=${PATH#"$PWD/${VENV:-.venv}/bin:"}
python=$(command -v "${PYTHON:-python3}") || fail "there is no ${PYTHON:-python3}; set PYTHON to a Python 3.11 or newer"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    fail "$python is no Python 3.11 or newer; set PYTHON to one"
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
bundle=${BUNDLE:-build/bundle}
if [ ! -f "$bundle/SHA256SUMS" ]; then
    tools/setup.sh
    BUNDLE="$bundle" BUNDLE_PYTHON="$version" tools/bundle.sh
fi
[ "$(cat "$bundle/python")" = "$version" ] ||
    fail "$bundle is for Python $(cat "$bundle/python"), but $python is $version; make one with BUNDLE_PYTHON=$version make bundle"
(cd "$bundle" && sha256sum --quiet --check SHA256SUMS) || fail "$bundle is damaged; make it anew with make bundle"

PYTORCH=${PYTORCH:-$("$python" -c 'import sys; print(sys.prefix)')}
[ -x "$PYTORCH/bin/python3" ] && "$PYTORCH/bin/python3" -c 'import torch, sklearn' 2>/dev/null ||
    fail "$PYTORCH is no Python environment with torch and scikit-learn; set PYTORCH to the folder of one"

mkdir -p build/gpu/bin
if ! cmp -s "$bundle/SHA256SUMS" build/gpu/site/SHA256SUMS; then
    rm -rf build/gpu/site
    "$python" -c 'import glob, sys, zipfile
for path in glob.glob(sys.argv[1]): zipfile.ZipFile(path).extractall("build/gpu/site")' "$bundle/wheels/*.whl"
    cp "$bundle/SHA256SUMS" build/gpu/site/
fi
for name in ansible ansible-playbook; do
    command="-m ansible ${name#ansible-}"
    [ "$name" = ansible ] && command="-m ansible adhoc"
    printf '#!/bin/sh\nPYTHONPATH="%s" exec "%s" %s "$@"\n' "$PWD/build/gpu/site" "$python" "$command" >"build/gpu/bin/$name"
    chmod +x "build/gpu/bin/$name"
done

export PYTORCH BUNDLE="$bundle"
export PATH="$PWD/build/gpu/bin:$PATH:$PWD/build/gpu/.state/host/bin:/usr/sbin:/sbin"
export PYTHONDONTWRITEBYTECODE=1 LC_ALL=C.UTF-8 ANSIBLE_FORCE_COLOR=
exec "$python" tests/gpu/run.py "$@"
