"""Run by test_trainer.py under torchrun: each process learns from its share of a frozen batch, then trains a little."""

import dataclasses
import sys
from pathlib import Path

import torch
from reach import make_reach, make_reach_policy
from test_update import CONFIG, B, G, gradient_of, make_batch, make_policy, weights_of

from prophrl_agents.config import TrainConfig
from prophrl_agents.gradients import processes
from prophrl_agents.learner import Learner
from prophrl_agents.trainer import GRPOTrainer
from prophrl_agents.update import update_policy

ALGORITHMS = ("fa_grpo", "filtered_bc", "ppo")
TRAINING = TrainConfig(
    updates=2, rollouts_per_update=16, group_size=4, mini_batch=16, learning_rate=1e-3, eval_every=1, eval_starts=5
)


def share_of(batch, rank, processes):
    """Groups rank, rank + processes, ... of a batch, as another process would have collected them."""
    rollouts = torch.arange(B).reshape(-1, G)[rank::processes].flatten()
    parts = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    tensors = {name: value[rollouts] for name, value in parts.items() if torch.is_tensor(value) and len(value) == B}
    instructions = tuple(batch.instructions[b] for b in rollouts)
    return dataclasses.replace(batch, **tensors, instructions=instructions, starts=batch.starts[rank::processes])


def learn(algorithm, rank, processes):
    config = dataclasses.replace(CONFIG, algorithm=algorithm, micro_batch=5)
    learner = Learner.build(make_policy(), config)
    batch = make_batch(learner.policy, valid=torch.arange(B) != 9)
    metrics = update_policy(learner, share_of(batch, rank, processes), config, 0)
    return {"gradient": gradient_of(learner), "weights": weights_of(learner), "metrics": metrics}


def train(run):
    trainer = GRPOTrainer(dataclasses.replace(TRAINING, run=run), make_reach_policy(), make_reach(8))
    result = trainer.train()
    return {"weights": weights_of(trainer.learner), "result": dataclasses.asdict(result)}


def main(folder):
    state = processes()
    results = {name: learn(name, state.process_index, state.num_processes) for name in ALGORITHMS}
    results["train"] = train(folder / "run")
    results["world"] = {"size": state.num_processes}
    torch.save(results, folder / f"rank{state.process_index}.pt")
    state.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
