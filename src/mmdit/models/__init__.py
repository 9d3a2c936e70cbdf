"""The nn.Modules of the MMDiT and their configs, and nothing else."""
