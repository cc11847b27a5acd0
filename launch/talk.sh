#!/bin/bash
# From the quickstart's model to one that answers: dialogues about people and what they do in four languages, training on
# them, answers to what was held out beside what guessing would score, and a dialogue on the terminal.
# Run it again: what is done is reused.
#   launch/talk.sh [settings of pipeline.train]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
base=runs/quickstart data=data/talk run=runs/talk
refuse_settings_of_done $run "$@"

[[ -e $base/DONE ]] || launch/quickstart.sh
[[ -e $data/held.jsonl ]] || step python launch/name_dialogues.py $data
for part in train held; do
  [[ -e $data/$part/train/manifest.json ]] || step python -m data_prep.conversations input=$data/$part.jsonl output=$data/$part \
    tokenizer=data/quickstart/tokenizer.json row_tokens=256 validation_fraction=0
done
step python -m data_prep.show $data/train row=0

train $run experiment=talk parallel.tensor_parallel_size=2 checkpoint.init_from=$base "$@"

step python -m pipeline.answer checkpoint=$run data=$data/held.jsonl
step python -m pipeline.report $run
printf '\n%s\n' 'A dialogue (type your own: python -m pipeline.generate checkpoint=runs/talk chat=true temperature=0)'
step python -m pipeline.generate checkpoint=$run chat=true temperature=0 <<< $'How does one say woman surfing in German?\nAnd in French?\nAnd in Spanish?'
