#!/usr/bin/env bash
# One visit to a GPU machine: the GPU tests, the benchmark, cold and warm start; under nine minutes, nothing installed.
#
#   bash benchmarks/device_visit.sh                              # results in $OUT, or ./results
#   SYSTEMS="ours hf_eager" BATCHES="1 8" bash benchmarks/device_visit.sh
#
# Every step has its own time limit, so that one hang does not eat the visit, and the benchmark saves its JSON after every
# cell, so that a step cut off keeps what it measured. Exit code: 0 if all steps ended well.
set -u

out=${OUT:-results}
mkdir -p "$out"
out=$(cd "$out" && pwd)
repo=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
shape=${SHAPE:-llama-3.1-8b}
systems=${SYSTEMS-ours ours_ngram ours_draft hf_eager hf_static hf_lookup hf_assistant}
batches=${BATCHES:-1 8 32}
starts=${STARTS-ours_ngram}
export PYTHONUNBUFFERED=1 COLUMNS=200

# The four rooms as the one import package that an installation would make of them. Everything runs from the copy: in the
# repository the folder spec_compile/, without its rooms, would be found first.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -r "$repo/spec_compile" "$work/spec_compile"
cp -r "$repo/ops" "$repo/passes" "$repo/hf_integration" "$work/spec_compile/"
cp -r "$repo/tests" "$repo/benchmarks" "$repo/pyproject.toml" "$work/"
export PYTHONPATH="$work${PYTHONPATH:+:$PYTHONPATH}"
export SPEC_COMPILE_COMMIT=${SPEC_COMPILE_COMMIT:-$(git -C "$repo" rev-parse HEAD 2>/dev/null || echo unknown)}
cd "$work" || exit 1

failed=""
step() { # step NAME SECONDS COMMAND...: the log goes to $out/NAME.log
    local name=$1 limit=$2 begin=$SECONDS code
    shift 2
    echo "== $name (at most $limit s)"
    timeout -k 5 "$limit" "$@" >"$out/$name.log" 2>&1
    code=$?
    echo "== $name: exit $code after $((SECONDS - begin)) s"
    [ $code -eq 0 ] || failed="$failed $name($code)"
    return $code
}

if [ "${TESTS:-1}" = 1 ]; then
    step gpu_tests "${TEST_SECONDS:-90}" "$python" -m pytest tests/gpu -q --tb=short
    tail -n 25 "$out/gpu_tests.log"
fi
if [ -n "$systems" ]; then
    # shellcheck disable=SC2086  # lists of words
    step bench "${BENCH_SECONDS:-330}" "$python" benchmarks/bench_generate.py --shape "$shape" --systems $systems \
        --batch $batches --repeats "${REPEATS:-3}" --cell-budget "${CELL_SECONDS:-35}" ${BENCH_FLAGS:-} \
        --json "$out/$shape.json" --plot "$out/$shape.png" || tail -n 15 "$out/bench.log"
fi
if [ -n "$starts" ]; then
    # shellcheck disable=SC2086
    step starts "${START_SECONDS:-110}" "$python" benchmarks/bench_generate.py --shape "$shape" --systems --batch 1 \
        --starts $starts --start-budget "${START_BUDGET:-80}" ${BENCH_FLAGS:-} \
        --json "$out/$shape-starts.json" || tail -n 15 "$out/starts.log"
fi

for json in "$out/$shape.json" "$out/$shape-starts.json"; do # from the JSON, also of a step that was cut off
    [ -f "$json" ] && timeout 60 "$python" benchmarks/report.py "$json" | tee "${json%.json}.md"
done
echo "== total $SECONDS s; failed:${failed:- none}"
[ -z "$failed" ]
