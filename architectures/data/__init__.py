"""From files to samples: how medical volumes get in, and how they get out again unharmed.

==========================  ==============================================================
volume.py                   voxels in memory, and whether two volumes share one grid
geometry.py                 where a volume lies, and which native axis is shown as what
nifti.py                    one file <-> one volume: guarded reading, verified writing
nifti_header.py             a header -> what it promises and what is odd about it
gzip_stream.py              a compressed file -> its bytes, none unchecked, none beyond the promise
voxel_values.py             stored numbers -> one frame, finite, labels whole
cases.py                    one folder -> a study of cases: layouts, pairing, checking
check.py                    a study -> everything that is wrong with it
split.py                    a study -> train, validation and test patients, kept in JSON
slices.py                   cases -> normalised 2-D slices, cached on disk
augmentation.py             one sample -> the same, turned, scaled or shifted as a generator decides
left_atrium_phantom.py      a seed -> a synthetic LGE study in the LAScarQS layout
abdomen_phantom.py          a seed -> a synthetic abdomen CT in the Synapse layout
abdomen_anatomy.py          the abdomen that it scans
solids.py                   ellipsoids and tubes to paint phantoms with
==========================  ==============================================================

Importing this package imports nothing else.
"""
