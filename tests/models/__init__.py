"""Reduced models with the anatomy of published ones, written from their descriptions: what the passes are tested on."""
