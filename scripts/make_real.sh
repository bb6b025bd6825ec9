#!/usr/bin/env bash
# Makes the packaged checkpoints of Prophet-Bridge-v0 and Prophet-Droid-v0 again from the recordings in DATA (bridge/,
# bridge64/, droid/), after make_tabletop.sh or with its packaged result. About an hour on two CPU cores; interrupted
# training goes on, interrupted conversion begins anew.
set -euo pipefail
prophet=${PROPHET:-.venv/bin/prophet}
python=${PYTHON:-.venv/bin/python}
data=${DATA:-../shared/data}
runs=${RUNS:-runs/real}
tabletop=${TABLETOP:-prophet_gym/assets/tabletop}
resume() { [ -e "$1/checkpoints/last.pt" ] && echo --resume || true; }
small=(--image-size 64 64)

# Held out: of Bridge the first episode, of DROID every sixth from number 2. DROID's two rates, 4 and 5 Hz, become one.
if [ ! -e "$runs/data/done" ]; then
  rm -rf "$runs/data"
  for part in codec codec-val; do
    [ "$part" = codec ] && { bridge=(--leave-out 0) droid=(--leave-out 2 8 14); } || { bridge=(--episodes 0) droid=(--episodes 2 8 14); }
    "$prophet" convert "$data/bridge" "$runs/data/$part" "${small[@]}" "${bridge[@]}" --prefix bridge_
    for camera in exterior_1 exterior_2 wrist; do
      "$prophet" convert "$data/droid" "$runs/data/$part" "${small[@]}" "${droid[@]}" --camera "$camera" --prefix "droid_${camera}_"
    done
  done
  for camera in image_0 image_1 image_2; do
    "$prophet" convert "$data/bridge64" "$runs/data/codec" "${small[@]}" --camera "$camera" --prefix "bridge64_${camera}_"
  done
  "$prophet" convert "$data/bridge" "$runs/data/bridge" "${small[@]}" --leave-out 0 --variants 15
  "$prophet" convert "$data/bridge" "$runs/data/bridge-val" "${small[@]}" --episodes 0
  for camera in exterior_1 exterior_2; do
    view=(--camera "$camera" --prefix "${camera}_" --control-hz 5 "${small[@]}")
    "$prophet" convert "$data/droid" "$runs/data/droid" "${view[@]}" --leave-out 2 8 14 --variants 3
    "$prophet" convert "$data/droid" "$runs/data/droid-val" "${view[@]}" --episodes 2 8 14
  done
  touch "$runs/data/done"
fi

[ -e "$runs/vae/vae/config.json" ] || "$prophet" train vae --data "$runs/data/codec" --validation "$runs/data/codec-val" \
  --clip-length 9 --groups 2 --init "$tabletop/vae" --run "$runs/vae" --cache "$runs/cache-codec" --foreground-weight 0 \
  --difference-weight 1 --steps 1500 --learning-rate 1e-3 --eval-every 750 $(resume "$runs/vae")
