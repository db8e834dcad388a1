"""ECGs: records of twelve leads, their quality, their median beats, and data sets of them."""
