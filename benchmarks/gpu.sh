#!/usr/bin/env bash
# Everything that needs a GPU, in calls of at most 10 minutes and without a network:
#
#     benchmarks/gpu.sh OUT [DEVICE] [kernels|t5|llama|bases|decode|trajectory]
#
# In this order while time lasts; the first three take up to ten minutes each. What a part measures is in OUT as soon as
# it is known: one that fails, or that its time is up for, costs no other.
#
# kernels (the default): correctness of every kernel on the device, microbenchmarks, the regression gate (its self-test,
# and against a recorded result of the same GPU, torch and triton), and where ncu runs what limits each kernel. Writes
# JSON, tables and the roofline plot to OUT. Needs torch, triton, pytest and hypothesis; a plain checkout will do. The
# static contract needs no GPU: python -m benchmarks.contract.
#
# t5: that recorded passes and layers give what launched and plain ones give, on tiny models; torch's attention and
# cuDNN's by themselves; then rounds of training (benchmarks.train_step) with M = 4 and M = 1 at the shapes of T5-large
# and FLAN-T5-XL by transformers' Trainer, by kif with bookkeeping tensor by tensor, with recorded passes, with cuDNN's
# attention; T5-large with rows of 64 to 512 tokens. Needs transformers and peft, the tests pytest and hypothesis, the
# Trainer accelerate too. Everywhere dropout is that of Appendix D but for the trajectory.
#
# llama: the same for LLaMA-2 7B, and 13B with 4 rows, with liger-kernel where it is installed.
#
# bases: the memory that LLaMA-2 7B takes in bf16, in 8 and in 4 bits, where bitsandbytes is installed; writes 13 GB to
# TMPDIR for a while.
#
# decode: short answers with a static cache, for which transformers compiles the decoding step; ranking of labels.
#
# trajectory: losses of T5-large over 200 steps, recorded in bf16 and by the plain path.
#
# DEVICE=cpu tries the script itself on a machine without a GPU, with tiny sizes.
set -uo pipefail
out=${1:?usage: benchmarks/gpu.sh OUT [DEVICE]}
device=${2:-cuda} part=${3:-kernels}
case $part in
  kernels | t5 | llama | bases | decode | trajectory) ;;
  *) echo "there is no part $part" >&2 && exit 2 ;;
esac
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."
# what was printed when the time is up shall be in the file
export PYTHONUNBUFFERED=1
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

if [ "$device" = cpu ]; then
  tests=(env KIF_BACKEND=interpret TRITON_INTERPRET=1 "$python" -m pytest -q -x tests/kernel_tests/test_fuse.py)
  sets=tiny budget=40 gate_options=(--sets tiny --rounds 2 --budget 20)
  profile=false
else
  "$python" -c "import torch; assert torch.cuda.is_available(), 'torch finds no GPU'" || exit 1
  tests=("$python" -m pytest -v tests/kernel_tests)
  # most of the time goes into compiling, which takes one core for each process
  "$python" -c "import xdist" 2>/dev/null && tests+=(-n "$(($(nproc) < 12 ? $(nproc) : 12))")
  sets=t5-large,256M,llama2-7b-all,llama2-7b,llama2-13b,1B budget=130 gate_options=(--rounds 2 --budget 10)
  profile=true
fi

finish() {
  if [ ${#failed[@]} -gt 0 ]; then
    echo "FAILED: ${failed[*]}"
    exit 1
  fi
  echo "all of it worked; results in $out"
  exit 0
}

step() {
  lines=12 stage "steps-$1" "$2" "$python" -m benchmarks.train_step --device "$device" --json "$out/steps-$1.json" "${@:3}"
  # of what worked the JSON says it all; few files come back from a machine that is lent
  case " ${failed[*]-} " in *" steps-$1 "*) ;; *) rm "$out/steps-$1.txt" ;; esac
}

real=(--precision bf16 --dropout)
both=("${real[@]}" --outer-steps 4 1)

