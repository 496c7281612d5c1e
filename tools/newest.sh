#!/usr/bin/env bash
# Runs a command with the newest Python of this machine that ansible-core supports, hence with the newest ansible-core; where
# there is none beside the usual one, with that. tools/newest.sh COMMAND...
set -eu
cd "$(dirname "$0")/.."

candidates() {
    local version
    for version in 3.14 3.13 3.12; do
        # pyenv's shims answer to a name although that version is not chosen; its own folders hold the real ones.
        compgen -G "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version.*/bin/python3" || true
        command -v "python$version" || true
    done
}

for python in $(candidates); do
    "$python" -c 'import venv, ensurepip' 2>/dev/null || continue
    export PYTHON=$python VENV=.venv-newest
    break
done
tools/setup.sh
export PATH=$PWD/${VENV:-.venv}/bin:$PATH
ansible --version | sed -n '1p;/python version/p'
exec bash -c "$*"
