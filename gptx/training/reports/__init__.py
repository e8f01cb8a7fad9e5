"""Reports of a run: log, progress, samples and plot, as callbacks."""
