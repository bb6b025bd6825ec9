"""Training of codec, world model and judge on recorded episodes."""
