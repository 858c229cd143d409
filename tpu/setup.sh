#!/usr/bin/env bash
# Installs the repository on all workers and mounts the storage on which runs are kept. Run it again to update.
# Example: tpu/setup.sh --name my-run --repo https://github.com/me/jax_dpo.git --share gs://my-bucket
# All workers write one checkpoint together, and a slice that is taken away loses its disks: runs lie on shared
# storage, mounted as jax_dpo/outputs. A save ends with the renaming of a directory, so a bucket needs a hierarchical
# namespace. gcloud reaches several workers at once only through an agent: ssh-add ~/.ssh/google_compute_engine first.

# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

[[ -n $REPO ]] || die "REPO is not set: the git URL that the workers clone"
case $SHARE in
    gs://?*)
        install="release=gcsfuse-\$(lsb_release -c -s)
key=/usr/share/keyrings/cloud.google.asc
command -v gcsfuse > /dev/null || {
  curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee \$key > /dev/null
  echo \"deb [signed-by=\$key] https://packages.cloud.google.com/apt \$release main\" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null
  sudo apt-get update -qq
  sudo apt-get install -y -qq -o DPkg::Lock::Timeout=300 gcsfuse
}"
        # No cache of names: a worker sees at once what another one has written.
        mount="gcsfuse --implicit-dirs --metadata-cache-ttl-secs 0 $(quoted "${SHARE#gs://}") outputs"
        ;;
    ?*:/*)
        install="sudo apt-get install -y -qq -o DPkg::Lock::Timeout=300 nfs-common"
        mount="sudo mount -t nfs -o hard $(quoted "$SHARE") outputs
sudo chown \$(id -u):\$(id -g) outputs"
        ;;
    *) die "SHARE is '$SHARE', expected gs://BUCKET or HOST:/EXPORT: where runs are kept" ;;
esac

on_workers all "set -e
[ -d jax_dpo/.git ] || git clone --quiet --depth 1 --branch $(quoted "$REF") $(quoted "$REPO") jax_dpo
cd jax_dpo
git fetch --quiet --depth 1 origin $(quoted "$REF")
git checkout --quiet --detach FETCH_HEAD
python3 -m pip install --quiet --user uv
[ -x .venv/bin/python ] || python3 -m uv venv --quiet --python 3.12 .venv
python3 -m uv pip install --quiet --python .venv/bin/python '.[tpu]'
mkdir -p logs outputs"

on_workers all "set -e
cd jax_dpo
if mountpoint -q outputs; then exit 0; fi
$install
$mount"

on_workers all "cd jax_dpo && .venv/bin/jax-dpo doctor"
