"""One file a model family: what is particular to a model stands here and nowhere else."""
