#!/bin/bash
# From text to model in two Slurm jobs: tokenization as an array, and pretraining, which starts when it has succeeded.
#   launch/text_to_model.sh --array=0-63 input='data/*.jsonl.zst' output=OUT tokenizer=gpt2.json -- --nodes=16 name=big model=gpt3-6.7b
# Before `--` stands what launch/tokenize.slurm gets, after it what launch/pretrain.slurm gets: words that begin with a
# dash are options of sbatch (--name=value), the others settings. Prints the two job ids.
set -euo pipefail
launch=$(dirname "$(readlink -f "$0")")

tokenize_options=() tokenize=() pretrain_options=() pretrain=() part=tokenize
for word in "$@"; do
  case $part:$word in
    tokenize:--) part=pretrain ;;
    tokenize:-*) tokenize_options+=("$word") ;;
    pretrain:-*) pretrain_options+=("$word") ;;
    tokenize:*) tokenize+=("$word") ;;
    pretrain:*) pretrain+=("$word") ;;
  esac
done
if [[ $part != pretrain ]]; then
  sed -n 's/^# \{0,1\}//; 2,5p' "$0" >&2
  exit 2
fi

REPO=$(dirname "$launch")
source "$REPO/launch/env.sh"
# Where the tokens will lie, from the tokenization's own reading of its settings. A wrong one is said here, before
# anything is submitted.
composed=$("${python[@]}" "$REPO/data_prep/tokenize.py" --cfg "${tokenize[@]}") || exit
output=$("${python[@]}" -c 'import sys, yaml; print(yaml.safe_load(sys.stdin)["output"])' <<< "$composed")
[[ $output != "???" ]] || { echo "error: output is not set; give output=..." >&2; exit 2; }

first=$(sbatch --parsable "${tokenize_options[@]}" "$launch/tokenize.slurm" "${tokenize[@]}")
# A pretraining job whose tokenization has failed leaves the queue instead of waiting for ever.
second=$(sbatch --parsable --dependency="afterok:$first" --kill-on-invalid-dep=yes "${pretrain_options[@]}" \
  "$launch/pretrain.slurm" "data.path=$output" "${pretrain[@]}")
echo "tokenize $first, pretrain $second"
