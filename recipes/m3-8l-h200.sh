#!/usr/bin/env bash
# The numbers of m3-8l-h200.md: bash recipes/m3-8l-h200.sh DIR [PART ...], from the repository.
#
# Writes DIR/PART/*.json and *.md row by row, DIR/run.log with time stamps, DIR/tables.md at the end.
# PARTs, in the order of their worth; without any all but the last two:
#   gqa      latency, fill, profile, contexts, prefill and throughput with the GQA draft, ~4 min
#   mha      latency with the MHA draft, ~1 min
#   fp8      decode steps at the longest context with KV and index keys in fp8, ~1 min
#   kernels  every kernel alone, ~2 min
#   waves    a fresh server's users over HTTP, with the GQA draft, ~4 min
#   invariant  latency and prefill with the GQA draft and --batch-invariant, ~1 min
#   apart    latency and profile with the GQA draft and --no-overlap-kernels, beside gqa's, ~1 min
# EAGLERUN is the command; on a small machine, PRESET is another preset, FLAGS are added to each
# command and LONGEST is fp8's context.
set -u
dir=${1:?usage: $0 DIR [PART ...]}
shift
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(gqa mha fp8 kernels waves)
read -ra eaglerun <<<"${EAGLERUN:-eaglerun}"
read -ra flags <<<"${FLAGS:-}"
preset=${PRESET:-m3-8l-h200}
peaks=(--bandwidth-gb-s 4350 --tflops 790)
mkdir -p "$dir"
failed=0

# measure NAME SECONDS ARGUMENTS...: a process of its own, ended after so long.
measure() {
  local name=$1 limit=$2
  shift 2
  echo "== $name: ${eaglerun[*]} bench $* ${flags[*]}" | tee -a "$dir/run.log"
  timeout --signal=INT --kill-after=10 "$limit" \
    "${eaglerun[@]}" bench "$@" "${flags[@]}" --out "$dir/$name" 2>&1 | tee -a "$dir/run.log"
  local code=${PIPESTATUS[0]}
  if [ "$code" -ne 0 ]; then
    echo "== $name ended with $code" | tee -a "$dir/run.log"
    failed=1
  fi
}

{
  date -u
  git rev-parse HEAD 2>/dev/null
  nvidia-smi --query-gpu=name,driver_version,clocks.max.sm --format=csv,noheader 2>/dev/null
} | tee "$dir/run.log"
for part in "${parts[@]}"; do
  case $part in
    gqa)
      measure gqa 330 latency,fill,profile,contexts,prefill,throughput --config "$preset" \
        "${peaks[@]}" --budget-s 300
      ;;
    mha)
      measure mha 120 latency --config "$preset-mha" --num-drafts 3 "${peaks[@]}"
      ;;
    fp8)
      measure fp8 120 contexts --config "$preset" --kv-cache-dtype fp8 --index-cache-dtype fp8 \
        --context "${LONGEST:-131072}" --concurrency 8 --concurrency 32 "${peaks[@]}"
      ;;
    kernels) measure kernels 240 kernels ;;
    waves) measure waves 480 waves --config "$preset" --budget-s 420 ;;
    apart)
      measure apart 120 latency,profile --config "$preset" --no-overlap-kernels "${peaks[@]}"
      ;;
    invariant)
      measure invariant 120 latency,prefill --config "$preset" --batch-invariant "${peaks[@]}"
      ;;
    *)
      echo "$part: allowed gqa, mha, fp8, kernels, waves, invariant, apart"
      exit 2
      ;;
  esac
done
date -u | tee -a "$dir/run.log"
for table in "$dir"/*/*.md; do
  printf '### %s\n\n' "${table#"$dir/"}"
  cat "$table"
  echo
done >"$dir/tables.md"
exit $failed
