"""One training run on several processes: started by torchrun, split by `moe.parallel`, with the folders of any run."""
