#!/usr/bin/env bash
# Makes the shipped checkpoint of Prophet-Tabletop-v0 again: data, codec, denoiser, judge, evaluation.
# About three hours on two CPU cores; every step continues where it was interrupted.
set -euo pipefail
prophet=${PROPHET:-.venv/bin/prophet}
runs=${RUNS:-runs/tabletop}
resume() { [ -e "$1/checkpoints/last.pt" ] && echo --resume || true; }

"$prophet" record "$runs/data/codec" --episodes 1500 --seed 100000
"$prophet" record "$runs/data/train" --episodes 4843 --seed 0
"$prophet" record "$runs/data/train" --episodes 1500 --seed 100000
"$prophet" record "$runs/data/val" --episodes 400 --seed 1000000

[ -e "$runs/vae/vae/config.json" ] || "$prophet" train vae --data "$runs/data/codec" --validation "$runs/data/val" \
  --run "$runs/vae" --cache "$runs/cache-codec" $(resume "$runs/vae")
[ -e "$runs/decoder/vae/config.json" ] || "$prophet" train vae --data "$runs/data/codec" --validation "$runs/data/val" \
  --run "$runs/decoder" --cache "$runs/cache-codec" --init "$runs/vae/vae" --decoder-only --difference-weight 1 \
  --steps 800 --learning-rate 1e-3 --warmup-steps 20 --decay-fraction 0.8 --ema-decay 0.99 --seed 2 $(resume "$runs/decoder")
world() {  # run folder, then the options in which the two phases differ
  local run=$1; shift
  [ -e "$run/prophet/prophet.json" ] || "$prophet" train world-model --data "$runs/data/train" \
    --validation "$runs/data/val" --vae "$runs/vae/vae" --run "$run" --cache "$runs/cache" "$@" $(resume "$run")
}
world "$runs/first" --steps 3250 --decay-fraction 0 --ema-decay 0.998 --timestep-shift 3 --motion-weight 1 --eventful 0.5
world "$runs/world" --init "$runs/first/prophet" --steps 2400 --decay-fraction 0.6 --warmup-steps 50 --seed 1
cp "$runs"/decoder/vae/* "$runs/world/prophet/vae/"  # same encoder, so the denoiser fits
[ -e "$runs/judge/judge.json" ] || "$prophet" judge train --data "$runs/data/train" --val "$runs/data/val" \
  --checkpoint "$runs/world/prophet" --max-episodes 1500 --steps 1000 --output "$runs/judge"

"$prophet" eval "$runs/data/val" --checkpoint "$runs/world/prophet" --out "$runs/evaluation"
