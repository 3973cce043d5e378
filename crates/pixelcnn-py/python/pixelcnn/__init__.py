"""PixelCNN++ (Salimans et al., 2017): image models with an exact likelihood.

>>> import pixelcnn
>>> model = pixelcnn.load()  # the model that comes with it, or the path of one
>>> images = model.sample(2)  # uint8 [2, 32, 32, 3]
>>> model.bits_per_dim(images)  # float64 [2]
"""

from ._pixelcnn import Distribution, Model, __version__, load
from ._training import resume, train

__all__ = ["Distribution", "Model", "__version__", "load", "resume", "train"]
