# What the recipes for this machine share; they source it. Every command is shown as you would type it.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ -d .venv ]] && export PATH=$PWD/.venv/bin:$PATH

step() {
  printf '\n$'
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_./=:,+-]+$ ]]; then printf ' %s' "$word"; else printf " '%s'" "$word"; fi
  done
  printf '\n'
  "$@"
}

# refuse_settings_of_done RUN SETTINGS: settings of a run that is done would change nothing, and are not passed over.
refuse_settings_of_done() {
  local run=$1; shift
  [[ -e $run/DONE ]] && (($#)) || return 0
  local given; printf -v given ' %s' "$@"
  echo "error: $run is done, and$given would change nothing. Train another run beside it with name=mine, as the recipe's line" >&2
  echo "       'launch/local.sh 2 ...' does it; or begin again: rm -r $run" >&2
  exit 2
}

# train RUN SETTINGS: two processes train what SETTINGS say, unless that is done.
train() {
  local run=$1; shift
  [[ -e $run/DONE ]] || step launch/local.sh 2 "$@"
  [[ -e $run/DONE ]] || { echo "Stopped before the end; the same command goes on at the last checkpoint."; exit 130; }
}
