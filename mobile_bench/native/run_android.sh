#!/usr/bin/env bash
# Measures a GGUF model on an Android phone or an ARM board: cross-builds stoker-bench, copies it and
# the model over, runs it, fetches the results and reports. Nothing is installed there.
set -euo pipefail
usage() {
  cat <<'HELP'
usage: mobile_bench/native/run_android.sh MODEL.gguf [options] [-- options of stoker-bench]

  --ssh HOST       a board over ssh instead of a phone over adb
  --serial S       which phone, as `adb devices` lists them
  --dir D          folder there [default: /data/local/tmp/stoker; over ssh: stoker-bench]
  --out F          results are appended here [default: results/<model>-<time>.jsonl]
  --report F.html  `stoker report` of the results
  --text F         text of the prompt [default: the one that `stoker bench` uses]
  --ids F          its token ids, for a tokenizer that stoker does not have
  --prompt N       tokens of it, at most [default: 512]
  --with "COMMAND" put before stoker-bench there, such as "taskset f0" for the big cores
  --binary F       stoker-bench for aarch64 [default: built by build_arm.sh]
  --python F       Python with stoker, for ids and report [default: .venv/bin/python, else python3]
  --remove         delete what was copied when done (a model stays otherwise, for the next time)
  --dry-run        show what would be done

Options after -- go to stoker-bench (its --help lists them), for instance
  mobile_bench/native/run_android.sh mixture.gguf -- --memory none,1GiB,500MB --tokens 128 --repeat 3
HELP
}
fail() { echo "run_android: $*" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$(dirname "$here")")
model='' host='' serial='' dir='' out='' report='' text='' ids='' prompt=512 with='' binary='' python=''
remove=false dry=false
bench=(--prompts 16,64,256,512)
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --remove) remove=true ;;
    --dry-run) dry=true ;;
    --ssh | --serial | --dir | --out | --report | --text | --ids | --prompt | --with | --binary | --python)
      [ $# -ge 2 ] || fail "$1: expected a value"
      case $1 in
        --ssh) host=$2 ;;
        --serial) serial=$2 ;;
        --dir) dir=$2 ;;
        --out) out=$2 ;;
        --report) report=$2 ;;
        --text) text=$2 ;;
        --ids) ids=$2 ;;
        --prompt) prompt=$2 ;;
        --with) with=$2 ;;
        --binary) binary=$2 ;;
        --python) python=$2 ;;
      esac
      shift ;;
    --) shift; bench+=("$@"); break ;;
    -*) fail "$1: no such option (--help lists them; those of stoker-bench go after --)" ;;
    *) [ -z "$model" ] || fail "expected one model, found $1 as well"; model=$1 ;;
  esac
  shift
done
[ -n "$model" ] || { usage >&2; exit 2; }
[ -f "$model" ] || fail "$model: no such file"
[ -z "$host" ] || [ -z "$serial" ] || fail "give --ssh or --serial, not both"
[ -z "$ids" ] || [ -z "$text" ] || fail "give --ids or --text, not both"
[[ $prompt =~ ^[1-9][0-9]{0,6}$ ]] || fail "--prompt: expected a number of tokens, found $prompt"
for given in "$text" "$ids" "$binary"; do
  [ -z "$given" ] || [ -f "$given" ] || fail "$given: no such file"
done
if [ -n "$host" ]; then tools='ssh scp'; else tools=adb; fi
for tool in $tools; do
  $dry || command -v "$tool" >/dev/null || fail "needs $tool (Android: apt-get install adb)"
done
if [ -z "$python" ]; then
  python=$root/.venv/bin/python
  [ -x "$python" ] || python=python3
fi
name=$(basename "$model")
[ -n "$out" ] || out=results/${name%.gguf}-$(date -u +%Y%m%dT%H%M%SZ).jsonl
if [ -n "$host" ]; then dir=${dir:-stoker-bench}; else dir=${dir:-/data/local/tmp/stoker}; fi
# All files of a sharded model.
files=("$model")
if [[ $model =~ ^(.*)-00001-of-([0-9]{5})\.gguf$ ]]; then
  files=("${BASH_REMATCH[1]}"-*-of-"${BASH_REMATCH[2]}".gguf)
fi

quoted() { printf "'%s'" "${1//\'/\'\\\'\'}"; }
exec 3>&1
show() { local word; for word in "$@"; do printf '%s ' "$(quoted "$word")" >&3; done; echo >&3; }
do_it() { if $dry; then show "$@"; else "$@"; fi; }
adb_there() { do_it adb ${serial:+-s "$serial"} "$@" </dev/null; }
there() {  # a command for the shell there
  if [ -n "$host" ]; then do_it ssh "$host" "$1" </dev/null; else adb_there shell "$1"; fi
}
put() {
  if [ -n "$host" ]; then do_it scp -q "$1" "$host:$2"; else adb_there push "$1" "$2" >&2; fi
}
fetch() {
  if [ -n "$host" ]; then do_it scp -q "$host:$1" "$2"; else adb_there pull "$1" "$2" >&2; fi
}
size_there() {
  $dry || there "stat -c %s $(quoted "$dir/$1") 2>/dev/null || echo none" | tr -d '\r'
}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ -z "$binary" ]; then
  binary=${STOKER_ARM_BUILD:-$root/build/aarch64}/stoker-bench
  do_it bash "$here/build_arm.sh" >&2
fi
if [ -z "$ids" ]; then
  ids=$work/ids
  do_it "$python" -c '
import sys
from pathlib import Path
model, n, text, out = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
if text:
    from stoker.runtime._core import GgufFile
    from stoker.runtime.text.tokenizer import Tokenizer
    found = Tokenizer.from_metadata(GgufFile(str(model)).get).encode(Path(text).read_text())[:n]
else:
    from stoker.mobile_bench.run.prompt_ids import prompt_ids
    found = prompt_ids(model, n)
out.write_text(" ".join(map(str, found)) + "\n")
' "$model" "$prompt" "$text" "$ids"
fi

there "mkdir -p $(quoted "$dir")"
put "$binary" "$dir/stoker-bench"
there "chmod 755 $(quoted "$dir/stoker-bench")"
put "$ids" "$dir/ids"
for file in "${files[@]}"; do
  if [ "$(size_there "$(basename "$file")")" = "$(stat -c %s "$file")" ]; then
    echo "$(basename "$file"): there already" >&2
  else
    put "$file" "$dir/$(basename "$file")"
  fi
done
command="cd $(quoted "$dir") && rm -f results.jsonl && $with ./stoker-bench $(quoted "$name")"
command+=" --ids-file ids --out results.jsonl"
for word in "${bench[@]}"; do command+=" $(quoted "$word")"; done
status=0
there "$command" || status=$?
do_it mkdir -p "$(dirname "$out")"
if fetch "$dir/results.jsonl" "$work/results.jsonl" && ! $dry; then
  cat "$work/results.jsonl" >>"$out"
  echo "$out"
elif ! $dry; then
  fail "no results: stoker-bench ended with exit code $status"
fi
gone="$(quoted "$dir/results.jsonl") $(quoted "$dir/ids")"
if $remove; then
  gone+=" $(quoted "$dir/stoker-bench")"
  for file in "${files[@]}"; do gone+=" $(quoted "$dir/$(basename "$file")")"; done
  there "rm -f $gone && rmdir $(quoted "$dir") 2>/dev/null || true"  # others' files stay
else
  there "rm -f $gone"
fi
if [ -n "$report" ]; then
  do_it "$python" -c 'import sys; from stoker.runtime.cli.main import main; sys.exit(main())' \
    report "$out" --out "$report"
fi
exit "$status"
