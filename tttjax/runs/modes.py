"""How a run's model is evaluated or used: names that the command line offers. Imports no JAX."""

MODES = ("on", "off", "dynamic")
DYNAMIC_PATHS = ("suffix/**/mlp/**",)  # fast weights of the mode dynamic
LEARN = ("all", "prompt", "none")  # tokens that inner updates are applied for
