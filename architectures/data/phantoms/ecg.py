"""A synthetic 12-lead ECG that knows of a scar: a heart reduced to one dipole, and no patient.

The heart's electrical vector moves through P, QRS and T; every lead is its projection on a direction. Each of the 17
segments of the left ventricle faces a direction, too. Scarred segments stop pulling: early in the QRS the vector
points away from them (pathological Q waves and lost R waves in the leads that face them), the ST segment is raised
towards them, and the T wave turns away. So an anteroseptal scar shows in V1 to V4, a lateral one in I, aVL, V5 and V6,
an inferior one in II, III and aVF, each the more the larger it is.

What an ECG says about a scar gets old. With the days between ECG and MRI the signs fade, and those of something that
the MRI does not show come in; only who knows the days can tell how far to believe them.

Directions are in the patient's left, back and head (L, P, S); amplitudes in mV.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .heart_anatomy import LONG_AXIS, TERRITORY_DEGREES, segment_directions

RATE_HZ = 500
BEAT_S = (-0.4, 0.8)  # of a median beat, round the R peak
FADE_DAYS = 35.0  # after so many days an ECG's signs are down to 1 / e

_LIMB = np.array([[1.0, 0.0, 0.0], [0.5, 0.0, -0.87]])  # I and II; the other four follow from them
_CHEST = np.array(
    [[-0.5, -1.2, 0.0], [0.0, -1.5, 0.0], [0.5, -1.4, -0.1], [1.0, -1.0, -0.2], [1.2, -0.3, -0.2], [1.1, 0.3, -0.15]]
)
_P, _R, _T = np.array([0.06, 0.0, -0.09]), np.array([0.85, 0.35, -0.65]), np.array([0.25, -0.16, -0.16])
_SEPTAL, _TERMINAL = np.array([-0.12, -0.15, 0.03]), np.array([-0.08, 0.16, 0.12])
_Q_LOSS, _ST_SHIFT, _T_TURN = 1.0, 0.22, 0.45  # mV by which a scar of strength 1 moves the vector
_FULL_SEGMENTS = 3.0  # so many wholly scarred segments that face one way are of strength 1
_STRONGEST = 1.3


def scar_vector(scar: np.ndarray) -> np.ndarray:
    """Return where a scar lies and how strongly it shows, (3,).

    Args:
        scar: share of each AHA segment that is scar, (17,), 0 to 1.
    """
    vector = np.asarray(scar) @ segment_directions() / _FULL_SEGMENTS
    return vector * min(1.0, _STRONGEST / max(float(np.linalg.norm(vector)), 1e-9))


@dataclass(frozen=True, eq=False)
class SyntheticEcg:
    """The ECG of one subject on one day.

    Attributes:
        waves: centre in s from the R peak, width in s, and heart vector in mV of each wave, (N, 5).
        local: what each of I, II, V1 ... V6 shows of the waves beyond their projection, as factors, (8, N).
    """

    waves: np.ndarray
    local: np.ndarray

    def at(self, time_s: np.ndarray, stretch: float = 1.0) -> np.ndarray:
        """Return the leads (12, T) of one beat at times from its R peak; the T wave comes ``stretch`` times as late."""
        centre = np.where(self.waves[:, 0] > 0.1, self.waves[:, 0] * stretch, self.waves[:, 0])
        shapes = np.exp(-0.5 * ((time_s - centre[:, None]) / self.waves[:, 1:2]) ** 2)
        heights = np.vstack([_LIMB, _CHEST]) @ self.waves[:, 2:].T * self.local
        return twelve_leads(heights @ shapes)

    def median_beat(self, rng: np.random.Generator, noise_mv: float = 0.008) -> np.ndarray:
        """Return a median beat (12, 600) at 500 Hz, from 0.4 s before the R peak to 0.8 s after it."""
        time = np.arange(round((BEAT_S[1] - BEAT_S[0]) * RATE_HZ)) / RATE_HZ + BEAT_S[0]
        return (self.at(time) + twelve_leads(_noise(rng, len(time), noise_mv))).astype(np.float32)

    def record(self, rng: np.random.Generator, seconds: float = 10.0, noise_mv: float = 0.02) -> np.ndarray:
        """Return a record (12, 500 * seconds) with a varying heart rate, wandering baseline and noise."""
        time = np.arange(round(seconds * RATE_HZ)) / RATE_HZ
        interval = rng.uniform(0.65, 1.05)
        beats = rng.uniform(-1, 0) * interval
        signal = np.zeros((12, len(time)))
        while beats < seconds + 1:
            length = interval * rng.uniform(0.94, 1.06)
            near = np.abs(time - beats) < 1
            signal[:, near] += self.at(time[near] - beats, np.sqrt(length))
            beats += length
        slow = rng.uniform(0.1, 0.35, (8, 1)) * time + rng.uniform(0, 1, (8, 1))
        wander = rng.uniform(0.02, 0.08, (8, 1)) * np.sin(2 * np.pi * slow)
        return (signal + twelve_leads(wander + _noise(rng, len(time), noise_mv))).astype(np.float32)


def synthetic_ecg(rng: np.random.Generator, scar: np.ndarray, interval_days: float = 0.0) -> SyntheticEcg:
    """Draw a subject, and let a scar show in his ECG.

    Args:
        rng: decides on the subject, and on what else comes in with time.
        scar: share of each AHA segment that is scar, (17,), 0 to 1.
        interval_days: days between the ECG and the MRI that shows the scar.
    """
    kept = np.exp(-interval_days / FADE_DAYS)
    shown = kept * scar_vector(scar) + (1 - kept) * _something_else(rng)
    turn = rng.normal(0, 0.12, 3)  # of the heart's electrical axis
    heights = rng.uniform(0.8, 1.2, 5)
    base = [
        vector * height + np.cross(turn, vector)
        for vector, height in zip((_P, _SEPTAL, _R, _TERMINAL, _T), heights, strict=True)
    ]
    waves = [
        (-0.16, 0.022, base[0]),
        (-0.028, 0.009, base[1]),
        (0.0, 0.011, base[2]),
        (0.03, 0.010, base[3]),
        (0.24, 0.055, 0.5 * base[4]),
        (0.29, 0.032, base[4]),
        (-0.017, 0.012, -_Q_LOSS * shown),
        (0.13, 0.045, _ST_SHIFT * shown),
        (0.28, 0.045, -_T_TURN * shown),
    ]
    table = np.array([(centre + rng.normal(0, 0.02) * (centre > 0.1), width, *v) for centre, width, v in waves])
    return SyntheticEcg(table, rng.uniform(0.88, 1.12, (8, len(waves))))


def twelve_leads(eight: np.ndarray) -> np.ndarray:
    """Return the leads I, II, III, aVR, aVL, aVF, V1 ... V6, (12, T), of I, II, V1 ... V6, (8, T)."""
    one, two = eight[0], eight[1]
    return np.stack([one, two, two - one, -(one + two) / 2, one - two / 2, two - one / 2, *eight[2:]])


def _something_else(rng: np.random.Generator) -> np.ndarray:
    """Draw signs that no scar of the MRI explains: they point to some territory."""
    scar = np.zeros(17)
    degrees = TERRITORY_DEGREES[rng.integers(len(TERRITORY_DEGREES))] + rng.uniform(-40, 40)
    first = int(((degrees + 60) % 360) // 60)
    scar[[first, first + 6]] = rng.uniform(0.2, 1.0)
    return scar_vector(scar) + rng.normal(0, 0.1) * LONG_AXIS


def _noise(rng: np.random.Generator, length: int, noise_mv: float) -> np.ndarray:
    """Draw noise of the eight independent leads, a little smooth, as after an amplifier's filter."""
    white = rng.normal(0, noise_mv, (8, length + 2))
    return (white[:, :-2] + white[:, 1:-1] + white[:, 2:]) / np.sqrt(3)
