"""Images of 1 to 16 channels with 8 or 16 bits or float32: TIFF, PNG, NumPy, DICOM, and files stacked by name."""
