"""A density estimator as scikit-learn has them, for its pipelines and its `model_selection`."""

import tempfile

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, DensityMixin
from sklearn.utils.validation import check_is_fitted

from ._training import train

__all__ = ["PixelCNN", "PixelCNNClassifier"]


class PixelCNN(DensityMixin, BaseEstimator):
    """A PixelCNN++ that is trained by `fit`.

    Parameters
    ----------
    preset : {"quick", "small", "cifar10"}
        The settings to begin with, as of :func:`pixelcnn.train`.
    settings : dict, optional
        Those that override them, such as ``{"nr_filters": 32, "steps": 1000}``.
    run : str or os.PathLike, optional
        The run's folder, which is kept; by default a temporary one, which is not.
    device : str
        As of :func:`pixelcnn.load`.
    progress : bool
        Whether to show a bar.

    Attributes
    ----------
    model_ : pixelcnn.Model
        The trained model.
    """

    def __init__(self, preset="quick", *, settings=None, run=None, device="auto", progress=False):
        self.preset = preset
        self.settings = settings
        self.run = run
        self.device = device
        self.progress = progress

    def fit(self, X, y=None):
        """Trains on images, uint8 [N, H, W, C]."""
        return self._fit(X, None)

    def _fit(self, X, classes):
        options = {"preset": self.preset, "device": self.device, "progress": self.progress}
        options.update(self.settings or {})
        if self.run is not None:
            self.model_ = train(X, classes, run=self.run, **options)
        else:
            with tempfile.TemporaryDirectory() as folder:
                self.model_ = train(X, classes, run=folder, **options)
        return self

    def score_samples(self, X):
        """The log-likelihood of each image in nats: float64 [N]."""
        check_is_fitted(self)
        return self.model_.score_samples(X)

    def score(self, X, y=None):
        """The mean log-likelihood of the images in nats."""
        return float(np.mean(self.score_samples(X)))

    def sample(self, n_samples=1, random_state=1):
        """Draws images: uint8 [n_samples, H, W, C]."""
        check_is_fitted(self)
        return self.model_.sample(n_samples, seed=random_state)


class PixelCNNClassifier(ClassifierMixin, PixelCNN):
    """A class-conditional PixelCNN++ that classifies images by Bayes' rule.

    Attributes
    ----------
    model_ : pixelcnn.Model
        The trained model.
    classes_ : array
        The classes, in the order of `predict_proba`'s columns.
    """

    def fit(self, X, y):
        """Trains on images, uint8 [N, H, W, C], of the classes `y` [N], which may be of any kind."""
        self.classes_, numbers = np.unique(y, return_inverse=True)
        return self._fit(X, numbers)

    def predict_proba(self, X):
        """The probability of each class for each image: float64 [N, classes]."""
        check_is_fitted(self)
        return self.model_.predict_proba(X)

    def predict(self, X):
        """The likeliest class of each image."""
        return self.classes_[self.predict_proba(X).argmax(axis=1)]

    def score_samples(self, X):
        """The log-likelihood of each image in nats, all classes as likely beforehand: float64 [N]."""
        check_is_fitted(self)
        count, nr_classes = len(X), len(self.classes_)
        each = [self.model_.score_samples(X, classes=label) for label in range(nr_classes)]
        return np.logaddexp.reduce(each, axis=0) - np.log(nr_classes) if count else np.empty(0)

    def score(self, X, y):
        """The share of images whose likeliest class is their own."""
        return float(np.mean(self.predict(X) == y))
