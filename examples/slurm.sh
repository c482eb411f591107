#!/bin/bash
# Eight workers of one search, as a Slurm array: `HPO_STORAGE=postgresql+psycopg://... sbatch examples/slurm.sh`.
# A task whose node fails is queued again, and its trials are taken over by the others meanwhile.
#SBATCH --job-name=hpo-search-lengths
#SBATCH --array=1-8
#SBATCH --cpus-per-task=4
#SBATCH --mem=8G
#SBATCH --requeue
set -euo pipefail

export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK
srun hpo search-lengths --trials 5000 --checkpoint model --dataset data --runs runs
