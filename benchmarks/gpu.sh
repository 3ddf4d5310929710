#!/usr/bin/env bash
# Everything that needs a GPU, in parts, each with a limit to its time, and without a network:
#
#     benchmarks/gpu.sh OUT [DEVICE] [PART...]
#
# What a part measures is in OUT as soon as it is known: one that fails, or that its time is up for, costs no other.
#
# correctness (190 s): every kernel on the device against its plain definition; where peft is installed, recorded passes
# and layers against launched and plain ones. Nothing is timed, so that it can run beside `bases`.
#
# kernels (455 s): microbenchmarks, the regression gate (its self-test, and against a recorded result of the same GPU,
# torch and triton), and where ncu runs what limits each kernel. Writes JSON, tables and the roofline plot. These two are
# what runs by default. They need torch, triton, pytest and hypothesis; a plain checkout will do. The static contract
# needs no GPU: python -m benchmarks.contract.
#
# t5 (400 s): rounds of training (benchmarks.train_step) with M = 4 and M = 1 at the shapes of T5-large and FLAN-T5-XL by
# transformers' Trainer, by kif with bookkeeping tensor by tensor, and with recorded passes. Needs transformers and peft,
# the Trainer accelerate too. Everywhere dropout is that of Appendix D but for the trajectory.
#
# llama (460 s): the same for LLaMA-2 7B, and 13B with 4 rows, with liger-kernel where it is installed; 7B also launched
# with cuDNN's attention and recorded without it.
#
# lengths (165 s): T5-large and LLaMA-2 7B with rows of 64 to 512 tokens.
#
# attention (60 s): torch's attention and cuDNN's by themselves, time, error and dropout.
#
# bases (400 s): the memory that LLaMA-2 7B and 13B take in bf16, in 8 and in 4 bits, where bitsandbytes is installed;
# writes 26 GB to TMPDIR for a while.
#
# decode (240 s): short answers with a static cache, for which transformers compiles the decoding step; ranking of labels.
#
# trajectory (90 s): losses of T5-large over 200 steps, recorded in bf16 and by the plain path.
#
# DEVICE=cpu tries the script itself on a machine without a GPU, with tiny sizes.
set -uo pipefail
out=${1:?usage: benchmarks/gpu.sh OUT [DEVICE] [PART...]}
device=${2:-cuda}
parts=("${@:3}")
[ ${#parts[@]} -gt 0 ] || parts=(correctness kernels)
for part in "${parts[@]}"; do
  case $part in
    correctness | kernels | t5 | llama | lengths | attention | bases | decode | trajectory) ;;
    *) echo "there is no part $part" >&2 && exit 2 ;;
  esac
done
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."
# what was printed when the time is up shall be in the file
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
python=${PYTHON:-python3}
failed=()

# name, seconds allowed, command; what is printed goes to OUT/name.txt, its end to the terminal
stage() {
  local name=$1 limit=$2 begun=$SECONDS
  shift 2
  timeout "$limit" "$@" >"$out/$name.txt" 2>&1
  local status=$?
  [ $status -eq 0 ] || failed+=("$name ($status)")
  echo "== $name: status $status, $((SECONDS - begun)) s"
  tail -n "${lines:-4}" "$out/$name.txt"
}

step() {
  lines=12 stage "steps-$1" "$2" "$python" -m benchmarks.train_step --device "$device" --json "$out/steps-$1.json" "${@:3}"
  # of what worked the JSON says it all; few files come back from a machine that is lent
  case " ${failed[*]-} " in *" steps-$1 "*) ;; *) rm "$out/steps-$1.txt" ;; esac
}

has() { "$python" -c "import sys, importlib.util as u; sys.exit(u.find_spec('$1') is None)"; }

tiny() { [ "$device" = cpu ]; }

real=(--precision bf16 --dropout)
both=("${real[@]}" --outer-steps 4 1)

if ! tiny; then
  "$python" -c "import torch; assert torch.cuda.is_available(), 'torch finds no GPU'" || exit 1
fi

# kif's best launched contender of a decoder
decoder() { has liger_kernel && echo kif-bf16-liger || echo kif-bf16; }

correctness() {
  if tiny; then
    stage correctness 200 env KIF_BACKEND=interpret TRITON_INTERPRET=1 \
      "$python" -m pytest -q -x tests/kernel_tests/test_fuse.py
    stage paths 120 "$python" -m pytest -q tests/test_captured.py -k "few_shapes or gpu or cuda"
    return
  fi
  local parallel=()
  # most of the time goes into compiling, which takes one core for each process
  has xdist && parallel=(-n "$(($(nproc) < 12 ? $(nproc) : 12))")
  stage correctness 120 "$python" -m pytest -v tests/kernel_tests "${parallel[@]}"
  has peft || { echo "== paths: left out, peft is not installed" && return; }
  stage paths 70 "$python" -m pytest -v tests/test_captured.py tests/test_layers.py -k 'gpu or cuda'
}

