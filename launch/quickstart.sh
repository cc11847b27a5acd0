#!/bin/bash
# From nothing to a trained, evaluated and sampled GPT on this machine, with the commands you would type for your own.
# Run it again: what is done is reused, an interrupted training goes on at its last checkpoint.
#   launch/quickstart.sh [settings of pipeline.train]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
data=data/quickstart run=runs/quickstart
refuse_settings_of_done $run "$@"

# Real text that every machine has: the source of Python's own standard library.
stdlib=$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
corpus=("input=stdlib=$stdlib" include=.py 'exclude=*/site-packages/*,*/dist-packages/*' on_error=quarantine)

[[ -e $data/tokenizer.json ]] ||
  step python -m data_prep.train_tokenizer "${corpus[@]}" output=$data/tokenizer.json vocab_size=2048
[[ -e $data/tokens/validation/manifest.json ]] ||
  step python data_prep/tokenize.py "${corpus[@]}" output=$data/tokens tokenizer=$data/tokenizer.json validation_fraction=0.02
step python -m data_prep.verify $data/tokens

train $run experiment=quickstart parallel.tensor_parallel_size=2 "$@"

step python -m pipeline.evaluate $run data.path=$data/tokens output=$run/evaluation.json
step python -m pipeline.generate checkpoint=$run prompt='def main(' max_new_tokens=120
step python -m pipeline.report $run
printf '%-14s %s\n' 'data' "$data/tokens"
cat << END

What to try next:
  launch/local.sh 2 experiment=quickstart name=mine optimizer.lr=2e-3        another run, with a setting of yours
  python -m pipeline.generate checkpoint=$run interactive=true   type prompts
  python -m pipeline.export checkpoint=$run output=exported      a folder that transformers loads
  make talk                                                                  teach it to answer
  docs/your-text.md                                                          the same with your own text
END
