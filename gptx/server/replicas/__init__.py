"""Engine processes behind one front process."""
