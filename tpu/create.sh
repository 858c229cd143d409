#!/usr/bin/env bash
# Requests a TPU slice and waits until it is there. Next: setup.sh.
# Example: tpu/create.sh --name my-run --zone us-west4-a --type v5litepod-16

# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

spot=()
[[ $SPOT == 0 ]] || spot=(--spot)
run gcloud compute tpus queued-resources create "$NAME" "${place[@]}" --node-id="$NAME" \
    --accelerator-type="$TYPE" --runtime-version="$VERSION" ${spot[@]+"${spot[@]}"}

if ((${#dry[@]})); then request_state; exit 0; fi
while :; do
    state=$(request_state)
    echo "$NAME: $state"
    case $state in
        ACTIVE) exit 0 ;;
        FAILED | SUSPENDING | SUSPENDED | DELETING) die "the request ended as $state; tpu/delete.sh clears it away" ;;
    esac
    sleep "${POLL_SECONDS:-30}"
done