if [ "$part" = t5 ]; then
  if [ "$device" = cpu ]; then
    stage paths 120 "$python" -m pytest -q tests/test_captured.py -k "few_shapes or gpu"
    stage attention 60 "$python" -m benchmarks.attention --device cpu --rows 2 --widths 64 72 --seconds 0.05 --json "$out/attention.json"
    step t5 120 --model tiny-t5 "${both[@]}" --length 32 --rounds 2 --profile --contenders trainer kif-bf16
  else
    stage paths 70 "$python" -m pytest -v tests/test_captured.py tests/test_layers.py -k gpu
    lines=34 stage attention 50 "$python" -m benchmarks.attention --json "$out/attention.json"
    step t5-large 210 --model t5-large "${both[@]}" --profile \
      --contenders trainer kif-bf16-graph kif-bf16-cudnn-graph per-tensor
    step flan-t5-xl 190 --model flan-t5-xl "${both[@]}" --rounds 2 --contenders trainer kif-bf16-graph per-tensor
    step t5-large-lengths 75 --model t5-large "${real[@]}" --shortest 64 --contenders kif-bf16-graph trainer
  fi
  finish
fi

if [ "$part" = llama ]; then
  if [ "$device" = cpu ]; then
    step llama 120 --model tiny-llama "${both[@]}" --length 32 --shortest 8 --rounds 2 --contenders trainer kif-bf16-cudnn
  else
    best=kif-bf16
    "$python" -c "import liger_kernel" 2>/dev/null && best=kif-bf16-liger
    step llama2-7b 270 --model llama2-7b "${both[@]}" --rounds 2 --profile \
      --contenders trainer $best $best-graph $best-cudnn-graph per-tensor
    step llama2-13b 160 --model llama2-13b "${both[@]}" --batch 4 --rounds 2 --contenders trainer $best-graph per-tensor
    step llama2-7b-lengths 90 --model llama2-7b "${real[@]}" --shortest 64 --rounds 2 --contenders $best-graph trainer
  fi
  finish
fi

if [ "$part" = trajectory ]; then
  if [ "$device" = cpu ]; then
    step trajectory 60 --model tiny-t5 --length 16 --batch 2 --trajectory 48
  else
    step trajectory 90 --model t5-large --precision bf16 --length 128 --trajectory 200 --contenders kif-bf16-graph
  fi
  finish
fi

if [ "$part" = bases ]; then
  if [ "$device" = cpu ]; then
    shape=tiny-llama options=(--rows 2 --length 16)
  else
    shape=llama2-7b options=(--rows 8 --length 512)
  fi
  lines=5 stage bases 280 "$python" -m benchmarks.memory --shape "$shape" --forms bf16 int8 nf4 --device "$device" \
    "${options[@]}" --json "$out/bases.json"
  finish
fi

if [ "$part" = decode ]; then
  if [ "$device" = cpu ]; then
    lines=3 stage decode 100 "$python" -m benchmarks.decode --device cpu --length 32 --repeats 2 --json "$out/decode.json"
  else
    for model in t5-large llama2-7b; do
      lines=3 stage "decode-$model" 120 "$python" -m benchmarks.decode --model "$model" --precision bf16 --json "$out/decode-$model.json"
    done
  fi
  finish
fi

stage correctness 110 "${tests[@]}"
lines=60 stage kernels $((budget + 80)) "$python" -m benchmarks.kernels --device "$device" --sets "$sets" \
  --variants bf16 --budget "$budget" --quiet --json "$out/kernels.json" --plot "$out/roofline.png"

recorded=
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
lines=16 stage gate 170 "$python" -m benchmarks.gate self-test --device "$device" "${gate_options[@]}"

if $profile && command -v ncu >/dev/null; then
  lines=40 stage limits 45 ncu --clock-control none --csv --page raw --kernel-name regex:_kernel \
    --metrics gpu__time_duration.sum,dram__bytes.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed,sm__throughput.avg.pct_of_peak_sustained_elapsed,launch__registers_per_thread,sm__warps_active.avg.pct_of_peak_sustained_active \
    "$python" -m benchmarks.profile_round --elements 67108864
fi

finish
