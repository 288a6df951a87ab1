"""Probes: how well single latents, few latents and baselines tell the classes of binary tasks."""
