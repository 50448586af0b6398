"""Students: exporting, importing, reading and evaluating trained networks."""
