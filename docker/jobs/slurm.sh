#!/bin/bash
# One training run on Slurm; it is queued again until it is finished.
#
#     sbatch docker/jobs/slurm.sh docker/jobs/run.yaml [more options of `train-sae run`]
#
# Submit from the folder that the paths in the YAML file are relative to. Two minutes before the
# time limit Slurm sends SIGTERM; the run saves a checkpoint, ends, and continues in the next turn.

#SBATCH --job-name=train-sae
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus=1
#SBATCH --mem=64G
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -u

config=${1:?usage: sbatch slurm.sh run.yaml [options of train-sae run]}
shift
most_turns=50 # whatever happens, not for ever

# where train-sae is installed, `pip install .` or `make install`
# source /path/to/sae-harvest/.venv/bin/activate

srun train-sae run --config "$config" --stopped-code 3 "$@"
code=$?

case $code in
    0) echo "Finished." ;;
    3 | 75) # stopped with work left; or trouble outside, a full disk say, that may pass
        if [ "${SLURM_RESTART_COUNT:-0}" -ge "$most_turns" ]; then
            echo "Still unfinished after $most_turns turns; giving up."
            exit $code
        fi
        [ $code -eq 75 ] && sleep 60
        scontrol requeue "$SLURM_JOB_ID"
        ;;
    *) exit $code ;; # the last line of the log says what is wrong
esac
