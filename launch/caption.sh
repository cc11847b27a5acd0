#!/bin/bash
# A model that looks: pictures of letters with their Unicode names, training on them with two processes, the names of letters in faces
# that it has never seen, scored with the right picture and with another one, and drawn as a sheet.
# Run it again: what is done is reused.
#   launch/caption.sh [settings of pipeline.train]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
data=data/caption run=runs/caption
refuse_settings_of_done $run "$@"

[[ -e $data/names.txt ]] || step python launch/letters.py $data
[[ -e $data/tokenizer.json ]] ||
  step python -m data_prep.train_tokenizer input=$data/names.txt output=$data/tokenizer.json vocab_size=512
for part in train held wrong; do
  [[ -e $data/$part/train/manifest.json ]] || step python -m data_prep.conversations input=$data/$part.tar output=$data/$part \
    tokenizer=$data/tokenizer.json template=launch/letter.jinja row_tokens=256 image_size=32 patch_size=8 validation_fraction=0
done
step python -m data_prep.show $data/train row=0 pictures=$data/seen

train $run experiment=caption parallel.tensor_parallel_size=2 "$@"

step python -m pipeline.evaluate $run output=$run/evaluation.json
python - $run/evaluation.json << 'END'
import json, math, sys
bits = {name: row["loss"] / math.log(2) for name, row in json.load(open(sys.argv[1]))["results"].items()}
print(f"\nbits a token: {bits['unseen-faces']:.2f} with the right picture, {bits['wrong-picture']:.2f} with another one")
END
[[ -e $run/exported/config.json ]] || step python -m pipeline.export $run $run/exported
step python -m launch.letter_sheet $run $data/held.tar $run/sheet.png
step python -m pipeline.report $run
