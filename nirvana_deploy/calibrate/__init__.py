"""From text to windows of tokens: calibration and held-out."""
