#!/usr/bin/env bash
# Install vllm-metal into a virtual environment of its own; run it again to update.
#
#   bash install.sh [--venv DIR] [--wheels DIR] [--lock FILE] [--python VERSION]
#
#   --venv DIR        where to install                  (default: ~/.venv-vllm-metal)
#   --wheels DIR      take our five packages from files (default: the package index)
#   --lock FILE       versions of everything else       (default: requirements.lock beside the wheels or this script)
#   --python VERSION  interpreter of a new environment  (default: 3.11)
set -euo pipefail

VLLM_VERSION=0.32.0
venv="$HOME/.venv-vllm-metal" wheels="" lock="" python=3.11
here=$(cd "$(dirname "${BASH_SOURCE[0]:-$0}")" && pwd)

fail() { printf 'install.sh: %s\n' "$*" >&2; exit 1; }
say() { printf '==> %s\n' "$*"; }

while [ $# -gt 0 ]; do
    case "$1" in
        --venv | --wheels | --lock | --python)
            [ $# -ge 2 ] || fail "$1 needs a value."
            printf -v "${1#--}" '%s' "$2"; shift 2 ;;
        -h | --help) sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
        *) fail "unknown option $1; see --help." ;;
    esac
done

case "$(uname -s)-$(uname -m)" in
    Darwin-arm64)
        xcode-select -p >/dev/null 2>&1 || fail "vLLM itself is compiled on a Mac and needs Apple's command-line tools. Run: xcode-select --install" ;;
    Darwin-*) fail "this Mac has an Intel processor; MLX needs Apple silicon." ;;
    Linux-*)
        command -v g++ >/dev/null || fail "MLX's CPU backend compiles kernels with g++. Install it (Debian, Ubuntu: apt-get install g++)." ;;
    *) fail "$(uname -s) on $(uname -m) is not supported; use macOS on Apple silicon, or Linux." ;;
esac
command -v uv >/dev/null || fail "uv is not installed. Get it from your package index (pip install uv) and run this again."

if [ -z "$lock" ]; then
    for candidate in "$wheels/requirements.lock" "$here/requirements.lock" "$here/../requirements.lock"; do
        if [ -f "$candidate" ]; then lock=$candidate; break; fi
    done
fi
[ -f "$lock" ] || fail "requirements.lock not found; name it with --lock."

say "Environment: $venv"
[ -x "$venv/bin/python" ] || uv venv --quiet --python "$python" "$venv"
pip() { uv pip "$@" --quiet --python "$venv/bin/python"; }

# vLLM's source needs its build tools in the environment: everything else goes first.
everything_else=$(mktemp) vllm=$(mktemp)
trap 'rm -f "$everything_else" "$vllm"' EXIT
awk -v vllm="$vllm" '/^[^ #]/ { is_vllm = /^vllm==/ } { print > (is_vllm ? vllm : "/dev/stdout") }' "$lock" >"$everything_else"
say "Dependencies ($(grep -c '^[^ #].*==' "$lock") locked packages)"
pip install --no-deps --require-hashes -r "$everything_else"
pip install "setuptools>=78.1.1,<81" "setuptools-scm>=8" "setuptools-rust>=1.9" "packaging>=24.2" wheel cmake ninja
say "vLLM $VLLM_VERSION, from source (about a minute the first time)"
# On Linux the pure-Python build is enough; a Mac gets vLLM's own choice. Its optional Rust front end is not built.
if [ "$(uname -s)" = Linux ]; then export VLLM_TARGET_DEVICE=empty; fi
CARGO=false VLLM_VERSION_OVERRIDE=$VLLM_VERSION \
    pip install --no-deps --require-hashes --no-binary vllm --no-build-isolation -r "$vllm"
unset VLLM_TARGET_DEVICE

say "vllm-metal"
ours=(metal-kernels metal-kv metal-models vllm-metal-plugin vllm-metal-hub vllm-metal)
if [ -n "$wheels" ]; then
    # With dependencies: a sibling range that the files do not meet must fail here.
    pip install --reinstall-package vllm-metal "${ours[@]/#/--reinstall-package=}" --no-index --find-links "$wheels" vllm-metal
else
    pip install --upgrade --no-deps "${ours[@]}"
fi

say "Check"
"$venv/bin/vllm-metal" doctor
say "Done. Activate with: source $venv/bin/activate"
