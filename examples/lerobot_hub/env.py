"""The ``env.py`` of a hub repository: LeRobot's EnvHub loads it and calls ``make_env(n_envs, use_async_envs)``.

Say here which world it is; ``env_id`` and ``checkpoint`` may be any registered world and any hub id of its weights.
"""

from functools import partial

from prophet_gym.compat.lerobot import make_env as make_worlds

make_env = partial(make_worlds, env_id="Prophet-Tabletop-v0", checkpoint="tabletop")
