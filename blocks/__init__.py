"""The blocks: an `nn.Module` is parameters, their initialisation, and a call into `trifuse.kernels`."""

from .attention import MemoryEfficientAttention
from .conv_norm_relu import ConvNormReLU
from .dilated_attention import DilatedAttention
from .image_branch import ImageBranch
from .transformer_block import LayerScale, Mlp, SwiGLU, TransformerBlock
from .unet_decoder import UNetDecoderStage
from .weighted_block_fusion import WeightedBlockFusion

__all__ = [
    "ConvNormReLU",
    "DilatedAttention",
    "ImageBranch",
    "LayerScale",
    "MemoryEfficientAttention",
    "Mlp",
    "SwiGLU",
    "TransformerBlock",
    "UNetDecoderStage",
    "WeightedBlockFusion",
]
