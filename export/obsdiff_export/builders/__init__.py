"""Engine builders. A builder is a module here and a line in `obsdiff_export.build.BUILDERS`."""
