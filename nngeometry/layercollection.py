"""Which parameters are seen, in which order, and how each layer packs its own: the coordinates of parameter space."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from . import arguments
from .changes import alone
from .kinds import Kind, Packing, is_ours, kind_of, own_parameters, serving
from .spelling import warn
from .tables import as_html
from .wrappers import BareNames, require_whole_parameters, unwrapped


class Shape(tuple[int, ...]):
    """A shape that answers as a parameter of NNGeometry did: ``layer.weight.size``, ``layer.weight.numel()``."""

    @property
    def size(self) -> tuple[int, ...]:
        """The plain tuple."""
        return tuple(self)

    def numel(self) -> int:
        """Number of entries."""
        return prod(self)


@dataclass(frozen=True, eq=False)
class Layer:
    """The parameters that one module owns: their names (relative to the module), shapes and packing.

    Args:
        name: The module's name in ``model.named_modules()``, without the names of wrappers (DistributedDataParallel,
            torch.compile).
        params: The name and shape of each parameter, in flat order.
        packing: How they are laid out in the module's Jacobian.
        kronecker: Whether that Jacobian has Kronecker factors.
        kind_name: The name of the type of the module.
        module_type: The type of the module, None if it was read from a file.
        served_by: The function of its kind, or "generic".
    """

    #: The class that the layers of a type of module have, where they have one of their own.
    classes: ClassVar[dict[type[nn.Module], type[Layer]]] = {}

    name: str
    params: tuple[tuple[str, tuple[int, ...]], ...]
    packing: Packing
    kronecker: bool
    kind_name: str = "?"
    module_type: type[nn.Module] | None = None
    served_by: str = "?"

    @property
    def _coordinates(self) -> tuple[Any, ...]:
        return self.name, self.params, self.packing, self.kronecker

    def __eq__(self, other: object) -> bool:
        return self._coordinates == other._coordinates if isinstance(other, Layer) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._coordinates)

    def __reduce__(self) -> Any:  # the type may be one that cannot be pickled
        return _layer_of, (type(self), {**vars(self), "module_type": None})

    def numel(self) -> int:
        """Number of scalar parameters."""
        return sum(prod(shape) for _, shape in self.params)

    @property
    def weight(self) -> Shape:
        """Shape of the first parameter."""
        return Shape(self.params[0][1])

    @property
    def bias(self) -> Shape | None:
        """Shape of the parameter named ``bias``, None if the layer has none."""
        shape = dict(self.params).get("bias")
        return None if shape is None else Shape(shape)

    def matches(self, selector: Any) -> bool:
        """Whether a selector selects this layer.

        Args:
            selector: A name (of the layer or of a module above it), a module type or a predicate ``Layer -> bool``.
        """
        if isinstance(selector, str):
            return self.name == selector or self.name.startswith(selector + ".")
        if isinstance(selector, type) and issubclass(selector, Layer):
            return isinstance(self, selector)
        if isinstance(selector, type):
            return self.module_type is not None and issubclass(self.module_type, selector)
        return bool(selector(self))


def _layer_of(cls: type[Layer], fields: dict[str, Any]) -> Layer:
    return cls(**fields)


@dataclass(frozen=True)
class Site:
    """A module of a model through which collected parameters act, and where each of them belongs.

    Args:
        name: The name of the module.
        module: The module.
        kind: What gives its Jacobian.
        params: All parameters that the module's Jacobian is with respect to, in its order.
        routes: For each layer that takes part, which of the module's parameters (by name) are which of the layer's (by
            position).
    """

    name: str
    module: nn.Module
    kind: Kind
    params: dict[str, nn.Parameter]
    routes: tuple[tuple[Layer, dict[str, int]], ...]

    @cached_property
    def packing(self) -> Packing:
        """How ``params`` are packed in the module's Jacobian."""
        return self.kind.packing_of(self.module, self.params)


