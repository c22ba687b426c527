#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Recipes of pre-training against one another: the same seconds of one processor core each,
# then a cool-down of 40 steps, whose end is probed.
#
#   race.sh ARRAYS RUNS SECONDS
#
# Every candidate has a folder in RUNS, with results.json when it has ended; the same
# command goes on with those that have none.
set -eu
if [ $# -ne 3 ]; then
  sed -n '3,9s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
arrays=$1 runs=$2 seconds=$3 cooldown=40
. "$(dirname "$0")/mixtures.sh"

# candidate NAME SPANS PREFIXES DISTILLED TASK_WEIGHTS FLAGS... : shares of the rows.
candidate() {
  folder=$runs/$1 spans=$2 prefixes=$3 distilled=$4 weights=$5
  shift 5
  [ -f "$folder/results.json" ] && return
  mkdir -p "$folder"
  set -- taskset -c 0 python -m prompt_tuning pretrain \
    --gin_file=models/t5_1_1_mini.gin \
    --gin.MODEL_DIR="'$folder'" --gin.ARRAYS_DIR="'$arrays'" \
    --gin.SPAN_CORRUPTION_SHARE="$spans" --gin.PREFIX_LM_SHARE="$prefixes" \
    --gin.DISTILLED_SHARE="$distilled" --gin.DISTILLATION_WEIGHT=10.0 \
    --gin.TASK_WEIGHTS="$weights" \
    --gin.BATCH_SIZE=32 --gin.INPUTS_LENGTH=160 --gin.TARGETS_LENGTH=48 \
    --gin.LEARNING_RATE=0.01 --gin.WARMUP_STEPS=100 \
    --gin.CHECKPOINT_PERIOD=100000 --gin.EVAL_PERIOD=100000 "$@"
  if [ ! -f "$folder/last_step" ]; then
    "$@" --gin.LEARNING_RATE_FACTORS="'constant * linear_warmup'" \
      --gin.TRAIN_STEPS=100000 &
    # What others do on the machine must not decide: the processor's time, not the clock's.
    while used=$(awk '{print int(($14 + $15) / 100)}' "/proc/$!/stat") &&
      [ "$used" -lt "$seconds" ]; do
      sleep 1
    done
    kill -TERM $! 2>/dev/null || true
    wait $! || true
    newest=$(ls "$folder/checkpoints" | grep -x '[0-9]*' | sort -n | tail -n 1)
    # A run that failed has none.
    [ -n "$newest" ] || exit 1
    echo $((newest + cooldown)) > "$folder/last_step"
  fi
  last=$(cat "$folder/last_step")
  "$@" --gin.LEARNING_RATE_FACTORS="'constant * linear_warmup * linear_cooldown'" \
    --gin.DECAY_STEPS="$last" --gin.COOLDOWN_STEPS=$cooldown --gin.TRAIN_STEPS="$last" \
    --gin.ALLOW_CHANGES=True
}

embedded="--gin.pretrain.initial_checkpoint_path='embedded:t5_1_1_mini'"
table=--gin.START_TABLE=True
candidate again 0.2 0.15 0.0 "$first" "$embedded"
candidate suites 0.2 0.1 0.0 "$suites" "$embedded"
candidate distil25 0.2 0.1 0.25 "$suites" "$embedded"
candidate distil50 0.1 0.1 0.5 "$suites" "$embedded"
candidate scratch25 0.2 0.1 0.25 "$suites" $table
candidate wide25 0.2 0.1 0.25 "$suites" $table --gin.T5Config.emb_dim=256 \
  --gin.T5Config.num_heads=8 --gin.T5Config.num_decoder_layers=2
