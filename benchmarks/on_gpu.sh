#!/usr/bin/env bash
# Tests and benchmarks on a machine with a GPU, in a given time:
#
#   bash benchmarks/on_gpu.sh [--dry] [SECONDS]     540 seconds by default
#   bash benchmarks/on_gpu.sh --fetch               download the wheels that such a machine may lack
#
# Needs Python with torch, pytest and pytest-benchmark, and no network: what else is missing is taken from
# benchmarks/wheels/, upstream's code from benchmarks/checkouts/VAR and Infinity. Where there is no nvcc, the libraries
# that `fastvar build` made elsewhere have to lie in fastvar/. Every result is written as it comes, into
# the folder OUT (outputs/on_gpu by default), so that a run that is cut off loses nothing; a short table comes last. --dry
# does the same on a CPU, at tiny sizes. In a copy without .git set FASTVAR_COMMIT to the commit.
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
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
installed=0
for wheel in "$WHEELS"/*.whl; do
    if "$PYTHON" -m pip install --quiet --no-index --no-deps --target "$site" "$wheel" >>"$OUT/wheels.log" 2>&1; then
        installed=$((installed + 1))
    else
        echo "wheels: $(basename "$wheel") does not fit, see $OUT/wheels.log"
    fi
done
echo "wheels: $installed installed"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}:$site"
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
if [ $dry = 0 ] && command -v "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" nvcc >/dev/null; then
    step build 120 "$PYTHON" -m fastvar build
fi
for target in cpu cuda; do
    if [ -f fastvar/_$target.abi3.so ]; then
        echo "build: _$target.abi3.so is there"
    elif [ $dry = 0 ]; then
        echo "build: no _$target.abi3.so; without nvcc here, build it elsewhere and bring it along" && failed=1
    fi
done
step tests $(($(left) / 3)) "$PYTHON" -m pytest tests -m gpu -q -p no:cacheprovider --continue-on-collection-errors
tail -n 1 "$OUT/tests.log"
sanitizer=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
if [ $dry = 1 ] || [ ! -x "$sanitizer" ]; then
    echo "sanitizer: left out, $([ $dry = 1 ] && echo "no device" || echo "no compute-sanitizer")"
else
    step sanitizer $(($(left) / 4)) "$sanitizer" --tool memcheck --error-exitcode 9 \
        "$PYTHON" -m pytest tests/ops/test_gpu.py tests/ops/test_gpu_sampling.py -q -p no:cacheprovider -k "triton or cuda"
fi

# 2. The benchmarks within what is left. First one setting of every suite, each in a process of its own, so that one which
# breaks the device takes no other along; then all other settings, then backward passes alone. Profiles show their ranges
# where nsys is there.
rows=$OUT/suites.jsonl
before=$([ -f "$rows" ] && wc -l <"$rows" || echo 0)
seconds=$([ $dry = 1 ] && echo 0.02 || echo 1)

bench() { # bench NAME LIMIT ARGUMENTS...: within LIMIT seconds, or what is left
    local name=$1 limit=$2 rest
    shift 2
    rest=$(left)
    [ "$rest" -lt 30 ] && [ $dry = 0 ] && return
    limit=$((limit < rest ? limit : rest))
    step "$name" "$limit" "$PYTHON" -m pytest benchmarks --benchmark-only -q -p no:cacheprovider --size $size \
        --seconds "$seconds" --rows "$rows" --time-budget $((limit > 40 ? limit - 20 : limit / 2 + 1)) "$@"
}

if command -v nsys >/dev/null && [ $dry = 0 ]; then
    step profile 60 nsys profile --trace=nvtx,cuda --force-overwrite=true --output "$OUT/profile" \
        env FASTVAR_NVTX=1 "$PYTHON" -m pytest benchmarks --benchmark-only -q -p no:cacheprovider --size gpu \
        --settings first --suites adaptive_layer_norm --passes forward --seconds 0.1 --rows "$OUT/profiled.jsonl"
    nsys stats --report nvtx_sum "$OUT/profile.nsys-rep" 2>/dev/null | grep -c "fastvar::" |
        sed 's/^/profile: lines with ranges of fastvar: /'
else
    echo "profile: left out, $([ $dry = 1 ] && echo "no device" || echo "no nsys")"
fi
if [ $dry = 1 ]; then
    bench suites "$(left)" --passes forward,backward,training
else
    for suite in $("$PYTHON" -c 'from benchmarks.suites import SUITES; print(*[suite.name for suite in SUITES])'); do
        bench "$suite" 90 --settings first --suites "$suite"
    done
    bench rest "$(left)" --settings rest
    bench backward "$(left)" --passes backward
fi

# 3. The table.
"$PYTHON" -m benchmarks.summary --rows "$rows" --skip "$before" --most 40 || failed=1
exit $failed
