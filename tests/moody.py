"""An environment and a judge that files tell to die, to fail or to wait; for workers in other processes."""

import os
import time
from pathlib import Path

from gymnasium.vector import AutoresetMode
from reach import Reach

from prophet_gym.sims.vector import make_sync_vector_env


class Uneven(Reach):
    """Its episodes have one to three chunks, by their seeds."""

    def reset(self, *, seed=None, options=None):
        self.calls = 1 + seed % 3
        return super().reset(seed=seed, options=options)


class Moody(Uneven):
    """Does what a file with the name of its seed says: "die <times>", "raise", or "wait <number of starts>"."""

    def __init__(self, moods):
        super().__init__()
        self.moods = moods

    def reset(self, *, seed=None, options=None):
        mood = self.moods / str(seed)
        match mood.read_text().split() if mood.exists() else []:
            case ["die", times] if int(times) > 0:
                mood.write_text(f"die {int(times) - 1}")
                os._exit(1)
            case ["raise"]:
                raise ValueError("the robot is on holiday")
            case ["wait", count]:
                deadline = time.monotonic() + 60
                while len(workers_of(self.moods)) < int(count):
                    if time.monotonic() > deadline:
                        raise TimeoutError(f"the others began {len(workers_of(self.moods))} starts")
                    time.sleep(0.01)
        (self.moods / f"{seed}.by.{os.getpid()}").touch()
        return super().reset(seed=seed, options=options)

    def close(self):
        (self.moods / f"closed.{os.getpid()}").touch()


def make_moody(moods):
    return make_sync_vector_env(lambda: Moody(moods), 8, AutoresetMode.DISABLED)


def make_uneven():
    return make_sync_vector_env(Uneven, 8, AutoresetMode.DISABLED)


def workers_of(moods):
    """Process of each start that was begun."""
    parts = [path.name.split(".") for path in moods.glob("*.by.*")]
    return {int(seed): int(process) for seed, _, process in parts}


class MoodyJudge:
    """Judges by the last frame's brightness; its instructions may be files that say "die <times>", or "raise"."""

    def __call__(self, frames, instruction):
        if instruction == "raise":
            raise KeyError("no such plate")
        mood = Path(instruction)
        times = int(mood.read_text().split()[1]) if mood.is_file() else 0
        if times:
            mood.write_text(f"die {times - 1}")
            os._exit(1)
        return float(frames[-1].mean() / 255)
