#!/usr/bin/env bash
# Builds the documentation site of all roles and plugins in build/docs.
set -eu
cd "$(dirname "$0")/.."
export PATH=$PWD/${VENV:-.venv}/bin:$PATH
export ANSIBLE_CONFIG=$PWD/ansible.cfg
rm -rf build/docs
mkdir -p build/docs
antsibull-docs sphinx-init --use-current --lenient --dest-dir build/docs onprem.torch
uv pip install --quiet --requirement build/docs/requirements.txt
(cd build/docs && ./build.sh)
echo "docs: see build/docs/build/html/index.html"
