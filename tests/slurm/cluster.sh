#!/usr/bin/env bash
# A real SLURM on one machine for the tests: its own daemons, its own network that leads nowhere.
#
#   cluster.sh up FOLDER [DEFINED] [STARTED]   nodes node1..nodeDEFINED (2), of which STARTED (2) run
#   cluster.sh run FOLDER COMMAND...           run a command in the cluster's network
#   cluster.sh kill FOLDER nodeK               switch a node off: all its processes die at once
#   cluster.sh boot FOLDER nodeK               switch it on
#   cluster.sh down FOLDER                     end everything that was started here
#
# FOLDER is short (sockets live there), new, and holds the state. Needs root, and Debian's slurm-wlm,
# munge, iproute2 and util-linux. All of the cluster lives in one network namespace that has but a
# loopback interface; each node has an address on it, and its own host name and processes. Every node
# claims 16 cores, 64 GB and 8 GPUs (/dev/null under other names).
set -euo pipefail

action=${1:?an action}
folder=${2:?a folder}
shift 2
export SLURM_CONF=$folder/slurm.conf
export PATH=$PATH:/usr/sbin:/sbin
unset SLURM_JOB_ID SLURM_NODELIST SLURM_PROCID || true

inside() { nsenter --target "$(cat "$folder/pids/network")" --net -- "$@"; }

# keep NAME COMMAND...: start a daemon and write down its process id
keep() {
  local name=$1
  shift
  setsid "$@" </dev/null >"$folder/log/$name.out" 2>&1 &
  echo $! >"$folder/pids/$name"
}

# wait_for SECONDS COMMAND...: until the command succeeds
wait_for() {
  local end=$((SECONDS + $1))
  shift
  until "$@" >/dev/null 2>&1; do
    if ((SECONDS >= end)); then
      echo "cluster.sh: in vain: $*" >&2
      tail -n 5 "$folder"/log/* >&2
      exit 1
    fi
    sleep 0.1
  done
}

address() { echo "10.99.0.${1#node}"; }

is_up() { inside sinfo --noheader --nodes="$1" --format=%T | grep -qE '^(idle|mixed|allocated|completing)$'; }

boot() {
  local node=$1
  # the node's first process is a shell that reaps what is left over; killing it kills the node
  keep "$node" nsenter --target "$(cat "$folder/pids/network")" --net -- \
    unshare --uts --mount --pid --fork --kill-child --mount-proc bash -c '
      hostname "$1"
      mount --bind "$2/hosts" /etc/hosts
      slurmd -D -N "$1" -f "$2/slurm.conf" &
      while true; do sleep 1000 & wait -n; done' node "$node" "$folder"
}

stop_one() {
  local pid file=$folder/pids/$1
  [ -s "$file" ] || return 0
  pid=$(cat "$file")
  kill "-$2" "$pid" 2>/dev/null || true
  for _ in $(seq 100); do
    kill -0 "$pid" 2>/dev/null || break
    sleep 0.05
  done
  kill -KILL "$pid" 2>/dev/null || true
  rm -f "$file"
}

write_files() {
  local defined=$1 k
  head -c 1024 /dev/urandom >"$folder/munge.key"
  chmod 400 "$folder/munge.key"
  chmod 711 "$folder/munge"
  for k in $(seq 0 7); do mknod "$folder/dev/nvidia$k" c 1 3; done
  {
    echo "127.0.0.1 localhost"
    echo "10.99.0.254 $(hostname -s) control"
    for k in $(seq "$defined"); do echo "10.99.0.$k node$k"; done
  } >"$folder/hosts"
  echo "NodeName=node[1-$defined] Name=gpu File=$folder/dev/nvidia[0-7]" >"$folder/gres.conf"
  # cred_expire is also how long a job that is queued again waits (two minutes by default)
  cat >"$folder/slurm.conf" <<CONF
ClusterName=tests
SlurmctldHost=$(hostname -s)(10.99.0.254)
SlurmctldPort=6817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$folder/munge/socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/pids/slurmctld.own
SlurmdPidFile=$folder/pids/%n.own
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/%n.log
MailProg=/bin/true
FirstJobId=$((RANDOM * 30 + 1000))
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
PropagateResourceLimits=NONE
SwitchType=switch/none
MpiDefault=none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1,batch_sched_delay=0
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
SlurmctldTimeout=10
SlurmdTimeout=5
KillWait=10
MessageTimeout=10
TCPTimeout=2
CompleteWait=0
Waittime=0
InactiveLimit=0
MinJobAge=3600
ReturnToService=2
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=9 PreemptMode=OFF
CONF
  for k in $(seq "$defined"); do
    echo "NodeName=node$k NodeAddr=10.99.0.$k Port=$((7000 + k)) CPUs=16 RealMemory=64000 Gres=gpu:8"
  done >>"$folder/slurm.conf"
}

case $action in
  up)
    defined=${1:-2}
    started=${2:-2}
    mkdir -p "$folder"/{pids,log,spool,state,dev,munge}
    chmod 755 "$folder"
    keep network unshare --net sleep infinity
    wait_for 5 sh -c "[ \"\$(readlink /proc/$(cat "$folder/pids/network")/ns/net)\" != \"\$(readlink /proc/self/ns/net)\" ]"
    inside ip link set lo up
    inside ip address add 10.99.0.254/24 dev lo
    for k in $(seq "$defined"); do inside ip address add "10.99.0.$k/24" dev lo; done
    write_files "$defined"
    keep munged munged --foreground --socket="$folder/munge/socket" --key-file="$folder/munge.key" \
      --pid-file="$folder/pids/munged.own" --log-file="$folder/log/munged.log" --seed-file="$folder/munge.seed"
    wait_for 10 munge --socket="$folder/munge/socket" --no-input
    for k in $(seq "$defined"); do mkdir -p "$folder/spool/node$k"; done
    keep slurmctld nsenter --target "$(cat "$folder/pids/network")" --net -- \
      slurmctld -D -c -f "$folder/slurm.conf"
    wait_for 20 sh -c "'$0' run '$folder' scontrol ping | grep -q UP"
    for k in $(seq "$started"); do boot "node$k"; done
    for k in $(seq "$started"); do wait_for 20 is_up "node$k"; done
    ;;
  run) inside env SLURM_CONF="$SLURM_CONF" "$@" ;;
  kill) stop_one "$1" KILL ;;
  boot)
    boot "$1"
    wait_for 20 is_up "$1"
    ;;
  down)
    for file in "$folder"/pids/node*; do
      case $file in *.own | *\*) ;; *) stop_one "$(basename "$file")" KILL ;; esac
    done
    stop_one slurmctld TERM
    stop_one munged TERM
    stop_one network KILL
    ;;
  *)
    sed -n '2,14p' "$0"
    exit 2
    ;;
esac
