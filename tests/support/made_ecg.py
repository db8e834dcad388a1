"""ECGs whose every wave is known: Gaussians at given times, eight leads of their own and four that follow from them."""

from __future__ import annotations

import numpy as np

WAVES = ((-0.16, 0.020), (-0.030, 0.008), (0.0, 0.011), (0.032, 0.010), (0.28, 0.045))  # P, Q, R, S, T: s, s
HEIGHTS_MV = {  # of these waves
    "I": (0.08, -0.08, 0.80, -0.10, 0.20),
    "II": (0.12, -0.06, 1.20, -0.20, 0.30),
    "V1": (0.04, 0.00, 0.20, -0.90, -0.05),
    "V2": (0.05, 0.00, 0.40, -1.40, 0.40),
    "V3": (0.05, 0.00, 0.70, -0.90, 0.45),
    "V4": (0.06, -0.05, 1.30, -0.50, 0.40),
    "V5": (0.06, -0.08, 1.20, -0.20, 0.30),
    "V6": (0.06, -0.10, 0.90, -0.05, 0.20),
}


def twelve(one, two, chest):
    """Return the leads in order."""
    return np.stack([one, two, two - one, -(one + two) / 2, one - two / 2, two - one / 2, *chest])


def waves_at(time_s):
    """Return one beat (12, T) at times from its R peak, in mV."""
    shapes = np.stack([np.exp(-0.5 * ((time_s - centre) / width) ** 2) for centre, width in WAVES])
    eight = np.array(list(HEIGHTS_MV.values())) @ shapes
    return twelve(eight[0], eight[1], eight[2:])


def made_ecg(seconds=10.0, bpm=70.0, rate_hz=500.0, noise_mv=0.01, seed=0, first_r_s=0.5):
    """Return a record (12, T) in mV: a beat every 60 / bpm seconds, a slow baseline, and noise."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate_hz)) / rate_hz
    signal = np.zeros((12, time.size))
    for r in np.arange(first_r_s, seconds + 1, 60 / bpm):
        near = np.abs(time - r) < 1
        signal[:, near] += waves_at(time[near] - r)
    rest = noise_mv * rng.normal(size=(8, time.size)) + 0.05 * np.sin(2 * np.pi * 0.2 * time)
    return signal + twelve(rest[0], rest[1], rest[2:])


def on_paper(signal, rhythm=True):
    """Return what a print of four columns shows of a record: each lead a quarter of the time, lead II always."""
    shown = np.full(signal.shape, np.nan)
    quarter = signal.shape[1] // 4
    for row in range(12):
        part = slice(row // 3 * quarter, (row // 3 + 1) * quarter)
        shown[row, part] = signal[row, part]
    if rhythm:
        shown[1] = signal[1]
    return shown


def median(seed: int = 0) -> np.ndarray:
    """A beat of 600 samples in mV: a narrow peak and a wide wave, scaled for each lead."""
    time = np.arange(600)
    peak, wave = np.exp(-(((time - 200) / 8) ** 2)), np.exp(-(((time - 330) / 40) ** 2))
    rng = np.random.default_rng(seed)
    return limb_leads(np.outer(rng.uniform(0.5, 1.5, 12), peak) + np.outer(rng.uniform(-0.3, 0.3, 12), wave))


def limb_leads(signal: np.ndarray) -> np.ndarray:
    """Make leads III to aVF what leads I and II say that they are."""
    one, two = signal[:2]
    signal[2:6] = two - one, -(one + two) / 2, one - two / 2, two - one / 2
    return signal
