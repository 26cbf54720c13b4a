"""Files of other programs: what of them comes through our nodes, to the last digit."""
