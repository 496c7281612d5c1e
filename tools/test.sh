#!/usr/bin/env bash
# Runs every check, or those that are named: tools/test.sh [SUITE...]. Prints what took how long; fails if one failed.
set -uo pipefail
cd "$(dirname "$0")/.."

# Nodes are booted and their network is cut, which takes root. In a copy, no file of root's is left among the user's own.
if [ "$(id -u)" -ne 0 ]; then
    copy=$(mktemp -d /var/tmp/onprem-test.XXXXXX) || exit 2
    trap 'sudo -n rm -rf "$copy"' EXIT
    { git ls-files -z --cached --others --exclude-standard && printf '.git\0'; } |
        tar --create --null --files-from=- --ignore-failed-read | sudo -n tar --extract --no-same-owner --directory "$copy" || exit 2
    sudo -n chown 0:0 "$copy"
    sudo -n -E -H make --no-print-directory -C "$copy" setup && sudo -n -E -H "$copy/tools/test.sh" "$@"
    exit
fi
export PATH=$PWD/${VENV:-.venv}/bin:$PATH
export ANSIBLE_CONFIG=$PWD/ansible.cfg NO_COLOR=1

# Tests have bridges and subnets of their own, which two runs cannot share. The lock ends with this shell; what it starts has none.
exec 9>/run/onprem-torch-test.lock
flock --nonblock 9 || {
    echo "test: another run of the tests is under way on this machine; wait for its end" >&2
    exit 2
}

# name: command. Those without nodes come first, since they are the quickest to tell.
suites=(
    "lint: ansible-lint --offline && yamllint --strict . && antsibull-changelog lint"
    "unit: pytest -q -n 2 tests/unit"
    "sanity: tools/sanity.sh"
    "collection: pytest -q tests/collection"
    "quickstart: pytest -q tests/quickstart"
    "inventory: pytest -q tests/inventory"
    "molecule-default: molecule test --scenario-name default"
    "molecule-nvidia: molecule test --scenario-name nvidia"
    "molecule-firewall: molecule test --scenario-name firewall"
    "nvidia: pytest -q tests/nvidia"
    "verify: pytest -q tests/verify"
    "faults: pytest -q tests/faults"
    "newest: tools/newest.sh 'pytest -q -n 2 tests/unit && molecule test --scenario-name debian13'"
    "interrupts: pytest -q tests/interrupts"
)

chosen() {
    [ ${#wanted[@]} -eq 0 ] && return 0
    local entry
    for entry in "${wanted[@]}"; do [ "$entry" = "$1" ] && return 0; done
    return 1
}

wanted=("$@")
for name in "${wanted[@]}"; do
    printf '%s\n' "${suites[@]%%:*}" | grep -qx -- "$name" || {
        echo "test: there is no suite $name; there are: ${suites[*]%%:*}" >&2
        exit 2
    }
done

rows=()
passed=0
failed=0
for suite in "${suites[@]}"; do
    name=${suite%%:*}
    command=${suite#*: }
    chosen "$name" || continue
    printf '\n=== %s: %s\n' "$name" "$command"
    began=$SECONDS
    if bash -c "$command" 9>&-; then
        verdict=passed
        passed=$((passed + 1))
    else
        verdict=FAILED
        failed=$((failed + 1))
    fi
    rows+=("$(printf '%-20s %-7s %5d s' "$name" "$verdict" $((SECONDS - began)))")
done

printf '\n=== all suites, %d s\n' "$SECONDS"
printf '%s\n' "${rows[@]}"
printf '%d passed, %d failed\n' "$passed" "$failed"
[ "$failed" -eq 0 ]
