"""The commands of `lfm`, one file each: options, help, and what is printed."""
