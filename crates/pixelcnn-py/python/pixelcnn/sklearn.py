"""A density estimator as scikit-learn has them, for its pipelines and its `model_selection`."""

from __future__ import annotations

import os
import tempfile
from typing import Any, Dict, Optional

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, DensityMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from ._pixelcnn import Model
from ._training import train

__all__ = ["PixelCNN", "PixelCNNClassifier"]


class PixelCNN(DensityMixin, BaseEstimator):  # type: ignore[misc]
    """A PixelCNN++ that is trained by `fit`. A share of the images, ``held_out``, is not trained on: training
    measures itself on it.

    Parameters
    ----------
    preset : {"quick", "small", "cifar10", "cifar10-best"}
        The settings to begin with, as of :func:`pixelcnn.train`.
    nr_resnet, nr_filters, nr_logistic_mix, optimizer, learning_rate, batch_size, dropout, epochs, steps, hours, \
    held_out, seed : optional
        Those that override them.
    settings : dict, optional
        And any others.
    device : str
        As of :func:`pixelcnn.load`.
    progress : bool
        Whether to show a bar.

    Attributes
    ----------
    model_ : pixelcnn.Model
        The trained model.
    """

    model_: Model

    def __init__(
        self,
        preset: str = "quick",
        *,
        nr_resnet: Optional[int] = None,
        nr_filters: Optional[int] = None,
        nr_logistic_mix: Optional[int] = None,
        optimizer: Optional[str] = None,
        learning_rate: Optional[float] = None,
        batch_size: Optional[int] = None,
        dropout: Optional[float] = None,
        epochs: Optional[int] = None,
        steps: Optional[int] = None,
        hours: Optional[float] = None,
        held_out: Optional[float] = None,
        seed: Optional[int] = None,
        settings: Optional[Dict[str, Any]] = None,
        device: str = "auto",
        progress: bool = False,
    ) -> None:
        self.preset = preset
        self.nr_resnet = nr_resnet
        self.nr_filters = nr_filters
        self.nr_logistic_mix = nr_logistic_mix
        self.optimizer = optimizer
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.dropout = dropout
        self.epochs = epochs
        self.steps = steps
        self.hours = hours
        self.held_out = held_out
        self.seed = seed
        self.settings = settings
        self.device = device
        self.progress = progress

    def fit(self, X: ArrayLike, y: Any = None) -> PixelCNN:
        """Trains on images, uint8 [N, H, W, C]."""
        return self._fit(X, None)

    def _fit(self, X: ArrayLike, classes: Optional[NDArray[Any]]) -> Any:
        options = dict(self.settings or {})
        for name, value in self.get_params(deep=False).items():
            if name != "settings" and value is not None:
                options[name] = value
        if classes is not None:
            options["class_conditional"] = True
        with tempfile.TemporaryDirectory() as folder:
            run = os.path.join(folder, "estimator")
            self.model_ = train(X, classes, run=run, **options)._without_run()
        return self

    def score_samples(self, X: ArrayLike) -> NDArray[np.float64]:
        """The log-likelihood of each image in nats: float64 [N]."""
        check_is_fitted(self)
        return self.model_.score_samples(X)

    def score(self, X: ArrayLike, y: Any = None) -> float:
        """The mean log-likelihood of the images in nats."""
        return float(np.mean(self.score_samples(X)))

    def sample(self, n_samples: int = 1, random_state: Any = 1) -> NDArray[Any]:
        """Draws images: uint8 [n_samples, H, W, C]."""
        check_is_fitted(self)
        if not isinstance(random_state, (int, np.integer)):
            random_state = check_random_state(random_state).randint(2**31)
        return self.model_.sample(n_samples, seed=int(random_state))


class PixelCNNClassifier(ClassifierMixin, PixelCNN):  # type: ignore[misc]
    """A class-conditional PixelCNN++ that classifies images by Bayes' rule; its parameters are those of
    :class:`PixelCNN`.

    Attributes
    ----------
    model_ : pixelcnn.Model
        The trained model.
    classes_ : array
        The classes, in the order of `predict_proba`'s columns.
    """

    classes_: NDArray[Any]

    def fit(self, X: ArrayLike, y: ArrayLike) -> PixelCNNClassifier:  # type: ignore[override]
        """Trains on images, uint8 [N, H, W, C], of the classes `y` [N], which may be of any kind."""
        self.classes_, numbers = np.unique(y, return_inverse=True)
        self._fit(X, numbers)
        return self

    def predict_proba(self, X: ArrayLike) -> NDArray[np.float64]:
        """The probability of each class for each image: float64 [N, classes]."""
        check_is_fitted(self)
        return self.model_.predict_proba(X)

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """The likeliest class of each image."""
        return self.classes_[self.predict_proba(X).argmax(axis=1)]

    def score_samples(self, X: ArrayLike) -> NDArray[np.float64]:
        """The log-likelihood of each image in nats, all classes as likely beforehand: float64 [N]."""
        check_is_fitted(self)
        nr_classes = len(self.classes_)
        each = [self.model_.score_samples(X, classes=label) for label in range(nr_classes)]
        return np.asarray(np.logaddexp.reduce(each, axis=0) - np.log(nr_classes))
