#!/usr/bin/env bash
# Train on the GPUs of several hosts over ssh, with one process on each. The first host is the coordinator.
#
#   HOSTS="gpu1 gpu2" REPOSITORY=/shared/moss_jax launch/gpu_ssh.sh [--dry-run] --config configs/stage1.py ...
#
#   HOSTS        host names for ssh; the other hosts must be able to resolve the first one
#   REPOSITORY   path of this repository on all hosts; data and runs are on a shared file system
#   ACTIVATE     command that makes moss-jax available, default: true (does nothing)
#   PORT         port of the coordinator, default 9876
#   XLA_SET      name in launch/xla_flags.py, default gpu-hosts
#
# Returns when all processes have ended, with the first exit code that is not 0. Ctrl-C signals the process on the first
# host; all hosts agree on a last step, save a checkpoint and exit with code 75.

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/common.sh"
if [[ "${1:-}" == --dry-run ]]; then DRY_RUN=1; shift; fi
if [[ $# == 0 || "$1" == --help ]]; then usage; exit 0; fi
need HOSTS "the hosts, such as 'gpu1 gpu2'"
need REPOSITORY "the path of this repository on every host"
read -ra hosts <<<"$HOSTS"
pid_file=/tmp/moss-jax-${PORT:-9876}
pids=()
for i in "${!hosts[@]}"; do
  command="cd $(quoted "$REPOSITORY") && ${ACTIVATE:-true} && PID_FILE=$pid_file-$i XLA_SET=${XLA_SET:-gpu-hosts} launch/gpu_host.sh"
  command+=" $(quoted "$@") --distributed --coordinator ${hosts[0]}:${PORT:-9876}"
  command+=" --processes ${#hosts[@]} --process $i"
  printf '%s\n' "$(quoted ssh "${hosts[$i]}" "$command")"
  if [[ "$DRY_RUN" != 1 ]]; then
    # Run in new sessions, so that Ctrl-C does not end ssh or sed before the training has saved.
    setsid ssh "${hosts[$i]}" "$command" </dev/null > >(exec setsid sed -u "s/^/$i ${hosts[$i]}: /") 2>&1 &
    pids+=($!)
  fi
done
[[ "$DRY_RUN" == 1 ]] && exit 0
trap 'ssh "${hosts[0]}" "kill -TERM \$(cat $pid_file-0)" </dev/null || true' INT TERM
code=0
for pid in "${pids[@]}"; do
  own=0
  wait "$pid" || own=$?
  while kill -0 "$pid" 2>/dev/null; do  # a trap interrupts wait
    own=0
    wait "$pid" || own=$?
  done
  [[ $code != 0 ]] || code=$own
done
exit "$code"
