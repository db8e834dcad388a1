"""How the Triton kernels are compiled for GPUs that are not here, and how many bytes their passes move.

Each file belongs to the file of the same name in `trifuse.kernels.gpu`: ``STATIC_CASES`` are its kernels as its
launchers specialise them, and ``TRAFFIC`` is what its passes move. ``kernel_budgets.csv`` says what each case may cost.
"""
