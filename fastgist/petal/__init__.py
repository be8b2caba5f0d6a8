"""PETAL (arXiv 2312.12458): tuning the Q-Former of BLIP-2 and InstructBLIP."""
