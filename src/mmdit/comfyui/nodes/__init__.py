"""The nodes that workflows may use, grouped by topic; each module registers its nodes in the table `NODES`."""

from mmdit.comfyui.declare import NODES as NODES
from mmdit.comfyui.nodes import conditioning as conditioning
from mmdit.comfyui.nodes import controlnet as controlnet
from mmdit.comfyui.nodes import images as images
from mmdit.comfyui.nodes import latents as latents
from mmdit.comfyui.nodes import loaders as loaders
from mmdit.comfyui.nodes import loras as loras
from mmdit.comfyui.nodes import masks as masks
from mmdit.comfyui.nodes import model_patches as model_patches
from mmdit.comfyui.nodes import primitives as primitives
from mmdit.comfyui.nodes import sampling as sampling
