#!/usr/bin/env bash
# Makes the shipped checkpoints of Prophet-Bridge-v0 and Prophet-Droid-v0 again from the recordings in DATA (bridge/,
# bridge64/, droid/), after make_tabletop.sh or with its packaged result. About an hour and a half of one CPU core;
# interrupted training goes on, interrupted conversion begins anew.
set -euo pipefail
prophet=${PROPHET:-.venv/bin/prophet}
python=${PYTHON:-.venv/bin/python}
data=${DATA:-../shared/data}
runs=${RUNS:-runs/real}
tabletop=${TABLETOP:-prophet_gym/assets/tabletop}
resume() { [ -e "$1/checkpoints/last.pt" ] && echo --resume || true; }
small=(--image-size 64 64)

# Held out everywhere: of Bridge the first episode, of DROID numbers 1, 5 and 9, which are the rig's 0002, 0007 and 0012.
if [ ! -e "$runs/data/done" ]; then
  rm -rf "$runs/data"
  "$python" scripts/real_cameras.py "$data" "$runs/data/calibrated"
  for part in codec codec-val; do
    [ "$part" = codec ] && { bridge=(--leave-out 0) droid=(--leave-out 1 5 9); } || { bridge=(--episodes 0) droid=(--episodes 1 5 9); }
    "$prophet" convert "$data/bridge" "$runs/data/$part" "${small[@]}" "${bridge[@]}" --prefix bridge_
    for camera in exterior_1 exterior_2 wrist; do
      [ "$part$camera" = codec-valwrist ] ||
        "$prophet" convert "$data/droid" "$runs/data/$part" "${small[@]}" "${droid[@]}" --camera "$camera" --prefix "droid_${camera}_"
    done
  done
  for camera in image_0 image_1 image_2; do
    "$prophet" convert "$data/bridge64" "$runs/data/codec" "${small[@]}" --camera "$camera" --prefix "bridge64_${camera}_"
  done
  "$prophet" convert "$runs/data/calibrated/bridge" "$runs/data/bridge" "${small[@]}" --leave-out 0 --variants 47 --mirror
  "$prophet" convert "$runs/data/calibrated/bridge" "$runs/data/bridge-val" "${small[@]}" --episodes 0
  "$prophet" convert "$runs/data/calibrated/droid" "$runs/data/droid" "${small[@]}" --leave-out 1 5 9 11 15 19 --variants 29 \
    --mirror --reverse
  "$prophet" convert "$runs/data/calibrated/droid" "$runs/data/droid-val" "${small[@]}" --episodes 1 5 9 11 15 19
  touch "$runs/data/done"
fi

[ -e "$runs/vae/vae/config.json" ] || "$prophet" train vae --data "$runs/data/codec" --validation "$runs/data/codec-val" \
  --clip-length 9 --groups 2 --init "$tabletop/vae" --run "$runs/vae" --cache "$runs/cache-codec" --foreground-weight 0 \
  --difference-weight 1 --steps 1800 --learning-rate 1e-3 --eval-every 600 $(resume "$runs/vae")
world() {  # robot, weights to start from, share of the run in which the learning rate falls, steps, commands of a clip, data in words
  [ -e "$runs/$1/prophet/prophet.json" ] || "$prophet" train world-model --data "$runs/data/$1" \
    --validation "$runs/data/$1-val" --vae "$runs/vae/vae" --init "$2" --decay-fraction "$3" --steps "$4" --clip-length "$5" \
    --trained-on "$6" --residual --still-below 12 --self-rollout 0 --motion-weight 1 --timestep-shift 4 --batch-size 16 \
    --weight-decay 0.05 --condition-noise 0.1 --eval-every 500 --run "$runs/$1" --cache "$runs/cache-$1" \
    --name "prophet-$1-tiny" $(resume "$runs/$1")
}
world droid "$tabletop" 0.5 2800 40 \
  "7 episodes of one Franka rig from two cameras (1,310 images), each in 30 crops, lights, mirror images and reversals"
world bridge "$runs/droid/prophet" 0.6 1000 22 \
  "7 episodes of BridgeData V2 (240 images), each in 48 crops, lights and mirror images; before, DROID's rig"

"$python" scripts/real_snapshots.py "$runs/data/calibrated" "$runs/snapshots"
for which in "droid 8" "bridge 4"; do
  read -r robot stride <<< "$which"
  rm -rf "$runs/$robot/prophet/snapshots"
  cp -r "$runs/snapshots/$robot" "$runs/$robot/prophet/snapshots"
  "$prophet" eval "$runs/data/$robot-val" --checkpoint "$runs/$robot/prophet" --steps 20 \
    --stride "$stride" --out "$runs/evaluation-$robot"
done
