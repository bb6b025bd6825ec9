"""The plugin for LeRobot's commands: ``--env.discover_packages_path=prophet_gym.lerobot_env --env.type=prophet``.

LeRobot imports the modules of this folder, and :mod:`prophet_gym.lerobot_env.config` registers itself. Nothing else in
the package imports lerobot.
"""
