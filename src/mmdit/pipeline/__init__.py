"""From a prompt to a picture: profiles, guidance, settings, calibration."""
