#!/usr/bin/env bash
# Shows the log of one worker as it grows (worker 0 writes the progress; --worker 3 for another). Ctrl-C ends the show,
# not the run.
# Example: tpu/follow.sh --name my-run

# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

on_workers "$WORKER" "tail -n 100 -F jax_dpo/logs/train.log"
