"""Reference forward passes in numpy: what every family must compute, written for reading.

Nothing here is fast and nothing is shared with the engine: the file is read with the `gguf`
package, weights are dequantized to float64 and each family is a few lines over `layers`.
"""

from oracle.config import Config
from oracle.forward import Oracle
from oracle.layers import Route
from oracle.weights import Weights

__all__ = ["Config", "Oracle", "Route", "Weights"]