class LayerCollection:
    """An ordered set of layers: the coordinates of parameter space, shared by vectors, maps and matrices.

    The flat order of parameters is the order of layers, and inside a layer that of its parameters (weight before bias).
    ``len``, ``in``, iteration over names and ``[name]`` are those of a dictionary; ``|`` and ``&`` are :meth:`merge`
    and :meth:`common_layers`.

    Args:
        layers: From names to layers, by default none; :meth:`from_model` makes them.
        ignore_uncalled: Whether a layer that the function does not call has derivative zero, rather than being an
            error.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> lc = LayerCollection.from_model(model)
        >>> list(lc), lc.numel()
        (['0', '2'], 11)
        >>> lc.select("2").numel()
        3
    """

    def __init__(self, layers: Mapping[str, Layer] | None = None, ignore_uncalled: bool = False) -> None:
        if layers is not None:
            arguments.instance("layers", layers, Mapping, "use LayerCollection.from_model(model)")
            for layer in layers.values():
                arguments.instance("layers", layer, Layer, "use LayerCollection.from_model(model)")
        self.layers: dict[str, Layer] = dict(layers or {})
        self.ignore_uncalled = ignore_uncalled

    @classmethod
    @alone
    def from_model(
        cls,
        model: nn.Module,
        *selectors: Any,
        frozen: bool = False,
        ignore_uncalled: bool = False,
        ignore_unsupported_layers: bool | None = None,
    ) -> LayerCollection:
        """Every trainable parameter of the model exactly once, in the order of ``model.named_modules()``.

        A parameter that several modules share is one parameter of the first of them.

        Args:
            model: The model.
            *selectors: Only the layers that one of them selects are kept (see :meth:`select`); all if there is none.
            frozen: Whether parameters with ``requires_grad=False`` are collected too, by default not.
            ignore_uncalled: Whether a layer that the function does not call has derivative zero; by default that is an
                error.

        Returns:
            The collection.

        Raises:
            ValueError: If nothing is left, or for a module whose registered kind does not know its parameters.
            KeyError: For a selector that selects nothing.
        """
        arguments.model(model)
        given, selectors = selectors, tuple(s for s in selectors if not isinstance(s, bool))
        if ignore_unsupported_layers is not None or len(selectors) < len(given):
            warn("from_model(model, ignore_unsupported_layers)", "from_model(model): every layer is supported")
        require_whole_parameters(model)
        owner: dict[int, tuple[str, str]] = {}
        uses: dict[int, list[Packing | None]] = {}
        for name, module, kind, params in _modules(model):
            for pname, p in params.items():
                if isinstance(p, UninitializedParameter):
                    raise ValueError("the model has lazy parameters that have no shape yet: run it once on a minibatch")
                owner.setdefault(id(p), (name, pname))
                uses.setdefault(id(p), []).append(_as_matrix(module, kind, params, pname))
        layers = {}
        registered = False
        for name, module, kind, params in _modules(model):
            registered = registered or not is_ours(kind)
            own = {k: p for k, p in params.items() if owner[id(p)] == (name, k) and (frozen or p.requires_grad)}
            if own:
                of_others = [_together(uses[id(p)]) for p in own.values() if len(uses[id(p)]) > 1]
                layers[name] = _layer(name, module, kind, params, own, of_others)
        collection = cls(layers, ignore_uncalled)
        if selectors:
            collection = collection.select(*selectors)
        if not collection.layers:
            others = ": none has requires_grad=True; LayerCollection.from_model(model, frozen=True) collects them too"
            hint = "" if frozen else others
            raise ValueError(f"no parameters to collect in {type(model).__name__}{hint}")
        if registered:
            collection.sites(model)  # raises where a kind cannot apply
        return collection

    def add_layer(self, name: str, layer: Layer) -> None:
        """Append a layer, in place.

        Args:
            name: The name of its module in the model.
            layer: The layer.

        Raises:
            ValueError: If there is one of that name.
        """
        arguments.instance("name", name, str, "the name of the module in the model")
        arguments.instance("layer", layer, Layer, "use add_layer_from_model(model, module)")
        if "(" in name:  # in NNGeometry 0.2 and 0.3 names ended in str(module)
            name = name[: name.index("(")].rpartition(".")[0]
        layer = layer if layer.name == name else replace(layer, name=name)
        if name in self.layers:
            raise ValueError(f"layer {name!r} is in the collection already")
        self.layers[name] = layer

    def add_layer_from_model(self, model: nn.Module, module: nn.Module, frozen: bool = False) -> None:
        """Append the layer of one module of the model, in place.

        Args:
            model: The model.
            module: One of its modules.
            frozen: Whether its frozen parameters are collected too, by default not.

        Raises:
            ValueError: If it is not a module of the model.
        """
        arguments.model(model)
        names = [BareNames(model)(name) for name, m in model.named_modules() if m is unwrapped(module)]
        if not names:
            raise ValueError(f"the given {type(module).__name__} is not a module of the model")
        found = LayerCollection.from_model(model, lambda layer: layer.name == names[0], frozen=frozen)
        self.add_layer(names[0], found[names[0]])

    def select(self, *selectors: Any) -> LayerCollection:
        """The sub-collection of the layers that at least one selector matches.

        Args:
            *selectors: Names of layers or of modules above them, module types, or predicates ``Layer -> bool``.

        Raises:
            KeyError: For a selector that matches nothing.

        Example:
            >>> model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2), nn.Linear(2, 1))
            >>> list(LayerCollection.from_model(model).select(nn.Linear))
            ['0', '2']
        """
        for selector in selectors:
            if not (isinstance(selector, str | type) or callable(selector)):
                raise TypeError(
                    f"a selector is a name, a module type or a predicate, got {arguments.described(selector)}: pass "
                    "several as several arguments"
                )
            if not any(layer.matches(selector) for layer in self.layers.values()):
                raise KeyError(f"{selector!r} selects no layer: the collection has {', '.join(self.layers) or 'none'}")
        return self._with(
            {name: layer for name, layer in self.layers.items() if any(layer.matches(s) for s in selectors)}
        )

    def exclude(self, *selectors: Any) -> LayerCollection:
        """The sub-collection of the layers that no selector matches.

        Args:
            *selectors: As of :meth:`select`.

        Raises:
            KeyError: For a selector that matches nothing.
        """
        gone = self.select(*selectors)
        return self._with({name: layer for name, layer in self.layers.items() if name not in gone.layers})

    def merge(self, other: LayerCollection) -> LayerCollection:
        """The layers of both, those of ``self`` first.

        Args:
            other: Another collection.

        Raises:
            ValueError: If a name stands for different layers.
        """
        self._check_common(other)
        return self._with({**self.layers, **other.layers})

    __or__ = merge

    def common_layers(self, other: LayerCollection) -> LayerCollection:
        """The layers that are in both.

        Args:
            other: Another collection.

        Raises:
            ValueError: If a name stands for different layers.
        """
        self._check_common(other)
        return self._with({name: layer for name, layer in self.layers.items() if name in other.layers})

    __and__ = common_layers

    def _with(self, layers: Mapping[str, Layer]) -> LayerCollection:
        return LayerCollection(layers, self.ignore_uncalled)

    def _check_common(self, other: LayerCollection) -> None:
        arguments.instance("the other", other, LayerCollection, "make one with LayerCollection.from_model(model)")
        for name, layer in self.layers.items():
            if name in other.layers and other.layers[name] != layer:
                raise ValueError(
                    f"layer {name!r} differs between the two collections: {layer} and {other.layers[name]}"
                )

    def numel(self) -> int:
        """Number of scalar parameters."""
        return sum(layer.numel() for layer in self.layers.values())

    @property
    def p_pos(self) -> dict[str, int]:
        """Where each layer starts in the flat order."""
        return {name: s.start for name, s in self.slices().items()}

    def slices(self) -> dict[str, slice]:
        """Where each layer is in the flat order."""
        out, start = {}, 0
        for name, layer in self.layers.items():
            out[name] = slice(start, start + layer.numel())
            start += layer.numel()
        return out

    def named_parameters(
        self, model: Any = None, layerid_to_module: Mapping[str, nn.Module] | None = None
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The collected parameters of a model, with their full names, in flat order.

        Args:
            model: The model that the collection is of, or one with the same layers.

        Raises:
            ValueError: If the model does not have them.
        """
        return iter(self._named(model if layerid_to_module is None else layerid_to_module))

    @alone
    def _named(self, model: Any) -> list[tuple[str, nn.Parameter]]:
        if isinstance(model, Mapping):
            warn("parameters(layerid_to_module)", "parameters(model)")
            return [
                (f"{name}.{k}" if name else k, model[name].get_parameter(k))
                for name, layer in self.layers.items()
                for k, _ in layer.params
            ]
        arguments.model(model)
        parameters = []
        named = dict(model.named_parameters(remove_duplicate=False))
        bare: dict[str, nn.Parameter] | None = None
        for layer in self.layers.values():
            for pname, shape in layer.params:
                full = f"{layer.name}.{pname}" if layer.name else pname
                p = named.get(full)
                if p is None:
                    bare = {BareNames(model)(k): p for k, p in named.items()} if bare is None else bare
                    p = bare.get(full)
                if p is None or tuple(p.shape) != shape:
                    found = "no such parameter" if p is None else f"shape {tuple(p.shape)}"
                    raise ValueError(
                        f"the layer collection is of another model: it has {full!r} of shape {shape}, "
                        f"{type(model).__name__} has {found}. Build it with LayerCollection.from_model(model)"
                    )
                parameters.append((full, p))
        if len({id(p) for _, p in parameters}) < len(parameters):
            names: dict[int, str] = {}
            one, other = next((names[id(p)], k) for k, p in parameters if names.setdefault(id(p), k) != k)
            raise ValueError(
                f"the layer collection is of another model: in {type(model).__name__} its parameters {one!r} and "
                f"{other!r} are one and the same. Build it with LayerCollection.from_model(model)"
            )
        return parameters

    def parameters(
        self, model: Any = None, layerid_to_module: Mapping[str, nn.Module] | None = None
    ) -> list[nn.Parameter]:
        """The collected parameters of a model, in flat order.

        Args:
            model: As of :meth:`named_parameters`.
        """
        return [p for _, p in self.named_parameters(model, layerid_to_module)]

    @alone
    def sites(self, model: nn.Module) -> list[Site]:
        """The modules of a model through which the collected parameters act.

        Args:
            model: As of :meth:`named_parameters`.

        Raises:
            ValueError: If a registered kind cannot serve one of them.
        """
        params = iter(self.parameters(model))
        home = {id(next(params)): (layer, k) for layer in self.layers.values() for k in range(len(layer.params))}
        sites = []
        for name, module, kind, own in _modules(model):
            routes: dict[str, tuple[Layer, dict[str, int]]] = {}
            for pname, p in own.items():
                if id(p) in home:
                    layer, k = home[id(p)]
                    routes.setdefault(layer.name, (layer, {}))[1][pname] = k
            if routes:
                site = Site(name, module, kind, kind.known(own), tuple(routes.values()))
                if not is_ours(kind):
                    _check_applies(site)
                sites.append(site)
        return sites

    def layer(self, name: Any, operation: str) -> Layer:
        """The layer of that name.

        Args:
            name: The name.
            operation: What asks for it, for the message.

        Raises:
            KeyError: If there is none, with the names that there are.
        """
        if not isinstance(name, str) or name not in self.layers:
            raise KeyError(f"{operation}: no layer {name!r}, the collection has {', '.join(self.layers)}")
        return self.layers[name]

    def __getitem__(self, name: str) -> Layer:
        if name not in self.layers:
            hint = arguments.near(name, self.layers)
            raise KeyError(f"no layer {name!r}{hint}: the collection has {', '.join(self.layers) or 'none'}")
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __contains__(self, name: object) -> bool:
        return name in self.layers

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LayerCollection):
            return NotImplemented
        return self is other or list(self.layers.items()) == list(other.layers.items())

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        lines = [f"LayerCollection of {len(self)} layers, {self.numel()} parameters"]
        names = [f"{name or '(root)'}:" for name in self.layers]
        widths = [max(map(len, column), default=0) for column in (names, [x.kind_name for x in self.layers.values()])]
        for name, layer in zip(names, self.layers.values(), strict=True):
            shapes = ", ".join(f"{pname} {shape}" for pname, shape in layer.params)
            served = "" if layer.served_by == "?" else f", {layer.served_by}"
            lines.append(f"  {name.ljust(widths[0])} {layer.kind_name.ljust(widths[1])} ({shapes}){served}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = []
        for name, layer in self.layers.items():
            shapes = ", ".join(f"{pname} {shape}" for pname, shape in layer.params)
            rows.append([name or "(root)", layer.kind_name, shapes, str(layer.numel())])
        title = f"LayerCollection of {len(self)} layers, {self.numel()} parameters"
        return as_html(title, ["layer", "kind", "shapes", "parameters"], rows)


def split(layer: Layer, flat: Tensor) -> list[Tensor]:
    """Views of a layer's parameters in its flat ones.

    Args:
        layer: The layer.
        flat: Its flat parameters ``(..., p)``.

    Returns:
        For each parameter ``(..., *shape)``.
    """
    sizes = [prod(shape) for _, shape in layer.params]
    return [
        piece.reshape(*flat.shape[:-1], *shape)
        for piece, (_, shape) in zip(flat.split(sizes, -1), layer.params, strict=True)
    ]


_LISTS = (nn.ParameterList, nn.ParameterDict)


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, Kind, dict[str, nn.Parameter]]]:
    """Every module that owns parameters, each once, with its kind and those parameters."""
    inside: tuple[str, ...] = ()
    bare = BareNames(model)
    for name, module in model.named_modules():
        if (inside and name.startswith(inside)) or isinstance(module, _LISTS):
            continue
        kind = kind_of(module)
        if kind.whole:
            inside = (*inside, name + "." if name else "")
            params = dict(module.named_parameters(remove_duplicate=False))
            kind = serving(kind, params)
        else:
            params = own_parameters(module)
            if any(isinstance(child, _LISTS) for child in module._modules.values()):
                for k, child in module.named_children():
                    if isinstance(child, _LISTS):  # it has no forward: its parameters act in that of its owner
                        params.update({f"{k}.{j}": p for j, p in child.named_parameters()})
            if not is_ours(kind):
                _check_owned(name, module, kind, params)
            kind = serving(kind, params)
        if params:
            yield bare(name), module, kind, params


def _check_owned(name: str, module: nn.Module, kind: Kind, own: dict[str, nn.Parameter]) -> None:
    """Raise, naming the module, if a kind that the user registered would serve nothing of it, or not all that it names:
    because those parameters are its children's.
    """
    absent = [k for k in kind.parameters if k not in own and not hasattr(module, k)]  # None where a module lacks one
    if not absent:
        return
    below = [k for k, p in module.named_parameters(remove_duplicate=False) if k not in own and p.requires_grad]
    named = [k for k in below if k in absent]
    if named or (below and not own and len(absent) == len(kind.parameters)):
        raise ValueError(
            f"layer {name!r} ({type(module).__name__}): its registered kind {kind.name!r} is for "
            f"{', '.join(absent)}, but {', '.join(named or below)} are parameters of its children, which are layers of "
            "their own: register the kind for the type of the children, or hold the parameters in the module itself"
        )


def _check_applies(site: Site) -> None:
    """Raise, naming the module, if a kind that the user registered cannot serve it."""
    what = f"layer {site.name!r} ({type(site.module).__name__}): its registered kind {site.kind.name!r}"
    unknown = [k for _, names in site.routes for k in names if k not in site.params]
    if unknown:
        raise ValueError(
            f"{what} is for parameters named {', '.join(site.kind.parameters)}, but it has {', '.join(unknown)}: name "
            "all of them in kind(..., parameters=...), freeze what is not to be collected, or give the module a type "
            "of its own (a subclass), which the generic kind serves"
        )
    numel = sum(p.numel() for p in site.params.values())
    if site.packing.numel() != numel:
        raise ValueError(
            f"{what} has a packing of shape {site.packing.shape}, which is {site.packing.numel()} numbers, but its "
            f"parameters {', '.join(site.params)} are {numel}: mend packing= or parameters= of nngeometry.kind"
        )


def _as_matrix(module: nn.Module, kind: Kind, params: dict[str, nn.Parameter], name: str) -> Packing | None:
    """How a module packs one of its parameters, if that is the weight of a linear map or a table."""
    if not kind.kronecker or kind.packing is None or name != next(iter(kind.known(params)), None):
        return None
    packing = kind.packing_of(module, kind.known(params))
    return None if packing.crossed is None else packing


def _together(uses: list[Packing | None]) -> Packing | None:
    """The packing in which the Jacobians of modules that share a weight add: that of the first, or of a table if there
    is one; None unless they use it as one matrix or as its transpose, without a bias if as both.
    """
    known = [use for use in uses if use is not None]
    first = next((use for use in known if use.crossed), None) or next(iter(known), None)
    if first is None or len(known) < len(uses):
        return None
    both = any(use.crossed != first.crossed for use in known)
    return None if both and known[0].bias else first


def _layer(
    name: str,
    module: nn.Module,
    kind: Kind,
    params: dict[str, nn.Parameter],
    own: dict[str, nn.Parameter],
    of_others: list[Packing | None],
) -> Layer:
    """of_others: for each parameter that other modules use too how it is packed for all of them, None if it is not."""
    shapes = tuple((k, tuple(p.shape)) for k, p in own.items())
    numel = sum(p.numel() for p in own.values())
    packing, kronecker = Packing.flat(numel), False
    if kind.packing is not None and None not in of_others:
        known = kind.known(params)
        table = next((use for use in of_others if use is not None and use.crossed), None)
        if table is not None:
            packing, kronecker = table, True
        elif [*own] == [*known]:
            packing, kronecker = kind.packing_of(module, known), kind.kronecker
        elif kind.kronecker and [*own] == [*known][:-1]:  # all but the bias
            full = kind.packing_of(module, known)
            if full.bias and full.without_bias().numel() == numel:
                packing, kronecker = full.without_bias(), True
    cls = next((Layer.classes[base] for base in type(module).__mro__ if base in Layer.classes), Layer)
    return cls(
        name=name,
        params=shapes,
        packing=packing,
        kronecker=kronecker,
        kind_name=type(module).__name__,
        module_type=type(module),
        served_by=kind.name,
    )
