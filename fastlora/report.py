"""A stand-in with what is used of the real report.py, to be replaced by it when merging."""

NO_PLOTS = 'plots: install the report extra (pip install "fastlora-bert[report]")'
