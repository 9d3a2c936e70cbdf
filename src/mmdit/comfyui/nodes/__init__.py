"""The nodes that workflows may use, by idea; importing this package fills `mmdit.comfyui.declare.NODES`."""

from mmdit.comfyui.nodes import (
    conditioning as conditioning,
)
from mmdit.comfyui.nodes import images as images
from mmdit.comfyui.nodes import latents as latents
from mmdit.comfyui.nodes import loaders as loaders
from mmdit.comfyui.nodes import masks as masks
from mmdit.comfyui.nodes import model_patches as model_patches
from mmdit.comfyui.nodes import primitives as primitives
from mmdit.comfyui.nodes import sampling as sampling
