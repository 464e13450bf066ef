"""Matrix-Game-3.0 with li_compile: upstream's own code, or a reduced model that stands in for it."""
