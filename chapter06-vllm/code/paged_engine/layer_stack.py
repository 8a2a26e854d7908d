"""The layers of a short step as one call of the compiled operators (`cpp/layers.cpp`)."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from paged_engine.attention import PagedCache, Plan
from paged_engine.native import native
from paged_engine.packing import Linear, Product
from paged_engine.paged_model import Layer

_POINTER, _COUNT = ctypes.c_void_p, ctypes.c_int64
_SCRATCH = ("added", "normed", "qkv", "attended", "gate_up", "active")
_COUNTS = ("tokens", "hidden", "heads", "kv_heads", "dim", "block_size", "table_stride")


class _Product(ctypes.Structure):
    _fields_ = [
        ("panels", _POINTER), ("bias", _POINTER), ("columns", _COUNT), ("depth", _COUNT),
        ("narrow", _COUNT),
    ]  # fmt: skip


class _Layer(ctypes.Structure):
    _fields_ = [
        ("input_norm", _POINTER), ("mlp_norm", _POINTER), ("qkv", _Product), ("output", _Product),
        ("gate_up", _Product), ("down", _Product), ("keys", _POINTER), ("values", _POINTER),
    ]  # fmt: skip

    def products(self) -> tuple[_Product, _Product, _Product, _Product]:
        return self.qkv, self.output, self.gate_up, self.down


class _Step(ctypes.Structure):
    _fields_ = [
        *[(name, _POINTER) for name in ("x", *_SCRATCH, "cosine", "sine")],
        *[(name, _POINTER) for name in ("slots", "tables", "lengths")],
        *[(name, _COUNT) for name in (*_COUNTS, "narrow_cache", "threads")],
        ("scale", ctypes.c_float), ("eps", ctypes.c_float),
    ]  # fmt: skip


class LayerStack:
    """Layers whose every operator is compiled; `of` says whether a model's are."""

    def __init__(self, layers: Sequence[Layer], cache: PagedCache) -> None:
        built, _ = native()
        assert built is not None
        self.layers = list(layers)  # the tensors behind the pointers live as long
        self.cache, self.eps = cache, layers[0].eps
        self._call = built.library.decoder_layers
        self._layers = (_Layer * len(layers))(*(_pointers(layer, cache) for layer in layers))
        qkv, output, gate_up, down = self._layers[0].products()
        self.widths = {
            "added": down.columns, "normed": qkv.depth, "qkv": qkv.columns,
            "attended": output.depth, "gate_up": gate_up.columns, "active": down.depth,
        }  # fmt: skip

    @classmethod
    def of(cls, layers: Sequence[Layer], cache: PagedCache) -> "LayerStack | None":
        """The stack of `layers`; None where one of them has an operator that is not compiled."""
        built, _ = native()
        dim = cache.shape.head_dim
        if built is None or not cache.data.is_cpu or not built.library.attention_takes(dim):
            return None
        return cls(layers, cache) if all(map(_is_compiled, layers)) else None

    def takes(self, plan: Plan) -> bool:
        """Whether all attention of a step is the compiled kernel's."""
        return plan.tables is not None and not plan.prefills and not plan.decodes

    def __call__(self, x: Tensor, rope: tuple[Tensor, Tensor], plan: Plan) -> Tensor:
        """What the last layer adds to `x` [tokens, hidden], which the others change in place."""
        assert plan.tables is not None and plan.lengths is not None
        shape, tokens = self.cache.shape, x.shape[0]
        scratch = torch.empty(tokens * sum(self.widths.values()))
        parts = scratch.split([tokens * width for width in self.widths.values()])
        step = _Step(
            x=x.data_ptr(), cosine=rope[0].data_ptr(), sine=rope[1].data_ptr(),
            slots=plan.slots.data_ptr(), tables=plan.tables.data_ptr(),
            lengths=plan.lengths.data_ptr(), tokens=tokens, hidden=x.shape[1],
            heads=self.widths["attended"] // shape.head_dim, kv_heads=shape.kv_heads,
            dim=shape.head_dim, block_size=shape.block_size, table_stride=plan.tables.stride(0),
            narrow_cache=self.cache.data.dtype == torch.bfloat16, threads=torch.get_num_threads(),
            scale=self.cache.scale, eps=self.eps,
            **{name: part.data_ptr() for name, part in zip(self.widths, parts, strict=True)},
        )  # fmt: skip
        self._call(self._layers, len(self.layers), ctypes.byref(step))
        return parts[0].view(tokens, -1)


def _is_compiled(layer: Layer) -> bool:
    products = (layer.qkv, layer.output, layer.gate_up, layer.down)
    plain = all(isinstance(one, Linear) for one in products)
    norms = (layer.input_norm, layer.mlp_norm)
    return (
        plain and layer.head_norms == (None, None) and all(n.dtype == torch.float32 for n in norms)
    )


def _pointers(layer: Layer, cache: PagedCache) -> _Layer:
    return _Layer(
        layer.input_norm.data_ptr(), layer.mlp_norm.data_ptr(),
        *(_product(one) for one in (layer.qkv, layer.output, layer.gate_up, layer.down)),
        cache.keys[layer.index].data_ptr(), cache.values[layer.index].data_ptr(),
    )  # fmt: skip


def _product(linear: Product) -> _Product:
    assert isinstance(linear, Linear)  # as `_is_compiled` has found
    bias = None if linear.bias is None else linear.bias.data_ptr()
    narrow = linear.panels.dtype == torch.bfloat16
    return _Product(linear.panels.data_ptr(), bias, linear.columns, linear.depth, narrow)
