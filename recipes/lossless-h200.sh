#!/usr/bin/env bash
# Answers with the draft against the plain engine's on one H200:
# bash recipes/lossless-h200.sh DIR [PART ...], from the repository.
#
# Writes DIR/PART/lossless.json and .md K by K, and DIR/run.log with time stamps; ends with 1 where
# a difference is not explained. PARTs, without any m3 and demo:
#   m3         m3-8l in bf16: 64 prompts of 512 to 6144 random tokens, K 0, 1, 3, 7, scripted drafts
#              of which 70% are accepted, ~1 min after loading
#   invariant  m3 with --batch-invariant
#   demo       the demo pair in float32: 1,000 prompts, K 0 to 7, ~1 min
# EAGLERUN is the command; FLAGS are added to each. PROMPTS is a file of the demo's prompts, from
# eaglerun lossless --save-prompts FILE, where the packages of its chat template are missing.
set -u
dir=${1:?usage: $0 DIR [PART ...]}
shift
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(m3 demo)
read -ra eaglerun <<<"${EAGLERUN:-eaglerun}"
read -ra flags <<<"${FLAGS:-}"
mkdir -p "$dir"
failed=0

# compare NAME ARGUMENTS...: a process of its own, ended after five minutes.
compare() {
  local name=$1
  shift
  echo "== $name: ${eaglerun[*]} lossless $* ${flags[*]}" | tee -a "$dir/run.log"
  timeout --signal=INT --kill-after=10 300 \
    "${eaglerun[@]}" lossless "$@" "${flags[@]}" --out "$dir/$name" 2>&1 | tee -a "$dir/run.log"
  local code=${PIPESTATUS[0]}
  if [ "$code" -ne 0 ]; then
    echo "== $name ended with $code" | tee -a "$dir/run.log"
    failed=1
  fi
}

{
  date -u
  git rev-parse HEAD 2>/dev/null
  nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null
} | tee "$dir/run.log"
# One captured batch size: a capture costs more here than the padding.
m3=(--config m3-8l-h200 --prompts random --num-prompts 64 --input-lens 512,6144 --output-len 64
  --num-drafts 3,7,1,0 --acceptance 0.7 --decode-batch-sizes 64)
for part in "${parts[@]}"; do
  case $part in
    m3) compare m3 "${m3[@]}" ;;
    invariant) compare invariant "${m3[@]}" --batch-invariant ;;
    demo)
      compare demo --dtype float32 --prompts "${PROMPTS:-demo}" --num-prompts 1000 \
        --output-len 128 --num-drafts 3,7,1,5,2,4,6,0 --max-num-seqs 512 \
        --max-num-batched-tokens 16384 --decode-batch-sizes 64,512
      ;;
    *)
      echo "$part: allowed m3, invariant, demo"
      exit 2
      ;;
  esac
done
date -u | tee -a "$dir/run.log"
exit $failed
