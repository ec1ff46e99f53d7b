#!/usr/bin/env bash
# Everything a GPU machine should run, offline, in under 9 minutes: install with the machine's own torch and nvcc, the
# gpu tests, validate, the benchmarks.  Leaves compact JSON in the folder given ($1, or $OUT, or out/gpu).  On a machine
# without a GPU the same steps run, and those that need one are skipped with their reasons.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:-${OUT:-out/gpu}}" && cd "${1:-${OUT:-out/gpu}}" && pwd)
python=${PYTHON:-python3}
status=0

step() { # name, seconds, command...
  local name=$1 limit=$2 begin=$SECONDS
  shift 2
  timeout "$limit" "$@" >"$out/$name.log" 2>&1
  local rc=$?
  [ $rc -eq 0 ] || status=1
  printf '{"step": "%s", "rc": %d, "seconds": %d}\n' "$name" $rc $((SECONDS - begin)) | tee -a "$out/steps.jsonl"
  [ $rc -eq 0 ] || tail -n 25 "$out/$name.log"
}

: >"$out/steps.jsonl"
if [ -z "${STEEPEST_SKIP_INSTALL:-}" ]; then
  site="$out/../site"
  step install 170 "$python" -m pip install --no-build-isolation --no-deps --target "$site" --upgrade .
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
step info 30 "$python" -m steepest info --json "$out/info.json"
step gpu_tests 170 "$python" -m pytest tests/gpu -q -p no:cacheprovider --junitxml="$out/gpu_tests.xml"
step validate 120 "$python" -m steepest validate --quick --json "$out/validate.json"
step bench 150 "$python" -m pytest bench -q -m gpu -p no:cacheprovider --benchmark-json="$out/bench.json"
rm -rf "$out/../site"
exit $status
