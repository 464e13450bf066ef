"""Upstream's generate.py of HY-WorldPlay, with its autoregressive rollout compiled: see README.md beside this file."""

import os
import sys

import li_compile

sys.path.insert(0, sys.argv.pop(1))  # upstream's tree; what follows is for upstream
from hyvideo import generate  # noqa: E402

config = li_compile.Config(preset=os.environ.get("LI_COMPILE_PRESET", "all"))
create = generate.HunyuanVideo_1_5_Pipeline.create_pipeline
generate.HunyuanVideo_1_5_Pipeline.create_pipeline = lambda *args, **kwargs: li_compile.compile(create(*args, **kwargs), config)
generate.main()
