"""Groups of subcommands of ``prophet``; :mod:`prophet_gym.cli` lists them."""
