"""What the numbers in a stored map of the left ventricle's segments mean: 0 for no segment, then 1 to 17.

Data sets, the network that takes such a map as its prior, and the pictures of its segments read the number here.

Source: Cerqueira et al. (2002), "Standardized myocardial segmentation and nomenclature for tomographic imaging of the
heart", Circulation 105.
"""

from __future__ import annotations

AHA_SEGMENTS = 17

ARTERY_SEGMENTS = {"LAD": (1, 2, 7, 8, 13, 14, 17), "RCA": (3, 4, 9, 10, 15), "LCX": (5, 6, 11, 12, 16)}
"""Segments that the left anterior descending, right and circumflex coronary arteries supply in most hearts."""
