"""The blocks: an `nn.Module` is parameters, their initialisation, and a call into `trifuse.kernels`."""

from .backbone_features import backbone_features
from .context_aware_fusion import ContextAwareFusion
from .conv_norm_relu import ConvNormReLU
from .depthwise_multi_kernel import DepthwiseMultiKernel
from .dilated_attention import DilatedAttention
from .image_branch import ImageBranch
from .layer_scale import LayerScale
from .memory_efficient_attention import MemoryEfficientAttention
from .mixing_attention import MixingAttention
from .monte_carlo_attention import MonteCarloAttention
from .plain_unet import PlainUNetDecoder, PlainUNetEncoder
from .temporal_aware_fusion import TemporalAwareFusion
from .temporal_film_gate import TemporalFiLMGate
from .transformer_block import Mlp, SwiGLU, TransformerBlock
from .unet_decoder import UNetDecoderStage
from .weighted_block_fusion import WeightedBlockFusion

__all__ = [
    "ContextAwareFusion",
    "ConvNormReLU",
    "DepthwiseMultiKernel",
    "DilatedAttention",
    "ImageBranch",
    "LayerScale",
    "MemoryEfficientAttention",
    "MixingAttention",
    "Mlp",
    "MonteCarloAttention",
    "PlainUNetDecoder",
    "PlainUNetEncoder",
    "SwiGLU",
    "TemporalAwareFusion",
    "TemporalFiLMGate",
    "TransformerBlock",
    "UNetDecoderStage",
    "WeightedBlockFusion",
    "backbone_features",
]
