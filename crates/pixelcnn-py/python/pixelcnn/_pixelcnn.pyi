import os
from pathlib import Path
from typing import Any, Callable, Dict, List, Literal, Mapping, Optional, Sequence, Union, final, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Distribution", "Model", "__version__", "expect_images", "expect_new", "expect_settings", "first_free", "load", "resume", "train"]

__version__: str

_Classes = Union[int, str, Sequence[int], NDArray[np.integer[Any]]]
_Path = Union[str, "os.PathLike[str]"]
_Bytes = Union[bytes, bytearray, memoryview]
_Picture = Union[NDArray[np.uint8], _Bytes]

@final
class Distribution:
    @property
    def weights(self) -> NDArray[np.float32]: ...
    @property
    def means(self) -> NDArray[np.float32]: ...
    @property
    def scales(self) -> NDArray[np.float32]: ...
    def probabilities(self, image: int, row: int, column: int) -> NDArray[np.float64]: ...

@final
class Model:
    def bits_per_dim(
        self, x: ArrayLike, *, classes: Optional[_Classes] = None, coarse: Optional[ArrayLike] = None
    ) -> NDArray[np.float64]: ...
    def score_samples(
        self, x: ArrayLike, *, classes: Optional[_Classes] = None, coarse: Optional[ArrayLike] = None
    ) -> NDArray[np.float64]: ...
    def bits_per_pixel(
        self, x: ArrayLike, *, classes: Optional[_Classes] = None, coarse: Optional[ArrayLike] = None
    ) -> NDArray[np.float32]: ...
    def distribution(
        self, x: ArrayLike, *, classes: Optional[_Classes] = None, coarse: Optional[ArrayLike] = None
    ) -> Union[Distribution, NDArray[np.float32]]: ...
    def predict_proba(self, x: ArrayLike, *, coarse: Optional[ArrayLike] = None) -> NDArray[np.float64]: ...
    def sample(
        self,
        n: Optional[int] = None,
        *,
        size: Optional[Sequence[int]] = None,
        classes: Optional[_Classes] = None,
        temperature: float = 1.0,
        seed: int = 1,
        coarse: Optional[ArrayLike] = None,
    ) -> NDArray[Any]: ...
    def complete(
        self,
        x: ArrayLike,
        mask: ArrayLike,
        variants: int = 1,
        *,
        classes: Optional[_Classes] = None,
        temperature: float = 1.0,
        seed: int = 1,
        coarse: Optional[ArrayLike] = None,
    ) -> NDArray[Any]: ...
    def compress(
        self,
        images: Union[NDArray[np.uint8], Sequence[_Picture], Mapping[str, _Picture]],
        *,
        classes: Optional[_Classes] = None,
    ) -> bytes: ...
    @overload
    def decompress(self, data: _Bytes, *, names: Literal[False] = False) -> List[Any]: ...
    @overload
    def decompress(self, data: _Bytes, *, names: Literal[True]) -> Dict[str, Any]: ...
    def save(self, path: _Path, *, half: bool = False, overwrite: bool = False) -> None: ...
    def state_dict(self, names: Literal["original", "port"] = "original") -> Dict[str, NDArray[np.float32]]: ...
    def _without_run(self) -> Model: ...
    @property
    def config(self) -> Dict[str, Any]: ...
    @property
    def card(self) -> Dict[str, Any]: ...
    @property
    def run(self) -> Optional[Path]: ...
    @property
    def device(self) -> str: ...

def load(path: Optional[_Path] = None, *, device: str = "auto") -> Model: ...
def train(
    run: _Path,
    data: str,
    preset: str,
    settings: str,
    init_from: Optional[Model],
    device: str,
    hear: Callable[[Dict[str, Any]], bool],
) -> Model: ...
def resume(run: _Path, settings: str, device: str, hear: Callable[[Dict[str, Any]], bool]) -> Model: ...
def first_free(name: str) -> Path: ...
def expect_images(x: ArrayLike, codes: bool) -> None: ...
def expect_new(run: _Path) -> None: ...
def expect_settings(preset: str, settings: str, init_from: Optional[Model], device: str) -> None: ...
