#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Runs the package on a Cloud TPU from a machine that may lose its connection to a TPU that
# may be taken away: the run is detached on the workers and looked at from time to time,
# what it has reached is copied here, and a preempted TPU VM is asked for again and goes on
# from that copy. docs/scale.md says what this was tried on.
set -euo pipefail

usage() {
  cat <<'EOF'
Usage: run_tpu.sh --name NAME --zone ZONE [options] -- COMMAND [arguments]

Asks for a TPU VM or a pod slice as a queued resource, or takes the one of that name,
installs the package on all of its workers, runs `python3 -m prompt_tuning COMMAND
arguments` on every one of them as one run, asks again and resumes when the TPU VM is
preempted, fetches what the run leaves, and deletes the TPU VM.

The run does not depend on this script. After Ctrl-C, the same command takes it up again.

The TPU
  --name NAME        the queued resource and its TPU VM
  --zone ZONE        for instance us-central1-a
  --project PROJECT  default: gcloud's
  --type TYPE        accelerator: v5litepod-N, v6e-N (N chips), v5p-N, v4-N (N cores, two
                     a chip); default v5litepod-8
  --version VERSION  runtime; default: the one that goes with the type
  --spot             cheaper, and may be preempted at any time
  --give-up-after T  withdraw a request that was not filled in time, for instance 6h
  --create-flag FLAG passed on when asking for the TPU VM, for instance --reserved; may be
                     given several times
  --keep             leave the TPU VM running in the end; one that this script did not
                     make is always left

The installation
  --install WHAT     a requirement for pip, such as 'prompt-tuning[tpu] @ git+https://...';
                     default: this checkout
  --send PATH        copy a file or folder to every worker's home folder, where the run
                     starts; may be given several times
  --setup LINE       a line of shell for every worker, run before the installation

The run
  --output FOLDER    where its files go on this machine; default runs/NAME
  --save-every S     seconds between copies of an unfinished MODEL_DIR, or never; default
                     600. MODEL_DIR is a folder on the workers: without a copy, what a
                     preempted TPU VM has reached is lost
  --max-restarts N   give up after so many; default 10
  --dry-run          print every command, as for a new TPU VM that is never preempted, and
                     run none
  --help             this text

RUN_TPU_POLL is the number of seconds between two looks at the cloud; default 30.
Slices of several workers need the key in the agent: ssh-add ~/.ssh/google_compute_engine
and a MODEL_DIR that all workers see (docs/scale.md).

Example:
  ./run_tpu.sh --name tuning --zone us-central1-a --type v5litepod-8 --spot -- train \
    --gin_file=models/t5_1_1_mini.gin --gin_file=methods/prompt_tuning.gin \
    --mixture_or_task_name=rotten_tomatoes \
    --task_feature_lengths="{'inputs': 96, 'targets': 4}" \
    --model_dir=runs/tuning
EOF
}

say() { echo "run_tpu.sh: $1" >&2; }
stop() { say "$1"; exit 1; }
fail() { say "$1; see ./run_tpu.sh --help"; exit 2; } # a mistake; nothing was done

# A line that a shell reads back as these words. It is the same on every machine, so that
# a run is known again by its command.
quoted() {
  local word line='' LC_ALL=C
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
    line+=" $word"
  done
  echo "${line# }"
}

# ------------------------------------------------------------------------ On a worker
here=prompt_tuning_run # in the home folder, where every command on a worker starts

# running, the exit code, or gone: the machine was started anew.
run_state() {
  if [[ ! -e $here/exit_code ]] && kill -0 "$(<"$here/pid")" 2>/dev/null; then
    echo running
  else
    cat "$here/exit_code" 2>/dev/null || echo gone
  fi
}

# The complete ones: a checkpoint that is being written has a longer name.
checkpoints_of() {
  local path
  for path in "$1"/checkpoints/*; do
    [[ ! ${path##*/} =~ ^[0-9]+$ ]] || echo "${path##*/}"
  done
}

