#!/bin/bash
# From nothing to a trained, evaluated and sampled GPT on this machine, with the commands you would type for your own.
# Run it again: what is done is reused, an interrupted training goes on at its last checkpoint.
#   launch/quickstart.sh [settings of pipeline.train]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ -d .venv ]] && export PATH=$PWD/.venv/bin:$PATH
data=data/quickstart run=runs/quickstart

step() {
  printf '\n$'
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_./=:,+-]+$ ]]; then printf ' %s' "$word"; else printf " '%s'" "$word"; fi
  done
  printf '\n'
  "$@"
}

# Real text that every machine has: the source of Python's own standard library.
stdlib=$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
corpus=("input=stdlib=$stdlib" include=.py 'exclude=*/site-packages/*,*/dist-packages/*' on_error=quarantine)

[[ -e $data/tokenizer.json ]] ||
  step python -m data_prep.train_tokenizer "${corpus[@]}" output=$data/tokenizer.json vocab_size=2048
[[ -e $data/tokens/validation/manifest.json ]] ||
  step python data_prep/tokenize.py "${corpus[@]}" output=$data/tokens tokenizer=$data/tokenizer.json validation_fraction=0.02
step python -m data_prep.verify $data/tokens

[[ -e $run/DONE ]] || step launch/local.sh 2 experiment=quickstart parallel.tensor_parallel_size=2 "$@"
[[ -e $run/DONE ]] || { echo "Stopped before the end; the same command goes on at the last checkpoint."; exit 130; }

step python -m pipeline.evaluate $run data.path=$data/tokens output=$run/evaluation.json
step python -m pipeline.generate checkpoint=$run prompt='def main(' max_new_tokens=120
step python -m pipeline.report $run
printf '%-14s %s\n' 'data' "$data/tokens"
