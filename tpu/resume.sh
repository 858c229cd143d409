#!/usr/bin/env bash
# Goes on with a run after its slice was taken away (a new one is requested) or after it stopped on a live one.
# Example: tpu/resume.sh --name my-run --repo https://github.com/me/jax_dpo.git --share gs://my-bucket
# It takes the settings of create.sh, setup.sh and launch.sh; the run goes on from its newest checkpoint on SHARE.

# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if ((${#dry[@]})); then
    request_state
    state=SUSPENDED # so that all steps are printed
else
    state=$(request_state || echo ABSENT)
    echo "$NAME: $state"
fi

case $state in
    ACTIVE) ;;
    ABSENT | FAILED | SUSPENDED)
        [[ $state == ABSENT ]] || "$here/delete.sh" ${dry[@]+"${dry[@]}"}
        "$here/create.sh" ${dry[@]+"${dry[@]}"}
        "$here/setup.sh" ${dry[@]+"${dry[@]}"}
        ;;
    *) die "the request is $state: wait a little, then try again" ;;
esac
"$here/launch.sh" ${dry[@]+"${dry[@]}"} -- --resume_from_checkpoint auto ${EXTRA[@]+"${EXTRA[@]}"}
