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

# train RUN SETTINGS: two processes train what SETTINGS say, unless that is done.
train() {
  local run=$1; shift
  [[ -e $run/DONE ]] || step launch/local.sh 2 "$@"
  [[ -e $run/DONE ]] || { echo "Stopped before the end; the same command goes on at the last checkpoint."; exit 130; }
}
