#!/bin/bash
# Train with N processes on this machine. Every further argument is a setting of pipeline.train:
#   launch/local.sh 4 model=tiny data.path=data/corpus parallel.tensor_parallel_size=2 parallel.pipeline_parallel_size=2
# One Ctrl-C (or TERM, USR2, or a terminal that closes) saves and ends; a second one ends at once. The same command
# continues the run. `nohup launch/local.sh ...` goes on without its terminal.
# In the background (`&`, nohup, many CI runners) Ctrl-C is ignored, and bash cannot change that: send TERM or USR2.
set -uo pipefail

[[ ${1:-} =~ ^[1-9][0-9]*$ ]] || { echo "usage: $0 NUM_PROCESSES [key=value ...]" >&2; exit 2; }
WORLD_SIZE=$1 LOCAL_WORLD_SIZE=$1; shift
REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
num_cpus=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((num_cpus > WORLD_SIZE ? num_cpus / WORLD_SIZE : 1))}
source "$REPO/launch/env.sh" || exit

# A wrong setting or a missing dataset is said once, not by every process.
"${python[@]}" -m pipeline.preflight "world_size=$WORLD_SIZE" "$@" > /dev/null || exit

export WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR=127.0.0.1
MASTER_PORT=$("${python[@]}" -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])') || exit
export MASTER_PORT

# No process outlives this script: an orphan would go on writing into the run that you start again.
guard=(); command -v setpriv > /dev/null && guard=(setpriv --pdeathsig KILL)
pids=()
for ((rank = 0; rank < WORLD_SIZE; rank++)); do
  RANK=$rank LOCAL_RANK=$rank "${guard[@]}" "${python[@]}" -m pipeline.train "$@" &
  pids+=($!)
done

# Ctrl-C and a closed terminal reach the processes by themselves, TERM and USR2 only this script; being told twice is harmless.
trap 'kill -USR2 "${pids[@]}" 2> /dev/null' INT TERM USR2 HUP
running=$WORLD_SIZE
while ((running)); do
  wait -n -p ended; code=$?
  [[ -n ${ended:-} ]] || continue      # a signal came, nobody ended
  running=$((running - 1))
  if ((code)); then                    # one process's end is the end of all: the others would wait for it
    sleep 2                            # whoever else failed says so
    kill -KILL "${pids[@]}" 2> /dev/null
    wait
    # A shard that shrinks under its reader kills it (SIGBUS), without a word: say which one.
    ((code > 128 && code != 130)) && "${python[@]}" -m pipeline.preflight shards_only=true "$@"
    exit "$code"
  fi
done
