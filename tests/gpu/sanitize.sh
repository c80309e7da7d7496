#!/bin/sh
# Runs the kernels under NVIDIA's compute-sanitizer (part of the CUDA toolkit): accesses outside of memory, and
# races in shared memory. Needs a GPU and no Rust.
#
#     tests/gpu/sanitize.sh [BINARY]      default: target/release/blockplane
#
# Ends with 0 when no tool found anything, with 1 when one did, and with 77 when the tool is not there.
set -u
cd "$(dirname "$0")/../.."
binary=${1:-target/release/blockplane}
tool=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
if [ ! -x "$tool" ]; then
    echo "SKIPPED: no compute-sanitizer on the path or in ${CUDA_HOME:-/usr/local/cuda}/bin; it comes with the CUDA toolkit"
    exit 77
fi
if [ ! -x "$binary" ]; then
    echo "no program $binary: build it (cargo build --release), or name it" >&2
    exit 1
fi
failed=0
for check in memcheck racecheck; do
    log=$(mktemp)
    # Checks run in a child process. A tool slows them down up to a hundred times.
    timeout 300 "$tool" --tool "$check" --target-processes all --error-exitcode 9 --print-limit 20 \
        "$binary" selftest gpu --only sanitizer --patience 10 >"$log" 2>&1
    status=$?
    # The exit status is that of the process which only watches, so the text counts as well.
    if [ $status -ne 0 ] || grep -qE 'ERROR SUMMARY: [1-9]|RACECHECK SUMMARY: [1-9]' "$log" ||
        ! grep -qE '^[1-9][0-9]* passed, 0 failed' "$log"; then
        echo "FAIL  $check (status $status)"
        sed 's/^/      | /' "$log"
        failed=1
    else
        echo "PASS  $check: $(grep -hE 'SUMMARY' "$log" | sort | uniq -c | tr -s ' ' | tr '\n' ';')"
    fi
    rm -f "$log"
done
exit $failed
