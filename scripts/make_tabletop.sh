#!/usr/bin/env bash
# Makes the shipped checkpoint of Prophet-Tabletop-v0 again: data, codec, denoiser, judge, evaluation.
# About eleven and a half hours on two CPU cores; every step continues where it was interrupted.
set -euo pipefail
prophet=${PROPHET:-.venv/bin/prophet}
prophrl=${PROPHRL:-.venv/bin/prophrl}
python=${PYTHON:-.venv/bin/python}
runs=${RUNS:-runs/tabletop}
resume() { [ -e "$1/checkpoints/last.pt" ] && echo --resume || true; }

"$prophet" record "$runs/data/codec" --episodes 1500 --seed 100000
"$prophet" record "$runs/data/train" --episodes 4843 --seed 0
"$prophet" record "$runs/data/train" --episodes 1500 --seed 100000
"$prophet" record "$runs/data/val" --episodes 120 --seed 1000000
"$prophet" record "$runs/data/test" --episodes 280 --seed 1000120

[ -e "$runs/vae/vae/config.json" ] || "$prophet" train vae --data "$runs/data/codec" --validation "$runs/data/val" \
  --run "$runs/vae" --cache "$runs/cache-codec" $(resume "$runs/vae")
decoder() {  # run folder, codec to start from, steps, seed; the encoder and its latents stay
  [ -e "$1/vae/config.json" ] || "$prophet" train vae --data "$runs/data/codec" --validation "$runs/data/val" --run "$1" \
    --cache "$runs/cache-codec" --init "$2" --decoder-only --difference-weight 1 --steps "$3" --seed "$4" \
    --learning-rate 1e-3 --warmup-steps 20 --decay-fraction 0.8 --ema-decay 0.99 --eval-every 0 $(resume "$1")
}
decoder "$runs/decoder-1" "$runs/vae/vae" 800 2
decoder "$runs/decoder" "$runs/decoder-1/vae" 2000 3
world() {  # run folder, then the options in which the phases differ
  local run=$1; shift
  [ -e "$run/prophet/prophet.json" ] || "$prophet" train world-model --data "$runs/data/train" \
    --validation "$runs/data/val" --vae "$runs/vae/vae" --run "$run" --cache "$runs/cache" "$@" $(resume "$run")
}
plain=(--first-step 0 --object-weight 0 --self-rollout 0 --num-layers 6)
world "$runs/first" "${plain[@]}" --steps 3250 --decay-fraction 0 --ema-decay 0.998 --timestep-shift 3 --motion-weight 1 \
  --eventful 0.5
world "$runs/second" "${plain[@]}" --motion-weight 3 --init "$runs/first/prophet" --steps 2400 --decay-fraction 0.6 --warmup-steps 50 --seed 1
# One block fewer, so that the checkpoint stays small; the object weighs more, and rollouts start from imagined frames.
world "$runs/world" --motion-weight 3 --object-weight 16 --init "$runs/second/prophet" --steps 6000 --decay-fraction 0.5 \
  --seed 2
# What goes wrong: more contact that fails, and what a policy does that imitates badly, as deployed and as it explores.
imitation="$runs/imitation"
[ -e "$imitation/policy/config.json" ] || "$prophrl" sft tabletop --data "$runs/data/train" --run "$imitation" --steps 1800 \
  --mixed-precision auto --eval-every 600 $(resume "$imitation")
"$prophet" record "$runs/data/extra" --episodes 1522 --seed 200000 --mix half_good 4 random 2 close_early 1 drop 1 \
  never_close 1 wrong_place 0.5 push_aside 1 hover 0.25 expert 0.5
"$prophrl" record "$runs/data/extra" --policy "$imitation/policy" --episodes 1016 --seed 4000000 --noisy-share 0.6
mkdir -p "$runs/data/all"
ln -sfn "$(realpath "$runs/data/train")"/episode_* "$(realpath "$runs/data/extra")"/episode_* "$runs/data/all/"
world "$runs/contact" --data "$runs/data/all" --motion-weight 3 --object-weight 16 --init "$runs/world/prophet" --steps 3200 \
  --decay-fraction 0.6 --warmup-steps 50 --seed 3
world "$runs/final" --data "$runs/data/all" --init "$runs/contact/prophet" --steps 1700 --decay-fraction 0.7 --warmup-steps 50 \
  --seed 4
