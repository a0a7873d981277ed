"""Steps of a net that have parameters: layers of torch with their options, the user's own, bare parameters."""

from __future__ import annotations

from typing import Any

from .choices import Choices
from .steps import Lines, Now, default, module, options, step


@step("module", "layer", times=4)
def linear(c: Choices, now: Now) -> Lines | None:
    if now.indices:
        return None
    kind = c.of(["nn.Linear"] * 6 + ["Flipped"])
    return module(f"{kind}({now.shape[-1]}, {c.of([3, 2, 4, 1, 5])}{options(bias=default(c, False))})")


@step("module", "layer", times=3)
def convolution(c: Choices, now: Now) -> Lines | None:
    if now.indices or not 2 <= len(now.shape) <= 4:
        return None
    dims, channels = len(now.shape) - 1, now.shape[0]
    groups = c.of([g for g in (1, 2, 3, 4) if channels % g == 0])
    made = f"nn.Conv{dims}d({channels}, {groups * c.of([2, 1, 3])}, {_sizes(c, dims, [2, 1, 3])}"
    same = c.once_in(6)
    stride = None if same else c.of([None, 2, None])
    padding = "same" if same else c.of([None, 1, _tuple(c, dims, [0, 1, 2])])
    return module(
        made
        + options(
            stride=stride,
            padding=padding,
            dilation=c.of([None, None, 2]),
            groups=None if groups == 1 else groups,
            padding_mode=c.of([None, None, "reflect", "circular", "replicate"]),
            bias=default(c, False),
        )
        + ")"
    )


@step("module", "layer")
def transposed_convolution(c: Choices, now: Now) -> Lines | None:
    if now.indices or not 2 <= len(now.shape) <= 4:
        return None
    dims, channels = len(now.shape) - 1, now.shape[0]
    groups = c.of([g for g in (1, 2, 3) if channels % g == 0])
    made = f"nn.ConvTranspose{dims}d({channels}, {groups * c.of([2, 1])}, {_sizes(c, dims, [2, 1, 3])}"
    stride = c.of([None, 2])
    return module(
        made
        + options(
            stride=stride,
            padding=c.of([None, 1]),
            output_padding=c.of([None, 1]) if stride else None,
            dilation=c.of([None, None, 2]),
            groups=None if groups == 1 else groups,
            bias=default(c, False),
        )
        + ")"
    )


@step("module", "layer", "norm", times=3)
def norm(c: Choices, now: Now) -> Lines | None:
    if now.indices:
        return None
    affine = c.of([None, None, False])
    axes = len(now.shape)
    kind = c.of(["layer", "batch", "group", "instance", "rms"])
    if kind == "layer" or kind == "rms":
        shape = now.shape[-1 - c.below(axes) :]
        bias = None if kind == "rms" else default(c, False)
        name = "nn.LayerNorm" if kind == "layer" else "nn.RMSNorm"
        return module(f"{name}({list(shape)}{options(elementwise_affine=affine, bias=bias)})")
    channels = now.shape[0]
    if kind == "group":
        groups = c.of([g for g in (1, 2, 3, channels) if channels % g == 0])
        return module(f"nn.GroupNorm({groups}, {channels}{options(affine=affine)})")
    dims = max(1, axes - 1)
    if kind == "batch":
        return module(f"nn.BatchNorm{dims}d({channels}{options(affine=affine)})")
    return module(
        f"nn.InstanceNorm{dims}d({channels}{options(affine=c.of([True, False]), track_running_stats=default(c, True))})"
    )


@step("module", "layer")
def prelu(c: Choices, now: Now) -> Lines | None:
    return None if now.indices else module(f"nn.PReLU({c.of([1, now.shape[0]])})")


@step("module", "layer", times=2)
def embedding(c: Choices, now: Now) -> Lines | None:
    if not now.indices:
        return None
    given = options(
        padding_idx=c.of([None, 0, 1]),
        sparse=default(c, True),
        max_norm=1.0 if c.once_in(12) else None,
        scale_grad_by_freq=True if c.once_in(12) else None,
    )
    return module(f"nn.Embedding(5, {c.of([3, 2, 4])}{given})")


@step("module", "layer")
def embedding_bag(c: Choices, now: Now) -> Lines | None:
    if not now.indices or len(now.shape) != 1:
        return None
    mode = c.of(["sum", "mean", "max"])
    given = options(mode=mode, padding_idx=c.of([None, 0]), sparse=default(c, True) if mode != "max" else None)
    return module(f"nn.EmbeddingBag(5, {c.of([3, 2, 4])}{given})")


