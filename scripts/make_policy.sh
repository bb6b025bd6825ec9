#!/usr/bin/env bash
# Makes the packaged policies of Tabletop again, after make_tabletop.sh: imitation, six minutes on two CPU cores, and
# reinforcement inside the world, thirty minutes a seed. Interrupted runs go on.
set -euo pipefail
prophrl=${PROPHRL:-.venv/bin/prophrl}
runs=${RUNS:-runs/tabletop}
resume() { [ -e "$1/checkpoints/last.pt" ] && echo --resume || true; }
export_half() {  # run's policy, packaged folder
  "$(dirname "$prophrl")/python" -c "import sys, torch; from prophrl_agents import SmallFlowPolicy as P
P.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2], dtype=torch.float16)" "$1" "$2"
}

[ -e "$runs/sft/policy/config.json" ] || "$prophrl" sft tabletop --data "$runs/data/train" --run "$runs/sft" --steps 2050 \
  --mixed-precision auto --eval-every 0 $(resume "$runs/sft")
export_half "$runs/sft/policy" "$runs/policies/tabletop-sft"

"$(dirname "$prophrl")/python" benchmarks/reinforcement.py --policy "$runs/policies/tabletop-sft" --out "$runs/learned" \
  --arms flowscale --envs Prophet-Tabletop-v0 --updates 40 --ema-decay 0 --checkpoint "$runs/mean" --judge "$runs/mean/judge"
rm -rf "$runs/policies/tabletop-reinforced"
"$prophrl" average "$runs/policies/tabletop-reinforced" \
  "$runs"/learned/flowscale-Prophet-Tabletop-v0-1024-{0,1,2}/policy --dtype float16
"$prophrl" eval "$runs/policies/tabletop-reinforced" --against "$runs/policies/tabletop-sft" --n 800 --env None --seed 1
