#!/bin/bash
# A SLURM of one node on this machine, for tests: `tests/slurm.sh start FOLDER` configures and starts munged, slurmctld
# and slurmd with all that they write in FOLDER; `tests/slurm.sh stop FOLDER` ends them. Needs root, and Debian's
# packages: apt-get install slurm-wlm munge. Clients find it by SLURM_CONF=FOLDER/slurm.conf.
set -euo pipefail
action=${1:?start or stop} folder=$(realpath -m "${2:?a folder}")
socket=$folder/munge.socket

stop() {
  for name in slurmd slurmctld munged; do
    if [ -f "$folder/$name.pid" ]; then
      pid=$(cat "$folder/$name.pid")
      kill "$pid" 2>/dev/null || true
      for _ in $(seq 100); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
      kill -9 "$pid" 2>/dev/null || true
      rm -f "$folder/$name.pid"
    fi
  done
}

wait_for() {      # what, command
  for _ in $(seq 100); do "${@:2}" >/dev/null 2>&1 && return; sleep 0.2; done
  echo "slurm: $1 didn't come up in 20 seconds; its logs are in $folder" >&2
  tail -n 5 "$folder"/*.log >&2
  stop
  exit 1
}

if [ "$action" = stop ]; then stop; exit; fi

for name in munged slurmctld slurmd sbatch; do
  PATH=$PATH:/usr/sbin command -v $name >/dev/null || { echo "slurm: $name isn't installed (apt-get install slurm-wlm munge)" >&2; exit 2; }
done
[ "$(id -u)" = 0 ] || { echo "slurm: needs root" >&2; exit 2; }
export PATH=$PATH:/usr/sbin
mkdir -p "$folder/state" "$folder/spool"
chmod 711 "$folder"
head -c 1024 /dev/urandom > "$folder/munge.key"
chmod 400 "$folder/munge.key"
host=$(hostname -s) cpus=$(nproc) base=$((20000 + RANDOM % 10000))
memory=$(($(awk '/MemTotal/ {print $2}' /proc/meminfo) / 1024 - 512))
cat > "$folder/slurm.conf" <<END
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$base
SlurmdPort=$((base + 1))
AuthType=auth/munge
AuthInfo=socket=$socket
CredType=cred/munge
SlurmUser=root
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
KillWait=5
InactiveLimit=0
MinJobAge=600
SchedulerParameters=bf_interval=1,sched_min_interval=100000
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cpus RealMemory=$memory State=UNKNOWN
PartitionName=cpu Nodes=$host Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
END
export SLURM_CONF=$folder/slurm.conf
munged --force --key-file "$folder/munge.key" --socket "$socket" --pid-file "$folder/munged.pid" \
  --log-file "$folder/munged.log" --seed-file "$folder/munge.seed" --num-threads 2
wait_for munged munge -n -S "$socket"
slurmctld -i
wait_for slurmctld scontrol ping
slurmd
node_is_up() { sinfo -h -o %T | grep -qE 'idle|mixed|allocated'; }
wait_for slurmd node_is_up
sinfo
