#!/usr/bin/env bash
# Everything a GPU machine should run, offline, in under 9 minutes: install with the machine's own torch and nvcc, the
# gpu tests, validate, the benchmarks.  Leaves compact JSON in the folder given ($1, or $OUT, or out/gpu):
#   steps.jsonl  one line per step: exit status, seconds     info.json, validate.json, gpu_tests.xml, log.txt
#   <machine>/<date>-<commit>.json                           the benchmarks, ready for bench/results/
# On a machine without a GPU the same steps run, and say what was skipped and why.
# PYTHON: the interpreter.  STEEPEST_STEPS: a subset, such as "info bench"; without "install", what PYTHON imports is used.
# STEEPEST_PATIENCE: multiplies the steps' time limits, on machines that have other work to do as well.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:-${OUT:-out/gpu}}" && cd "${1:-${OUT:-out/gpu}}" && pwd)
python=${PYTHON:-python3}
steps=${STEEPEST_STEPS:-install info gpu_tests validate bench}
status=0

step() { # name, seconds, command...
  local name=$1 limit=$(($2 * ${STEEPEST_PATIENCE:-1})) begin=$SECONDS
  shift 2
  case " $steps " in *" $name "*) ;; *) return ;; esac
  timeout "$limit" "$@" >"$out/$name.log" 2>&1
  local rc=$?
  [ $rc -eq 0 ] || status=1
  printf '{"step": "%s", "rc": %d, "seconds": %d}\n' "$name" $rc $((SECONDS - begin)) | tee -a "$out/steps.jsonl"
  if [ $rc -eq 0 ]; then grep -E '^(SKIPPED|skipped)' "$out/$name.log"; else tail -n 25 "$out/$name.log"; fi
  { echo "== $name: status $rc" && cat "$out/$name.log"; } >>"$out/log.txt"
  rm "$out/$name.log"
}

bench() { # interrupted, pytest still writes what it has; a result of nothing (no GPU) is not kept
  timeout -s INT 105 "$python" -m pytest bench -m gpu -p no:cacheprovider --seconds 0.8 --benchmark-json="$out/bench.json"
  local rc=$?
  if grep -qs '"rounds"' "$out/bench.json"; then "$python" bench/table.py save "$out/bench.json" "$out"; fi
  return $rc
}

# What `timeout` starts is a shell of its own.
export -f bench
export python out
: >"$out/steps.jsonl"
: >"$out/log.txt"
# The limits add up to 530 s.
site="$out/.site"
step install 120 "$python" -m pip install --no-build-isolation --no-deps --target "$site" --upgrade .
[ -d "$site" ] && export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
step info 20 bash -c '"$python" -m steepest info --json >"$out/info.json"'
step gpu_tests 150 "$python" -m pytest tests/gpu -q -p no:cacheprovider --junitxml="$out/gpu_tests.xml"
step validate 125 "$python" -m steepest validate --quick --json "$out/validate.json"
step bench 115 bash -c bench
rm -rf "$site" "$out/bench.json"
exit $status
