#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# A teacher's vectors and opinions, then a pre-training without a planned end; the same
# command goes on from wherever an earlier one was stopped.
#
#   long_run.sh ARRAYS PACKAGES RUN          trains until it is stopped
#   long_run.sh ARRAYS PACKAGES RUN N MODEL  copies the newest checkpoint of RUN to
#                                            MODEL and cools it down in N more steps
#
# t5_1_1_mini unless the variable $MODEL names another file of models/. $PREFIXES is the share
# of rows of prefix language modelling, 0.1 unless it is set; 0.3 less it are rows of span
# corruption. With 0 for the run and 0.3 for its cool-down, the cool-down is LM adaptation.
set -eu
if [ $# -ne 3 ] && [ $# -ne 5 ]; then
  sed -n '3,13s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
. "$(dirname "$0")/mixtures.sh"
# Vectors of 32 times 4,096 sentences of everything and of as many of film reviews; those
# that are there already are kept.
[ -f "$1/sentences.npz" ] ||
  python "$(dirname "$0")/teacher.py" --arrays "$1" --packages "$2" --parts 32 --film_parts 32
[ -f "$1/film_opinions.json" ] ||
  python "$(dirname "$0")/opinions.py" --arrays "$1" --packages "$2" \
    --output "$1/film_opinions.json"
prefixes=${PREFIXES:-0.1}
spans=$(awk "BEGIN {print 0.3 - $prefixes}")
folder=$3
last=54000  # of 9,216 positions each: 500 million
decay=
changes=False
if [ $# -eq 5 ]; then
  folder=$5
  # A copy that was cut short goes on where it is.
  if [ ! -d "$5/checkpoints" ]; then
    newest=$(ls "$3/checkpoints" | grep -x '[0-9]*' | sort -n | tail -n 1)
    mkdir -p "$5/partial"
    cp -r "$3/checkpoints/$newest" "$5/partial/"
    cp "$3/run.json" "$3/metrics.jsonl" "$5/"
    # There from the first evaluation on.
    [ ! -d "$3/best" ] || cp -r "$3/best" "$5/"
    echo $((newest + $4)) > "$5/last_step"
    mv "$5/partial" "$5/checkpoints"
  fi
  last=$(cat "$5/last_step")
  decay=' * linear_cooldown'
  changes=True
fi
# glibc then keeps the room of a step, which it would fetch anew, page by page, for the next.
export MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000
# 48 rows of 160 + 32 tokens are 9,216 positions a step. The rate falls with the root of
# the step, which needs no end; a cool-down of a tenth of the steps makes the model.
exec python -m prompt_tuning pretrain --gin_file="models/${MODEL:-t5_1_1_mini}.gin" \
  --gin.MODEL_DIR="'$folder'" --gin.ARRAYS_DIR="'$1'" \
  --gin.BATCH_SIZE=48 --gin.INPUTS_LENGTH=160 --gin.TARGETS_LENGTH=32 \
  --gin.SPAN_CORRUPTION_SHARE="$spans" --gin.PREFIX_LM_SHARE="$prefixes" \
  --gin.DISTILLED_SHARE=0.25 --gin.DISTILLATION_WEIGHT=10.0 --gin.START_TABLE=True \
  --gin.TASK_WEIGHTS="$family" --gin.ACTIVATION_DTYPE="'bfloat16'" \
  --gin.LEARNING_RATE=0.015 --gin.WARMUP_STEPS=600 \
  --gin.LEARNING_RATE_FACTORS="'constant * linear_warmup * rsqrt_normalized_decay$decay'" \
  --gin.DECAY_STEPS="$last" --gin.COOLDOWN_STEPS="${4:-1}" --gin.TRAIN_STEPS="$last" \
  --gin.EVAL_PERIOD=1000 --gin.CHECKPOINT_PERIOD=200 \
  --gin.ALLOW_CHANGES="$changes"
