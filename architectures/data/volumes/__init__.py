"""Volumes: voxels on a grid, and the NIfTI files and arrays that hold them."""
