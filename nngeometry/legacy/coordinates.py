"""Old names of vectors, layers and layer collections."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import layercollection, layers
from ..layercollection import Layer, LayerCollection, Shape
from ..object import FVector, PVector, random_pvector, vector
from ..spelling import warn
from .names import adopt, attach


class LayerKind(type(Layer)):  # type: ignore[misc]
    """The class of the layers of a type of module: ``type(layer) is LinearLayer``, ``LinearLayer(3, 2, bias=True)``."""

    module: type[nn.Module]
    arguments: tuple[str, ...]

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if "packing" in kwargs:  # from the fields of a layer
            return super().__call__(*args, **kwargs)
        if len(args) > len(cls.arguments):
            raise TypeError(f"{cls.__name__} takes {', '.join(cls.arguments)}, got {len(args)} arguments")
        return _module_to_layer(cls.module(**dict(zip(cls.arguments, args, strict=False), **kwargs)))


def _axis(k: int) -> property:
    return property(lambda self: self.params[0][1][k])


_LINEAR = {"in_features": _axis(1), "out_features": _axis(0)}
_CONV = {"in_channels": _axis(1), "out_channels": _axis(0), "kernel_size": property(lambda self: self.params[0][1][2:])}
_TRANSPOSED = {**_CONV, "in_channels": _axis(0), "out_channels": _axis(1)}
_FEATURES = {"num_features": _axis(0)}
#: What a layer of a type of module was made from, in order, and those that it tells.
_MADE_OF: tuple[tuple[type[nn.Module], str, dict[str, Any]], ...] = (
    (nn.Linear, "in_features out_features bias", _LINEAR),
    (nn.Conv1d, "in_channels out_channels kernel_size bias", _CONV),
    (nn.Conv2d, "in_channels out_channels kernel_size bias", _CONV),
    (nn.ConvTranspose2d, "in_channels out_channels kernel_size bias", _TRANSPOSED),
    (nn.BatchNorm1d, "num_features", _FEATURES),
    (nn.BatchNorm2d, "num_features", _FEATURES),
    (nn.LayerNorm, "normalized_shape bias", {}),
    (nn.GroupNorm, "num_groups num_channels", {"num_channels": _axis(0)}),
    (nn.Embedding, "num_embeddings embedding_dim", {"num_embeddings": _axis(0), "embedding_dim": _axis(1)}),
    (layers.WeightNorm1d, "in_features out_features", _LINEAR),
    (layers.WeightNorm2d, "in_channels out_channels kernel_size", _CONV),
    (layers.Cosine1d, "in_features out_features", _LINEAR),
    (layers.Affine1d, "num_features bias", _FEATURES),
)
_KIND_OF: dict[type[nn.Module], Any] = {
    module: LayerKind(
        f"{module.__name__}Layer",
        (Layer,),
        {
            "__doc__": f"The layer of a ``{module.__name__}``.",
            "__module__": layercollection.__name__,
            "module": module,
            "arguments": tuple(arguments.split()),
            **properties,
        },
    )
    for module, arguments, properties in _MADE_OF
}
EmbeddingLayer = _KIND_OF[nn.Embedding]


def _module_to_layer(module: nn.Module) -> Layer:
    (layer,) = LayerCollection.from_model(module, frozen=True).layers.values()
    return layer


def random_pvector_dict(layer_collection: LayerCollection, device: Any = None) -> PVector:
    """Old name of ``random_pvector``."""
    warn("random_pvector_dict", "random_pvector")
    return random_pvector(layer_collection, device=device)


def random_fvector(n_samples: int, n_output: int = 1, device: Any = None, dtype: Any = None) -> FVector:
    """A vector ``(n_output, n_samples)`` of independent standard normal entries."""
    return FVector(torch.randn(n_output, n_samples, device=device, dtype=dtype))


class OfVectors:
    """Old names of vectors, in both spaces."""

    def get_flat_representation(self: Any) -> Tensor:
        """Old name of ``to_torch()``.

        :meta private:
        """
        warn("get_flat_representation()", "to_torch()")
        values: Tensor = self.to_torch()
        return values


class OfParameterVectors:
    """Old names of vectors in parameter space."""

    @property
    def vector_repr(self: Any) -> Any:
        """Old name of ``to_torch()``."""
        return self.to_torch()

    @property
    def dict_repr(self: Any) -> Any:
        """Old name of ``to_dict()``."""
        return self.to_dict()

    def get_dict_representation(self: Any) -> Any:
        """Old name of ``to_dict()``.

        :meta private:
        """
        warn("get_dict_representation()", "to_dict()")
        return self.to_dict()

    def to_torch_layer(self: Any, name: str) -> Any:
        """The tensors of one layer.

        :meta private:
        """
        return self.to_dict()[name]


class OfLayers:
    """Old names of layers."""

    def has_bias(self: Any) -> bool:
        """Whether it has a bias.

        :meta private:
        """
        return self.bias is not None

    @property
    def transposed(self) -> bool:
        """Whether rows of its weight are of inputs."""
        return isinstance(self, EmbeddingLayer)


class OfLayerCollections:
    """Old names of layer collections."""

    def get_layerid_module_map(self: Any, model: nn.Module) -> dict[str, nn.Module]:
        """The module of each layer.

        :meta private:
        """
        return {name: model.get_submodule(name) for name in self.layers}

    def get_layerid_module_maps(self: Any, model: nn.Module) -> tuple[dict[str, nn.Module], dict[nn.Module, str]]:
        """The module of each layer, and the layer of each module.

        :meta private:
        """
        warn("get_layerid_module_maps(model)", "model.get_submodule(name): a layer has the name of its module")
        modules = self.get_layerid_module_map(model)
        return modules, {module: name for name, module in modules.items()}

    _module_to_layer = staticmethod(_module_to_layer)


def install() -> None:
    """Add the old names of vectors, layers and layer collections."""
    for kind in (PVector, FVector):
        adopt(kind, OfVectors)
    adopt(PVector, OfParameterVectors)
    adopt(Layer, OfLayers)
    adopt(LayerCollection, OfLayerCollections)
    attach(vector, random_pvector_dict=random_pvector_dict, random_fvector=random_fvector)
    attach(layercollection, AbstractLayer=Layer, Parameter=lambda *size: Shape(size))
    attach(layercollection, **{kind.__name__: kind for kind in _KIND_OF.values()})
    Layer.classes.update(_KIND_OF)
