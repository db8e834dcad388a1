"""From files to samples: how medical volumes get in, and how they get out again unharmed.

==========================  ==============================================================
volume.py                   voxels in memory, and whether two volumes share one grid
geometry.py                 where a volume lies, and which native axis is shown as what
nifti.py                    one file <-> one volume: guarded reading, verified writing
nifti_header.py             a header -> what it promises and what is odd about it
gzip_stream.py              a compressed file -> its bytes, none unchecked, none beyond the promise
voxel_values.py             stored numbers -> one frame, finite, labels whole
arrays.py                   NumPy and HDF5 files -> volumes, nothing in them executed
cohort.py                    what a cohort is: cases, classes, split; and how a case is read
cases.py                    one folder -> a cohort of cases, whichever its layout
layout.py                   what every layout answers, and targets chosen among its labels
synapse.py                  TransUNet's package: slices, volumes, lists, three numberings of organs
acdc.py                     ACDC's folders of patients, and slices made of them
scar_cohort.py               LGE and ECG paired by a table, with dates and landmarks
nnunet_raw.py               nnU-Net's raw data sets: files, channels, grids
nnunet_json.py              their dataset.json, every fault of it named
convert.py                  a cohort -> another layout
check.py                    a cohort -> everything that is wrong with it
split.py                    a cohort -> train, validation and test patients, kept in JSON
preprocessing.py              a volume -> a network's slices; its labels -> back again
slices.py                   cases -> samples for training, cached on disk
augmentation.py             one sample -> another as likely, keyed by a generator
left_atrium_phantom.py      a seed -> a synthetic LGE cohort in the LAScarQS layout
abdomen_phantom.py          a seed -> a synthetic CT cohort in the Synapse layout
abdomen_anatomy.py          where its organs lie, and what each voxel is made of
scar_phantom.py             a seed -> a synthetic cohort of LGE with an ECG each, in that table's layout
heart_anatomy.py            its left ventricle: wall, segments, scar and what looks like one
ecg_phantom.py              a scar -> an ECG that shows it, the less the older it is
solids.py                   positions -> how deep inside a shape they lie
==========================  ==============================================================

Importing this package imports nothing else.
"""
