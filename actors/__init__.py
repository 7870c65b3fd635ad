"""Where and when it is computed: Ray actors and the driver's loop. No mathematics here."""
