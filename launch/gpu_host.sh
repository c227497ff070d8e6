#!/usr/bin/env bash
# Train on the GPUs of one host. One process drives them all.
#
#   launch/gpu_host.sh [--dry-run] --config configs/stage1.py [more arguments of `moss-jax train`]
#
#   XLA_SET     name in launch/xla_flags.py, default gpu; none: no flags
#   PID_FILE    gets the number of the process, for `kill -TERM`
#
# The same command goes on where an interrupted run stopped. Exit code: that of moss-jax train.

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
# Almost all memory at once: what grows piece by piece breaks into pieces.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
printf '%s\n' "$(quoted moss-jax train "$@")"
[[ "$DRY_RUN" == 1 ]] && exit 0
[[ -z "${PID_FILE:-}" ]] || echo $$ >"$PID_FILE"
# exec, so that a signal to this script is one to the training.
exec moss-jax train "$@"
