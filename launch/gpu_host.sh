#!/usr/bin/env bash
# Train on the GPUs of one host, in one process.
#
#   launch/gpu_host.sh [--dry-run] --config configs/stage1.py [more arguments of `moss-jax train`]
#
#   XLA_SET     name in launch/xla_flags.py, default gpu; none: no flags
#   PID_FILE    file to write the process id to, for `kill -TERM`
#
# Rerun the same command to resume an interrupted run. The exit code is that of moss-jax train.

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/common.sh"
if [[ "${1:-}" == --dry-run ]]; then DRY_RUN=1; shift; fi
if [[ $# == 0 || "$1" == --help ]]; then usage; exit 0; fi
if [[ "${XLA_SET:-gpu}" != none ]]; then
  line=$(python3 "$here/xla_flags.py" "${XLA_SET:-gpu}")
  echo "$line"
  eval "$line"
fi
# Allocate most of the memory at the start: growing allocations fragment it.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
printf '%s\n' "$(quoted moss-jax train "$@")"
[[ "$DRY_RUN" == 1 ]] && exit 0
[[ -z "${PID_FILE:-}" ]] || echo $$ >"$PID_FILE"
# exec, so that signals to this script reach the training process.
exec moss-jax train "$@"
