"""The files that configure Slurm on a virtual cluster, by the names of slurm.conf(5)."""

from collections.abc import Sequence

FOLDER = "/dev/shm/slurm"  # each node has a /dev/shm of its own, in memory
CPUS, GPUS, MEMORY_MB = 2, 2, 4000  # of each node, whatever the machine has
MOST_MINUTES = 10
CREDENTIAL_S = 20  # also how long a requeued job waits: its old credential must have expired
CGROUPS_CAN_BE_DISABLED = (24, 5)

SLURM_CONF = """\
ClusterName=lab
SlurmctldHost={head}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire={credential_s}
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
TaskProlog={folder}/task_prolog
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
# A job starts at once: by default, a batch job waits 3 s, a requeued one up to 30 s longer.
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
SlurmdTimeout=10
KillWait=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName={nodes} CPUs={cpus} RealMemory={memory_mb} Gres=gpu:{gpus} State=UNKNOWN
PartitionName=lab Nodes=ALL Default=YES MaxTime={minutes} State=UP
"""

# A device file each: without one, Slurm does not set CUDA_VISIBLE_DEVICES.
GRES_CONF = """\
AutoDetect=off
NodeName={nodes} Name=gpu File={folder}/nvidia[0-{last_gpu}]
"""


def configuration(names: Sequence[str], user: int, version: tuple[int, ...]) -> dict[str, str]:
    """The texts of slurm.conf, gres.conf and cgroup.conf, as variables for slurm_node.sh."""
    # No limits by cgroups: neither an ordinary user nor a container may set them.
    plugin = "disabled" if version >= CGROUPS_CAN_BE_DISABLED else "cgroup/v1"
    values = {
        "head": names[0],
        "user": user,
        "folder": FOLDER,
        "nodes": ",".join(names),
        "cpus": CPUS,
        "gpus": GPUS,
        "last_gpu": GPUS - 1,
        "memory_mb": MEMORY_MB,
        "minutes": MOST_MINUTES,
        "credential_s": CREDENTIAL_S,
    }
    return {
        "LAB_SLURM_CONF": SLURM_CONF.format(**values),
        "LAB_GRES_CONF": GRES_CONF.format(**values),
        "LAB_CGROUP_CONF": f"CgroupPlugin={plugin}\n",
        "LAB_GPUS": " ".join(str(gpu) for gpu in range(GPUS)),
    }
