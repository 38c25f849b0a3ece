"""What every room stands on and none is about: checks of arguments, files, memory, clocks."""