@step("layer")
def bilinear(c: Choices, now: Now) -> Lines | None:
    if now.indices:
        return None
    made = f"nn.Bilinear({now.shape[-1]}, {{other}}, {c.of([2, 3])}{options(bias=default(c, False))})"
    if now.second and len(now.shape) == 1 and c.of([True, False]):
        return Lines((f"self.{{m}} = {made.replace('{other}', '3')}",), ("x = self.{m}(x, z)",))
    return Lines((f"self.{{m}} = {made.replace('{other}', str(now.shape[-1]))}",), ("x = self.{m}(x, x)",))


@step("layer", times=2)
def recurrent(c: Choices, now: Now) -> Lines | None:
    if now.indices or len(now.shape) != 2:
        return None
    kind = c.of(["RNN", "GRU", "LSTM"])
    first = c.of([True, False])
    given = options(
        batch_first=True if first else None,
        bidirectional=default(c, True),
        num_layers=c.of([None, None, 2]),
        bias=default(c, False),
        proj_size=c.of([None, 1]) if kind == "LSTM" else None,
    )
    init = (f"self.{{m}} = nn.{kind}({now.shape[-1]}, {c.of([2, 3])}{given})",)
    given_x = "x" if first else "x.transpose(0, 1)"
    if c.of([True, False]):
        back = "" if first else ".transpose(0, 1)"
        return Lines(init, (f"x = self.{{m}}({given_x})[0]{back}",))
    last = "[1][0]" if kind == "LSTM" else "[1]"
    return Lines(init, (f"x = self.{{m}}({given_x}){last}.transpose(0, 1)",))


@step("layer", "attention", times=2)
def attention(c: Choices, now: Now) -> Lines | None:
    if now.indices or len(now.shape) != 2:
        return None
    length, d = now.shape
    kind = c.of(["nn.MultiheadAttention", "nn.TransformerEncoderLayer", "F.scaled_dot_product_attention"])
    heads = c.of([h for h in (1, 2) if d % h == 0])
    first = c.of([True, False])
    a, b = ("", "") if first else (".transpose(0, 1)", ".transpose(0, 1)")
    masked = c.once_in(3)
    mask = f"torch.ones({length}, {length}, dtype=torch.bool).triu(1)"
    if kind == "nn.MultiheadAttention":
        given = options(
            batch_first=True if first else None,
            bias=default(c, False),
            add_bias_kv=c.of([None, None, True]),
            add_zero_attn=c.of([None, None, True]),
            kdim=c.of([None, None, d]),
        )
        call = options(need_weights=default(c, False)) + (f", attn_mask={mask}" if masked else "")
        forward = (f"y = x{a}", f"x = self.{{m}}(y, y, y{call})[0]{b}")
        return Lines((f"self.{{m}} = nn.MultiheadAttention({d}, {heads}{given})",), forward)
    if kind == "nn.TransformerEncoderLayer":
        given = options(
            dropout=c.of([0.0, None]),
            activation=c.of([None, "gelu"]),
            batch_first=True if first else None,
            norm_first=default(c, True),
        )
        call = f", src_mask={mask}" if masked else ""
        return Lines(
            (f"self.{{m}} = nn.TransformerEncoderLayer({d}, {heads}, 3{given})",), (f"x = self.{{m}}(x{a}{call}){b}",)
        )
    causal = options(is_causal=True if masked else None)
    return Lines(
        (f"self.{{m}} = nn.Linear({d}, {3 * d}{options(bias=default(c, False))})",),
        (
            f"q, k, v = self.{{m}}(x).unflatten(-1, (3, {heads}, -1)).permute(2, 0, 3, 1, 4)",
            f"x = F.scaled_dot_product_attention(q, k, v{causal}).transpose(1, 2).flatten(2)",
        ),
    )


@step("layer", "bare", times=2)
def bare_parameter(c: Choices, now: Now) -> Lines | None:
    if now.indices:
        return None
    d, shape = now.shape[-1], list(now.shape)
    whole = c.of([[d], shape])
    init = (f"self.{{m}} = nn.Parameter(torch.randn({whole}))",)
    square = (f"self.{{m}} = nn.Parameter(torch.randn({d}, {d}))",)
    token = (f"self.{{m}} = nn.Parameter(torch.randn(1, 1, {d}))",)
    pair = (f"self.{{m}} = nn.ParameterList([torch.randn({d}), torch.randn({d})])",)
    named = (f"self.{{m}} = nn.ParameterDict({{'a': torch.randn({d}), 'b': torch.randn(())}})",)
    use = c.of(
        [
            (init, "x = x * self.{m}"),
            (init, "x = x + self.{m}"),
            (square, "x = x @ self.{m}"),
            (square, "x = F.linear(x, self.{m})"),
            (pair, "x = x * self.{m}[0] + self.{m}[1]"),
            (named, "x = x * self.{m}['a'] + self.{m}['b']"),
            (token, "x = torch.cat([self.{m}.expand(len(x), -1, -1), x], 1)"),
            (init, "x += self.{m}"),
            (init, "x *= self.{m}"),
            (init, "x = torch.addcmul(x, x, self.{m})"),
        ]
    )
    return Lines(use[0], (use[1],))


