"""Programs that load the package which hub/build.py makes: ``python hub_programs.py NAME FOLDER ...``.

Each needs a process of its own, for operators cannot be registered twice. They print what was found to be.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import pkgutil
import re
import sys
from pathlib import Path
from types import MethodType, ModuleType
from typing import Any

import torch
from operator_calls import OPERATORS, calls_of
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from trifuse import blocks, kernels

SHAPE = (2, 4, 4, 6)
OF_KERNELS = ("channel_gate", "weighted_block_fusion")  # enough to show that kernels run, which takes long


def loaded(folder: str | Path, name: str | None = None) -> ModuleType:
    """Load a package from a folder as the loader does: under its id, from its own file."""
    folder = Path(folder)
    name = name or json.loads((folder / "metadata.json").read_text(encoding="utf-8"))["id"]
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception:
        del sys.modules[name]
        raise
    return module


def operators_of(namespace: str) -> set[str]:
    """Return the names of the operators that are registered in a namespace."""
    names = [schema.name for schema in torch._C._jit_get_all_schemas()]
    return {name.partition("::")[2] for name in names if name.startswith(f"{namespace}::")}


def all_operators_of(package: ModuleType, namespace: str) -> set[str]:
    """Import every file of operators, those of losses that only the networks use among them."""
    operators = importlib.import_module(f"{package.__name__}.ops")
    for file in pkgutil.iter_modules(operators.__path__):
        importlib.import_module(f"{operators.__name__}.{file.name}")
    return operators_of(namespace)


def compare(folder: str, backend: str) -> None:
    """Every operator of the package gives what the installed one gives, values and gradients."""
    hub = loaded(folder)
    checked = set()
    for given in OPERATORS if backend == "torch" else OF_KERNELS:
        for call in calls_of(given, SHAPE):
            op, results = call.function.__name__, []
            if getattr(kernels, op, None) is not call.function:
                continue
            for package in (kernels, hub):
                with package.backend(backend, strict=False):
                    result = getattr(package, op)(*call.arguments, **call.options)
                    total = sum(x.double().sum() for x in tree_leaves(result) if isinstance(x, Tensor))
                    leaves = call.leaves() if total.requires_grad else []
                    results.append((result, torch.autograd.grad(total, leaves, allow_unused=True) if leaves else []))
            torch.testing.assert_close(*results, rtol=0, atol=0)
            checked.add(op)
    for op in kernels.OPERATORS:
        assert getattr(hub, op) is not getattr(kernels, op)
        assert getattr(hub, f"{op}_reference").__module__.startswith(f"{hub.__name__}.ops.")
    assert all_operators_of(hub, hub.__name__) == all_operators_of(kernels, "trifuse") != set()
    assert len(checked) == (13 if backend == "torch" else 2), checked
    assert hub.ShapeError is not kernels.ShapeError
    print("the same:", *sorted(checked))


def another_name(folder: str) -> None:
    """A loader that gives the package a name of its own: operators are in the namespace of the build all the same."""
    hub = loaded(folder, name="trifuse_4f2a")
    assert hub.channel_gate.__module__ == "trifuse_4f2a.ops.gates"
    id = json.loads((Path(folder) / "metadata.json").read_text(encoding="utf-8"))["id"]
    assert "channel_gate" in operators_of(id)
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(hub.channel_gate(x, torch.zeros(2, 3)), x / 2)
    print("the same")


def older(folder: str) -> None:
    """A loader that looks for a folder of the package's name, and loads that under a name of its own."""
    found = loaded(Path(folder) / "trifuse", name="trifuse_4f2a")
    id = json.loads((Path(folder) / "metadata.json").read_text(encoding="utf-8"))["id"]
    assert sys.modules["trifuse_4f2a"] is sys.modules[id]
    assert sys.modules[id].layers.LayerNorm
    assert loaded(Path(folder) / "trifuse", name="trifuse_77b1").__name__ == "trifuse_77b1"
    assert sys.modules["trifuse_77b1"] is sys.modules[id]
    assert found is not None
    print("the same")


def twice(folder: str, copy: str) -> None:
    """The same build from another folder has the same id, and so the operators that are there."""
    first, second = loaded(folder), loaded(copy)
    assert first is not second
    assert all(getattr(first, op) is getattr(second, op) for op in kernels.OPERATORS)
    print("the same")


def taken(folder: str, kind: str) -> None:
    """Another package has the namespace, or an operator there: said when this one is loaded, and that goes on."""
    id = json.loads((Path(folder) / "metadata.json").read_text(encoding="utf-8"))["id"]
    library = torch.library.Library(id, kind)
    library.define("residual_layer_norm(Tensor x) -> Tensor")
    library.impl("residual_layer_norm", torch.neg, "CPU")
    try:
        loaded(folder)
    except ImportError as error:
        message = f"{type(error).__name__}: {error}"
    place = f"{id}.residual_layer_norm" if kind == "FRAGMENT" else id
    assert message.startswith(f"NamespaceTaken: expected torch.ops.{place} to be free, but it was registered before")
    assert "load one of the two, or each in a process of its own" in message
    assert getattr(torch.ops, id).residual_layer_norm(torch.ones(())) == -1
    assert kernels.residual_layer_norm
    print("refused")


