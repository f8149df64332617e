# shellcheck shell=bash disable=SC2034 # env.sh, launch.sh and submit.sh read these
# The values of your cluster. Copy this file to slurm/cluster.sh and change them:
#     cp slurm/cluster.example.sh slurm/cluster.sh
# submit.sh turns the first part into sbatch options; plain sbatch does not read them. RANKS_PER_NODE, PARTS and all values after the
# first empty line hold in every job, also with plain sbatch.
PARTITION=gpu        # where training, features and probes run
CPU_PARTITION=cpu    # where images become shards; the same name if there is only one partition
ACCOUNT=             # empty: your default account
NODES=8              # of a training job; 4-8 uses the free nodes, and a restart may have another number
GPUS_PER_NODE=8
RANKS_PER_NODE=      # empty: one rank a GPU
CPUS=32              # cores of a job that is one process: images, features, probes, tables
PARTS=16             # tasks of the arrays that make shards and extract features
TIME=24:00:00        # limit of each job; training saves before it, queues again and continues
LOGS=runs/logs       # directory of the jobs' output
OPTIONS=()           # more sbatch options of every job: (--qos=long)
GPU_OPTIONS=()       # more sbatch options of GPU jobs: (--constraint=h100)

DATA=                # shards for training without --data
SPARE_NODES=0        # nodes of a training job that wait until one of the others fails; NODES includes them
MAX_FRUITLESS=3      # starts in a row without a new checkpoint before the job gives up
PREFLIGHT=${PREFLIGHT:-1} # check every node before each start; 0 skips it, also for one job: PREFLIGHT=0 bash slurm/submit.sh ...

# If the nodes have several networks, the fast one:
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
