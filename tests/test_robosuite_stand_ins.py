"""Robosuite's environments, as far as that can be tested without robosuite: stand-ins around the real MuJoCo."""

from __future__ import annotations

from types import SimpleNamespace

import mujoco
import numpy as np
import pytest

from prophet_gym.action_frames import Camera, project
from prophet_gym.sims import robosuite


def test_an_environment_with_another_robot_is_refused_every_time() -> None:
    class Twin:
        """Two arms, as far as they are looked at."""

        control_freq, closed = 20, False
        robots = [SimpleNamespace(controller=SimpleNamespace(name="OSC_POSE"), gripper=None)] * 2
        context = SimpleNamespace(gl_ctx=SimpleNamespace(make_current=lambda: None))
        sim = SimpleNamespace(model=SimpleNamespace(camera_names=["agentview"]), _render_context_offscreen=context)

        def close(self) -> None:
            self.closed = True

    made: list[Twin] = []
    task = robosuite.RobosuiteTask("lift", "lift", lambda: made.append(Twin()) or made[-1])
    sim = robosuite.RobosuiteSim([task], name="x")
    for _ in range(2):
        with pytest.raises(ValueError, match="another robot needs an ActionSpec"):
            sim.reset(seed=0)
    assert [twin.closed for twin in made] == [True, True]


def test_a_camera_that_moves_has_no_calibration() -> None:
    model = mujoco.MjModel.from_xml_string("""
      <mujoco><worldbody>
        <camera name="agentview" pos="0 0 1"/>
        <body pos="1 0 0"><geom size="0.1"/><camera name="sideview"/>
          <body><joint axis="0 0 1"/><geom size="0.1"/>
            <body name="hand"><camera name="robot0_eye_in_hand"/></body>
          </body>
        </body>
      </worldbody></mujoco>""")
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    names = {"camera_name2id": lambda name: model.camera(name).id}  # robosuite's
    names |= {key: getattr(model, key) for key in ("cam_fovy", "cam_bodyid", "body_weldid")}
    task = robosuite.RobosuiteTask("lift", "lift", lambda: None)

    def camera(name: str) -> Camera | None:
        sim = robosuite.RobosuiteSim([task], name="x", camera=name, size=32)
        sim.env = SimpleNamespace(sim=SimpleNamespace(model=SimpleNamespace(**names), data=data))
        return sim.camera

    above, beside = camera("agentview"), camera("sideview")
    assert above is not None and beside is not None
    np.testing.assert_allclose(project(np.zeros(3), above), [15.5, 15.5])
    np.testing.assert_allclose(beside.E[:3, 3], [-1, 0, 0])
    assert camera("robot0_eye_in_hand") is None
