"""The ground floor: what an op is, who serves a call and why, GPUs and their facts, checks, cost."""
