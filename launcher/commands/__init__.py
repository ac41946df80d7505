"""The commands of `lfm`, one file each: their options, help texts and output."""
