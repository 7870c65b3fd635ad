"""SparseGPT and GPTQ for many experts at once."""

from pipeline.solver.factor import Factor, inverse_factor
from pipeline.solver.quantizer import Grid, find_grid
from pipeline.solver.solve import solve

__all__ = ["Factor", "Grid", "find_grid", "inverse_factor", "solve"]
