"""What the numbers in a stored map of the left ventricle's segments mean: 0 for no segment, then 1 to 17.

Data sets, the network that takes such a map as its prior, and the pictures of its segments read the number here.

Source: Cerqueira et al. (2002), "Standardized myocardial segmentation and nomenclature for tomographic imaging of the
heart", Circulation 105.
"""

from __future__ import annotations

AHA_SEGMENTS = 17
