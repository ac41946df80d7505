"""What ends a run, or mends it: signals, hangs, numbers that are not finite, spikes."""
