"""PixelCNN++ (Salimans, Karpathy, Chen, Kingma, Bulatov, 2017) in PyTorch, written from the paper:
network, likelihood, optimiser. Maps are NCHW; every convolution keeps the original's name, so that
parameters can be exchanged in TensorFlow's layouts."""

import math

import torch
import torch.nn.functional as F
from torch import nn


class Layer(nn.Module):
    """A weight-normalised layer: W = g V / ||V||, the norm over all axes but the output channel."""

    output_axis = 0

    def __init__(self, name, shape, outputs):
        super().__init__()
        self.name = name
        self.V = nn.Parameter(torch.randn(shape) * 0.05)
        self.g = nn.Parameter(torch.ones(outputs))
        self.b = nn.Parameter(torch.zeros(outputs))

    def weight(self):
        shape = [1, 1, 1, 1]
        shape[self.output_axis] = -1
        return torch._weight_norm(self.V, self.g.view(shape), self.output_axis)

    @staticmethod
    def from_tensorflow(v):
        """[rows, columns, a, b] to [b, a, rows, columns]; a dense layer's [in, out] is 1x1."""
        if v.dim() == 2:
            v = v[None, None]
        return v.permute(3, 2, 0, 1)


class Conv(Layer):
    """A shifted convolution: causal by the padding alone."""

    def __init__(self, name, kernel, padding, inputs, outputs, stride=1):
        super().__init__(name, (outputs, inputs, *kernel), outputs)
        self.padding, self.stride = padding, stride

    def forward(self, x):
        if any(self.padding):
            x = F.pad(x, self.padding)
        return F.conv2d(x, self.weight(), self.b, self.stride)


class Deconv(Layer):
    """A shifted transposed convolution of stride 2: causal by what is cropped."""

    output_axis = 1

    def __init__(self, name, kernel, left, inputs, outputs):
        super().__init__(name, (inputs, outputs, *kernel), outputs)
        self.left = left

    def forward(self, x):
        height, width = 2 * x.shape[2], 2 * x.shape[3]
        y = F.conv_transpose2d(x, self.weight(), self.b, stride=2, output_padding=1)
        return y[:, :, :height, self.left : self.left + width]


def concat_elu(x):
    return F.elu(torch.cat([x, -x], 1))


class GatedResnet(nn.Module):
    """Paper, section 2.5."""

    def __init__(self, conv, dense, filters, auxiliary, dropout):
        super().__init__()
        self.conv_1 = conv(2 * filters, filters)
        self.nin = dense(2 * auxiliary, filters) if auxiliary else None
        self.conv_2 = conv(2 * filters, 2 * filters)
        self.dropout = dropout

    def forward(self, x, a=None):
        c1 = self.conv_1(concat_elu(x))
        if self.nin is not None:
            c1 = c1 + self.nin(concat_elu(a))
        c1 = F.dropout(concat_elu(c1), self.dropout, self.training)
        a, b = self.conv_2(c1).chunk(2, 1)
        return x + a * torch.sigmoid(b)


