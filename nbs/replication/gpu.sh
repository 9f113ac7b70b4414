#!/usr/bin/env bash
# CIFAR-10 on a GPU that is there for minutes: every stage takes a time limit, keeps what it has, and goes on where it stopped.
#
#   gpu.sh measure OUT                       speed against the reference's arithmetic, WRN-28-10 and 28-4 (6 minutes)
#   gpu.sh pace    OUT RUNS SYSTEM           images a second of a training, and the epochs that fit into BUDGET minutes (1 minute)
#   gpu.sh train   OUT RUNS SYSTEM EPOCHS    train, at most MINUTES; exit code 3: not finished, the same command goes on
#   gpu.sh sample  OUT RUNS SYSTEM           10,000 samples a row, at most MINUTES for all; 3 as above
#   gpu.sh judge   OUT RUNS SYSTEM           accuracy, PGD, sample scores; EXTRACTOR names the features
#   gpu.sh table   OUT RUNS                  Table 1 and figures
#   gpu.sh trunk   OUT FILE                  a copy of a TorchScript file for an older PyTorch, which refuses scripts that name an operator it lacks
#
# RUNS keeps the run folders while the machine is held; OUT is what is brought back, each file under 16 MiB.
# ROBUST_JEM_DATA is the folder with cifar10/{train,test}/<class>/*. A dry run anywhere, in a few minutes on a CPU:
#   PRESET=cifar10-cpu SMALL="--depth 10 --width 1 --batch-size 16" MINUTES=0.3 BUDGET=1 DEVICE=cpu gpu.sh pace out runs robust_jem
set -euo pipefail
stage=${1:?measure, pace, train, sample, judge, table or trunk}; out=${2:?a folder for what is brought back}; runs=${3:-runs}; system=${4:-robust_jem}
minutes=${MINUTES:-8.5}; budget=${BUDGET:-25}; preset=${PRESET:-h100}; device=${DEVICE:-auto}; seed=${SEED:-0}; small=(${SMALL:-})
jem() { ${PYTHON:-python3} -m robust_jem.app.cli "$@"; }
run=$runs/$system-s$seed; mkdir -p "$out"
common=(--system "$system" --dataset cifar10 --preset "$preset" --seed "$seed" --device "$device" "${small[@]}")
export PYTHONUNBUFFERED=1

bring_back() {                                   # weights in two bytes each, and all that is small
  ${PYTHON:-python3} - "$run" "$out/$system-s$seed" <<'P'
import shutil, sys
from pathlib import Path
import torch
from robust_jem.engine.sample import RobustJEM
run, out = map(Path, sys.argv[1:])
out.mkdir(parents=True, exist_ok=True)
for file in ("config.json", "summary.json", "metrics.jsonl"):
    if (run / file).exists(): shutil.copy(run / file, out / file.replace("config", "train"))
if (run / "model.safetensors").exists(): RobustJEM.from_run(run).save_pretrained(out / "pretrained", torch.bfloat16, prior=False)
if (run / "scores").exists(): shutil.copytree(run / "scores", out / "scores", dirs_exist_ok=True)
P
}

case $stage in
  measure)
    jem benchmark --depth 28 --width 10 --batches 64 256 --policies bfloat16/off bfloat16/default bfloat16/max-autotune --repeats 3 --no-growth --device "$device" --max-minutes 5 --out "$out/wrn-28-10" ${MEASURE:-}
    jem benchmark --depth 28 --width 4 --batches 256 --policies bfloat16/default --repeats 3 --device "$device" --max-minutes 2 --out "$out/wrn-28-4" ${MEASURE:-} ;;
  pace)
    code=0; rm -rf "$runs/pace"; jem train "${common[@]}" --out "$runs/pace" --epochs 1000 --log-every 5 --max-minutes "${PACE:-1}" || code=$?
    [ $code -eq 3 ] || { echo "expected the time limit (3), got $code" >&2; exit 1; }
    ${PYTHON:-python3} - "$runs/pace" "$budget" "$out/pace-$system.json" <<'P'
import json, sys
from robust_jem.core.files import read_tensors
from robust_jem.core.images import load_images
from robust_jem.engine.runs import Run
run, budget, out = Run(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
rows = [r for r in run.metrics() if "loss" in r]
meta = read_tensors(run.checkpoints()[0])[1]
rate = meta["step"] * run.config.batch_size / meta["seconds"]
images = len(load_images("cifar10", run.config.root or None).train_x)
found = {"updates": meta["step"], "seconds": meta["seconds"], "images a second": round(rate, 1), "compilation included": True, "epochs in budget": int(rate * budget * 60 / images), "last": rows[-1] if rows else {}}
open(out, "w").write(json.dumps(found, indent=1)); print(json.dumps(found, indent=1))
P
    ;;
  train)
    code=0; jem train "${common[@]}" --out "$run" --epochs "${5:?epochs, as pace found}" --max-minutes "$minutes" || code=$?
    bring_back; tail -n 1 "$run/metrics.jsonl"
    [ $code -eq 0 ] && echo "trained" || { [ $code -ne 3 ] || echo "not finished: run the same command again"; exit $code; } ;;
  sample)
    case $system in robust_classifier) methods=(attack) ;; jempp) methods=(energy) ;; *) methods=(energy combined attack) ;; esac
    for s in ${SAMPLING_SEEDS:-0 1 2}; do for m in "${methods[@]}"; do
      left=$(awk "BEGIN { left = $minutes - $SECONDS / 60; print (left > 0.1 ? left : 0.1) }")
      jem generate "$run" --method "$m" --seed "$s" --name "$([ "$s" = 0 ] && echo "$m" || echo "$m-seed$s")" --device "$device" --max-minutes "$left" ${SAMPLES:-}
    done; done ;;
  judge)
    code=0; jem evaluate "$run" --extractor "${EXTRACTOR:?a path to a TorchScript file, or inception; +efficientnet-lite0 for the score}" --device "$device" --max-minutes "$minutes" ${JUDGE:-} || code=$?
    [ $code -eq 0 ] || [ $code -eq 3 ] || exit $code
    bring_back; exit $code ;;
  table) jem report --runs "$runs" --figures "$out/figures" ;;
  trunk)                                         # Inception resizes by bilinear interpolation; the branch for Lanczos, in scripts of PyTorch 2.14, is never taken
    ${PYTHON:-python3} - "${3:?a TorchScript file}" "$out/$(basename "$3")" <<'P'
import os, sys, zipfile
if os.path.realpath(sys.argv[1]) == os.path.realpath(sys.argv[2]): sys.exit(f"gpu.sh trunk: OUT is the folder of {sys.argv[1]}, which would be overwritten; name another folder")
old, new = b"torch._upsample_lanczos2d_aa(", b"torch._upsample_bicubic2d_aa("
with zipfile.ZipFile(sys.argv[1]) as source, zipfile.ZipFile(sys.argv[2], "w", zipfile.ZIP_STORED) as target:
    found = 0
    for name in source.namelist():
        data = source.read(name)
        found += data.count(old) if name.endswith(".py") else 0
        target.writestr(name, data.replace(old, new) if name.endswith(".py") else data)
print(f"{sys.argv[2]}: {found} calls replaced")
P
    ;;
  *) echo "gpu.sh: $stage is unknown; accepted: measure, pace, train, sample, judge, table, trunk" >&2; exit 2 ;;
esac
