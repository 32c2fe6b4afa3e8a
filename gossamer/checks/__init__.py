"""Checks of any ASE calculator. This package imports neither torch nor our models, so that it can judge others'."""
