"""From files to samples: how medical volumes get in, and how they get out again unharmed.

==========================  ==============================================================
nifti.py                    one file <-> one volume: guarded reading, verified writing
cases.py                    one folder -> a study of cases: layouts, pairing, checking
check.py                    a study -> everything that is wrong with it
split.py                    a study -> train, validation and test patients, kept in JSON
slices.py                   cases -> normalised 2-D slices, cached on disk
augmentation.py             one sample -> one of its symmetries, keyed by a generator
left_atrium_phantom.py      a seed -> a synthetic LGE study in the LAScarQS layout
==========================  ==============================================================

Importing this package imports nothing else.
"""
