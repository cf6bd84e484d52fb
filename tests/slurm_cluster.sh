#!/bin/bash
# A real Slurm of two hosts on this one, from nothing: each host is a network, name and process namespace with an
# address of its own, and runs a slurmd; slurmctld and munged run beside them. Needs root, slurm-wlm, munge, iproute2.
#
#   slurm_cluster.sh up FOLDER     start; then: export SLURM_CONF=FOLDER/slurm.conf
#   slurm_cluster.sh start N FOLDER, slurm_cluster.sh kill N FOLDER     one host (N is 1 or 2)
#   slurm_cluster.sh kill-slurmd N FOLDER   its slurmd alone: what runs on the host lives on
#   slurm_cluster.sh down FOLDER   stop all that `up` started, and nothing else
set -euo pipefail
action=$1
folder=$(realpath -m -- "${*: -1}")
net=${SLURM_TEST_NET:-10.213.77}
bridge=tl${net##*.}
port=$((26000 + 2 * ${net##*.}))
cpus=${SLURM_TEST_CPUS:-4}

# The process in `unshare` is the host's init: when it ends, all that runs on the host ends with it.
start_host() {
  local n=$1 holder
  mkdir -p "$folder/n$n"
  # shellcheck disable=SC2016 # the inner shell expands its own arguments
  unshare --net --uts --pid --mount --mount-proc --fork --kill-child bash -c '
    set -euo pipefail
    hostname "$1"
    until [ -e /sys/class/net/"$2" ] 2>/dev/null || ip link show "$2" >/dev/null 2>&1; do sleep 0.05; done
    ip link set lo up
    ip addr add "$3"/24 dev "$2"
    ip link set "$2" up
    slurmd -D -N "$1" -f "$4/slurm.conf" & wait $! || true # the host lives on without it
    sleep infinity' bash "n$n" "${bridge}n$n" "$net.$n" "$folder" >>"$folder/n$n/slurmd.out" 2>&1 </dev/null &
  echo $! >"$folder/n$n/pid"
  until holder=$(pgrep -P "$(cat "$folder/n$n/pid")"); do sleep 0.05; done
  until [ "$(readlink "/proc/$holder/ns/net")" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.05; done
  ip link del "${bridge}h$n" 2>/dev/null || true
  ip link add "${bridge}h$n" type veth peer name "${bridge}n$n" netns "$holder"
  ip link set "${bridge}h$n" master "$bridge" up
}

kill_host() { kill -KILL "$(cat "$folder/n$1/pid")" 2>/dev/null || true; }

write_config() {
  cat >"$folder/slurm.conf" <<END
ClusterName=test
SlurmctldHost=$(hostname)($net.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/%n/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/%n/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/%n/slurmd.log
SlurmctldPort=$port
SlurmdPort=$((port + 1))
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
SlurmdTimeout=15
KillWait=10
MinJobAge=600
SchedulerParameters=sched_interval=2,batch_sched_delay=0
JobRequeue=1
GresTypes=gpu
NodeName=n1 NodeAddr=$net.1 CPUs=$cpus RealMemory=4000 Gres=gpu:fake:2 State=UNKNOWN
NodeName=n2 NodeAddr=$net.2 CPUs=$cpus RealMemory=4000 Gres=gpu:fake:2 State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:2
END
  # Two GPUs a host, whose device files are any two: Slurm grants them and sets CUDA_VISIBLE_DEVICES as it does for real
  # ones, and nobody opens them.
  cat >"$folder/gres.conf" <<END
Name=gpu Type=fake File=/dev/null
Name=gpu Type=fake File=/dev/zero
END
}

case $action in
  up)
    mkdir -p "$folder/state" "$folder/n1/spool" "$folder/n2/spool"
    install -d -m 711 "$folder/munge"
    (umask 077 && head -c 128 /dev/urandom >"$folder/munge/key")
    munged --force --key-file="$folder/munge/key" --socket="$folder/munge/socket" --pid-file="$folder/munge/pid" \
      --log-file="$folder/munge/log" --seed-file="$folder/munge/seed"
    write_config
    ip link add "$bridge" type bridge
    ip addr add "$net.254/24" dev "$bridge"
    ip link set "$bridge" up
    slurmctld -f "$folder/slurm.conf"
    start_host 1
    start_host 2
    export SLURM_CONF=$folder/slurm.conf
    for _ in {1..100}; do
      [ "$(sinfo --noheader --states=idle --format=%D 2>/dev/null)" = 2 ] && exit 0
      sleep 0.2
    done
    sinfo >&2
    tail -n 20 "$folder"/slurmctld.log "$folder"/n?/slurmd.* >&2
    exit 1
    ;;
  start) start_host "$2" ;;
  kill) kill_host "$2" ;;
  kill-slurmd) kill -KILL "$(pgrep -x slurmd -P "$(pgrep -P "$(cat "$folder/n$2/pid")")")" ;;
  down)
    for n in 1 2; do [ ! -s "$folder/n$n/pid" ] || kill_host $n; done
    for file in slurmctld.pid munge/pid; do
      if [ -s "$folder/$file" ]; then kill "$(cat "$folder/$file")" 2>/dev/null || true; fi
    done
    ip link del "$bridge" 2>/dev/null || true
    ;;
esac
