#!/usr/bin/env bash
# The tests and the comparison with mlx-vlm on a machine with a GPU (Apple silicon, or NVIDIA with
# MLX's CUDA build), in one run. Written where there was none: what it calls is tested, the script as
# a whole has not been seen to run on a GPU.
#
#   benchmarks/on_gpu.sh FOLDER [ROW ...]
#
# FOLDER gets environments, random weights (3.3 GB), logs and records; what is there already is used
# again. ROW: rows of the comparison (`against_mlx_vlm.py --rows list`), by default those whose
# figures mean something on a GPU. Ends with 1 when a step failed; all steps are tried.
set -u -o pipefail

usage="usage: $0 FOLDER [ROW ...]"
[ $# -ge 1 ] || { echo "$usage" >&2; exit 2; }
case $1 in -*) echo "$usage" >&2; exit 2 ;; esac

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "$1" || exit 2
folder=$(cd "$1" && pwd)
shift
rows=("$@")
[ ${#rows[@]} -gt 0 ] || rows=(jpeg vision-256 vision-512 vision-1024 prefill-f32 ttft-f32 second-f32 decode-f32 memory-f32 cold fixed)

python=${PYTHON:-python3}
peer_version=0.7.10
failed=0

mlx=()
if [ "$(uname -s)" = Linux ]; then mlx=("mlx[cuda]>=0.32"); fi

step() { # step NAME COMMAND...: its output in FOLDER/NAME.log
    local name=$1
    shift
    echo "== $name"
    if "$@" >"$folder/$name.log" 2>&1; then
        tail -n 3 "$folder/$name.log"
    else
        echo "failed: the end of $folder/$name.log:"
        tail -n 20 "$folder/$name.log"
        failed=1
        return 1
    fi
}

# shellcheck disable=SC2317  # called by step
environment() { # environment NAME PACKAGE...
    local place=$folder/$1
    shift
    [ -x "$place/bin/python" ] || "$python" -m venv "$place" || return 1
    "$place/bin/python" -m pip install --quiet "$@" ${mlx[@]+"${mlx[@]}"}
}

step install-ours environment ours -e "${root}[dev]" || exit 1
step install-peer environment peer "mlx-vlm==$peer_version" || exit 1

ours=$folder/ours/bin/python
peer=$folder/peer/bin/python
step device "$ours" -c '
import sys
import mlx.core as mx
print(mx.default_device(), mx.device_info())
sys.exit(mx.default_device() == mx.Device(mx.cpu) and "MLX has no GPU here")
' || exit 1

cd "$root" || exit 1
step doctor "$ours" -m mlx_vlm_edge doctor --selftest
step tests "$ours" -m pytest -q -p no:cacheprovider
step bench "$ours" -m mlx_vlm_edge bench --model fastvlm-0.5b --random-weights \
    --resolution 256 512 1024 --json "$folder/bench.json"
step against-mlx-vlm "$ours" benchmarks/against_mlx_vlm.py --peer-python "$peer" --blas stock \
    --checkpoints "$folder/checkpoints" --rows "${rows[@]}" --json "$folder/against.json"

if [ -s "$folder/bench.json" ] && [ -s "$folder/against.json" ]; then
    name=${MACHINE:-$(uname -s -m | tr 'A-Z ' 'a-z-')-gpu}
    step report "$ours" benchmarks/report.py --machine "$name" --add "$folder/bench.json" "$folder/against.json"
fi
exit "$failed"
