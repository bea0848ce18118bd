#!/bin/sh
# A real Slurm of three nodes on this machine, as root, from Debian's packages:
#   slurm.sh start <folder>     installs and starts it; the folder takes its state and logs
#   slurm.sh lose <folder> n2   the node is gone, and what ran on it
#   slurm.sh stop <folder>
set -eu
what=$1
folder=$2
host=$(hostname -s)
conf=/etc/slurm/slurm.conf # jobs look here; they do not inherit SLURM_CONF

start() {
    if [ -e "$conf" ]; then
        echo "$conf exists: this machine is of a cluster, or a test was cut off (slurm.sh stop)" >&2
        exit 1
    fi
    command -v slurmctld >/dev/null || {
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends \
            slurmctld slurmd slurm-client munge >/dev/null
    }
    mkdir -p "$folder/state" /etc/slurm
    dd if=/dev/urandom bs=1 count=1024 of="$folder/munge.key" 2>/dev/null
    chmod 400 "$folder/munge.key"
    munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" \
        --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" --seed-file="$folder/munge.seed"
    cat >"$conf" <<END
ClusterName=here
SlurmctldHost=$host(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
SlurmUser=root
SlurmdUser=root
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
ReturnToService=2
MinJobAge=3600
SlurmdTimeout=20
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
StateSaveLocation=$folder/state
SlurmctldPidFile=$folder/slurmctld.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdSpoolDir=$folder/%n
SlurmdPidFile=$folder/%n.pid
SlurmdLogFile=$folder/%n.log
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=17001 CPUs=2 RealMemory=6000
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=17002 CPUs=2 RealMemory=6000
NodeName=n3 NodeHostname=$host NodeAddr=127.0.0.1 Port=17003 CPUs=2 RealMemory=6000
PartitionName=main Nodes=n1,n2,n3 Default=YES MaxTime=INFINITE State=UP
END
    slurmctld -f "$conf"
    for node in n1 n2 n3; do
        mkdir -p "$folder/$node"
        slurmd -N "$node" -f "$conf"
    done
    for _ in $(seq 30); do
        [ "$(sinfo --noheader --states=idle --format=%D)" = 3 ] && exit 0
        sleep 1
    done
    sinfo
    exit 1
}

lose() {
    jobs=$(squeue --noheader --nodelist "$1" --format=%i)
    kill -9 "$(cat "$folder/$1.pid")"
    for job in $jobs; do # a node that is lost takes its processes with it
        pkill -9 --parent "$(pgrep --full --delimiter , "slurmstepd: \[$job\.")" || true
        pkill -9 --full "slurmstepd: \[$job\." || true
    done
}

stop() {
    scancel --user root || true
    for each in n1 n2 n3 slurmctld munged; do
        [ -f "$folder/$each.pid" ] || continue
        pid=$(cat "$folder/$each.pid")
        kill "$pid" 2>/dev/null || continue
        while kill -0 "$pid" 2>/dev/null; do sleep 0.2; done
    done
    rm -f "$conf"
}

case $what in
start) start ;;
lose) lose "$3" ;;
stop) stop ;;
esac
