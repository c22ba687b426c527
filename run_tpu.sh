#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Runs the package on a Cloud TPU: makes or reuses a TPU VM, installs this checkout on all
# of its workers and starts `python3 -m prompt_tuning` on every one of them. The runtime
# images come with Python 3.10, so a newer one is installed beside it.
set -euo pipefail

usage() {
  cat <<'EOF'
Usage: run_tpu.sh --name NAME --zone ZONE [options] -- COMMAND [arguments]

Makes the TPU VM if there is none of that name, installs this checkout on every worker
and runs `python3 -m prompt_tuning COMMAND arguments` there. The TPU VM is left running.

  --name NAME        the TPU VM
  --zone ZONE        for instance us-central1-a
  --project PROJECT  default: gcloud's
  --type TYPE        accelerator of a new TPU VM; default v5litepod-8
  --version VERSION  runtime of a new TPU VM; default v2-alpha-tpuv5-lite
  --dry-run          print the commands instead of running them
  --help             this text

Example:
  ./run_tpu.sh --name tuning --zone us-central1-a -- train \
    --gin_file=models/t5_1_1_mini.gin --gin_file=methods/prompt_tuning.gin \
    --gin.MIXTURE_OR_TASK_NAME=rotten_tomatoes \
    --gin.TASK_FEATURE_LENGTHS="{'inputs': 96, 'targets': 4}" \
    --gin.MODEL_DIR=/tmp/tuning
EOF
}

fail() {
  echo "run_tpu.sh: $1; see ./run_tpu.sh --help" >&2
  exit 2
}

name='' zone='' project='' dry_run=false
type=v5litepod-8 version=v2-alpha-tpuv5-lite
while [[ $# -gt 0 ]]; do
  case $1 in
    --help) usage; exit 0 ;;
    --dry-run) dry_run=true; shift; continue ;;
    --) shift; break ;;
    --name | --zone | --project | --type | --version)
      [[ $# -ge 2 ]] || fail "$1 needs a value"
      printf -v "${1#--}" '%s' "$2"
      shift 2 ;;
    *) fail "unknown argument $1" ;;
  esac
done
[[ -n $name ]] || fail '--name is missing'
[[ -n $zone ]] || fail '--zone is missing'
[[ $# -gt 0 ]] || fail "nothing to run: put a command after '--', for instance: -- train"
if ! $dry_run && ! command -v gcloud >/dev/null; then
  fail 'gcloud is not installed (https://cloud.google.com/sdk/docs/install)'
fi

where=("--zone=$zone")
[[ -z $project ]] || where+=("--project=$project")
tpu=(gcloud compute tpus tpu-vm)
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# Prints a command so that a shell can read it back, and runs it unless it is a dry run.
run() {
  printf '+ %s\n' "${*@Q}" >&2
  $dry_run || "$@"
}

on_every_worker() {
  run "${tpu[@]}" ssh "$name" "${where[@]}" --worker=all --command="$1"
}

# A dry run asks the cloud nothing and shows the longer way, with the creation.
if $dry_run || ! "${tpu[@]}" describe "$name" "${where[@]}" >/dev/null 2>&1; then
  run "${tpu[@]}" create "$name" "${where[@]}" \
    "--accelerator-type=$type" "--version=$version"
fi

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# What an installation reads, so that neither environments nor runs travel.
run tar --create --gzip --file="$scratch/checkout.tar.gz" --directory="$checkout" \
  --exclude=__pycache__ \
  prompt_tuning configs tasks pyproject.toml setup.py README.md LICENSE
on_every_worker 'rm -rf ~/prompt_tuning_run && mkdir ~/prompt_tuning_run'
run "${tpu[@]}" scp "$scratch/checkout.tar.gz" "$name:prompt_tuning_run/" \
  "${where[@]}" --worker=all
on_every_worker "$(tr '\n' ' ' <<'EOF'
cd ~/prompt_tuning_run && mkdir src && tar -xzf checkout.tar.gz -C src &&
python3 -m pip install --quiet --user uv &&
~/.local/bin/uv venv --quiet --python 3.12 venv &&
~/.local/bin/uv pip install --quiet --python venv/bin/python './src[tpu,demo]'
EOF
)"
on_every_worker "prompt_tuning_run/venv/bin/python3 -m prompt_tuning ${*@Q}"
