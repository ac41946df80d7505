"""Which rows repeat others, or hold what is evaluated on."""