def several(*folders: str) -> None:
    """Two builds and the installed package: three namespaces with the same operators."""
    packages = [loaded(folder) for folder in folders]
    names = ["trifuse", *(package.__name__ for package in packages)]
    x, logits = torch.randn(3, 2, 5, 4), torch.zeros(3)
    results = [package.weighted_block_fusion(list(x), logits) for package in (kernels, *packages)]
    assert len(set(names)) == 3
    assert all({"weighted_block_fusion", "weighted_block_fusion_backward"} <= operators_of(name) for name in names)
    for result in results:
        torch.testing.assert_close(result, x.mean(0))
    print("the same")


def layers(folder: str) -> None:
    """Each layer is a forward alone, with the arguments of what it replaces, and gives the same, compiled as well."""
    hub = loaded(folder)
    replaced = {
        "LayerNorm": (nn.LayerNorm(8), torch.randn(2, 5, 8)),
        "MemoryEfficientAttention": (blocks.MemoryEfficientAttention(8, 2), torch.randn(2, 5, 8)),
        "DilatedAttention": (blocks.DilatedAttention(8, 4, 3, (1, 2), True, 0.9, "mask"), torch.randn(2, 5, 4, 8)),
        "WeightedBlockFusion": (blocks.WeightedBlockFusion(3, 1), torch.randn(3, 2, 5, 4)),
    }
    classes = {name: value for name, value in vars(hub.layers).items() if inspect.isclass(value)}
    found = {name for name, value in classes.items() if issubclass(value, nn.Module)}
    assert found == set(replaced)
    for name, (module, x) in replaced.items():
        check_layer(getattr(hub.layers, name), module, x)
    axes, x = nn.LayerNorm((4, 3)), torch.randn(2, 4, 3)
    for norm, given in ((axes, x), (nn.LayerNorm(3), x[0, 0]), (nn.LayerNorm(3, elementwise_affine=False), x)):
        expected = norm(given)
        norm.forward = MethodType(hub.layers.LayerNorm.forward, norm)
        torch.testing.assert_close(norm(given), expected)
    print("the same:", *sorted(found))


def check_layer(layer: type[nn.Module], module: nn.Module, x: Tensor) -> None:
    assert layer.__init__ is nn.Module.__init__
    assert set(dir(layer)) - set(dir(nn.Module)) <= {"can_torch_compile", "has_backward", "__annotations__"}
    wanted, got = (list(inspect.signature(of.forward).parameters) for of in (type(module), layer))
    assert wanted[: len(got)] == got
    leaves = [x.requires_grad_(), *(p for p in module.parameters())]
    results = []
    for step in range(3):
        if step == 1:
            module.forward = MethodType(layer.forward, module)
        call = torch.compile(module, fullgraph=True, backend="eager") if step == 2 else module
        result = call(x)
        results.append((result, torch.autograd.grad(result.square().sum(), leaves)))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


def loader(package: str) -> None:
    """The package `kernels` resolves, checks and loads it, and puts its layers in the place of PyTorch's."""
    from kernels._rust import Digest, DigestAlgorithm, Metadata

    from kernels import (
        LocalLayerRepository,
        Mode,
        get_loaded_kernels,
        get_local_kernel,
        kernelize,
        replace_kernel_forward_from_hub,
        use_kernel_mapping,
    )

    path = Path(package)
    hub = get_local_kernel(path)
    (found,) = get_loaded_kernels()
    variant = path / "build" / "torch-universal"
    assert (found.metadata.id, found.metadata.license, found.module) == (hub.__name__, "Apache-2.0", hub)
    Metadata.read_from_file(variant / "metadata.json").digest.validate(
        Digest.hash_variant(DigestAlgorithm.SHA256, variant)
    )
    features, logits = torch.randn(3, 2, 5, 8), torch.randn(3)
    expected = kernels.weighted_block_fusion(features, logits)
    torch.testing.assert_close(hub.weighted_block_fusion(features, logits), expected, rtol=0, atol=0)
    assert all(getattr(hub, op) is not getattr(kernels, op) for op in kernels.OPERATORS)
    assert all_operators_of(hub, hub.__name__) == all_operators_of(kernels, "trifuse") != set()
    norm = nn.LayerNorm(8)
    before = norm(features)
    replace_kernel_forward_from_hub(nn.LayerNorm, "LayerNorm")
    model = nn.Sequential(norm)
    with use_kernel_mapping({"LayerNorm": {"cpu": LocalLayerRepository(path, layer_name="LayerNorm")}}):
        kernelize(model, mode=Mode.TRAINING | Mode.TORCH_COMPILE, device="cpu", use_fallback=False)
    assert norm.forward.__func__ is hub.layers.LayerNorm.forward
    torch.testing.assert_close(model(features), before)
    page = (Path(__file__).parents[2] / "docs" / "kernels_hub.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    shown: dict[str, Any] = {}
    exec(compile(example.replace('Path("build/hub")', f"Path({package!r})"), "kernels_hub.md", "exec"), shown)
    assert shown["trifuse"] is hub
    assert shown["labels"].shape == (2, 256, 256)
    print("the same")


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
