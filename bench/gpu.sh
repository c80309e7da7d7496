#!/bin/sh
# Qualifies a node with GPUs: checks that every kind of transfer moves the right bytes, times it, and prints
# tables. Needs the blockplane binary and the NVIDIA driver; builds nothing. Exit status 0: everything ran
# and every byte was right; 1: something failed; 2: a wrong option, or no binary.
set -u

usage() {
    cat <<'TEXT'
bench/gpu.sh [OPTIONS] [-- OPTIONS OF "blockplane bench gpu"]

  --binary PATH    the program [default: beside this script, in target/release, in PATH]
  --out FILE       where results go, one JSON object a line [default: gpu-DATE.jsonl here]
  --commit TEXT    what the program was built from, for the results [default: asked of git]
  --quick          fewer and shorter rows
  --no-selftest    leave out the checks ("blockplane selftest gpu")
  --no-bench       leave out the timing ("blockplane bench gpu")
TEXT
}

fail() {
    printf 'bench/gpu.sh: %s\n' "$1" >&2
    exit 2
}

binary='' out='' commit='' quick='' selftest=yes bench=yes
while [ $# -gt 0 ]; do
    case $1 in
    --binary | --out | --commit)
        [ $# -ge 2 ] || fail "$1 needs a value"
        case $1 in
        --binary) binary=$2 ;;
        --out) out=$2 ;;
        --commit) commit=$2 ;;
        esac
        shift 2
        ;;
    --quick) quick=--quick && shift ;;
    --no-selftest) selftest=no && shift ;;
    --no-bench) bench=no && shift ;;
    --help | -h) usage && exit 0 ;;
    --) shift && break ;;
    *) usage >&2 && fail "'$1' is no option" ;;
    esac
done

here=$(dirname "$0")
if [ -z "$binary" ]; then
    for candidate in "$here/blockplane" "$here/../target/release/blockplane"; do
        if [ -x "$candidate" ]; then
            binary=$candidate
            break
        fi
    done
    [ -n "$binary" ] || binary=$(command -v blockplane) || fail \
        "no blockplane beside this script, in target/release or in PATH; give --binary PATH"
fi
[ -x "$binary" ] || fail "$binary is no program"
version=$("$binary" --version) || fail "$binary does not run"
if [ -z "$commit" ]; then
    commit=$(git -C "$here" rev-parse --short HEAD 2>/dev/null) || commit=unknown
fi
date=$(date -u +%Y-%m-%d)
[ -n "$out" ] || out=gpu-$date.jsonl

# What nvidia-smi says of a property of all devices, on one line; without characters that mean something
# to JSON or sed.
property() {
    nvidia-smi --query-gpu="$1" --format=csv,noheader 2>/dev/null | sort | uniq -c |
        sed 's/^ *//; s/ /x /' | tr '\n' ';' | tr -d '"\\|&' | sed 's/;$//'
}

# A command that is ended after a number of seconds, where the system can do that.
limited() {
    seconds=$1
    shift
    if command -v timeout >/dev/null; then
        timeout -k 10 "$seconds" "$@"
    else
        "$@"
    fi
}

printf '%s, commit %s, %s\n' "$version" "$commit" "$date"
if command -v nvidia-smi >/dev/null; then
    nvidia-smi --query-gpu=index,name,driver_version,pcie.link.gen.max,pcie.link.width.max,memory.total,ecc.mode.current,clocks.max.sm,power.limit \
        --format=csv || echo "nvidia-smi failed" >&2
    nvidia-smi topo -m 2>/dev/null || true
else
    echo "nvidia-smi is not here: no facts about the devices" >&2
fi
gpus=$(property name)
driver=$(property driver_version)

# Tables are easier to read without the news of every connection.
DYN_LOG=${DYN_LOG:-warn}
export DYN_LOG

status=0
if [ "$selftest" = yes ]; then
    printf '\n== checks\n'
    limited 1200 "$binary" selftest gpu
    code=$?
    if [ $code -ne 0 ]; then
        echo "== checks FAILED (exit status $code)"
        status=1
    fi
fi

if [ "$bench" = yes ]; then
    printf '\n== timing\n'
    lines=$(mktemp) || fail "no temporary file"
    trap 'rm -f "$lines"' EXIT
    trap 'exit 1' INT TERM
    # shellcheck disable=SC2086 # no word when there is none
    limited 600 "$binary" bench gpu $quick --out "$lines" "$@"
    code=$?
    if [ $code -ne 0 ]; then
        echo "== timing FAILED (exit status $code)"
        status=1
    fi
    facts="\"date\":\"$date\",\"driver\":\"$driver\",\"gpus\":\"$gpus\",\"version\":\"$version\",\"commit\":\"$commit\""
    if sed "s|}\$|,$facts}|" "$lines" >>"$out"; then
        printf '\n%s results were added to %s\n' "$(wc -l <"$lines" | tr -d ' ')" "$out"
    else
        status=1
    fi
fi

if [ $status -eq 0 ]; then
    echo "== this node does what it should"
else
    echo "== this node, or this program on it, FAILED: see above"
fi
exit $status
