#!/usr/bin/env bash
# Starts a configuration on all workers and returns; the run goes on without this machine. Next: follow.sh.
# Example: tpu/launch.sh --name my-run --config configs/standard.yaml -- --max_steps 500
# What follows -- goes to jax-dpo train. The configuration is copied from this machine.

# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

[[ -f $CONFIG ]] || die "CONFIG is '$CONFIG': there is no such file here"
options=
for word in ${EXTRA[@]+"${EXTRA[@]}"}; do options+=" $(quoted "$word")"; done

run gcloud compute tpus tpu-vm scp "$CONFIG" "$NAME:jax_dpo/run.yaml" "${place[@]}" --worker=all

# JAX finds the other workers in the slice's metadata; only the port is ours. setsid: the run outlives the connection.
on_workers all "set -e
cd jax_dpo
mkdir -p logs
if [ -s logs/train.pid ] && kill -0 \$(cat logs/train.pid) 2> /dev/null; then echo 'a run is going on' >&2; exit 1; fi
export JAX_COORDINATOR_PORT=$(quoted "$PORT")
setsid nohup .venv/bin/jax-dpo train run.yaml$options >> logs/train.log 2>&1 < /dev/null &
echo \$! > logs/train.pid"
