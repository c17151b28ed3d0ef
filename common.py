"""What the four scripts share: saving a grid of images, and DCGAN weight init.

Copy this file along with any script that you take into another project.
"""

from pathlib import Path

from torch import nn
from torchvision.utils import save_image


def save_grid(images, path, columns=8):
    """Saves images as one PNG, row by row, and creates the folder that it goes into.

    images: N x C x H x W in [-1, 1], with C of 1 (grey) or 3 (RGB). In every grid -1 is
        black and 1 is white, so that grids can be compared; values outside are clipped.
        Small images are enlarged by a whole factor, without smoothing, to be judged.
    columns: images per row. The last row may be short; its empty places stay black.
    Raises ValueError for another shape, no images or fewer than one column, and OSError
    if the file cannot be written.
    """
    if images.dim() != 4 or len(images) < 1 or images.size(1) not in (1, 3):
        raise ValueError(f"expected N x 1 or 3 x H x W, got {tuple(images.shape)}")
    if columns < 1:
        raise ValueError(f"expected at least one column, got {columns}")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    scale = max(1, 96 // images.size(3))  # 3 for 28 and 32 pixels, 1 from 64 up
    images = images.detach().float().repeat_interleave(scale, 2)
    images = images.repeat_interleave(scale, 3)
    save_image(images, path, nrow=columns, normalize=True, value_range=(-1, 1))


def init_weights(module):
    """Initialises one layer as the DCGAN paper does (Radford et al. 2015, section 4).

    For use as network.apply(init_weights). The weights of linear, convolutional and
    transposed convolutional layers are drawn from a normal distribution with mean 0 and
    std 0.02. BatchNorm's scales are drawn with mean 1 and std 0.02, as in the authors'
    code. All biases become 0. Other layers are left alone.
    """
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        nn.init.normal_(module.weight, 1.0, 0.02)
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)
