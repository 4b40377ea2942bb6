"""Arrays in, arrays out: the arithmetic of the layers, each with a plain form first."""
