#!/bin/bash
# For sites that forbid requeueing: N jobs of one name, each of which waits for the one before and goes on with its run.
#
#   slurm/chain.sh 7 --job-name=r152 --nodes=16 --ntasks-per-node=8 --gpus-per-node=8 --time=24:00:00 \
#     slurm/train.sbatch imagenet/xie_yuille/base.yaml data.path=/data/imagenet
#
# Once the run has come to its end the remaining jobs leave at once.
set -e
number=${1:?number of jobs}
shift
for ((i = 1; i <= number; i++)); do
  REQUEUE=no sbatch --export=ALL --no-requeue --dependency=singleton "$@"
done
