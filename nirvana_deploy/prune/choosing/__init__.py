"""Several ways to cut, compared: which calibration set, saliency and gamma."""
