#!/usr/bin/env bash
# Tests and benchmarks on a machine with a GPU, in a given time:
#
#   bash benchmarks/on_gpu.sh [--dry] [PART...] [SECONDS] [-- ARGUMENTS...]
#   bash benchmarks/on_gpu.sh --fetch     download the wheels that such a machine may lack
#
# Parts, all but `profile` by default, in this order however they are given, within SECONDS (540 by default):
#
#   tests      those that need a GPU, in WORKERS (9) processes
#   sanitize   what compute-sanitizer says of our CUDA and Triton code
#   bench      compiles in WARMERS (3) processes side by side, then measures, one pass at a time, the most important ones
#              first. What has a row of this card and this code is left out: call it again to go on. ARGUMENTS go to pytest
#   tune       the fastest tiles for this card, into OUT/cache/fastvar/tiles
#   profile    ranges of one suite, where there is nsys
#
# Needs Python with torch, pytest and pytest-benchmark (pytest-xdist for tests side by side), and no network: what else is
# missing is taken from benchmarks/wheels/, upstream's code from benchmarks/checkouts/VAR and Infinity. Where there is no
# nvcc, the libraries that `fastvar build` made elsewhere have to lie in fastvar/. Every result is written as it comes,
# into the folder OUT (outputs/on_gpu by default), so that a run that is cut off loses nothing, and each part is a process
# of its own. --dry does the same on a CPU, at tiny sizes. In a copy of the tree set FASTVAR_COMMIT to its commit.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-outputs/on_gpu}
WHEELS=benchmarks/wheels

if [ "${1:-}" = --fetch ]; then
    version=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    exec "$PYTHON" -m pip download --no-deps --only-binary=:all: --python-version "${WHEELS_PYTHON:-$version}" \
        --dest "$WHEELS" --requirement benchmarks/wheels.txt
fi
dry=0 budget=540 asked=() parts=()
while [ $# -gt 0 ]; do
    case $1 in
    --dry) dry=1 ;;
    tests | sanitize | bench | tune | profile) asked+=("$1") ;;
    --) shift && break ;;
    '' | *[!0-9]*)
        echo "on_gpu: expected tests, sanitize, bench, tune, profile or a number of seconds, got $1" >&2
        exit 2
        ;;
    *) budget=$1 ;;
    esac
    shift
