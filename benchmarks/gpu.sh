#!/usr/bin/env bash
# Everything that needs a GPU, in calls of at most 10 minutes and without a network:
#
#     benchmarks/gpu.sh OUT [DEVICE] [kernels|graphs|steps|shapes|compile|decode]
#
# In this order while time lasts; the first three take about 25 minutes. What a part measures is in OUT as soon as it is
# known: one that fails, or that its time is up for, costs no other.
#
# kernels (the default): correctness of every kernel on the device, microbenchmarks, the regression gate (its self-test,
# and against a recorded result of the same GPU, torch and triton), and where ncu runs what limits each kernel. Writes
# JSON, tables and the roofline plot to OUT. Needs torch, triton, pytest and hypothesis; a plain checkout will do. The
# static contract needs no GPU: python -m benchmarks.contract.
#
# graphs: that recorded passes are the launched ones, on tiny models; then rounds of training (benchmarks.train_step) at
# the shapes of T5-large and LLaMA-2 7B by transformers' Trainer, by kif, with the adapter's products in bf16, with
# passes replayed as CUDA graphs, with norms as single operations, with liger-kernel where it is installed, with gradient
# checkpointing. Needs transformers and peft, the tests pytest and hypothesis, the Trainer accelerate too.
#
# steps: the same rounds against the Trainer and per-tensor bookkeeping, and the loss trajectory of the last two.
#
# shapes: FLAN-T5-XL, and LLaMA-2 13B with 4 rows. Everywhere dropout is that of Appendix D but for the trajectories.
#
# compile: T5-large with torch.compile inside the graphs, which takes minutes to trace. decode: short answers with a
# static cache, for which transformers compiles the decoding step.
#
# DEVICE=cpu tries the script itself on a machine without a GPU, with tiny sizes.
set -uo pipefail
out=${1:?usage: benchmarks/gpu.sh OUT [DEVICE]}
device=${2:-cuda} part=${3:-kernels}
case $part in
  kernels | graphs | steps | shapes | compile | decode) ;;
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
  "$python" -c "import xdist" 2>/dev/null && tests+=(-n "$(($(nproc) < 8 ? $(nproc) : 8))")
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
  lines=8 stage "steps-$1" "$2" "$python" -m benchmarks.train_step --device "$device" --json "$out/steps-$1.json" "${@:3}"
}

real=(--precision bf16 --dropout)

if [ "$part" = graphs ]; then
  if [ "$device" = cpu ]; then
    stage captured 120 "$python" -m pytest -q tests/test_captured.py -k "few_shapes or gpu"
    step graphs 120 --model tiny-t5 --precision bf16 --length 32 --rounds 2 --contenders kif kif-bf16
  else
    liger=()
    "$python" -c "import liger_kernel" 2>/dev/null && liger=(kif-bf16-liger kif-bf16-liger-graph)
    stage captured 60 "$python" -m pytest -v tests/test_captured.py -k gpu
    step graphs 160 --model t5-large "${real[@]}" --rounds 5 --contenders \
      trainer kif-bf16-graph kif kif-bf16 kif-bf16-norm-graph
    step graphs-trajectory 90 --model t5-large --precision bf16 --length 128 --trajectory 200 --contenders kif-bf16-graph
    step llama2-7b-graphs 260 --model llama2-7b "${real[@]}" --rounds 2 --contenders \
      trainer kif-bf16-graph kif-bf16 kif-bf16-norm-graph "${liger[@]}" kif kif-checkpointing
  fi
  finish
fi

if [ "$part" = steps ]; then
  if [ "$device" = cpu ]; then
    step tiny-t5 60 --model tiny-t5 --length 32 --rounds 2
    step trajectory 60 --model tiny-t5 --length 16 --batch 2 --trajectory 48
  else
    step t5-large 150 --model t5-large "${real[@]}" --turns 2
    step t5-large-m1 90 --model t5-large "${real[@]}" --outer-steps 1 --contenders per-tensor kif
    step trajectory 90 --model t5-large --precision fp32 --length 128 --trajectory 200
    step llama2-7b 140 --model llama2-7b "${real[@]}" --rounds 2
  fi
  finish
fi

if [ "$part" = shapes ]; then
  if [ "$device" = cpu ]; then
    step shapes 120 --model tiny-llama "${real[@]}" --outer-steps 1 --length 32 --rounds 2 --contenders trainer kif-bf16
  else
    step flan-t5-xl 220 --model flan-t5-xl "${real[@]}" --contenders trainer kif-bf16 kif-bf16-graph
    step llama2-13b 270 --model llama2-13b "${real[@]}" --batch 4 --rounds 2 --contenders trainer kif-bf16 kif-bf16-graph
  fi
  finish
fi

if [ "$part" = compile ]; then
  if [ "$device" = cpu ]; then
    step compile 300 --model tiny-t5 --precision bf16 --length 32 --rounds 2 --contenders kif kif-bf16 kif-bf16-compile
  else
    step compile 560 --model t5-large "${real[@]}" --contenders kif-bf16-graph kif-bf16-compile-graph
  fi
  finish
fi

if [ "$part" = decode ]; then
  if [ "$device" = cpu ]; then
    lines=3 stage decode 100 "$python" -m benchmarks.decode --device cpu --length 32 --repeats 2 --json "$out/decode.json"
  else
    for model in t5-large llama2-7b; do
      lines=3 stage "decode-$model" 270 "$python" -m benchmarks.decode --model "$model" --precision bf16 --json "$out/decode-$model.json"
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
