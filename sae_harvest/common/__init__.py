"""Errors, options, numbers, paths, console, Ray, devices: for all. Stands on nothing of ours."""
