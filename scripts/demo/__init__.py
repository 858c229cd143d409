"""The demo: a real model, real preference pairs, and the ordinary `jax-dpo` commands on them."""
