#!/usr/bin/env bash
# The core's tests with the oldest versions that pyproject.toml claims and with the newest there are, on every Python it
# claims. Each case has an environment of its own in a temporary folder, which is deleted afterwards.
#
#   tests/versions.sh                        all cases
#   tests/versions.sh oldest-3.10            one of them
#   TESTS="tests/test_compile.py" tests/versions.sh newest-3.13
#
# Needs python3.10 to python3.13 on the path, or pyenv's. An environment takes about 6 GB while it is there.
set -uo pipefail
cd "$(dirname "$0")/.."

# What takes long and is the same for all versions is left to .ci/run.
left_out="documentation|examples|benchmarks|time_to_accuracy|solo_learn"
TESTS="${TESTS:-$(ls tests/test_*.py tests/adapters/test_*.py tests/trust/test_*.py | grep -vE "$left_out")}"
cases=("${@:-oldest-3.10 newest-3.10 newest-3.11 newest-3.12 newest-3.13}")

python_of() {
    command -v "$HOME/.pyenv/versions/$1".*/bin/python "python$1" | head -n 1
}

# "torch>=2.6" becomes "torch==2.6"; what the tests alone use may be any version that goes with these.
oldest() {
    grep -oE '"(torch|timm|packaging|lightly|lightning|pytorch-lightning|transformers\[torch\]|peft|kornia)>=[0-9.]+"' \
        pyproject.toml | tr -d '"' | sed 's/>=/==/; s/\[torch\]//' | sort -u
    echo "numpy<2" # as those were built with
}

failed=()
for case in ${cases[@]}; do
    python="$(python_of "${case#*-}")"
    folder="$(mktemp -d)"
    trap 'rm -rf "$folder"' EXIT
    pins="$folder/pins.txt"
    [[ "$case" == oldest-* ]] && oldest > "$pins" || : > "$pins"
    echo "== $case: ${python:-no such Python}"
    if [[ -n "$python" ]] && "$python" -m venv "$folder/venv" &&
        "$folder/venv/bin/pip" install --quiet --no-cache-dir --constraint "$pins" ".[test]" &&
        "$folder/venv/bin/python" -c '
import importlib.metadata, sys
names = ("torch", "timm", "lightning", "lightly", "transformers", "numpy")
print(sys.version.split()[0], *(f"{name} {importlib.metadata.version(name)}" for name in names), sep=", ")' &&
        "$folder/venv/bin/pytest" -q -p no:cacheprovider $TESTS; then
        echo "== $case: passed"
    else
        failed+=("$case")
        echo "== $case: FAILED"
    fi
    rm -rf "$folder"
done
[[ ${#failed[@]} -eq 0 ]] || { echo "failed: ${failed[*]}"; exit 1; }
