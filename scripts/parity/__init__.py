"""Both trainers, this one and TRL, run on the same made-up models and texts; their numbers side by side."""
