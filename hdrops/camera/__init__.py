"""Cameras: response curves and their recovery from a bracket, and tone mapping."""