kernels() {
  local sets=tiny budget=40 gate=(--sets tiny --rounds 2 --budget 20)
  if ! tiny; then
    sets=t5-large,256M,llama2-7b-all,llama2-7b,llama2-13b,1B budget=130 gate=(--rounds 2 --budget 10)
  fi
  lines=60 stage kernels $((budget + 80)) "$python" -m benchmarks.kernels --device "$device" --sets "$sets" \
    --variants bf16 --budget "$budget" --quiet --json "$out/kernels.json" --plot "$out/roofline.png"
  if ! tiny && command -v ncu >/dev/null; then
    lines=40 stage limits 45 ncu --clock-control none --csv --page raw --kernel-name regex:_kernel \
      --metrics gpu__time_duration.sum,dram__bytes.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed,sm__throughput.avg.pct_of_peak_sustained_elapsed,launch__registers_per_thread,sm__warps_active.avg.pct_of_peak_sustained_active \
      "$python" -m benchmarks.profile_round --elements 67108864
  fi
  local recorded= file
  for file in benchmarks/results/kernels-*.json; do
    [ -f "$file" ] && [ -f "$out/kernels.json" ] || continue
    "$python" -m benchmarks.gate compare "$file" "$out/kernels.json" >"$out/gate-recorded.txt" 2>&1
    # 2: another GPU, torch or triton
    [ $? -eq 2 ] || { recorded=$file; break; }
  done
  if [ -n "$recorded" ]; then
    lines=20 stage gate-recorded 30 "$python" -m benchmarks.gate compare "$recorded" "$out/kernels.json"
  else
    echo "== gate-recorded: no result of this GPU, torch and triton is recorded"
  fi
  lines=16 stage gate 170 "$python" -m benchmarks.gate self-test --device "$device" "${gate[@]}"
}

t5() {
  if tiny; then
    step t5 120 --model tiny-t5 "${both[@]}" --length 32 --rounds 2 --profile --contenders trainer kif-bf16
    return
  fi
  step t5-large 210 --model t5-large "${both[@]}" --profile \
    --contenders trainer kif-bf16-graph per-tensor
  step flan-t5-xl 190 --model flan-t5-xl "${both[@]}" --rounds 2 --contenders trainer kif-bf16-graph per-tensor
}

llama() {
  if tiny; then
    step llama 120 --model tiny-llama "${both[@]}" --length 32 --rounds 2 --contenders trainer kif-bf16-cudnn
    return
  fi
  local best
  best=$(decoder)
  step llama2-7b 300 --model llama2-7b "${both[@]}" --rounds 2 --profile \
    --contenders trainer $best $best-cudnn $best-graph $best-own-graph per-tensor
  step llama2-13b 160 --model llama2-13b "${both[@]}" --batch 4 --rounds 2 --contenders trainer $best-graph per-tensor
}

lengths() {
  if tiny; then
    step lengths 120 --model tiny-llama "${real[@]}" --length 32 --shortest 8 --rounds 2 --contenders kif-bf16
    return
  fi
  step llama2-7b-lengths 90 --model llama2-7b "${real[@]}" --shortest 64 --rounds 2 --contenders "$(decoder)-graph" trainer
  step t5-large-lengths 75 --model t5-large "${real[@]}" --shortest 64 --contenders kif-bf16-graph trainer
}

attention() {
  local options=()
  tiny && options=(--device cpu --rows 2 --widths 64 72 --seconds 0.05)
  lines=49 stage attention 60 "$python" -m benchmarks.attention "${options[@]}" --json "$out/attention.json"
}

bases() {
  if tiny; then
    lines=5 stage bases 280 "$python" -m benchmarks.memory --shape tiny-llama --forms bf16 int8 nf4 --device cpu \
      --rows 2 --length 16 --json "$out/bases.json"
    return
  fi
  local rows=8
  for shape in llama2-7b llama2-13b; do
    lines=5 stage "bases-$shape" 200 "$python" -m benchmarks.memory --shape $shape --forms nf4 int8 bf16 \
      --device "$device" --rows $rows --length 512 --json "$out/bases-$shape.json"
    rows=4
  done
}

decode() {
  if tiny; then
    lines=4 stage decode 100 "$python" -m benchmarks.decode --device cpu --length 32 --repeats 2 --json "$out/decode.json"
    return
  fi
  for model in t5-large llama2-7b; do
    lines=4 stage "decode-$model" 120 "$python" -m benchmarks.decode --model "$model" --precision bf16 --json "$out/decode-$model.json"
  done
}

trajectory() {
  if tiny; then
    step trajectory 60 --model tiny-t5 --length 16 --batch 2 --trajectory 48
    return
  fi
  step trajectory 90 --model t5-large --precision bf16 --length 128 --trajectory 200 --contenders kif-bf16-graph
}

for part in "${parts[@]}"; do
  $part
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "FAILED: ${failed[*]}"
  exit 1
fi
echo "all of it worked; results in $out"