on_worker() {
  local verb=$1 status=0 size second endpoints
  local metadata=http://metadata.google.internal/computeMetadata/v1/instance/attributes
  metadata+=/worker-network-endpoints
  shift
  case $verb in
    install) # REQUIREMENT. The runtime images have Python 3.10; uv brings a newer one.
      if [[ -e $here/checkout.tar ]]; then
        mkdir "$here/src"
        tar -xf "$here/checkout.tar" -C "$here/src"
      fi
      python3 -m pip install --quiet --user uv
      ~/.local/bin/uv venv --quiet --python 3.12 "$here/venv"
      ~/.local/bin/uv pip install --quiet --python "$here/venv/bin/python3" "$1" ;;
    launch) # COMMAND arguments
      quoted "$@" >"$here/command"
      # With this the package joins the other workers, whom JAX finds by the same metadata.
      endpoints=$(curl --silent --fail --header 'Metadata-Flavor: Google' "$metadata")
      IFS=, read -ra endpoints <<<"$endpoints"
      export JAX_NUM_PROCESSES=${#endpoints[@]}
      setsid bash "$0" --on-worker run "$@" </dev/null >"$here/run.log" 2>&1 &
      echo $! >"$here/pid" ;;
    run)
      "$here/venv/bin/python3" -m prompt_tuning "$@" || status=$?
      echo "$status" >"$here/exit_code.part"
      mv "$here/exit_code.part" "$here/exit_code" ;;
    stop) kill -KILL -- "-$(<"$here/pid")" 2>/dev/null || true ;;
    peek) # BYTES: the log from there on; then its length and the state of the run
      size=$(stat -c %s "$here/run.log")
      head -c "$size" "$here/run.log" | tail -c "+$(($1 + 1))"
      printf '\n@%s %s' "$size" "$(run_state)" ;;
    unfetched) # the state and the command of a run whose files nobody has fetched
      [[ -e $here/fetched || ! -e $here/pid ]] || { run_state; cat "$here/command"; } ;;
    fetched) touch "$here/fetched" ;;
    end) # Ends as the run does: all workers within moments, or something is wrong.
      for ((second = 0; second < 300; second++)); do
        [[ ! -e $here/exit_code ]] || exit "$(<"$here/exit_code")"
        sleep 1
      done
      exit 1 ;;
    checkpoints) checkpoints_of "$1" ;;
    save) # FOLDER CHECKPOINTS: these being there before and after, none was cut off
      tar -czf "$here/unfinished.tar.gz" -C "$1" --exclude='./checkpoints/*tmp*' .
      [[ $(checkpoints_of "$1") == "$2" ]] ;;
    restore) # FOLDER
      [[ ! -e $1 ]] || return 0
      rm -rf "$1.part"
      mkdir -p "$1.part"
      tar -xzf "$here/unfinished.tar.gz" -C "$1.part"
      mv "$1.part" "$1" ;;
    results) # FOLDER
      tar -czf "$here/results.tar.gz" -C "$1" --exclude=./checkpoints --exclude=./best . ;;
  esac
}

if [[ ${1-} == --on-worker ]]; then
  on_worker "${@:2}"
  exit
fi

# ---------------------------------------------------------------------------- Options
[[ ${BASH_VERSINFO[0]}${BASH_VERSINFO[1]} -ge 44 ]] || fail 'it needs bash 4.4 or newer'
myself=("$0" "$@")
name='' zone='' project='' type=v5litepod-8 version='' give_up_after=''
install='' setup='' output='' save_every=600 max_restarts=10
spot=false keep=false dry_run=false send=() create_flags=()
poll=${RUN_TPU_POLL:-30}

while [[ $# -gt 0 ]]; do
  case $1 in
    --help) usage; exit 0 ;;
    --spot | --keep | --dry-run)
      option=${1#--}
      printf -v "${option//-/_}" true
      shift; continue ;;
    --) break ;;
    --name | --zone | --project | --type | --version | --give-up-after | --install | \
      --setup | --output | --save-every | --max-restarts | --send | --create-flag) ;;
    *) fail "unknown argument $1" ;;
  esac
  [[ $# -ge 2 && -n $2 ]] || fail "$1 needs a value"
  case $1 in
    --send) send+=("$2") ;;
    --create-flag) create_flags+=("$2") ;;
    *) option=${1#--}; printf -v "${option//-/_}" '%s' "$2" ;;
  esac
  shift 2
done
[[ -n $name ]] || fail '--name is missing'
[[ -n $zone ]] || fail '--zone is missing'
[[ $# -gt 1 ]] || fail "nothing to run: put a command after '--', for instance: -- train"
shift
[[ $save_every =~ ^([0-9]+|never)$ ]] || fail "--save-every $save_every is not in seconds"
[[ $max_restarts =~ ^[0-9]+$ ]] || fail "--max-restarts $max_restarts is not a number"
[[ $poll =~ ^[0-9]*[.]?[0-9]+$ ]] || fail "RUN_TPU_POLL=$poll is not in seconds"
[[ -n $version ]] || case $type in
  v5litepod-*) version=v2-alpha-tpuv5-lite ;;
  v6e-*) version=v2-alpha-tpuv6e ;;
  v5p-*) version=v2-alpha-tpuv5 ;;
  v2-* | v3-* | v4-*) version=tpu-ubuntu2204-base ;;
  *) fail "--type $type is none of v5litepod-N, v6e-N, v5p-N, v4-N: add its --version" ;;
