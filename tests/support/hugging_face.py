"""Hugging Face models with random weights, small enough for tests, and their folders."""

from __future__ import annotations

import pytest
import torch

SMALL = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32}


def small_model(name, seed=0, **options):
    """Return a model with random weights, in evaluation mode, and the number of tokens before its patches."""
    transformers = pytest.importorskip("transformers")
    kinds = {
        "vit": ("ViTModel", {}, 1),
        "deit": ("DeiTModel", {}, 2),
        "dinov2": ("Dinov2Model", {"mlp_ratio": 2}, 1),
        "registers": ("Dinov2WithRegistersModel", {"num_register_tokens": 3}, 4),
        "dinov3": ("DINOv3ViTModel", {"num_register_tokens": 4}, 5),
        "siglip": ("SiglipVisionModel", {}, 0),
        "clip": ("CLIPVisionModel", {}, 1),
        "backbone": ("Dinov2Backbone", {}, 1),
        "classifier": ("ViTForImageClassification", {}, 1),
    }
    class_name, own, prefix = kinds[name]
    if (model_type := getattr(transformers, class_name, None)) is None:
        pytest.skip(f"transformers {transformers.__version__} has no {class_name}")
    model = model_type(model_type.config_class(**{**SMALL, "patch_size": 8, **own, **options})).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model, prefix


def save_small_model(folder, name, seed=0, **options):
    """Save such a model as its authors do, and return it."""
    model, _ = small_model(name, seed, **options)
    model.save_pretrained(folder)
    return model
