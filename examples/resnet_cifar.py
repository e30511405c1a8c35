"""The residual networks for 32 x 32 images of He et al. (2015, arXiv:1512.03385, section 4.2).

6n + 2 layers: a 3 x 3 convolution, three stages of n blocks with 16, 32 and 64 channels, global average pooling and a
linear layer. Where the shape changes the shortcut has no weights (option A): every second pixel, new channels zero.
Module names are those of the widely used checkpoints: conv1, bn1, layer{1,2,3}.{i}.{conv1,bn1,conv2,bn2}, linear.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """relu(x' + bn2(conv2(relu(bn1(conv1(x)))))), x' the shortcut."""

    def __init__(self, channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride, self.extra = stride, out_channels - channels

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C', H / stride, W / stride)
        shortcut = x[:, :, :: self.stride, :: self.stride]
        if self.extra:
            shortcut = F.pad(shortcut, (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2))
        return F.relu(shortcut + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class ResNet(nn.Module):
    """`blocks` per stage; (B, 3, 32, 32) -> (B, num_classes)."""

    def __init__(self, blocks: int, num_classes: int = 10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(blocks, 16, 16, 1)
        self.layer2 = self._stage(blocks, 16, 32, 2)
        self.layer3 = self._stage(blocks, 32, 64, 2)
        self.linear = nn.Linear(64, num_classes)

    @staticmethod
    def _stage(blocks: int, channels: int, out_channels: int, stride: int) -> nn.Sequential:
        first = Block(channels, out_channels, stride)
        return nn.Sequential(first, *(Block(out_channels, out_channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def resnet20(num_classes: int = 10) -> ResNet:
    """0.27 M parameters."""
    return ResNet(3, num_classes)


def resnet32(num_classes: int = 10) -> ResNet:
    """0.46 M parameters."""
    return ResNet(5, num_classes)


def resnet44(num_classes: int = 10) -> ResNet:
    """0.66 M parameters."""
    return ResNet(7, num_classes)


def resnet56(num_classes: int = 10) -> ResNet:
    """0.85 M parameters."""
    return ResNet(9, num_classes)
