"""Steps of a net between layers: activations, views, operations in place, sharing, hooks; several steps at once."""

from __future__ import annotations

from .choices import Choices
from .steps import Lines, Now, default, does, module, options, step

# Sharing, tying, freezing, hooks: what is done with a layer that is there


@step("sharing", times=2)
def again(c: Choices, now: Now) -> Lines | None:
    if not now.modules:
        return None
    name = c.of(now.modules)
    return does(c.of([f"x = self.{name}(x)", f"x = self.{name}(x) + x", f"x = x + self.{name}(x.tanh())"]))


@step("sharing", "tying", times=2)
def tied(c: Choices, now: Now) -> Lines | None:
    square = [(n, s) for n, s in now.named if len(s) == 2 and n.endswith("weight") and not now.indices]
    fits = [(n, s) for n, s in square if s[1] == now.shape[-1]] + [(n, s) for n, s in square if s[0] == now.shape[-1]]
    if not fits:
        return None
    name, (rows, columns) = c.of(fits)
    if columns == now.shape[-1]:
        bias = options(bias=default(c, False))
        tie = f"self.{{m}}.weight = self.{name}"
        return module(f"nn.Linear({columns}, {rows}{bias})", tie)
    return does(f"x = F.linear(x, self.{name}.t())")


@step("freezing", times=2)
def frozen(c: Choices, now: Now) -> Lines | None:
    if not now.named:
        return None
    name, _ = c.of(now.named)
    owner = name.rpartition(".")[0]
    whole = f"self.{owner}.requires_grad_(False)" if owner else f"self.{name}.requires_grad_(False)"
    return Lines((c.of([f"self.{name}.requires_grad_(False)", whole]),), ())


@step("hooks")
def hook(c: Choices, now: Now) -> Lines | None:
    if not now.modules:
        return None
    name = c.of(now.modules)
    return Lines(
        (
            c.of(
                [
                    f"self.{name}.register_forward_hook(lambda m, a, y: y * 2 if torch.is_tensor(y) else None)",
                    f"self.{name}.register_forward_hook(lambda m, a, y: y.mul_(2) if torch.is_tensor(y) else None)",
                    f"self.{name}.register_forward_pre_hook(lambda m, a: (a[0] * 2, *a[1:]))",
                    f"self.{name}.register_forward_hook(lambda m, a, y: None)",
                    f"self.{name}.register_full_backward_hook(lambda m, gx, gy: None)",
                ]
            ),
        ),
        (),
    )


# Activations, pools


@step("module", "activation", times=3)
def activation(c: Choices, now: Now) -> Lines | None:
    if now.indices:
        return None
    return module(
        c.of(
            [
                "nn.Tanh()",
                "nn.ReLU()",
                "nn.Sigmoid()",
                "nn.GELU()",
                "nn.Softplus()",
                "nn.LogSigmoid()",
                "nn.Softsign()",
                "nn.Tanhshrink()",
                "nn.Hardshrink(0.1)",
                "nn.Softshrink(0.1)",
                "nn.Softmax(-1)",
                "nn.LogSoftmax(1)",
                "nn.GLU(-1)",
                "nn.Dropout(0.5)",
                "nn.AlphaDropout(0.5)",
                "nn.Hardsigmoid()",
            ]
        )
    )


@step("module", "activation", "in-place", times=3)
def in_place_activation(c: Choices, now: Now) -> Lines | None:
    if now.indices:
        return None
    kind = c.of(
        [
            "ReLU(",
            "LeakyReLU(0.1, ",
            "SiLU(",
            "ELU(",
            "CELU(",
            "SELU(",
            "ReLU6(",
            "Hardtanh(",
            "Hardswish(",
            "Mish(",
            "Threshold(0.1, 0.2, ",
            "Hardsigmoid(",
            "Dropout(0.5, ",
            "RReLU(",
        ]
    )
    return module(f"nn.{kind}inplace=True)")


@step("module", "pool")
def pool(c: Choices, now: Now) -> Lines | None:
    dims = len(now.shape) - 1
    if now.indices or not 1 <= dims <= 3:
        return None
    return module(
        c.of(
            [
                f"nn.AvgPool{dims}d(2)",
                f"nn.MaxPool{dims}d(2)",
                f"nn.AdaptiveAvgPool{dims}d(1)",
                f"nn.AdaptiveMaxPool{dims}d(2)",
                f"nn.LPPool{dims}d(2, 2)",
                f"nn.MaxPool{dims}d(2, stride=1, padding=1)",
                f"nn.AvgPool{dims}d(2, stride=1, padding=1, ceil_mode=True)",
            ]
        )
    )


@step("module", "view", times=2)
def reshaping_module(c: Choices, now: Now) -> Lines | None:
    d = now.shape[-1]
    return module(
        c.of(
            ["nn.Flatten()", "nn.Identity()", f"nn.Unflatten(-1, ({d // 2}, 2))" if d % 2 == 0 else "nn.Flatten(1, -1)"]
        )
    )


# Operations between layers


