# Functions shared by the launch scripts: required settings, quoting, and commands that --dry-run only prints.

DRY_RUN=${DRY_RUN:-0}

fail() {
  echo "${0##*/}: $*" >&2
  exit 2
}

# need VARIABLE MEANING: fails unless the variable is set.
need() {
  [[ -n "${!1:-}" ]] || fail "set $1: $2"
}

# quoted WORD...: the words, quoted for a shell where necessary.
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

# run COMMAND...: prints the command and, unless this is a dry run, runs it.
run() {
  printf '%s\n' "$(quoted "$@")"
  [[ "$DRY_RUN" == 1 ]] || "$@"
}

usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
}
