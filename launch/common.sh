# Sourced by the scripts beside it: settings from the environment, and commands that --dry-run only prints.

DRY_RUN=${DRY_RUN:-0}

fail() {
  echo "${0##*/}: $*" >&2
  exit 2
}

# need VARIABLE MEANING: stops unless the variable is set.
need() {
  [[ -n "${!1:-}" ]] || fail "set $1: $2"
}

# quoted WORD...: the words as a shell would read them again, without needless quotes.
quoted() {
  local word line=""
  for word in "$@"; do
    if [[ "$word" =~ ^[A-Za-z0-9_./:=@%+,~-]+$ ]]; then
      line+="$word "
    else
      line+="'${word//\'/\'\\\'\'}' "
    fi
  done
  printf '%s' "${line% }"
}

# run COMMAND...: prints the command, and runs it unless this is a dry run.
run() {
  printf '%s\n' "$(quoted "$@")"
  [[ "$DRY_RUN" == 1 ]] || "$@"
}

usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
}
