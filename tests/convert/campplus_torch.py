"""A small CAM++ in PyTorch with 3D-Speaker's names, for ONNX exports and as a reference."""

import torch
from torch import nn
from torch.nn import functional as F

SMALL = {
    "feat_dim": 80,
    "m_channels": 4,
    "head_blocks": (2, 2),
    "init_channels": 8,
    "growth_rate": 4,
    "bn_size": 2,
    "dense_layers": (2, 3, 2),
    "dense_dilations": (1, 2, 2),
    "embedding_size": 12,
}


class Norm(nn.Module):
    def __init__(self, channels, affine=True, relu=True):
        super().__init__()
        self.batchnorm = nn.BatchNorm1d(channels, affine=affine)
        self.relu = relu

    def forward(self, x):
        y = self.batchnorm(x)
        return F.relu(y) if self.relu else y


class Residual(nn.Module):
    def __init__(self, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, (stride, 1), 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1:
            conv = nn.Conv2d(channels, channels, 1, (stride, 1), bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(channels))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class Head(nn.Module):
    def __init__(self, channels, blocks):
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.layer1 = nn.Sequential(*[Residual(channels, 1 if i else 2) for i in range(blocks[0])])
        self.layer2 = nn.Sequential(*[Residual(channels, 1 if i else 2) for i in range(blocks[1])])
        self.conv2 = nn.Conv2d(channels, channels, 3, (2, 1), 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x[:, None])))
        x = F.relu(self.bn2(self.conv2(self.layer2(self.layer1(x)))))
        return x.reshape(x.shape[0], x.shape[1] * x.shape[2], x.shape[3])


class Cam(nn.Module):
    def __init__(self, inner, out, dilation):
        super().__init__()
        self.linear_local = nn.Conv1d(inner, out, 3, 1, dilation, dilation, bias=False)
        self.linear1 = nn.Conv1d(inner, inner // 2, 1)
        self.linear2 = nn.Conv1d(inner // 2, out, 1)

    def forward(self, x):
        y = self.linear_local(x)
        segments = F.avg_pool1d(x, 100, 100, ceil_mode=True)
        segments = segments[..., None].expand(*segments.shape, 100).reshape(*segments.shape[:-1], -1)
        context = x.mean(-1, keepdim=True) + segments[..., : x.shape[-1]]
        return y * torch.sigmoid(self.linear2(F.relu(self.linear1(context))))


class Dense(nn.Module):
    def __init__(self, channels, inner, out, dilation):
        super().__init__()
        self.nonlinear1 = Norm(channels)
        self.linear1 = nn.Conv1d(channels, inner, 1, bias=False)
        self.nonlinear2 = Norm(inner)
        self.cam_layer = Cam(inner, out, dilation)

    def forward(self, x):
        return torch.cat([x, self.cam_layer(self.nonlinear2(self.linear1(self.nonlinear1(x))))], 1)


class Unit(nn.Module):
    """Convolution and norm, in either order."""

    def __init__(self, channels, out, norm_first, **conv):
        super().__init__()
        if norm_first:
            self.nonlinear = Norm(channels)
        self.linear = nn.Conv1d(channels, out, bias=False, **{"kernel_size": 1} | conv)
        self.norm_first = norm_first
        if not norm_first:
            self.nonlinear = Norm(out, affine=bool(conv), relu=bool(conv))

    def forward(self, x):
        return self.linear(self.nonlinear(x)) if self.norm_first else self.nonlinear(self.linear(x))


class CampPlus(nn.Module):
    """[B, T, feat_dim] -> [B, embedding_size]."""

    def __init__(
        self,
        feat_dim,
        m_channels,
        head_blocks,
        init_channels,
        growth_rate,
        bn_size,
        dense_layers,
        dense_dilations,
        embedding_size,
    ):
        super().__init__()
        self.head = Head(m_channels, head_blocks)
        inner = {"tdnn": Unit(m_channels * feat_dim // 8, init_channels, False, kernel_size=5, stride=2, padding=2)}
        channels = init_channels
        for i, (layers, dilation) in enumerate(zip(dense_layers, dense_dilations, strict=True), 1):
            block = {}
            for j in range(1, layers + 1):
                block[f"tdnnd{j}"] = Dense(channels, bn_size * growth_rate, growth_rate, dilation)
                channels += growth_rate
            inner[f"block{i}"] = nn.Sequential()
            for name, layer in block.items():
                inner[f"block{i}"].add_module(name, layer)
            inner[f"transit{i}"] = Unit(channels, channels // 2, True)
            channels //= 2
        inner["out_nonlinear"] = Norm(channels)
        inner["dense"] = Unit(2 * channels, embedding_size, False)
        self.xvector = nn.ModuleDict(inner)

    def forward(self, x):
        x = self.head(x.transpose(1, 2))
        for name, layer in self.xvector.items():
            if name == "dense":
                x = torch.cat([x.mean(-1), x.std(-1, unbiased=True)], -1)[..., None]
            x = layer(x)
        return x[..., 0]


def random_campplus(sizes=None, seed=0):
    """A small CAM++ whose BatchNorms have statistics, in eval mode."""
    torch.manual_seed(seed)
    model = CampPlus(**(sizes or SMALL)).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 1.5)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.3)
    return model


def state(model):
    """{name: array} of what the network uses."""
    return {k: v.detach().numpy() for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}


def export(model, path, folded, frames=230):
    """Real ONNX exports: names kept, or BatchNorms folded into the convolutions and constants renamed."""
    import warnings

    training = torch.onnx.TrainingMode.EVAL if folded else torch.onnx.TrainingMode.PRESERVE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (torch.randn(1, frames, model.head.conv1.in_channels * 80),),
            str(path),
            dynamo=False,
            opset_version=17,
            training=training,
            do_constant_folding=folded,
            input_names=["input"],
            output_names=["output"],
        )