done
[ ${#asked[@]} -gt 0 ] || asked=(tests sanitize bench tune)
for part in tests sanitize bench tune profile; do
    if [[ " ${asked[*]} " = *" $part "* ]]; then parts+=("$part"); fi
done
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
begin=$SECONDS
failed=0

left() { # seconds of the budget that are left, at least 1
    local rest=$((budget - (SECONDS - begin)))
    echo $((rest > 1 ? rest : 1))
}

# The most that a part takes of what is left while others come after it, and what of the whole is kept for one that does.
declare -A divisor=([tests]=3 [sanitize]=5 [bench]=1 [tune]=1 [profile]=1)
declare -A kept=([tune]=$((budget / 7)) [profile]=$((budget / 10)))

share() { # share PART LATER...: seconds for a part while those come after it
    local rest most part=$1
    rest=$(left)
    shift
    most=$((rest / ($# > 0 ? ${divisor[$part]} : 1)))
    for part in "$@"; do rest=$((rest - ${kept[$part]:-0})); done
    if [ $rest -gt $most ]; then rest=$most; fi
    echo $((rest > 1 ? rest : 1))
}

run() { # run NAME SECONDS COMMAND...: its output goes to OUT/NAME.log; 124 if it took too long
    local name=$1 limit=$2 start=$SECONDS status
    shift 2
    timeout --signal=INT --kill-after=10 "$limit" "$@" >>"$OUT/$name.log" 2>&1
    status=$?
    # Killed before its time it was for want of memory, after it because it did not end.
    return $((status == 137 && SECONDS - start >= limit ? 124 : status))
}

told() { # told NAME STATUS SECONDS: how a command ended; one that was cut off has failed if its log names failures
    local log=$OUT/$1.log place found
    case $2 in
    0) echo "$1: done in $3 s" ;;
    124)
        place=$(grep -aoE '\[ *[0-9]+%\]' "$log" | tail -n 1)
        echo "$1: cut off after $3 s at ${place:-$(tail -n 1 "$log")}, see $log"
        found=$(grep -aE '(^|[] ])(FAILED|ERROR)( |$)|Invalid __|Misaligned|Program hit ' "$log" |
            grep -avF 'ERROR SUMMARY: 0 errors' | tail -n 15)
        if [ -n "$found" ]; then echo "$1: FAILED before that:" && echo "$found" && failed=1; fi
        ;;
    *) echo "$1: FAILED with $2, see $log" && tail -n 15 "$log" && failed=1 ;;
    esac
}

step() { # step NAME SECONDS COMMAND...: runs it and says how it ended
    local start=$SECONDS
    run "$@"
    told "$1" $? $((SECONDS - start))
}

has() { # has MODULE: whether Python finds it
    "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"
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
# Results are those of the package's own tiles, and what `tune` finds lies beside them.
export XDG_CACHE_HOME="$OUT/untuned"
if [ $dry = 0 ]; then
    size=gpu device=cuda
    "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
        echo "on_gpu: expected a CUDA device, torch sees none; --dry runs without one" >&2
        exit 1
    }
else
    size=tiny device=cpu
fi
"$PYTHON" -c "import json; from benchmarks.records import provenance; print(json.dumps(provenance('$device')))" \
    >"$OUT/machine.json"
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

part_tests() { # part_tests SECONDS
    local side=() where=tests
    if [ $dry = 1 ]; then where=tests/ops/test_gpu.py; fi # collecting all would take longer than all else here
    if has xdist; then side=(-n "${WORKERS:-$((dry ? 2 : 9))}"); fi
    step tests "$1" "$PYTHON" -m pytest $where -m gpu -v -p no:cacheprovider --continue-on-collection-errors "${side[@]}"
    tail -n 1 "$OUT/tests.log"
}

part_sanitize() { # two processes side by side, as the sanitizer makes them slow
    local sanitizer names=() statuses=() start=$SECONDS part name i
    sanitizer=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
    if [ $dry = 1 ] || [ ! -x "$sanitizer" ]; then
        echo "sanitize: left out, $([ $dry = 1 ] && echo "no device" || echo "no compute-sanitizer")"
        return
    fi
    for part in "as_on_the_cpu" "not as_on_the_cpu"; do
        name=sanitize_${part// /_}
        run "$name" "$1" "$sanitizer" --tool memcheck --error-exitcode 9 \
            "$PYTHON" -m pytest tests/ops/test_gpu.py -v -p no:cacheprovider -k "(triton or cuda) and $part" &
        names+=("$name") statuses+=($!)
    done
    for i in "${!names[@]}"; do
        wait "${statuses[i]}"
        told "${names[i]}" $? $((SECONDS - start))
    done
}

tries() { # how many passes were begun
    cat "$OUT/suites.tries.jsonl" "${TMPDIR:-/tmp}/fastvar_compiled.jsonl" 2>/dev/null | wc -l
}

benchmarks() { # benchmarks NAME SECONDS ARGUMENTS...: starts again after a pass that ended the process
    local name=$1 limit=$2 end=$((SECONDS + $2)) status=70 begun vain=0
    shift 2
    while [ $status != 0 ] && [ $((end - SECONDS)) -ge $((dry ? 1 : 15)) ]; do
        begun=$(tries)
        limit=$((end - SECONDS))
        run "$name" "$limit" "$PYTHON" -m pytest benchmarks --benchmark-only -q -p no:cacheprovider --size $size \
            --rows "$OUT/suites.jsonl" --by-priority --resume --case-limit 90 \
            --time-budget $((limit > 40 ? limit - 15 : limit / 2 + 1)) "$@"
        status=$?
        case $status in
        70 | 13[0-9] | 14[0-9]) echo "$name: a pass ended the process ($status), see $OUT/$name.log" ;;
        *) break ;;
        esac
        vain=$(($(tries) > begun ? 0 : vain + 1))
        if [ $vain = 2 ]; then echo "$name: given up, as it ended twice before the first pass" && break; fi
    done
    return $status
}

part_bench() { # part_bench SECONDS
    local warmers=${WARMERS:-3} end=$((SECONDS + $1)) start=$SECONDS jobs=() job i
    shift
    for ((i = 1; i <= warmers; i++)); do
        TORCHINDUCTOR_COMPILE_THREADS=$((1 + $(nproc) / warmers)) \
            benchmarks bench_compile $(((end - start) / 3)) --warm "$i/$warmers" "$@" &
        jobs+=($!)
    done
    for job in "${jobs[@]}"; do wait "$job"; done
    echo "bench: compiled for $((SECONDS - start)) s"
    start=$SECONDS
    benchmarks bench $((end - SECONDS)) --seconds "$([ $dry = 1 ] && echo 0.02 || echo 0.4)" "$@"
    told bench $? $((SECONDS - start))
    tail -n 1 "$OUT/bench.log"
    "$PYTHON" -m benchmarks.summary --rows "$OUT/suites.jsonl" --most 40 || failed=1
}

part_tune() { # part_tune SECONDS
    if [ $dry = 1 ]; then
        echo "tune: left out, no device"
        return
    fi
    XDG_CACHE_HOME="$OUT/cache" step tune "$1" "$PYTHON" -m fastvar tune \
        --minutes "$(awk "BEGIN { print $(($1 > 30 ? $1 - 15 : $1)) / 60 }")"
}

part_profile() { # part_profile SECONDS
    if [ $dry = 1 ] || ! command -v nsys >/dev/null; then
        echo "profile: left out, $([ $dry = 1 ] && echo "no device" || echo "no nsys")"
        return
    fi
    step profile "$1" nsys profile --trace=nvtx,cuda --force-overwrite=true --output "$OUT/profile" \
        env FASTVAR_NVTX=1 "$PYTHON" -m pytest benchmarks --benchmark-only -q -p no:cacheprovider --size gpu \
        --settings first --suites adaptive_layer_norm --passes forward --seconds 0.1 --rows "$OUT/profiled.jsonl"
    nsys stats --report nvtx_sum "$OUT/profile.nsys-rep" 2>/dev/null | grep -c "fastvar::" |
        sed 's/^/profile: lines with ranges of fastvar: /'
}

for number in "${!parts[@]}"; do
    part=${parts[number]}
    rm -f "$OUT/$part"*.log
    "part_$part" "$(share "${parts[@]:number}")" "$@"
done
exit $failed
