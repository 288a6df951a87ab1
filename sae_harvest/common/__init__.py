"""Errors, options, numbers, paths, console, Ray, devices. Imports none of our other folders."""