judge() {  # checkpoint, held-out episodes, steps, episodes read, folders of episodes
  local world=$1 val=$2 steps=$3 episodes=$4; shift 4
  cp "$runs"/decoder/vae/* "$world/vae/"  # same encoder, so the denoiser fits
  [ -e "$world/judge/judge.json" ] || "$prophet" judge train --data "$@" --val "$val" --checkpoint "$world" \
    --max-episodes "$episodes" --steps "$steps" --chunk-length 8 --output "$world/judge"
}
judge "$runs/final/prophet" "$runs/data/val" 700 1600 "$runs/data/all" "$runs/data/extra"

# What a policy learns in that world and does not work in truth: reinforce in it, play the result, learn from that.
"$python" benchmarks/reinforcement.py --policy tabletop-sft --out "$runs/reinforced" --arms flowscale \
  --envs Prophet-Tabletop-v0 --seeds 0 1 --updates 24 --checkpoint "$runs/final/prophet" --judge "$runs/final/prophet/judge"
play() {  # policy, episodes, first seed
  "$prophrl" record "$runs/data/played-$3" --policy "$1" --episodes "$2" --seed "$3" --noisy-share 0.7
}
play tabletop-sft 1000 4200000
play "$runs/reinforced/flowscale-Prophet-Tabletop-v0-1024-0/policy" 500 4300000
play "$runs/reinforced/flowscale-Prophet-Tabletop-v0-1024-0/policy" 500 4310000
play "$runs/reinforced/flowscale-Prophet-Tabletop-v0-1024-1/policy" 1000 4400000
"$prophrl" record "$runs/data/val-played" --policy tabletop-sft --episodes 160 --seed 4100000
mkdir -p "$runs/data/everything" "$runs/data/some" "$runs/data/val-judge"
ln -sfn "$(realpath "$runs/data/val")"/episode_* "$(realpath "$runs/data/val-played")"/episode_* "$runs/data/val-judge/"
ln -sfn "$(realpath "$runs/data/all")"/episode_* "$(realpath "$runs")"/data/played-4[234]*/episode_* "$runs/data/everything/"
ls -d "$(realpath "$runs/data/train")"/episode_* | awk 'NR <= 800' | xargs -I{} ln -sfn {} "$runs/data/some/"
world "$runs/refreshed" --data "$runs/data/everything" --init "$runs/final/prophet" --steps 3600 --decay-fraction 0.6 \
  --warmup-steps 50 --seed 5 --timestep-shift 4 --first-step 0.35 --num-inference-steps 2
# Where a block truly is weighs more (by 6, then by 20), beside what hands and starts weigh: it fades less where the outcome is open.
mkdir -p "$runs/data/half"
ln -sfn "$(realpath "$runs/data/extra")"/episode_* "$(realpath "$runs")"/data/played-4[234]*/episode_* "$runs/data/half/"
ls -d "$(realpath "$runs/data/train")"/episode_* | awk 'NR % 2 == 0 && NR <= 4842' | xargs -I{} ln -sfn {} "$runs/data/half/"
present=(--data "$runs/data/half" --cache "$runs/cache-half" --warmup-steps 50 --self-rollout 0.5 --still-below 6)
world "$runs/present" "${present[@]}" --init "$runs/refreshed/prophet" --steps 1250 --decay-fraction 0.2 --seed 6 --presence-weight 6
world "$runs/presence" "${present[@]}" --init "$runs/present/prophet" --steps 2400 --decay-fraction 0.5 --seed 9 \
  --presence-weight 20 --first-step 0.7
# The judge also reads what a policy learned in the world before, with that world's own judge and one denoising step.
sed -i 's/"num_inference_steps": 2/"num_inference_steps": 1/' "$runs/refreshed/prophet/prophet.json"
judge "$runs/refreshed/prophet" "$runs/data/val-judge" 1200 2600 "$runs"/data/played-4[234]* "$runs/data/extra" "$runs/data/some"
"$python" benchmarks/reinforcement.py --policy tabletop-sft --out "$runs/reinforced-again" --arms flowscale \
  --envs Prophet-Tabletop-v0 --seeds 0 --updates 48 --learning-rate 3e-4 --checkpoint "$runs/refreshed/prophet" \
  --judge "$runs/refreshed/prophet/judge"
play "$runs/reinforced-again/flowscale-Prophet-Tabletop-v0-1024-0/policy" 1000 4500000
# What it learned in that world is shown, too; one step is what is deployed, so nine of ten samples are at pure noise. At last the
# hand and the start of a block weigh less, then nothing, beside where the block truly is: 32 : 2, then 46 : 1, where 39 : 9 was.
mkdir -p "$runs/data/shown"
ln -sfn "$(realpath "$runs/data/half")"/episode_* "$(realpath "$runs")"/data/played-4500000/episode_* "$runs/data/shown/"
contested=("${present[@]}" --first-step 0.9 --eventful 0.8)
world "$runs/contested" "${contested[@]}" --init "$runs/presence/prophet" --steps 500 --decay-fraction 0 --seed 11 \
  --presence-weight 30
contested+=(--data "$runs/data/shown" --cache "$runs/cache-shown")
world "$runs/shown" "${contested[@]}" --init "$runs/contested/prophet" --steps 2800 --decay-fraction 0.5 --seed 12 \
  --presence-weight 30
world "$runs/kept" "${contested[@]}" --init "$runs/shown/prophet" --steps 700 --decay-fraction 0.7 --seed 13 \
  --presence-weight 30 --object-weight 1
world "$runs/last" "${contested[@]}" --init "$runs/kept/prophet" --steps 500 --decay-fraction 0.8 --warmup-steps 30 --seed 14 \
  --presence-weight 45 --object-weight 0
world=$runs/last/prophet
judge "$world" "$runs/data/val-judge" 1200 3000 "$runs"/data/played-* "$runs/data/extra" "$runs/data/some"

# What policies do where they act on its frames, and what then happens in truth: 1,149 episodes, with 1,100 of those before.
"$python" benchmarks/reinforcement.py --policy tabletop-sft --out "$runs/reinforced-last" --arms flowscale \
  --envs Prophet-Tabletop-v0 --seeds 0 1 --updates 24 --checkpoint "$world" --judge "$world/judge"
inside() {  # policy, episodes, first seed
  "$prophrl" record "$runs/data/inside-$3" --policy "$1" --episodes "$2" --seed "$3" --noisy-share 0.8 \
    --world Prophet-Tabletop-v0 --checkpoint "$world"
}
inside tabletop-sft 709 4700000
inside "$runs/reinforced-last/flowscale-Prophet-Tabletop-v0-1024-0/policy" 220 4710000
inside "$runs/reinforced-last/flowscale-Prophet-Tabletop-v0-1024-1/policy" 220 4720000
mkdir -p "$runs/data/acted"
ln -sfn "$(realpath "$runs")"/data/inside-*/episode_* "$runs/data/acted/"
"$prophrl" record "$runs/data/again" --policy tabletop-sft --episodes 300 --seed 4200000 --noisy-share 0.8
ln -sfn "$(realpath "$runs/data/again")"/episode_* "$runs/data/acted/"
first() {  # folder, episodes
  ls -d "$(realpath "$runs/data/$1")"/episode_* | awk -v count="$2" 'NR <= count' | xargs -I{} ln -sfn {} "$runs/data/acted/"
}
first extra 400; first train 400
acted=("${contested[@]}" --data "$runs/data/acted" --cache "$runs/cache-acted" --vae "$runs/decoder/vae" --warmup-steps 30 --object-weight 0)
world "$runs/acted" "${acted[@]}" --init "$world" --steps 1150 --decay-fraction 0.6 --seed 16 --presence-weight 45
world "$runs/held" "${acted[@]}" --init "$runs/acted/prophet" --steps 420 --decay-fraction 0.8 --seed 21 --presence-weight 100
median=("${acted[@]}" --first-step 0 --object-weight 8 --presence-weight 0 --objective median)
world "$runs/likely" "${median[@]}" --init "$runs/acted/prophet" --steps 900 --decay-fraction 0.7 --seed 18
# The mean of the four, with the judge of before, which tells more on its frames than on those it was trained on.
mean=$runs/mean
[ -e "$mean/prophet.json" ] || "$prophet" average "$mean" "$world" "$runs/acted/prophet" "$runs/held/prophet" "$runs/likely/prophet" \
  --weights 0.2 0.15 0.5 0.15 --trained-on "14029 Tabletop episodes, scripted, of an imitation policy and of policies reinforced in \
earlier worlds, acting in the simulator and on imagined frames, successes and failures"
[ -e "$mean/judge" ] || { rm -rf "$mean/.judge"; cp -r "$world/judge" "$mean/.judge"; mv "$mean/.judge" "$mean/judge"; }
world=$mean
"$prophet" snapshots "$world/snapshots" --overwrite

"$prophet" eval "$runs/data/test" --episodes 280 --checkpoint "$world" --out "$runs/evaluation"
"$prophet" judge eval "$runs/data/test" --checkpoint "$world" --chunk-length 8
