"""Ground-truth simulators behind the same chunk interface as the world models."""
