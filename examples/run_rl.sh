#!/usr/bin/env bash
# Train from a config, an engine, a model and data:
#
#     bash examples/run_rl.sh CONFIG ENGINE MODEL DATA [EVAL_DATA] [-- FLAGS OF xrl train]
#     bash examples/run_rl.sh configs/demo_single.yaml embedded examples/student examples/data/train.jsonl
#
# NPROC is the number of ranks: by default one for each GPU, or 1 where there is none. What the arguments name wins over
# what the config says; flags after -- win over both. PYTHON is the interpreter: by default that of the active
# environment, else the .venv that `make setup` made, else python or python3.
set -euo pipefail

readonly USAGE="usage: bash examples/run_rl.sh CONFIG ENGINE MODEL DATA [EVAL_DATA] [-- FLAGS]"

fail() {
    echo "run_rl.sh: error: $1" >&2
    exit 2
}

count_gpus() {
    # CUDA_VISIBLE_DEVICES hides GPUs from us that nvidia-smi still lists.
    if [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '[^[:space:]]' || true
    elif command -v nvidia-smi >/dev/null; then
        nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true
    else
        echo 0
    fi
}

find_python() {
    local clone_python
    clone_python="$(dirname "${BASH_SOURCE[0]}")/../.venv/bin/python"
    if [[ -n "${PYTHON:-}" ]]; then
        echo "$PYTHON"
    elif [[ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" && -x "$clone_python" ]]; then
        echo "$clone_python"
    else
        command -v python || command -v python3 || true
    fi
}

arguments=()
while (($#)) && [[ "$1" != "--" ]]; do
    arguments+=("$1")
    shift
done
(($#)) && shift # the -- itself; what is left goes to xrl train

if [[ "${arguments[0]:-}" == "-h" || "${arguments[0]:-}" == "--help" ]]; then
    echo "$USAGE"
    echo "  ENGINE: embedded, turbomind (lmdeploy), or package.module:factory of your own"
    exit
fi
((${#arguments[@]} == 4 || ${#arguments[@]} == 5)) || fail "needs 4 or 5 arguments, found ${#arguments[@]}; $USAGE"

config=${arguments[0]} engine=${arguments[1]} model=${arguments[2]} data=${arguments[3]} eval_data=${arguments[4]:-}
[[ -f "$config" ]] || fail "CONFIG $config is not a file: give a YAML file, one of configs/ say"
[[ -n "$engine" ]] || fail "ENGINE is empty: give the name of a rollout engine, embedded say"
[[ -d "$model" ]] || fail "MODEL $model is not a folder: give a Hugging Face folder with config.json and safetensors"
[[ -f "$data" ]] || fail "DATA $data is not a file: give the JSONL or parquet file that xrl gsm8k wrote, say"
[[ -z "$eval_data" || -f "$eval_data" ]] || fail "EVAL_DATA $eval_data is not a file: give a JSONL or parquet file"

num_gpus=$(count_gpus)
num_ranks=${NPROC:-$((num_gpus > 0 ? num_gpus : 1))}
[[ "$num_ranks" =~ ^[1-9][0-9]*$ ]] || fail "NPROC must be a whole number >= 1, found '$num_ranks'"

python=$(find_python)
[[ -n "$python" ]] || fail "there is no python: run make setup, or name an interpreter that has xrl in PYTHON"

exec "$python" -m xrl.cli train --nproc-per-node "$num_ranks" --config "$config" \
    --engine "$engine" --model "$model" --data "$data" ${eval_data:+--eval-data "$eval_data"} "$@"
