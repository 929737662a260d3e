"""Many runs from one grid file: what to run, running it, and the table and plot of what came out."""
