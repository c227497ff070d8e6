#!/usr/bin/env bash
# Train on one or several Cloud TPU pod slices with queued resources.
#
#   launch/tpu_queued.sh [--dry-run] VERB [arguments]
#
#   create             request the slices; they are allocated when capacity is available
#   status             print the state; ACTIVE when the slices are allocated
#   setup              install the shared file system, Python and this repository on every host
#   train ARGS...      run `moss-jax train ARGS... --distributed` on every host; rerun after a preemption to resume
#   logs               follow the log of the first host
#   stop               finish the current step, save a checkpoint and exit on all hosts
#   delete             delete the slices; the shared file system is kept
#
#   PROJECT, ZONE      cloud project and zone, such as us-west4-a
#   NAME               name of the request, default moss
#   TPU_TYPE           such as v5litepod-256 (v5e, 256 chips), default v5litepod-16
#   RUNTIME            TPU software version, default v2-alpha-tpuv5-lite (v5e); v2-alpha-tpuv5 (v5p), v2-alpha-tpuv6e
#   SLICES             default 1; with more, pass --set mesh.data=SLICES (or a multiple) to train
#   SPOT               1: spot capacity, cheaper but preemptible; default 0
#   SHARE              ADDRESS:/PATH of an NFS folder that all hosts mount at /mnt/share; its folders systems, data and
#                      runs are linked into the repository, where the configs expect them
#   REPOSITORY_URL     URL for `git clone`, default: the remote "origin" of this checkout
#   COMMIT             default: the commit checked out here; it must exist in REPOSITORY_URL
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
    # setsid and nohup keep the training running when the connection closes.
    everywhere "cd moss_jax && source ../venv/bin/activate && eval \"\$(python3 launch/xla_flags.py ${XLA_SET:-$default_set})\" && (setsid nohup moss-jax train $(quoted "$@") --distributed >../train.log 2>&1 </dev/null & echo \$! >../train.pid)"
    ;;
  logs)
    run "${queue[@]}" ssh "$NAME" "${where[@]}" --node=0 --worker=0 --command='tail -n 50 -f train.log'
    ;;
  stop)
    # Signalling one host is enough: all hosts agree on the last step.
    run "${queue[@]}" ssh "$NAME" "${where[@]}" --node=0 --worker=0 --command='kill -TERM $(cat train.pid)'
    ;;
  delete)
    run "${queue[@]}" delete "$NAME" "${where[@]}" --force
    ;;
  *)
    fail "$verb: expected create, status, setup, train, logs, stop or delete"
    ;;
esac
