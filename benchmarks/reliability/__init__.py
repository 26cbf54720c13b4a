"""What the pack survives: kills, full disks, damaged files."""
