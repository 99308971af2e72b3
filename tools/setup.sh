#!/usr/bin/env bash
# Make .venv fit for its use:   bash tools/setup.sh [EXTRA...]      (extras of pyproject.toml: dev ref book lab torch)
# A second call is instant; pyproject.toml, constraints.txt, the backend or the folder changing means installing again.
# Environment: PYTHON (the interpreter to use), BACKEND (cpu, cuda12, cuda13; empty on macOS). Works with bash 3.2.
set -eu
cd "$(dirname "$0")/.."

fail() { echo "llmfs: $1" >&2; exit 1; }

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        new_enough "$PYTHON" || fail "$PYTHON is not Python 3.11 or newer"
        echo "$PYTHON"
        return
    fi
    for python in python3 python3.13 python3.12 python3.11; do
        if new_enough "$python"; then echo "$python"; return; fi
    done
    fail "needs Python 3.11 or newer, found $(python3 --version 2>/dev/null || echo none): install one, or uv (https://docs.astral.sh/uv), which brings its own"
}

find_backend() {
    case "$(uname -s) $(uname -m)" in
        "Darwin arm64") return ;;
        Darwin*) fail "MLX needs Apple Silicon and an arm64 Python; this shell runs as $(uname -m)" ;;
        Linux*) ;;
        *) fail "MLX runs on macOS and Linux (on Windows: in WSL)" ;;
    esac
    glibc=$(getconf GNU_LIBC_VERSION 2>/dev/null | sed 's/^glibc 2\.\([0-9]*\).*/\1/') || true
    case "$glibc" in
        "" | *[!0-9]*) ;;
        *) [ "$glibc" -ge 35 ] || fail "MLX needs glibc 2.35 or newer (Ubuntu 22.04, Debian 12); this is 2.$glibc" ;;
    esac
    cuda=$(nvidia-smi 2>/dev/null | sed -n 's/.*CUDA[^0-9|]*Version: *\([0-9][0-9]*\).*/\1/p' | head -n 1) || true
    if [ "${cuda:-0}" -ge 13 ]; then echo cuda13
    elif [ "${cuda:-0}" -eq 12 ]; then echo cuda12
    else echo cpu; fi
}

if [ -e .venv ] || [ -h .venv ]; then
    new_enough .venv/bin/python || fail ".venv has no Python 3.11 or newer: remove it (rm -rf .venv) and run make again"
elif command -v uv >/dev/null 2>&1; then
    uv venv --quiet --python "${PYTHON:->=3.11}" .venv || fail "uv could not make .venv (its message is above)"
else
    python=$(find_python) || exit 1
    if ! "$python" -m venv .venv >/dev/null 2>&1; then
        rm -rf .venv
        fail "$python cannot make virtual environments: install python3-venv (Debian, Ubuntu: sudo apt install python3-venv), or uv"
    fi
fi

backend=${BACKEND-$(find_backend)} || exit 1
stamp=.venv/llmfs-setup
state="$(cat pyproject.toml constraints.txt tools/setup.sh | cksum) ${backend:-macos} $PWD"
have=""
[ -f "$stamp" ] && [ "$(sed -n 1p "$stamp")" = "$state" ] && have=" $(sed -n 2p "$stamp") "
extras=$backend
[ -n "$have" ] && extras=$(sed -n 2p "$stamp")
missing=$([ -n "$have" ] || echo yes)
for extra in "$@"; do
    case " $extras " in *" $extra "*) ;; *) extras="$extras $extra"; missing=yes ;; esac
done
[ -n "$missing" ] || exit 0

list=$(echo $extras | tr ' ' ',')
echo "llmfs: installing into .venv: $(.venv/bin/python --version), ${backend:-Metal}${list:+, extras $list} (a minute or two the first time)"
set -- --constraint constraints.txt --config-settings editable_mode=compat --editable ".${list:+[$list]}"
if command -v uv >/dev/null 2>&1; then
    uv pip install --python .venv/bin/python "$@"
else
    .venv/bin/python -m pip install --quiet --quiet --disable-pip-version-check "$@"
fi || fail "the installation failed (messages above); without a network nothing can be installed"
printf '%s\n%s\n' "$state" "$(echo $extras)" > "$stamp"
