"""What the plain U-Net is made of: its skips, and at each of them all that lies deeper."""

from __future__ import annotations

from trifuse.architectures.evaluation.mechanisms import Context, Means, Mechanism, cut, zeroed

from .model import PlainUNet


def mechanisms(model: PlainUNet) -> list[Mechanism]:
    """Return the table of a network's mechanisms, finest first."""
    stages = len(model.decoder.stages)
    return [row for stage in range(stages) for row in (_skip(stage), _deeper(stage))]


def _skip(stage: int) -> Mechanism:
    def switch(model: PlainUNet, means: Means) -> Context:
        decoder_stage, channels = _of_decoder(stage, model), model.config.features[stage]
        return cut([model.decoder.stages[decoder_stage]], slice(channels, None))  # it stands behind the deeper map

    return Mechanism(
        f"skip at {_size(stage)}",
        f"the decoder is given zeros in place of the encoder's map at {_size(stage)} of the image's size",
        switch,
    )


def _deeper(stage: int) -> Mechanism:
    def switch(model: PlainUNet, means: Means) -> Context:
        return zeroed([model.decoder.transpconvs[_of_decoder(stage, model)]])

    return Mechanism(
        f"all below {_size(stage)}",
        f"the decoder at {_size(stage)} of the image's size is given zeros in place of what comes from deeper layers",
        switch,
    )


def _of_decoder(stage: int, model: PlainUNet) -> int:
    """Return the place of an encoder's stage in the decoder, which runs from the coarsest one."""
    return len(model.decoder.stages) - 1 - stage


def _size(stage: int) -> str:
    return f"1/{2**stage}"
