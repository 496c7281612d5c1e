#!/usr/bin/env bash
# ansible-test sanity, without an ignore file, over a copy of what git would commit (ansible-test wants a real path).
set -eu
cd "$(dirname "$0")/.."
venv=$PWD/${VENV:-.venv}
version=$("$venv/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
folder=$PWD/build/sanity/ansible_collections/onprem/torch
rm -rf "$folder"
mkdir -p "$folder"
git ls-files -coz --exclude-standard -- . ':!.collections' | while IFS= read -r -d '' name; do
    [ -e "$name" ] && printf '%s\0' "$name"
done | tar --null --files-from=- --create | tar --extract --directory "$folder"
(cd "$folder" && git init -q && git add -A)

# ansible-test fetches get-pip from a host that a site may not reach; this one takes pip from Python itself.
home=$PWD/build/home
mkdir -p "$home/.ansible/test/cache"
for name in get_pip_24_2.py get_pip_25_2.py; do
    cp tools/get_pip.py "$home/.ansible/test/cache/$name"
done
cd "$folder"
HOME=$home PATH=$venv/bin:$PATH exec ansible-test sanity --venv --requirements --color no --python "$version" "$@"