@step("layer")
def own_layer(c: Choices, now: Now) -> Lines | None:
    if now.indices:
        return None
    d = now.shape[-1]
    plain = module(f"Gain({d})")
    return c.of(
        [
            plain,
            Lines((f"self.{{m}} = Gain({d})",), ("x = self.{m}(x, power=2)",)),
            Lines((f"self.{{m}} = Gain({d})",), ("x = self.{m}(power=3, x=x)",)),
            Lines((f"self.{{m}} = Several({d})",), ("x = self.{m}(x)[0]",)),
            Lines((f"self.{{m}} = Several({d})",), ("x, y = self.{m}(x)", "x = x + y['again']")),
            module(f"First(Several({d}))"),
        ]
    )


@step("layer", "parametrised")
def parametrised(c: Choices, now: Now) -> Lines | None:
    if now.indices:
        return None
    d = now.shape[-1]
    inner = f"nn.Linear({d}, {c.of([3, 2])})"
    if len(now.shape) == 2 and c.of([False, True]):
        inner = f"nn.Conv1d({now.shape[0]}, 2, 1)"
    made = f"self.{{m}} = {inner}"
    return c.of(
        [
            module(f"nn.utils.parametrizations.weight_norm({inner})"),
            module(f"nn.utils.parametrizations.spectral_norm({inner})"),
            Lines((made, "nn.utils.parametrize.register_parametrization(self.{m}, 'weight', Centre())"), _CALL, True),
            Lines((made, "nn.utils.parametrize.register_parametrization(self.{m}, 'bias', Centre())"), _CALL, True),
            module(f"nn.utils.weight_norm({inner})"),
        ]
    )


_CALL = ("x = self.{m}(x)",)


@step("layer", "elsewhere")
def read_elsewhere(c: Choices, now: Now) -> Lines | None:
    """Weights that reach the output otherwise than through their module."""
    if now.indices:
        return None
    d = now.shape[-1]
    made = (f"self.{{m}} = nn.Linear({d}, {c.of([3, 2, d])})",)
    return c.of(
        [
            Lines(made, ("x = F.linear(x, self.{m}.weight, self.{m}.bias)",)),
            Lines((*made, "self.{m}_kept = [self.{m}.weight, self.{m}.bias]"), ("x = F.linear(x, *self.{m}_kept)",)),
            Lines(
                (*made, "self.{m}_kept = {'w': self.{m}.weight}"),
                ("x = F.linear(x, self.{m}_kept['w'], self.{m}.bias)",),
            ),
            Lines(
                (*made, "self.{m}_call = lambda x, w=self.{m}.weight, b=self.{m}.bias: F.linear(x, w, b)"),
                ("x = self.{m}_call(x)",),
            ),
            Lines((*made, "self.{m}_kept = [self.{m}]"), ("x = self.{m}_kept[0](x)",)),
            Lines(made, ("x = self.{m}(x) * self.{m}.weight.sum()",)),
            Lines((*made, "self.{m}_kept = [self.{m}.bias]"), ("x = self.{m}(x) * self.{m}_kept[0]",)),
            Lines(made, ("x = self.{m}.forward(x)",)),
        ]
    )


@step("layer", "second")
def second_input(c: Choices, now: Now) -> Lines | None:
    if now.indices or not now.second:
        return None
    d = now.shape[-1]
    one = "" if len(now.shape) == 1 else f".view(-1, {'1, ' * (len(now.shape) - 1)}{d})"
    return c.of(
        [
            Lines((f"self.{{m}} = nn.Linear(3, {d})",), (f"x = x + self.{{m}}(z){one}",)),
            Lines((f"self.{{m}} = nn.Linear(3, {d})",), (f"x = x * self.{{m}}(z){one}",)),
            Lines((f"self.{{m}} = nn.Linear(3, {d})",), (f"x += self.{{m}}(z){one}",)),
            Lines((f"self.{{m}} = nn.Embedding(4, {d})",), (f"x = x + self.{{m}}((z[:, 0] > 0).long()){one}",)),
            Lines(
                (f"self.{{m}} = nn.Embedding(4, {d})",),
                ("x = x + self.{m}(torch.arange(x.shape[-2] if x.ndim > 2 else 1))",),
            ),
        ]
    )


def _sizes(c: Choices, dims: int, options: list[int]) -> Any:
    return c.of(options) if c.of([True, False]) else _tuple(c, dims, options)


def _tuple(c: Choices, dims: int, options: list[int]) -> tuple[int, ...]:
    return tuple(c.of(options) for _ in range(dims))
