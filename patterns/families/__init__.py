"""One file a model family: what is particular to a model stands here and nowhere else. Importing this registers them."""

from . import doom_world, hy_worldplay, hy_worldplay_wan, kernels_of_others, matrix_game_3  # noqa: F401