esac
output=${output:-runs/$name}
for path in "$output" ${send[@]+"${send[@]}"}; do
  [[ $path != *:* ]] || fail "scp would take $path for another machine: no ':' please"
done
for path in ${send[@]+"${send[@]}"}; do
  [[ -e $path ]] || fail "--send $path is not there"
done

# The folder on the workers that the run fills; the last value wins, as it does with gin.
model_dir='' before='' names='(gin\.|gin_bindings=)?(model[_-]dir|eval[_-]output[_-]dir)'
shopt -s nocasematch
for word in "$@"; do
  [[ $before =~ ^--$names$ ]] && word=$before=$word
  if [[ $word =~ ^--$names\ *=\ *(.+)$ ]]; then
    model_dir=${BASH_REMATCH[3]}
    case $model_dir in \'*\' | \"*\") model_dir=${model_dir:1:-1} ;; esac
    model_dir=${model_dir%/}
  fi
  before=$word
done
shopt -u nocasematch
[[ $model_dir != gs://* ]] ||
  fail "$model_dir is no folder: runs write to the workers' disks, or to a bucket that \
--setup mounts (docs/scale.md)"
[[ -n $model_dir || ! $1 =~ ^(train|pretrain)$ ]] ||
  fail "$1 needs --model_dir=FOLDER after '--': its files are to be fetched"
$dry_run || command -v gcloud >/dev/null ||
  fail 'gcloud is not installed (https://cloud.google.com/sdk/docs/install)'

# -------------------------------------------------------------------------- The cloud
launched=$(quoted "$@")
if [[ -e $output/unfinished.tar.gz && $(<"$output/command.txt") != "$launched" ]]; then
  fail "$output/unfinished.tar.gz is what another command has reached ($output/command.txt);\
 choose another --output, or delete it to start over"
fi
where=("--zone=$zone")
[[ -z $project ]] || where+=("--project=$project")
tpus=(gcloud compute tpus)
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
scratch=$(mktemp -d)
# What `look` saw last. `held` is whether the cloud may have something that costs money.
queued=ABSENT node=ABSENT ours=true held=false requested=false
if $dry_run; then exec 3>&1; else exec 3>&2; fi

# Prints a command, and runs it unless it is a dry run.
run() {
  if $dry_run; then quoted "$@" >&3; else echo "+ $(quoted "$@")" >&3; "$@" 3>&-; fi
}

# Prints the answer of a command that changes nothing; a dry run assumes one.
ask() {
  if $dry_run; then quoted "${@:2}" >&3; echo "$1"; else "${@:2}" 2>"$scratch/error" 3>&-; fi
}

reason() { grep . "$scratch/error" | tail -n 1 || echo 'no reason given'; }
nap() { sleep "$poll"; }

shell() { # WORKER LINE: runs a line of shell in the home folder of a worker, or of all
  run "${tpus[@]}" tpu-vm ssh "$name" "${where[@]}" --worker="$1" --command="$2"
}
worker() { # WORKER VERB ...: does one of the things above
  shell "$1" "$(quoted bash $here/run_tpu.sh --on-worker "${@:2}")"
}
ask_worker() { # ASSUMED VERB ...: asks the first worker
  ask "$1" "${tpus[@]}" tpu-vm ssh "$name" "${where[@]}" --worker=0 \
    --command="$(quoted bash $here/run_tpu.sh --on-worker "${@:2}")"
}
send() { # WORKER PATH FOLDER
  run "${tpus[@]}" tpu-vm scp "$2" "$name:$3" "${where[@]}" --worker="$1" --recurse
}
fetch_file() { # NAME PATH
  run "${tpus[@]}" tpu-vm scp "$name:$here/$1" "$2" "${where[@]}" --worker=0
}

# shellcheck disable=SC2317,SC2329  # The trap calls it.
on_exit() {
  local status=$? what=(queued-resources delete "$name" "${where[@]}" --force --quiet)
  rm -rf "$scratch"
  [[ $queued != ABSENT || $node == ABSENT ]] ||
    what=(tpu-vm delete "$name" "${where[@]}" --quiet)
  if $held && ! $dry_run; then
    say "$name is left in the cloud and costs money while it is there
  take it up again:  $(quoted "${myself[@]}")
  look at the run:   $(quoted "${tpus[@]}" tpu-vm ssh "$name" "${where[@]}" \
    --command="tail -n 50 $here/run.log")
  delete it:         $(quoted "${tpus[@]}" "${what[@]}")"
  fi
  exit "$status"
}
trap on_exit EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

# The state of a thing of a kind; ABSENT if there is none. Fails if the cloud does not say.
state() {
  ask "$1" "${tpus[@]}" "$2" describe "$name" "${where[@]}" --format="$3" ||
    { grep -Eiq 'not[_ ]found' "$scratch/error" && echo ABSENT; }
}

look() {
  local answer label='tpu.nodeSpec[0].node.labels.run_tpu' assumed=(ABSENT ABSENT)
  ! $requested || assumed=($'ACTIVE\tmade' READY)
  answer=$(state "${assumed[0]}" queued-resources "value(state.state,$label)") || return
  if [[ $answer == *$'\tmade' ]]; then ours=true; else ours=false; fi
  queued=${answer%%$'\t'*} node=ABSENT
  if [[ $queued =~ ^(ABSENT|ACTIVE)$ ]]; then
    node=$(state "${assumed[1]}" tpu-vm 'value(state)') || return
  fi
  if [[ $queued/$node == ABSENT/ABSENT ]]; then held=false; else held=true; fi
}

# A passing failure of the network must not end what goes on without it.
look_patiently() {
  local tries
  for ((tries = 0; tries < 20; tries++)); do
    look && return
    $held || break
    nap
  done
  stop "the cloud does not answer: $(reason)"
}

ready() { [[ $queued/$node =~ ^(ACTIVE|ABSENT)/READY$ ]]; }

create() {
  local flags=(--labels=run_tpu=made)
  ! $spot || flags+=(--spot)
  [[ -z $give_up_after ]] || flags+=("--valid-until-duration=$give_up_after")
  held=true
  run "${tpus[@]}" queued-resources create "$name" "${where[@]}" --node-id="$name" \
    --accelerator-type="$type" --runtime-version="$version" "${flags[@]}" \
    ${create_flags[@]+"${create_flags[@]}"} ||
    { look || true; stop "gcloud would not ask for $name"; }
  requested=true
}

discard() {
  local tries
  $ours || stop "$name is $queued and not made by this script: delete it or choose another \
--name"
  for ((tries = 0; tries < 5; tries++)); do
    if run "${tpus[@]}" queued-resources delete "$name" "${where[@]}" --force --quiet; then
      held=false requested=false queued=ABSENT node=ABSENT
      return
    fi
    nap
  done
  stop "$name could not be deleted"
}

# Returns when the TPU VM is ready, asking for it where there is none.
ensure() {
  local known='' why
  while :; do
    look_patiently
    [[ $queued/$node == "$known" ]] || $dry_run ||
      say "$name: the queued resource is $queued, its TPU VM $node"
    known=$queued/$node
    case $known in
      ACTIVE/READY | ABSENT/READY) return ;;
      ABSENT/ABSENT) create ;;
      FAILED/*)
        why=$(ask '' "${tpus[@]}" queued-resources describe "$name" "${where[@]}" \
          '--format=value(state.failedData.error.message)') || why=$(reason)
        $requested || { discard; continue; } # It is from an earlier day.
        discard
        stop "the request for $name failed: $why" ;;
      SUSPENDED/* | PREEMPTED/* | ACTIVE/PREEMPTED | ACTIVE/TERMINATED) discard ;;
      */STOPPED | */HIDDEN | ABSENT/PREEMPTED | ABSENT/TERMINATED)
        stop "$name is $node and will not start by itself: start or delete it" ;;
      *) nap ;;
    esac
  done
}

