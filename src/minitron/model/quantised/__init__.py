"""Reads the tensors of a folder whose weights are quantised, each in floating point.

A quantised matrix is stored as numbers of few bits and the scales that they are multiplied by: one for the matrix, for
each of its rows, or for each block of it. `methods` reads what a config states, and names the layouts of its method;
`layout` finds the tensors that hold one matrix; `scaled`, `packed`, `transposed`, `mxfp4` and `bitsandbytes` compute
the matrix of them. Tensors are read one by one, and no code of the folder is run.
"""

from minitron.model.quantised.folder import QuantisedFolder, open_quantised

__all__ = ["QuantisedFolder", "open_quantised"]
