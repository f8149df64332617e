# shellcheck shell=bash disable=SC2034 # env.sh, launch.sh and submit.sh read these
# What belongs to your cluster and to nothing else. Copy this file to slurm/cluster.sh and change the values:
#     cp slurm/cluster.example.sh slurm/cluster.sh
# submit.sh turns the first part into sbatch options, which plain sbatch has to be given. RANKS_PER_NODE, PARTS and what follows the
# first empty line holds in every job, however it was submitted.
PARTITION=gpu        # where training, features and probes run
CPU_PARTITION=cpu    # where images become shards; the same name where there is only one partition
ACCOUNT=             # empty: the one that SLURM gives you anyway
NODES=8              # of a training job; 4-8 takes what there is, and a restart may have another number
GPUS_PER_NODE=8
RANKS_PER_NODE=      # empty: one rank a GPU
CPUS=32              # cores of each task that is one process: images, features, probes, tables
PARTS=16             # tasks of the arrays that make shards and extract features
TIME=24:00:00        # limit of each job; training saves before it, queues again and goes on
LOGS=runs/logs       # where the jobs' output goes
OPTIONS=()           # more sbatch options of every job: (--qos=long)
GPU_OPTIONS=()       # and of those that use GPUs: (--constraint=h100)

DATA=                # shards that training reads when no --data is given
MAX_FRUITLESS=3      # starts in a row that may end without a new checkpoint; then the job stops and says why
PREFLIGHT=${PREFLIGHT:-1} # look at every node before each start; 0: do not, also for one job: PREFLIGHT=0 bash slurm/submit.sh ...

# Where nodes have several networks, the one between them:
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
