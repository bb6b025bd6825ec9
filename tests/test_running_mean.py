"""The running mean of a policy's weights: what it is, that it is evaluated and saved, and that the run is the same."""

import dataclasses

import pytest
import torch
from reach import make_reach, make_reach_policy
from test_trainer import QUICK, ScriptedTruth, lines_of, weights_of, without_times

import prophrl_agents.trainer as trainer_module
from prophrl_agents import SmallFlowPolicy
from prophrl_agents.governor import Governor, GovernorRules
from prophrl_agents.learner import Learner
from prophrl_agents.trainer import GRPOTrainer

DECAY = 0.6


def trained(run, monkeypatch, **settings):
    """A run of three updates: its policy, its weights after each update, and those that were evaluated."""
    acting, evaluated, policy = [], [], make_reach_policy()
    trainer = GRPOTrainer(dataclasses.replace(QUICK, run=run, updates=3, **settings), policy, make_reach(8))
    update, evaluate = trainer_module.update_policy, trainer_module.evaluate_policy

    def noting_update(*args, **options):
        metrics = update(*args, **options)
        acting.append(weights_of(policy))
        return metrics

    def noting_evaluation(asked, *args):
        evaluated.append(weights_of(asked))
        return evaluate(asked, *args)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "update_policy", noting_update)
        patch.setattr(trainer_module, "evaluate_policy", noting_evaluation)
        trainer.train()
    return policy, acting, evaluated


def test_the_mean_is_evaluated_and_saved_and_changes_nothing_else(tmp_path, monkeypatch):
    _, acting, evaluated = trained(tmp_path / "mean", monkeypatch, ema_decay=DECAY, eval_every=1)
    plain, same, _ = trained(tmp_path / "plain", monkeypatch, eval_every=1)
    assert all(map(torch.equal, acting, same)) and not torch.equal(acting[0], acting[2])
    expected = [acting[0]]
    for weights in acting[1:]:
        expected.append(DECAY * expected[-1] + (1 - DECAY) * weights)
    start = weights_of(make_reach_policy())
    torch.testing.assert_close(torch.stack(evaluated), torch.stack([start, *expected]), rtol=0, atol=1e-6)
    saved = [weights_of(SmallFlowPolicy.from_pretrained(tmp_path / run / "policy")) for run in ("mean", "plain")]
    torch.testing.assert_close(saved[0], expected[-1], rtol=0, atol=1e-6)
    assert torch.equal(saved[1], weights_of(plain)) and (saved[0] - saved[1]).abs().max() > 1e-4
    lines = [without_times(lines_of(tmp_path / run)) for run in ("mean", "plain")]
    for line in [*lines[0], *lines[1]]:
        for name in ("rate", "low", "high"):
            line.pop(f"eval_success_{name}")
    assert lines[0] == lines[1]


def test_the_best_that_a_governor_finds_are_the_weights_that_acted(tmp_path):
    config = dataclasses.replace(QUICK, run=tmp_path, updates=4, ema_decay=DECAY)
    governor = Governor(ScriptedTruth([0.2, 0.4, 0.5, 0.9]), GovernorRules(every=1))
    policy = make_reach_policy()
    result = GRPOTrainer(config, policy, make_reach(8), governor=governor).train()
    assert result.best_update == 3
    three = make_reach_policy()
    GRPOTrainer(dataclasses.replace(config, run=tmp_path / "three", updates=3), three, make_reach(8)).train()
    best = weights_of(SmallFlowPolicy.from_pretrained(tmp_path / "best"))
    assert torch.equal(best, weights_of(three)) and not torch.equal(best, weights_of(policy))


def test_weights_that_stand_still_have_themselves_as_mean():
    learner = Learner.build(make_reach_policy(), dataclasses.replace(QUICK, ema_decay=DECAY))
    for _ in range(3):
        learner.note_update()
    assert learner.result is not learner.policy and torch.equal(weights_of(learner.result), weights_of(learner.policy))


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_bad_decays_are_refused(decay):
    with pytest.raises(ValueError, match=r"ema_decay is .*, expected 0 \(no mean\) or a share below 1"):
        dataclasses.replace(QUICK, ema_decay=decay)


def test_a_run_with_a_mean_is_not_resumed_without(tmp_path, monkeypatch):
    trained(tmp_path, monkeypatch, ema_decay=DECAY)
    state = torch.load(tmp_path / "checkpoints" / "last.pt", weights_only=True)["learner"]
    learner = Learner.build(make_reach_policy(), QUICK)
    with pytest.raises(ValueError, match="same algorithm, beta and ema_decay"):
        learner.load_state_dict(state)
