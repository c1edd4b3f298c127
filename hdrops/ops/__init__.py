"""The public operators, one module per family: checks, fake kernel, autograd formula, autocast rule."""
