#!/usr/bin/env bash
# Deletes the slice and the request for it. What lies on SHARE stays; what lies on the workers' own disks is lost.
# Example: tpu/delete.sh --name my-run

# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

run gcloud compute tpus queued-resources delete "$NAME" "${place[@]}" --force --quiet
