"""A campaign against the command line: kills, full disks, hostile files, odd options; README.md says more."""
