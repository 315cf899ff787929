"""The commands, one thin file for each, and the options that they share."""
