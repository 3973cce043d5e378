"""How well a PixelCNN++ does on images that it has not seen, and which settings are better: with the tools of
scikit-learn.

    python cross_validation.py images.npz [steps]
"""

import sys

import numpy as np
from sklearn.model_selection import GridSearchCV, cross_val_score

from pixelcnn.sklearn import PixelCNN, PixelCNNClassifier


def main(path: str, steps: int = 200) -> None:
    data = np.load(path)
    images, classes = data["trainx"][:120], data["trainy"][:120] % 2
    dims = images[0].size
    small = {"nr_filters": 8, "steps": steps, "settings": {"init_batch_size": 16, "samples": 0}}

    scores = cross_val_score(PixelCNN(**small), images, cv=3)
    print("bits/dim of each fold:", -scores / (np.log(2) * dims))

    search = GridSearchCV(PixelCNN(**small), {"nr_logistic_mix": [2, 5]}, cv=2).fit(images)
    print("best:", search.best_params_)
    print("drawn:", search.best_estimator_.sample(2).shape)

    right = cross_val_score(PixelCNNClassifier(**small), images, classes, cv=2)
    print("right:", right)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
