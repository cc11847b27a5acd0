#!/bin/bash
# A model that translates, from scratch: names of people and what they do in five languages, each into each other, training on
# them with two processes, answers to names that it never saw beside what guessing and looking up would score, and a try.
# Run it again: what is done is reused.
#   launch/translate.sh [settings of pipeline.train]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
data=data/translate run=runs/translate
refuse_settings_of_done $run "$@"

[[ -e $data/names.txt ]] || step python -m launch.translations $data
[[ -e $data/tokenizer.json ]] ||
  step python -m data_prep.train_tokenizer input=$data/names.txt output=$data/tokenizer.json vocab_size=1024
for part in train held; do
  [[ -e $data/$part/train/manifest.json ]] || step python -m data_prep.conversations input=$data/$part.jsonl output=$data/$part \
    tokenizer=$data/tokenizer.json row_tokens=256 validation_fraction=0
done
step python -m data_prep.show $data/train row=0

train $run experiment=translate parallel.tensor_parallel_size=2 "$@"

step python -m pipeline.answer checkpoint=$run data=$data/held.jsonl
step python -m launch.translations $data memory
step python -m pipeline.report $run
step python -m pipeline.generate checkpoint=$run chat=true temperature=0 <<< $'German to French: surferin'
