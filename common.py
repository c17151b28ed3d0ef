"""The two functions that all four scripts share: saving a grid of pictures, and DCGAN weight init.

Copy this file along with any script that you take into another project.
"""
from pathlib import Path

from torch import nn
from torchvision.utils import save_image


def save_grid(images, path, columns=8):
    """Saves pictures as one PNG grid, row by row, and creates the folder that it goes into.

    images: float tensor N x C x H x W with values in [-1, 1] and C of 1 (grey) or 3 (RGB); values
        outside are clipped. Every picture is mapped by (x + 1) / 2, whatever the others hold, so
        contrast can be compared between grids: -1 is black (0), 1 is white (255).
    columns: pictures in a row. The last row may be short; its empty places stay black.
    Raises ValueError for another shape, no pictures or fewer than one column, and OSError where
    the file cannot be written.
    """
    if images.dim() != 4 or images.size(0) < 1 or images.size(1) not in (1, 3):
        raise ValueError(f"expected N x C x H x W with C of 1 or 3, got {tuple(images.shape)}")
    if columns < 1:
        raise ValueError(f"expected at least one column, got {columns}")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_image(images.detach().float(), path, nrow=columns, normalize=True, value_range=(-1, 1))


def init_weights(module):
    """Initialises one layer as the DCGAN paper does (Radford et al. 2015, section 4).

    For use as network.apply(init_weights). Weights of linear, convolutional and transposed
    convolutional layers are drawn from N(0, 0.02), BatchNorm scales from N(1, 0.02) as in the
    authors' code, and biases are set to 0. Other layers are left alone.
    """
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        nn.init.normal_(module.weight, 1.0, 0.02)
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)