class PixelCNN(nn.Module):
    """Images [N, 3, H, W] in [-1, 1] to the mixture's parameters [N, 10 * mixtures, H, W]."""

    def __init__(self, filters, resnet, mixtures, dropout):
        super().__init__()
        counts = {"conv2d": 0, "deconv2d": 0, "dense": 0}

        def name(kind):
            counts[kind] += 1
            return f"model/{kind}_{counts[kind] - 1}"

        # Padding is left, right, top, bottom.
        def down_shifted(kernel, *channels, **options):
            rows, columns = kernel
            padding = ((columns - 1) // 2, (columns - 1) // 2, rows - 1, 0)
            return Conv(name("conv2d"), kernel, padding, *channels, **options)

        def down_right_shifted(kernel, *channels, **options):
            rows, columns = kernel
            padding = (columns - 1, 0, rows - 1, 0)
            return Conv(name("conv2d"), kernel, padding, *channels, **options)

        def dense(*channels):
            return Conv(name("dense"), (1, 1), (0, 0, 0, 0), *channels)

        def vertical(auxiliary):
            conv = lambda *channels: down_shifted((2, 3), *channels)
            return GatedResnet(conv, dense, filters, auxiliary, dropout)

        def horizontal(auxiliary):
            conv = lambda *channels: down_right_shifted((2, 2), *channels)
            return GatedResnet(conv, dense, filters, auxiliary, dropout)

        # In the original's creation order, which numbers the layers.
        self.first = down_shifted((2, 3), 4, filters)
        self.above = down_shifted((1, 3), 4, filters)
        self.left = down_right_shifted((2, 1), 4, filters)
        self.up, self.down = nn.ModuleList(), nn.ModuleList()
        for scale in range(3):
            if scale > 0:
                u = down_shifted((2, 3), filters, filters, stride=2)
                ul = down_right_shifted((2, 2), filters, filters, stride=2)
                self.up.append(nn.ModuleList([u, ul]))
            for _ in range(resnet):
                self.up.append(nn.ModuleList([vertical(0), horizontal(filters)]))
        for scale in range(3):
            if scale > 0:
                u = Deconv(name("deconv2d"), (2, 3), 1, filters, filters)
                ul = Deconv(name("deconv2d"), (2, 2), 0, filters, filters)
                self.down.append(nn.ModuleList([u, ul]))
            for _ in range(resnet + (scale > 0)):
                self.down.append(nn.ModuleList([vertical(filters), horizontal(2 * filters)]))
        self.out = dense(filters, 10 * mixtures)

    def forward(self, x):
        # A plane of ones shows the network where the image ends.
        x = F.pad(x, (0, 0, 0, 0, 0, 1), value=1.0)
        down_shift = lambda x: F.pad(x[:, :, :-1], (0, 0, 1, 0))
        right_shift = lambda x: F.pad(x[:, :, :, :-1], (1, 0))
        u = down_shift(self.first(x))
        ul = down_shift(self.above(x)) + right_shift(self.left(x))
        us, uls = [u], [ul]
        for stage, (to_u, to_ul) in enumerate(self.up):
            if isinstance(to_u, GatedResnet):
                u = to_u(u)
                ul = to_ul(ul, u)
            else:
                u, ul = to_u(u), to_ul(ul)
            us.append(u)
            uls.append(ul)
        u, ul = us.pop(), uls.pop()
        for to_u, to_ul in self.down:
            if isinstance(to_u, GatedResnet):
                u = to_u(u, us.pop())
                ul = to_ul(ul, torch.cat([u, uls.pop()], 1))
            else:
                u, ul = to_u(u), to_ul(ul)
        return self.out(F.elu(ul))

    def layers(self):
        return [module for module in self.modules() if isinstance(module, Layer)]

    def named_tensors(self):
        """Every parameter under the original's name, shaped as here."""
        return {f"{layer.name}/{p}": getattr(layer, p) for layer in self.layers() for p in "Vgb"}

    def load_tensorflow(self, tensors):
        """Takes parameters of the original's names and layouts."""
        with torch.no_grad():
            for name, parameter in self.named_tensors().items():
                parameter.copy_(from_tensorflow(name, tensors[name]))


def from_tensorflow(name, value):
    return Layer.from_tensorflow(value) if name.endswith("/V") else value


def to_tensorflow(name, value):
    if not name.endswith("/V"):
        return value.contiguous()
    v = value.permute(2, 3, 1, 0).contiguous()
    return v[0, 0] if "/dense_" in name else v


def nats_per_image(x, logits):
    """Discretized mixture of logistics (paper, section 2.1), as the original writes it."""
    n, outputs, height, width = logits.shape
    mixtures = outputs // 10
    log_weights = F.log_softmax(logits[:, :mixtures], 1)
    means, log_scales, coefficients = (
        logits[:, mixtures:].view(n, 3, 3, mixtures, height, width).unbind(2)
    )
    log_scales = log_scales.clamp(min=-7.0)
    c0, c1, c2 = torch.tanh(coefficients).unbind(1)
    x = x.unsqueeze(2)
    red, green, _ = x.unbind(1)
    of_others = torch.stack([torch.zeros_like(c0), c0 * red, c1 * red + c2 * green], 1)
    centred = x - (means + of_others)

    inverse = torch.exp(-log_scales)
    plus = inverse * (centred + 1 / 255)
    minus = inverse * (centred - 1 / 255)
    middle = inverse * centred
    mass = torch.sigmoid(plus) - torch.sigmoid(minus)
    lowest = plus - F.softplus(plus)
    highest = -F.softplus(minus)
    density = middle - log_scales - 2 * F.softplus(middle) - math.log(127.5)
    inner = torch.where(mass > 1e-5, torch.log(mass.clamp(min=1e-12)), density)
    log_probs = torch.where(x < -0.999, lowest, torch.where(x > 0.999, highest, inner))
    return -torch.logsumexp(log_probs.sum(1) + log_weights, 1).sum((1, 2))


class Adam:
    """The original's: epsilon inside the root, and the Polyak average of the parameters."""

    def __init__(
        self,
        parameters,
        learning_rate=1e-3,
        decay=0.999995,
        polyak_decay=0.9995,
        compiled=False,
    ):
        self.parameters = list(parameters)
        self.first_rate, self.decay, self.polyak_decay = learning_rate, decay, polyak_decay
        self.update = torch.compile(adam_update) if compiled else adam_update
        self.restart()

    def restart(self):
        """Before the first step, from the parameters as they are now."""
        self.first = [torch.zeros_like(p) for p in self.parameters]
        self.second = [torch.zeros_like(p) for p in self.parameters]
        self.average = [p.detach().clone() for p in self.parameters]
        self.learning_rate, self.steps = self.first_rate, 0

    @torch.no_grad()
    def step(self):
        self.steps += 1
        self.learning_rate *= self.decay
        # The root of the corrected second moment is the root of the uncorrected one with the
        # correction moved to the rate and to epsilon. Tensors, lest each step compile anew.
        correction = 1 - 0.9995**self.steps
        rate = -self.learning_rate * math.sqrt(correction) / (1 - 0.95**self.steps)
        gradients = [p.grad for p in self.parameters]
        self.update(
            self.parameters,
            gradients,
            self.first,
            self.second,
            self.average,
            torch.tensor(rate),
            torch.tensor(1e-8 * correction),
            1 - self.polyak_decay,
        )
        for p in self.parameters:
            p.grad = None


def adam_update(parameters, gradients, first, second, average, rate, epsilon, share):
    torch._foreach_lerp_(first, gradients, 1 - 0.95)
    torch._foreach_mul_(second, 0.9995)
    torch._foreach_addcmul_(second, gradients, gradients, 1 - 0.9995)
    roots = torch._foreach_add(second, epsilon)
    torch._foreach_sqrt_(roots)
    steps = torch._foreach_div(first, roots)
    torch._foreach_mul_(steps, rate)
    torch._foreach_add_(parameters, steps)
    torch._foreach_lerp_(average, parameters, share)
