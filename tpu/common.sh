# shellcheck shell=bash disable=SC2034
# Sourced by the other scripts: settings, --dry_run, and the ways to reach the slice.
# A setting is an environment variable or a flag of the same name in small letters: NAME=a or --name a. Flags win.

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

: "${NAME:=jax-dpo}"                     # of the slice and of the request for it
: "${ZONE:=us-west4-a}"
: "${PROJECT:=}"                         # empty: gcloud's own default
: "${TYPE:=v5litepod-16}"                # a v5e slice of 4x4 chips on 4 hosts
: "${VERSION:=v2-alpha-tpuv5-lite}"      # v6e: v2-alpha-tpuv6e, v5p: v2-alpha-tpuv5, v4: tpu-ubuntu2204-base
: "${SPOT:=1}"                           # 1: cheaper, and may be taken away (resume.sh); 0: on demand
: "${REPO:=}"                            # git URL that the workers clone
: "${REF:=main}"                         # branch or tag
: "${SHARE:=}"                           # where runs are kept: gs://BUCKET or HOST:/EXPORT (NFS)
: "${CONFIG:=configs/standard.yaml}"     # a file on this machine
: "${PORT:=8476}"                        # of the coordinator, the same on all workers
: "${WORKER:=0}"                         # whose log follow.sh shows
settings="NAME ZONE PROJECT TYPE VERSION SPOT REPO REF SHARE CONFIG PORT WORKER"
dry=()
EXTRA=()                                 # what follows --, for jax-dpo train

die() { echo "$(basename "$0"): $*" >&2; exit 2; }

while (($#)); do
    case $1 in
        --dry_run) dry=(--dry_run) ;;
        --help | -h)
            sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
            echo "Settings (variable, or flag in small letters): $settings. --dry_run prints the commands only."
            exit 0
            ;;
        --) shift; EXTRA=("$@"); break ;;
        --*)
            key=$(printf '%s' "${1#--}" | tr '[:lower:]' '[:upper:]')
            case " $settings " in *" $key "*) ;; *) die "unknown flag $1; known: --dry_run --help and $settings" ;; esac
            (($# > 1)) || die "$1 needs a value"
            printf -v "$key" '%s' "$2"
            shift
            ;;
        *) die "unexpected '$1'; options of jax-dpo train come after --" ;;
    esac
    shift
done
# The scripts that a script calls get its settings so.
export NAME ZONE PROJECT TYPE VERSION SPOT REPO REF SHARE CONFIG PORT WORKER

place=(--zone="$ZONE")
[[ -z $PROJECT ]] || place+=(--project="$PROJECT")

quoted() { # VALUE: as a shell reads it back
    local one="'" inside="'\\''"
    case $1 in '' | *[!A-Za-z0-9_@%+=:,./-]*) printf "'%s'" "${1//$one/$inside}" ;; *) printf '%s' "$1" ;; esac
}

run() { # COMMAND...: printed under --dry_run, else run
    if ((${#dry[@]} == 0)); then "$@"; return; fi
    local word
    for word in "$@"; do quoted "$word"; printf ' '; done
    echo
}

request_state() { # of the request for the slice: ACTIVE, SUSPENDED, ...
    run gcloud compute tpus queued-resources describe "$NAME" "${place[@]}" "--format=value(state.state)"
}

on_workers() { # WORKERS COMMAND: lines of shell on these workers, "all" or a number
    run gcloud compute tpus tpu-vm ssh "$NAME" "${place[@]}" --worker="$1" --command="$2"
}
