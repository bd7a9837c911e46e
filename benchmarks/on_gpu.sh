#!/usr/bin/env bash
# Tests and benchmarks on a machine with a GPU, in a given time:
#
#   bash benchmarks/on_gpu.sh [--dry] [SECONDS]     540 seconds by default
#   bash benchmarks/on_gpu.sh --fetch               download the wheels that such a machine may lack
#
# Needs Python with torch, pytest and pytest-benchmark, and no network: what else is missing is taken from
# benchmarks/wheels/. Every result is written as it comes, into the folder OUT (outputs/on_gpu by default), so that a run
# that is cut off loses nothing; a short table comes last. --dry does the same on a CPU, at tiny sizes.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-outputs/on_gpu}
WHEELS=benchmarks/wheels

dry=0
if [ "${1:-}" = --fetch ]; then
    version=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    exec "$PYTHON" -m pip download --no-deps --only-binary=:all: --python-version "${WHEELS_PYTHON:-$version}" \
        --dest "$WHEELS" --requirement benchmarks/wheels.txt
fi
if [ "${1:-}" = --dry ]; then
    dry=1
    shift
fi
budget=${1:-540}
case $budget in
'' | *[!0-9]*)
    echo "on_gpu: SECONDS: expected a number of seconds, got $budget" >&2
    exit 2
    ;;
esac
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
begin=$SECONDS
failed=0

left() { # seconds of the budget that are left, at least 1
    local rest=$((budget - (SECONDS - begin)))
    echo $((rest > 1 ? rest : 1))
}

step() { # step NAME SECONDS COMMAND...: runs it, its output in OUT/NAME.log; says how it ended
    local name=$1 limit=$2 start=$SECONDS status
    shift 2
    timeout --signal=INT --kill-after=10 "$limit" "$@" >"$OUT/$name.log" 2>&1
    status=$?
    case $status in
    0) echo "$name: done in $((SECONDS - start)) s" ;;
    124 | 137) echo "$name: cut off after $limit s, see $OUT/$name.log" ;;
    *) echo "$name: FAILED with $status, see $OUT/$name.log" && tail -n 15 "$OUT/$name.log" && failed=1 ;;
    esac
}

shopt -s nullglob
wheels=("$WHEELS"/*.whl)
if [ ${#wheels[@]} -gt 0 ] && [ $dry = 0 ]; then
    step wheels 120 "$PYTHON" -m pip install --no-index --no-deps --upgrade --target "$OUT/site" "${wheels[@]}"
    export PYTHONPATH="$OUT/site:$PWD${PYTHONPATH:+:$PYTHONPATH}"
else
    echo "wheels: none installed"
    export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
fi
if [ $dry = 0 ]; then
    size=gpu
    "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
        echo "on_gpu: expected a CUDA device, torch sees none; --dry runs without one" >&2
        exit 1
    }
else
    size=tiny
fi
"$PYTHON" -c 'import json; from benchmarks.records import provenance; print(json.dumps(provenance("'$([ $dry = 0 ] && echo cuda || echo cpu)'")))' \
    >"$OUT/machine.json"

# 1. The extension, the tests that need a GPU, and what compute-sanitizer says of our CUDA code.
if [ -d csrc ]; then
    step build $(($(left) / 3)) "$PYTHON" -m fastvar build
else
    echo "build: there is no csrc yet"
fi
step tests $(($(left) / 3)) "$PYTHON" -m pytest tests -m gpu -q -p no:cacheprovider --continue-on-collection-errors
tail -n 1 "$OUT/tests.log"
sanitizer=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
if [ ! -d csrc ]; then
    echo "sanitizer: there is no CUDA code yet"
elif [ $dry = 1 ] || [ ! -x "$sanitizer" ]; then
    echo "sanitizer: left out, $([ $dry = 1 ] && echo "no device" || echo "no compute-sanitizer")"
else
    step sanitizer $(($(left) / 4)) "$sanitizer" --tool memcheck --error-exitcode 9 \
        "$PYTHON" -m pytest tests -m gpu -q -p no:cacheprovider -k cuda
fi

# 2. The benchmarks, the most important ones first, within what is left; profiles show their ranges where nsys is there.
rows=$OUT/suites.jsonl
before=$([ -f "$rows" ] && wc -l <"$rows" || echo 0)
if command -v nsys >/dev/null && [ $dry = 0 ]; then
    step profile 60 nsys profile --trace=nvtx,cuda --force-overwrite=true --output "$OUT/profile" \
        env FASTVAR_NVTX=1 "$PYTHON" -m pytest benchmarks --benchmark-only -q -p no:cacheprovider \
        --size tiny --suites adaptive_layer_norm --seconds 0.1 --rows "$OUT/profiled.jsonl"
else
    echo "profile: left out, $([ $dry = 1 ] && echo "no device" || echo "no nsys")"
fi
seconds=$([ $dry = 1 ] && echo 0.02 || echo 1)
step suites "$(left)" "$PYTHON" -m pytest benchmarks --benchmark-only -q -p no:cacheprovider --size $size \
    --passes forward,backward,training --seconds "$seconds" --rows "$rows" --time-budget $(($(left) - 20)) ${FASTVAR_BENCH_ARGS:-}
tail -n 1 "$OUT/suites.log"

# 3. The table.
"$PYTHON" -m benchmarks.summary --rows "$rows" --skip "$before" --most 40 || failed=1
exit $failed
