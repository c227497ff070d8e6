#!/usr/bin/env bash
# Train on a Cloud TPU pod slice, or on several, by queued resources.
#
#   launch/tpu_queued.sh [--dry-run] VERB [arguments]
#
#   create             asks for the slices; they come when there is room
#   status             ACTIVE when they are there
#   setup              on every host: the shared folder, Python, this repository
#   train ARGS...      `moss-jax train ARGS... --distributed` on every host; again after a preemption: it goes on
#   logs               what the first host says
#   stop               the step is finished, everything saved, all hosts leave
#   delete             gives everything back; the shared folder stays
#
#   PROJECT, ZONE      of the cloud, such as us-west4-a
#   NAME               of the request, default moss
#   TPU_TYPE           such as v5litepod-256 (v5e, 256 chips), default v5litepod-16
#   RUNTIME            of the TPU's machine, default v2-alpha-tpuv5-lite (v5e); v2-alpha-tpuv5 (v5p), v2-alpha-tpuv6e
#   SLICES             default 1; with more, give train --set mesh.data=SLICES (or a multiple)
#   SPOT               1: cheap, and taken back at any time; default 0
#   SHARE              ADDRESS:/PATH of an NFS folder that all hosts mount at /mnt/share; its systems, data and runs
#                      stand in the repository under these names, as the configs expect them
#   REPOSITORY_URL     what `git clone` takes, default: the remote "origin" here
#   COMMIT             default: the one checked out here; it must be there, too
#   XLA_SET            name in launch/xla_flags.py, default tpu, or tpu-multislice

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/common.sh"
if [[ "${1:-}" == --dry-run ]]; then DRY_RUN=1; shift; fi
if [[ $# == 0 || "$1" == --help ]]; then usage; exit 0; fi
verb=$1
shift
need PROJECT "the cloud project"
need ZONE "where the TPUs are, such as us-west4-a"
NAME=${NAME:-moss}
SLICES=${SLICES:-1}
if [[ "$SLICES" == 1 ]]; then default_set=tpu; else default_set=tpu-multislice; fi
where=(--project="$PROJECT" --zone="$ZONE")
queue=(gcloud compute tpus queued-resources)

everywhere() {
  run "${queue[@]}" ssh "$NAME" "${where[@]}" --node=all --worker=all --command="$1"
}

case "$verb" in
  create)
    nodes=(--node-id="$NAME")
    if [[ "$SLICES" != 1 ]]; then nodes=(--node-count="$SLICES" --node-prefix="$NAME"); fi
    price=()
    if [[ "${SPOT:-0}" == 1 ]]; then price=(--spot); fi
    run "${queue[@]}" create "$NAME" "${where[@]}" --accelerator-type="${TPU_TYPE:-v5litepod-16}" \
      --runtime-version="${RUNTIME:-v2-alpha-tpuv5-lite}" "${nodes[@]}" ${price[@]+"${price[@]}"}
    ;;
  status)
    run "${queue[@]}" describe "$NAME" "${where[@]}" --format='value(state.state)'
    ;;
  setup)
    need SHARE "ADDRESS:/PATH of the shared folder"
    url=${REPOSITORY_URL:-$(git -C "$here" remote get-url origin 2>/dev/null || true)}
    [[ -n "$url" ]] || fail "set REPOSITORY_URL: this checkout has no remote 'origin'"
    commit=${COMMIT:-$(git -C "$here" rev-parse HEAD)}
    everywhere "sudo apt-get -q update && sudo apt-get -q install -y nfs-common python3-pip && sudo mkdir -p /mnt/share && (mountpoint -q /mnt/share || sudo mount $(quoted "$SHARE") /mnt/share) && sudo mkdir -p -m 1777 /mnt/share/systems /mnt/share/data /mnt/share/runs"
    everywhere "(test -d moss_jax || git clone $(quoted "$url") moss_jax) && cd moss_jax && git fetch -q origin && git checkout -q $commit && ln -sfnt . /mnt/share/systems /mnt/share/data /mnt/share/runs && pip3 install -q --user uv && python3 -m uv venv -q --allow-existing --python 3.11 ../venv && python3 -m uv pip install -q --python ../venv/bin/python -c launch/constraints.txt '.[tpu,train]'"
    ;;
  train)
    [[ $# -gt 0 ]] || fail "train: expected the arguments of moss-jax train, such as --config configs/stage1.py"
    # setsid and nohup: training goes on when the connection ends.
    everywhere "cd moss_jax && source ../venv/bin/activate && eval \"\$(python3 launch/xla_flags.py ${XLA_SET:-$default_set})\" && (setsid nohup moss-jax train $(quoted "$@") --distributed >../train.log 2>&1 </dev/null & echo \$! >../train.pid)"
    ;;
  logs)
    run "${queue[@]}" ssh "$NAME" "${where[@]}" --node=0 --worker=0 --command='tail -n 50 -f train.log'
    ;;
  stop)
    # One host is told; all agree on the last step.
    run "${queue[@]}" ssh "$NAME" "${where[@]}" --node=0 --worker=0 --command='kill -TERM $(cat train.pid)'
    ;;
  delete)
    run "${queue[@]}" delete "$NAME" "${where[@]}" --force
    ;;
  *)
    fail "$verb: expected create, status, setup, train, logs, stop or delete"
    ;;
esac
