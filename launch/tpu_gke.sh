#!/usr/bin/env bash
# Train on TPU slices in Google Kubernetes Engine, by XPK (pip install xpk).
#
#   launch/tpu_gke.sh [--dry-run] VERB [arguments]
#
#   image              build launch/Dockerfile for TPU and push it
#   cluster            create a cluster with the slices
#   share              create a shared file system (Filestore, 1 TB), mounted at /mnt/share in every workload
#   train ARGS...      run `moss-jax train ARGS... --distributed` on every host; restarted after a preemption
#   list               list the workloads
#   delete             delete the cluster; the Filestore is kept, and billed, until you delete it
#
#   PROJECT, ZONE      cloud project and zone
#   NAME               name of the cluster, default moss; the workload is NAME-train, the file system NAME-share
#   TPU_TYPE           such as v5litepod-256, default v5litepod-16
#   SLICES             default 1; with more, pass --set mesh.data=SLICES (or a multiple) to train
#   SPOT               1: spot capacity, cheaper but preemptible; default 0
#   IMAGE              default REGION-docker.pkg.dev/PROJECT/moss/moss-jax:tpu
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
TPU_TYPE=${TPU_TYPE:-v5litepod-16}
IMAGE=${IMAGE:-${ZONE%-*}-docker.pkg.dev/$PROJECT/moss/moss-jax:tpu}
if [[ "$SLICES" == 1 ]]; then default_set=tpu; else default_set=tpu-multislice; fi
where=(--project="$PROJECT" --zone="$ZONE")

case "$verb" in
  image)
    cd "$here/.."
    run docker build -f launch/Dockerfile --build-arg EXTRA=tpu -t "$IMAGE" .
    run docker push "$IMAGE"
    ;;
  cluster)
    price=(--on-demand)
    if [[ "${SPOT:-0}" == 1 ]]; then price=(--spot); fi
    run xpk cluster create --cluster="$NAME" "${where[@]}" --tpu-type="$TPU_TYPE" --num-slices="$SLICES" "${price[@]}"
    ;;
  share)
    run xpk storage create "$NAME-share" --cluster="$NAME" "${where[@]}" --type=gcpfilestore --vol=share --size=1TB \
      --tier=BASIC_HDD --access-mode=ReadWriteMany --auto-mount=true --mount-point=/mnt/share --readonly=false
    ;;
  train)
    [[ $# -gt 0 ]] || fail "train: expected the arguments of moss-jax train, such as --config configs/stage1.py"
    command="eval \"\$(python3 launch/xla_flags.py ${XLA_SET:-$default_set})\" && moss-jax train $(quoted "$@") --distributed"
    # Exit code 75 (preempted and saved) counts as a user code failure, so restarts are requested, with time to save.
    run xpk workload create --workload="$NAME-train" --cluster="$NAME" "${where[@]}" --tpu-type="$TPU_TYPE" \
      --num-slices="$SLICES" --docker-image="$IMAGE" --max-restarts=100 --restart-on-user-code-failure \
      --termination-grace-period-seconds=300 --command="$command"
    ;;
  list)
    run xpk workload list --cluster="$NAME" "${where[@]}"
    ;;
  delete)
    run xpk cluster delete --cluster="$NAME" "${where[@]}"
    ;;
  *)
    fail "$verb: expected image, cluster, share, train, list or delete"
    ;;
esac