# Whether the TPU VM went away: runs end of that some seconds before the cloud says so.
gone() {
  local looks
  for looks in 1 2 3; do
    look_patiently
    ready || return 0
    [[ $looks == 3 ]] || nap
  done
  return 1
}

# ---------------------------------------------------------------------------- The run
# Whether this very run is on the workers, under way or done and not yet fetched.
taken_up() {
  local answer
  answer=$(ask '' "${tpus[@]}" tpu-vm ssh "$name" "${where[@]}" --worker=0 --command="test \
! -e $here/run_tpu.sh || bash $here/run_tpu.sh --on-worker unfetched") ||
    stop "no worker of $name answers: $(reason)"
  case $answer in
    $'running\n'"$launched" | $'0\n'"$launched") say "taking up the run on $name" ;;
    running*) stop "$name is busy with another run: ${answer#*$'\n'}" ;;
    *) return 1 ;;
  esac
}

install_and_launch() {
  local path
  # A run that the cloud lost sight of must not go on beside its successor.
  shell all "if test -e $here/pid; then bash $here/run_tpu.sh --on-worker stop; fi; \
rm -rf $here && mkdir $here" || return
  send all "${BASH_SOURCE[0]}" $here/ || return
  for path in ${send[@]+"${send[@]}"}; do send all "$path" . || return; done
  [[ -z $setup ]] || shell all "$setup" || return
  [[ -n $install ]] || send all "$output/checkout.tar" $here/ || return
  worker all install "${install:-./$here/src[tpu,demo]}" || return
  if [[ -e $output/unfinished.tar.gz ]]; then
    # One worker is enough: several need a MODEL_DIR that all of them see.
    send 0 "$output/unfinished.tar.gz" $here/ || return
    worker 0 restore "$model_dir" || return
  fi
  worker all launch "$@"
}

