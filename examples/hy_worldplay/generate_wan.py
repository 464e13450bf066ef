"""Upstream's wan/generate.py of HY-WorldPlay, with its autoregressive rollout compiled: see README.md beside this file."""

import os
import runpy
import sys

import li_compile

tree = os.path.abspath(sys.argv.pop(1))  # upstream's; what follows is for upstream
sys.path[:0] = [tree, os.path.join(tree, "wan")]
from wan.inference.pipeline_wan_w_mem_relative_rope import WanPipeline  # noqa: E402

call = WanPipeline.__call__


def compile_first(self, *args, **kwargs):
    """By the first call the transformer is the trained one, which upstream puts in after it has made the pipeline."""
    WanPipeline.__call__ = call
    li_compile.compile(self, li_compile.Config(preset=os.environ.get("LI_COMPILE_PRESET", "all")))
    return self(*args, **kwargs)


WanPipeline.__call__ = compile_first
runpy.run_module("wan.generate", run_name="__main__")
