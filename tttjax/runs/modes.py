"""Names of evaluation modes and of the choices of inner updates. Imports no JAX."""

MODES = ("on", "off", "dynamic")
DYNAMIC_PATHS = ("suffix/**/mlp/**",)  # fast weights of the mode dynamic
LEARN = ("all", "prompt", "none")  # tokens that are targets of inner updates
