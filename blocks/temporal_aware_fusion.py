"""Temporal-aware feature fusion: an ECG's code, weighed against the image and modulated by the days between them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trifuse.kernels import DataError, ShapeError, segment_film_gate, temporal_film_gate
from trifuse.kernels.choices import check_choice
from trifuse.kernels.library import check_dtype, values_at_hand
from trifuse.kernels.ops.segment_film_gate import MOST_SEGMENTS

from .float32_linear import Float32Linear, TimeApartGate, ZeroInitMlp, without_autocast
from .image_input import check_map
from .plain_layers import dtype_of
from .plain_unet import NEGATIVE_SLOPE
from .temporal_film_gate import TemporalFiLM, scaled_days

Projection = Literal["segments", "segments_full", "grid", "broadcast"]
"""How an ECG's code becomes a map."""

GateTime = Literal["apart", "joined", "unseen"]
"""How a gate sees the days between image and ECG."""

BY_SEGMENT: tuple[Projection, ...] = ("segments", "segments_full")
"""The projections that need to know where the heart's segments lie."""


class TemporalAwareFusion(nn.Module):
    """Fuse a map with the code of an ECG that was taken some days from it: (B, C, H, W), (B, E) -> (B, C, H, W).

    With z the normalised code, and t the days between the two, divided by ``max_days`` and cut to [0, 1]:

        [w_mri, w_ecg] = softmax(gate(cat(mean of the image over positions, z)) + gate_t(t))  (B, 2); the last term
                                                                                  only with time
        gamma, beta    = film(t)                                                  (B, C) each; 0 without time
        fused          = f + (f * w_mri + e * w_ecg) * (1 + gamma) + beta

    where the ECG's map e (B, C, H, W) is made by ``projection``:

        "segments"       P(z) + a_s(z) v    at the positions of the heart's segment s, and P(z) outside of all segments;
                                            v has one number for each channel
        "segments_full"  P_s(z)             at the positions of segment s, and 0 outside of all segments
        "grid"           P(z), (B, C, g, g), brought to the map's size bilinearly, and moved as the image was
        "broadcast"      P(z)               at every position

    Only a map that differs between positions is sure to be heard. A convolution with an instance norm, as the next
    stage of a U-Net has, takes away what is the same at every position of a channel: behind ``"broadcast"`` the code
    reaches the result through the padding of the border and little else, however much the gate gives it, unless
    something that is not linear stands between the two (``rectify``).

    The last layers of gate and film start as zero: the weights start equal, and time changes nothing at first. The
    projection, the two networks and the softmax are computed in float32 or wider, under autocast as well.

    A sample without an ECG comes out exactly as it came in, with weights (0, 0). Whatever stands in its code and
    interval, NaN included, changes neither a result nor a gradient, and it trains nothing.

    Args:
        dim: channels C.
        ecg_dim: width E of the code.
        time: whether the interval counts; without, there is no film, and intervals are not looked at.
        projection: how the code becomes a map.
        max_days: days from which on all intervals count as equally long.
        zero_init_proj: let the ECG's map start as zero, too.
        gate_time: how the gate sees t: ``"apart"``, as above, in a network of its own, whose two logits are added;
            ``"joined"`` to the mean and the code, as one more number among many, which hardly teaches it anything; or
            ``"unseen"``. None is ``"apart"`` with time.
        grid_side: side g of the grid.
        rectify: apply a leaky rectifier to the fused map.
        normalise_code: normalise the code over its E numbers before gate and projection; else z is the code itself.
        gate_slope: slope, below zero, of the rectifier in the gate; with 0 hidden units can die.
        num_segments: of the heart.
        gate_width: hidden units of the gate, and
        film_width: of the film.

    Raises:
        ValueError: an unknown projection, ``gate_time`` without ``time``, a size below 1, more than 255 segments, or
            ``max_days`` that are not positive and finite.

    Source: temporal-aware feature fusion of TAFF-UNet, which calls e a map and does not say how the code becomes one;
    FiLM is Perez et al., 2018.
    """

    def __init__(
        self,
        dim: int,
        ecg_dim: int = 64,
        time: bool = True,
        projection: Projection = "segments",
        max_days: float = 90,
        zero_init_proj: bool = False,
        gate_time: GateTime | None = None,
        grid_side: int = 8,
        rectify: bool = False,
        normalise_code: bool = True,
        gate_slope: float = NEGATIVE_SLOPE,
        num_segments: int = 17,
        gate_width: int = 64,
        film_width: int = 64,
    ) -> None:
        super().__init__()
        check_choice("TemporalAwareFusion: projection", projection, Projection)
        gate_time = gate_time or ("apart" if time else "unseen")
        check_choice("TemporalAwareFusion: gate_time", gate_time, GateTime)
        if gate_time != "unseen" and not time:
            raise ValueError(f"TemporalAwareFusion: gate_time={gate_time!r} needs time=True, got time=False")
        sizes = {"dim": dim, "ecg_dim": ecg_dim, "grid_side": grid_side, "num_segments": num_segments}
        for name, value in {**sizes, "gate_width": gate_width, "film_width": film_width}.items():
            if value < 1:
                raise ValueError(f"TemporalAwareFusion: {name} must be at least 1, got {value}")
        if num_segments > MOST_SEGMENTS:
            raise ValueError(
                f"TemporalAwareFusion: num_segments must be at most {MOST_SEGMENTS}, which labels of a byte can name, "
                f"got {num_segments}"
            )
        self.dim, self.ecg_dim, self.grid_side, self.num_segments = dim, ecg_dim, grid_side, num_segments
        self.form, self.rectify, self.normalise_code = projection, rectify, normalise_code
        self.zero_init_proj, self.gate_time, self.max_days = zero_init_proj, gate_time, max_days
        copies = {"segments_full": num_segments, "grid": grid_side**2}.get(projection, 1)
        self.projection = Float32Linear(ecg_dim, dim * copies)
        gate: type[TimeApartGate] | type[ZeroInitMlp] = TimeApartGate if gate_time == "apart" else ZeroInitMlp
        self.gate = gate(dim + ecg_dim + (gate_time != "unseen"), gate_width, 2, gate_slope)
        self.film = TemporalFiLM(dim, film_width, max_days) if time else None
        self.scores = Float32Linear(ecg_dim, num_segments) if projection == "segments" else None
        self.direction = nn.Parameter(torch.empty(dim)) if projection == "segments" else None
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weights as `torch.nn.Linear` does, v from the normal distribution; set to zero what starts there."""
        self.projection.reset_parameters(generator)
        if self.zero_init_proj:  # drawn all the same: with one seed, the option changes no other weight
            nn.init.zeros_(self.projection.weight)
            nn.init.zeros_(self.projection.bias)
        self.gate.reset_parameters(generator)
        if self.film is not None:
            self.film.reset_parameters(generator)
        if self.scores is not None and self.direction is not None:
            self.scores.reset_parameters(generator)
            nn.init.normal_(self.direction, generator=generator)
            if self.zero_init_proj:
                nn.init.zeros_(self.direction)

    def forward(
        self,
        features: Tensor,
        ecg_code: Tensor,
        interval: Tensor | float | None = None,
        has_ecg: Tensor | None = None,
        segments: Tensor | None = None,
        *,
        image_means: Tensor | None = None,
        transform: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Fuse.

        Args:
            features: maps (B, C, H, W).
            ecg_code: one code per sample, (B, E).
            interval: days between image and ECG: (B,), (B, 1), or one number for all samples, whole or not. Negative
                ones count as 0.
            has_ecg: which samples have an ECG, bool of shape (B,); None says all of them.
            segments: where the heart's segments lie, for projections by segment: labels (B, H, W) uint8, 0 outside of
                all, which `segment_labels` makes of masks; or soft masks (B, S, H, W).
            image_means: what the gate sees of the image, (B, C); None takes the means of ``features``. Behind an
                instance norm these hardly differ between images, so that those from before the norm tell it more.
            transform: for ``"grid"``, where positions of the maps lie on the grid: (B, 2, 3), as
                `torch.nn.functional.affine_grid` takes it; None says that no image was mirrored or turned.

        Returns:
            The fused maps (B, C, H, W), in the type of features, and the weights (B, 2) of image and ECG, float32 or
            wider.

        Raises:
            ShapeError: an argument has another shape.
            TypeError: features are no floating point maps, ``has_ecg`` is not of bools, or labels are not of uint8.
            ValueError: no interval where time counts, or no segments where they are needed.
            DataError: a label that is none, or a ``transform`` that is not finite, of a sample with an ECG; neither
                is looked at on a GPU.
        """
        self._check(features, ecg_code, has_ecg, image_means, transform)
        self._check_segments(features, segments)
        present = self._present(features.shape[0], has_ecg, features.device)
        transform = self._seen_transform(transform, present)
        code = self._seen_code(ecg_code, present)
        image = features.mean((2, 3), dtype=code.dtype) if image_means is None else image_means.to(code.dtype)
        seen = [image, code]
        gamma = beta = torch.zeros(features.shape[:2], dtype=code.dtype, device=features.device)
        if self.film is not None:
            if interval is None:
                raise ValueError(
                    "TemporalAwareFusion: interval is None; expected the days between image and ECG, of shape (B,); or "
                    "build the block with time=False"
                )
            days = scaled_days(interval, features, self.max_days, dtype_of(self.film))
            t = torch.where(present, days, 0.0)
            gamma, beta = (torch.where(present, half, 0.0) for half in self.film(t))
            seen += [t] if self.gate_time != "unseen" else []
        logits = self.gate(torch.where(present, torch.cat(seen, dim=1), 0.0))
        weights = torch.where(present, torch.softmax(logits, dim=1), 0.0)
        fused = self._fuse(features, code, weights, gamma, beta, segments, transform)
        if self.rectify:
            fused = torch.where(present[:, :, None, None], F.leaky_relu(fused, NEGATIVE_SLOPE), fused)
        return fused, weights

    def segment_scores(self, ecg_code: Tensor, has_ecg: Tensor | None = None) -> Tensor | None:
        """Return a_s(z), what an ECG says of each segment: (B, S), zeros without an ECG; None but for ``"segments"``.

        Their differences between segments count: their sign is that of v, which may as well be the other way round.

        Args:
            ecg_code: see `forward`.
            has_ecg: see `forward`.
        """
        if self.scores is None:
            return None
        present = self._present(ecg_code.shape[0], has_ecg, ecg_code.device)
        return torch.where(present, self.scores(self._seen_code(ecg_code, present)), 0.0)

    def _present(self, batch: int, has_ecg: Tensor | None, device: torch.device) -> Tensor:
        return (torch.ones(batch, dtype=torch.bool, device=device) if has_ecg is None else has_ecg)[:, None]

    def _seen_code(self, ecg_code: Tensor, present: Tensor) -> Tensor:
        """Return z, and zeros where there is no ECG."""
        dtype = torch.promote_types(dtype_of(self.projection), torch.float32)
        # Chosen before and after every network: 0 * NaN is NaN, in a gradient as well.
        code = torch.where(present, ecg_code.to(dtype), 0.0)
        return F.layer_norm(code, (self.ecg_dim,)) if self.normalise_code else code

    def _seen_transform(self, transform: Tensor | None, present: Tensor) -> Tensor | None:
        """Return the transforms of samples with an ECG: to sample where no number says, torch reads any memory."""
        if transform is None or self.form != "grid":
            return None
        transform = torch.where(present[:, :, None], transform, 0.0)
        if values_at_hand((transform,)) and not transform.isfinite().all():
            want, hint = "finite numbers", "[[1, 0, 0], [0, 1, 0]] says that an image was neither mirrored nor turned"
            raise DataError("TemporalAwareFusion: transform", got="NaN or infinity", want=want, hint=hint)
        return transform

    def _fuse(
        self,
        features: Tensor,
        code: Tensor,
        weights: Tensor,
        gamma: Tensor,
        beta: Tensor,
        segments: Tensor | None,
        transform: Tensor | None,
    ) -> Tensor:
        projected = self.projection(code)
        if self.form == "broadcast":
            return temporal_film_gate(features, projected, weights, gamma, beta)
        if self.scores is not None and self.direction is not None:
            assert segments is not None  # see `_check_segments`
            scores = self.scores(code)
            if segments.ndim == 3:
                return segment_film_gate(features, segments, projected, scores, self.direction, weights, gamma, beta)
            field = (segments.to(scores.dtype) * scores[:, :, None, None]).sum(dim=1, keepdim=True)
            ecg_map = projected[:, :, None, None] + field * self.direction.to(scores.dtype)[:, None, None]
        elif self.form == "grid":
            ecg_map = self._on_grid(projected, features, transform)
        else:
            assert segments is not None
            ecg_map = self._by_segment(projected, segments)
        return _mix(features, ecg_map, weights, gamma, beta)

    def _on_grid(self, projected: Tensor, features: Tensor, transform: Tensor | None) -> Tensor:
        grid: Tensor = projected.unflatten(1, (self.dim, self.grid_side, self.grid_side))
        if features.numel() == 0:  # which neither way of sampling takes
            return grid.new_zeros(features.shape)
        if transform is None:
            return F.interpolate(grid, features.shape[2:], mode="bilinear", align_corners=False)
        places = F.affine_grid(transform.to(grid.dtype), list(features.shape), align_corners=False)
        return F.grid_sample(grid, places, mode="bilinear", padding_mode="border", align_corners=False)

    def _by_segment(self, projected: Tensor, segments: Tensor) -> Tensor:
        if segments.ndim == 3:
            numbers = torch.arange(1, self.num_segments + 1, dtype=segments.dtype, device=segments.device)
            segments = segments[:, None] == numbers[:, None, None]
        vectors = projected.unflatten(1, (self.num_segments, self.dim)).transpose(1, 2)
        with without_autocast(projected.device.type):
            on_map: Tensor = (vectors @ segments.to(vectors.dtype).flatten(2)).unflatten(2, segments.shape[2:])
            return on_map

    # ------------------------------------------------------------------------------------------------ what it takes

    def _check(
        self,
        features: Tensor,
        ecg_code: Tensor,
        has_ecg: Tensor | None,
        image_means: Tensor | None,
        transform: Tensor | None,
    ) -> None:
        check_map("TemporalAwareFusion", "features", features, self.dim)
        check_dtype("TemporalAwareFusion", "features", features)
        batch = features.shape[0]
        if has_ecg is not None and has_ecg.dtype != torch.bool:
            raise TypeError(f"TemporalAwareFusion: has_ecg is {has_ecg.dtype}; expected torch.bool; use .bool()")
        for name, value, expected, what in (
            ("ecg_code", ecg_code, (batch, self.ecg_dim), "one code for each map"),
            ("has_ecg", has_ecg, (batch,), "one for each map"),
            ("image_means", image_means, (batch, self.dim), "one number for each channel of each map"),
            ("transform", transform, (batch, 2, 3), "one matrix for each map"),
        ):
            if value is not None and tuple(value.shape) != expected:
                raise ShapeError(
                    f"TemporalAwareFusion: {name} has shape {tuple(value.shape)}; expected {expected}, {what}"
                )

    def _check_segments(self, features: Tensor, segments: Tensor | None) -> None:
        if self.form not in BY_SEGMENT:
            return
        if segments is None:
            raise ValueError(
                f"TemporalAwareFusion: segments is None; projection={self.form!r} needs labels (B, H, W) uint8; make "
                "them with segment_labels(masks, size), or build the block with projection='grid' or 'broadcast'"
            )
        batch, height, width = features.shape[0], *features.shape[2:]
        masks = (batch, self.num_segments, height, width)
        if tuple(segments.shape) not in ((batch, height, width), masks):
            raise ShapeError(
                f"TemporalAwareFusion: segments has shape {tuple(segments.shape)}; expected labels "
                f"{(batch, height, width)} or masks {masks}, of the size of features; segment_labels(masks, size) "
                "brings masks there"
            )
        if segments.ndim == 4:
            return
        if segments.dtype != torch.uint8:
            raise TypeError(
                f"TemporalAwareFusion: labels in segments are {segments.dtype}; expected torch.uint8; use "
                ".to(torch.uint8)"
            )
        if values_at_hand((segments,)) and segments.numel() and (largest := int(segments.max())) > self.num_segments:
            want = f"0, outside of all segments, to {self.num_segments}"
            hint = "set what is no segment to 0"
            raise DataError("TemporalAwareFusion: segments", got=f"the label {largest}", want=want, hint=hint)

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, ecg_dim={self.ecg_dim}, projection={self.form!r}, rectify={self.rectify}, "
            f"normalise_code={self.normalise_code}, zero_init_proj={self.zero_init_proj}, "
            f"gate_time={self.gate_time!r}"
        )


def _mix(features: Tensor, ecg_map: Tensor, weights: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """Return f + (f * w_mri + e * w_ecg) * (1 + gamma) + beta, in the type of the features."""
    w_mri, w_ecg = weights[:, :, None, None, None].unbind(1)
    modulation = 1 + gamma[:, :, None, None]
    fused = features * (1 + w_mri * modulation) + ecg_map * (w_ecg * modulation) + beta[:, :, None, None]
    return fused.to(features.dtype)
