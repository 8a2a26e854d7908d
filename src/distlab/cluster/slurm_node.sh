# Slurm's daemons on one node of a virtual cluster. Run by distlab.cluster.slurm:
#   sh slurm_node.sh head|node [BECOME...]
# BECOME is the start of a command line that runs a command as Slurm's user. Ends when slurmd does.
set -eu
role=$1
shift
PATH=$PATH:/usr/sbin:/sbin

grep -q '^lab /dev/shm tmpfs ' /proc/mounts ||
    { echo "error: the node has no /dev/shm of its own" >&2; exit 1; }
mkdir -p "$LAB_FOLDER/state"
cd "$LAB_FOLDER"
printf %s "$LAB_SLURM_CONF" >slurm.conf
printf %s "$LAB_GRES_CONF" >gres.conf
printf %s "$LAB_CGROUP_CONF" >cgroup.conf
(umask 077 && printf %s "$LAB_MUNGE_KEY" >munge.key)

# A job belongs to Slurm, not to the command that submitted it and its node.
cat >task_prolog <<'END'
#!/bin/sh
for name in LAB_RUN_ID NODE_RANK NNODES HEAD; do echo "unset $name"; done
END
chmod 755 task_prolog

for gpu in $LAB_GPUS; do
    : >"nvidia$gpu"
    mount --bind /dev/null "nvidia$gpu"
done

# Slurm runs for nobody whom it cannot name: a user of a directory service, or of a container.
uid=${LAB_USER%:*}
if ! grep -q "^[^:]*:[^:]*:$uid:" /etc/passwd; then
    { cat /etc/passwd; echo "lab:x:$LAB_USER::/:/bin/sh"; } >passwd
    mount --bind passwd /etc/passwd
fi

unset LAB_SLURM_CONF LAB_GRES_CONF LAB_CGROUP_CONF LAB_MUNGE_KEY
"$@" munged --force --key-file="$PWD/munge.key" --socket="$PWD/munge.sock" \
    --pid-file="$PWD/munged.pid" --log-file="$PWD/munged.log" --seed-file="$PWD/munged.seed"
if [ "$role" = head ]; then
    "$@" slurmctld
fi
# A slurmd that nobody answers asks again only a second later.
until "$@" scontrol ping >/dev/null 2>&1; do
    if grep -s fatal slurmctld.log >&2; then exit 1; fi
    sleep 0.1
done
exec "$@" slurmd -D
