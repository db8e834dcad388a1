"""From files to samples: how volumes and ECGs get in, and how labels get out again unharmed.

=============  ===============================================================================================
``volumes/``   voxels on a grid, and the NIfTI files and arrays that hold them: guarded reading, verified writing
``layouts/``   a folder becomes a cohort of cases: one file per layout, the list of them, splits, checks, export
``samples/``   cases become what networks see: preprocessing, slices, patches, augmentation, side inputs
``ecg/``       records of twelve leads, their quality, median beats, and data sets of them
``phantoms/``  synthetic cohorts with known anatomy
=============  ===============================================================================================

Importing this package imports nothing else.
"""
