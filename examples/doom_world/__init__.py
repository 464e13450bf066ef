"""Doom World: a small autoregressive video world model with the anatomy of HY-WorldPlay."""
