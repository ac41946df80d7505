"""Handle signals, hangs, lost ranks, lost data, non-finite numbers and loss spikes."""