# Copies what an unfinished run has reached, if that is more than the last time.
save() {
  local checkpoints
  checkpoints=$(ask_worker '' checkpoints "$model_dir") && [[ -n $checkpoints ]] || return
  [[ $checkpoints != "$saved" ]] || return 0
  worker 0 save "$model_dir" "$checkpoints" &&
    fetch_file unfinished.tar.gz "$output/unfinished.part" &&
    mv "$output/unfinished.part" "$output/unfinished.tar.gz" && saved=$checkpoints
}

# Prints the run's log until it ends; `code` is its exit code then, or gone.
follow() {
  local text size=0 failures=0 saved_at=$SECONDS
  while :; do
    text=$(ask_worker '@0 0' peek "$size") || text=''
    code=running
    if [[ $text =~ (^|$'\n')@([0-9]+)\ ([a-z0-9]+)$ ]]; then
      failures=0 size=${BASH_REMATCH[2]} code=${BASH_REMATCH[3]}
      $dry_run || printf %s "${text%$'\n'@*}" | tee -a "$output/run.log"
    else
      look_patiently
      ready || code=gone
      ((++failures < 20)) || stop "no worker of $name answers: $(reason)"
    fi
    case $code in
      running) ;;
      0) break ;;
      2) return ;; # A mistake in the command, which another TPU VM would not cure.
      *) ! gone || code=gone; return ;;
    esac
    if [[ $save_every != never && -n $model_dir && $failures == 0 ]] &&
      ((SECONDS - saved_at >= save_every)) && save; then
      saved_at=$SECONDS
    fi
    nap
  done
  worker all end || { code=1; ! gone || code=gone; }
}

fetch() {
  [[ -n $model_dir ]] || return 0
  worker 0 results "$model_dir" &&
    fetch_file results.tar.gz "$output/results.tar.gz" &&
    run tar -xzf "$output/results.tar.gz" -C "$output" &&
    run rm -f "$output/results.tar.gz" "$output/unfinished.tar.gz"
}

run mkdir -p "$output"
# What an installation reads, so that neither environments nor runs travel; packed once, so
# that a restart runs the same code whatever was edited since.
[[ -n $install ]] ||
  run tar -cf "$output/checkout.tar" -C "$checkout" --exclude=__pycache__ \
    prompt_tuning configs tasks pyproject.toml setup.py README.md LICENSE
$dry_run || echo "$launched" >"$output/command.txt"

saved='' restarts=0
while :; do
  ensure
  code=1
  if ((restarts == 0)) && ! $requested && taken_up; then
    follow
  elif install_and_launch "$@"; then
    follow
  elif gone; then
    code=gone
  else
    say 'the package could not be installed or started'
  fi
  [[ $code != 0 ]] || fetch || { code=unfetched; ! gone || code=gone; }
  [[ $code == gone ]] || break
  ((restarts++ < max_restarts)) || { code=1; break; }
  say "$name went away; restart $restarts of $max_restarts"
done

if [[ $code == unfetched ]]; then
  stop "the run is done, but what it left could not be fetched"
elif [[ $code != 0 ]]; then
  say "the run ended with exit code $code"
  if [[ -n $model_dir && $save_every != never ]] && ready && save; then
    say "the same command goes on from $output/unfinished.tar.gz"
  fi
elif [[ -n $model_dir ]] && ! $dry_run; then
  say "its files are in $output"
fi
if $keep || ! $ours; then
  [[ $code != 0 ]] || worker all fetched
elif $held; then
  discard
fi
exit "$code"
