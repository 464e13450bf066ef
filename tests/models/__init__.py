"""Reduced models with the anatomy of published ones, written from their descriptions: what matchers and passes are tested on."""
