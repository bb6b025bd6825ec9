"""From a robot's recordings to an environment that others can load: ``prophet calibrate``, ``adapt`` and ``push``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tyro.conf import Positional

from ..atomic import atomic_folder
from ..calibrate import calibrate_camera, clicked_points, read_clicks
from ..data.folder import write_episode
from ..data.opening import open_dataset
from ..metrics.report import markdown
from ..push import push as push_checkpoint
from ..strict_json import to_json
from ..training.adapt import adapt as adapt_world
from ..training.adapt_config import AdaptConfig

__all__ = ["adapt", "calibrate", "push"]


def calibrate(
    data: Positional[Path],
    clicks: Path,
    out: Path = Path("camera.json"),
    apply: Path | None = None,
    card: str | None = None,
    camera: str | None = None,
    offset: tuple[float, float, float] = (0.0, 0.0, 0.0),
    principal_point: tuple[float, float] | None = None,
) -> None:
    """Fit a camera to clicks on the gripper in images with measured poses.

    Args:
        data: a data set of any format, with poses.
        clicks: CSV or JSON file of episode, frame, u, v (pixels from the centre of the top left one); ten or more.
        out: JSON file of the camera.
        apply: folder for a copy of all episodes with this camera, as `prophet adapt` takes it.
        card: what the numbers mean, for formats that do not say: bridge, droid, libero, ..., or a TOML file
        camera: which camera was clicked on; the card's or the first by default.
        offset: of the clicked point from the end-effector's origin, metres along its axes.
        principal_point: cx and cy in pixels; the middle of the image by default.
    """
    if apply is not None and apply.exists():
        raise ValueError(f"{apply} exists already; give another folder for the copy")
    episodes = open_dataset(data, card=card, camera=camera)
    given = read_clicks(clicks)
    points, pixels, (height, width) = clicked_points(given, episodes, offset)
    result = calibrate_camera(points, pixels, width, height, principal_point=principal_point)
    print(f"{len(given)} clicks: median {result.median:.2f} px, worst {result.worst:.2f} px")
    for i in result.errors.argsort()[::-1][:3]:
        print(f"  {result.errors[i]:.2f} px: {given[i].episode}, frame {given[i].frame}")
    print(f"focal length {result.camera.K[0, 0]:.1f} px, uncertain by {result.focal_uncertainty:.0%}")
    if result.focal_uncertainty > 0.2:
        print("the clicks hardly determine the focal length: add some nearer to the camera and farther from it")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(to_json(result.camera.to_dict()))
    print(f"camera: {out}")
    if apply is not None:
        with atomic_folder(apply) as folder:
            for i, name in enumerate(episodes.names):
                write_episode(folder / name.replace("/", "_"), replace(episodes[i], camera=result.camera))
        print(f"{len(episodes)} episodes with this camera: {apply}")


def adapt(config: AdaptConfig) -> None:
    """Adapt a world to a few episodes of another robot, scene or task; the result is an environment.

    Args:
        config: data, base, result, and how.
    """
    result = adapt_world(config)
    print(markdown(result["metrics"]))
    print(f'environment: gym.make("Prophet-Custom-v0", checkpoint="{config.out}")')


def push(checkpoint: Positional[Path], repo_id: Positional[str], public: bool = False) -> None:
    """Upload a checkpoint folder, and nothing else, to a repository on the hub; private unless asked otherwise.

    Args:
        checkpoint: folder of a whole checkpoint.
        repo_id: owner/name; made where there is none.
        public: let everybody see it.
    """
    print(f"uploaded: {push_checkpoint(checkpoint, repo_id, private=not public)}")
    print(f'environment: gym.make("Prophet-Custom-v0", checkpoint="{repo_id}")')