@step("in-place", times=4)
def in_place(c: Choices, now: Now) -> Lines | None:
    if now.indices:
        return None
    shape = list(now.shape)
    return does(
        c.of(
            [
                "x.relu_()",
                "x.tanh_()",
                "x /= 2.0",
                "x = F.silu(x, inplace=True)",
                "x += 1.0",
                f"x += torch.linspace(-1, 1, {shape[-1]}, dtype=x.dtype)",
                "x.masked_fill_(torch.arange(x.shape[-1]) == 0, 0.5)",
                "x.clamp_(-0.5, 0.5)",
                "x[..., 0] = 0.5",
                "x[:, 0] = x[:, -1].clone()",
                "x[:, 0] *= 2",
                "x.mul_(x.detach().abs().mean(-1, keepdim=True))",
                "x.neg_().exp_()",
                "x = F.relu_(x)",
                "x = F.dropout(x, 0.5, False, inplace=True)",
                "x.add_(x.clone().tanh(), alpha=2)",
                "x.sub_(x.mean(-1, keepdim=True))",
                "x.copy_(x.sigmoid())",
                "x.index_fill_(1, torch.tensor([0]), 0.3)",
                "x.square_()",
                "torch.sin(x, out=None); x.sin_()",
                "x.unsqueeze_(1)",
                "x.squeeze_()",
                "x.transpose_(1, -1)",
                "x.set_(x.tanh()) if False else x.tanh_()",
                "with torch.no_grad(): x *= 2",
                "x.data.mul_(2)",
                "x.detach().mul_(2)",
            ]
        )
    )


@step("in-place", "view", times=3)
def view_in_place(c: Choices, now: Now) -> Lines | None:
    if now.indices:
        return None
    view = c.of(
        [
            "x.flatten(1)",
            "x[:, :1]",
            "x[..., -1:]",
            "x.transpose(1, -1)",
            "x.unsqueeze(1)",
            "x.view(len(x), -1)",
            "x.reshape(-1)",
            "x.narrow(-1, 0, 1)",
            "x[:, 0]",
            "x.movedim(-1, 1)",
            "x.chunk(2, -1)[0]",
            "x.unbind(1)[0]",
            "x.expand_as(x)",
            "x.detach()",
            "x.view_as(x)",
            "x.flatten(0, 1)",
            "x.diagonal(dim1=-1, dim2=-2)",
            "x.split(1, -1)[0]",
        ]
    )
    change = c.of(["v.tanh_()", "v /= 2", "v.relu_()", "v.mul_(2)", "v += 1", "v.zero_()", "v.clamp_(-0.5, 0.5)"])
    return c.of([does(f"v = {view}", change), does(f"x = {view}", change.replace("v", "x", 1))])


@step("view", times=3)
def view(c: Choices, now: Now) -> Lines | None:
    if now.indices:
        return None
    return does(
        c.of(
            [
                "x = x.flatten(1)",
                "x = x.transpose(1, -1)",
                "x = x.unflatten(-1, (2, -1))",
                "x = x.unsqueeze(1)",
                "x = x.squeeze(1)",
                "x = x.mean(1)",
                "x = x.mean(-1)",
                "x = torch.cat(x.chunk(2, -1), -1)",
                "a, b = x.chunk(2, -1); x = a * b.sigmoid()",
                "x = x[:, 0]",
                "x = x.movedim(-1, 1)",
                "x = x.unsqueeze(1).expand(-1, 2, *x.shape[1:])",
                "x = x.flip(-1)",
                "x = x.roll(1, -1)",
                "x = x.cumsum(1)",
                "x = x.contiguous()",
                "x = x.transpose(1, -1).contiguous().transpose(1, -1)",
                "x = x.reshape(len(x), -1)",
                "x = x.contiguous(memory_format=torch.channels_last)",
                "x = x[..., ::2]",
                "x = torch.stack([x, x.tanh()], 1)",
                "x = x.amax(-1)",
                "x = x.softmax(-1)",
                "x = x.flatten(0, 1).view(len(x), -1)",
                "x = x.split(1, 1)[-1]",
                "x = F.normalize(x, dim=-1)",
                "x = torch.where(x > 0, x, 0.1 * x)",
                "x = x.clone()",
                "x = x.unsqueeze(-1).expand(*x.shape, 2)",
            ]
        )
    )


@step("odd")
def odd(c: Choices, now: Now) -> Lines | None:
    if now.indices:
        return None
    return does(
        c.of(
            [
                "x = x + x.detach()",
                "x = x.detach()",
                "x = x * x.shape[1]",
                "x = x.to_dense() if x.is_sparse else x",
                "x = torch.einsum('...i,...j->...ij', x, x).sum(-1)",
                "x = x @ x.transpose(-1, -2)",
                "x = torch.cumsum(x, -1) / (1 + torch.arange(x.shape[-1]))",
                "y = x.mean(-1, keepdim=True); x = x - y",
                "x = x.sort(-1).values",
                "x = x.gather(-1, torch.zeros(x.shape, dtype=torch.long))",
                "x = x if len(x) > 1 else x + 0",
                "x = torch.stack([row.tanh() for row in x])",
            ]
        )
    )


@step("mixing")
def mixing(c: Choices, now: Now) -> Lines | None:
    """Operations after which an example depends on others."""
    if now.indices or not c.once_in(3):
        return None
    return does(
        c.of(
            [
                "x = x - x.mean(0)",
                "x = x.softmax(0)",
                "x = x.cumsum(0)",
                "x = x + x.flip(0)",
                "x = x + 0.1 * x.roll(1, 0)",
            ]
        )
    )


#: What is done with the next few steps together, ``{r}`` being their method. The first does nothing.
REGIONS = (
    "x = x + self.{r}(x{z})",
    "x = checkpoint(self.{r}, x{z}, use_reentrant=False)",
    "x = x + checkpoint(self.{r}, x{z}, use_reentrant=False)",
    "x = self.{r}(self.{r}(x{z}){z})",
    "y = self.{r}(x{z}); y += x; x = y",
    "x += self.{r}(x{z})",
    "x = torch.cat([x, self.{r}(x{z})], -1)",
    "y = x; x = self.{r}(x{z}); x = x + y.sum(tuple(range(1, y.ndim))).view(-1, *[1] * (x.ndim - 1))",
    "x = self.{r}(x.clone(){z}) * self.{r}(x.clone(){z})",
    "with torch.no_grad(): x = self.{r}(x{z})",
    "x = self.{r}(x[:, :1]{z})",
)
