#!/bin/bash
# One training run as a job of a Ray cluster; it is submitted again after what may pass.
#
#     RAY_ADDRESS=http://head-node:8265 docker/jobs/ray-job.sh docker/jobs/run.yaml [more options]
#
# The nodes need this package. `store` and `out` of the YAML file have to be reachable from all of
# them: absolute paths of a shared file system, or s3://bucket/prefix for the store.
#
# `ray job stop` sends SIGTERM and, three seconds later, SIGKILL. Set RAY_JOB_STOP_WAIT_TIME_S=120
# where the cluster's head is started, so that a large checkpoint can be written in between. A run
# that was killed continues as well, from its last checkpoint: run this script again.

set -u

config=${1:?usage: ray-job.sh run.yaml [options of train-sae run]}
shift
gpus=${GPUS:-1}
cpus=${CPUS:-8}
most_turns=${TURNS:-5}
pause=${PAUSE:-60} # seconds

# the job runs on another machine: the file travels with it
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cp "$config" "$folder/run.yaml"

for turn in $(seq "$most_turns"); do
    id="train-sae-$(date +%s)-$$-$turn"
    # prints the job's log; ends with 0 if the job succeeded or was stopped by hand
    if ray job submit \
        --submission-id "$id" \
        --working-dir "$folder" \
        --entrypoint-num-cpus "$cpus" \
        --entrypoint-num-gpus "$gpus" \
        -- train-sae run --config run.yaml "$@"; then
        exit 0
    fi
    case $(ray job status "$id" 2>&1) in
        *"exit code 1,"* | *"exit code 1."* | *"exit code 2,"* | *"exit code 2."*)
            exit 1 ;; # trying again does not mend it; the log says what is wrong
    esac
    echo "Turn $turn of $most_turns failed."
    sleep "$pause"
done
exit 1
