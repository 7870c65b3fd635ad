"""Where and when it is computed: Ray actors, the driver's loop, progress. No mathematics."""
